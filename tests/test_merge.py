"""The merge: each rule by itself, copies and splits."""

from collections import Counter

import numpy as np
import pytest
from merge_cases import KINDS, Case, jpeg, original, png, scene
from PIL import Image, ImageEnhance, ImageOps

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings
from nbs_lib.data.images import image_id
from nbs_lib.data.items import Item
from nbs_lib.data.write import hash_split, write_version
from nbs_lib.feedback.database import last_word


@pytest.fixture
def case(home): return Case(home)


def test_what_people_agree_on_joins_and_the_rest_waits(case):
    agreed, single = case.say(original(200), "fig"), case.say(original(201), "plum", "bob")
    case.say(original(200), "fig", "bob")
    unknown, disputed = case.say(original(202), None), case.say(original(203), "fig")
    case.say(original(203), "plum", "bob")
    found = case.weigh()
    assert [found[i].outcome for i in (agreed, single, unknown, disputed)] == ["joins", "joins", "waits", "waits"]
    assert "expert" in found[unknown].reason and "review" in found[disputed].reason
    child = case.merge("v1")
    rows = child.rows.set_index("id")
    assert len(rows) == 82 and rows.loc[agreed, "kind"] == "fig"
    assert rows.loc[agreed, "source"] == "feedback:bob" == rows.loc[single, "source"]
    assert child.card["source"] == "drawn" and dict(child.images([single]))[single] == original(201)
    case.say(original(203), "plum", "eve", review=True)
    case.say(original(202), "fig", "eve", review=True)
    assert {a.outcome for a in case.weigh(dataset=child).values()} == {"known", "joins"}
    grown = case.merge("v2", child)
    assert len(grown.rows) == 84 and grown.rows.set_index("id").loc[disputed, "kind"] == "plum"


@pytest.mark.parametrize("split", ("train", "validation", "test"))
def test_the_same_image_with_another_label_is_a_correction_and_stays_in_its_split(case, split):
    n = case.of[split][0]
    id = case.say(original(n), KINDS[1 - n % 2])
    other = case.say(original(case.of[split][1]), KINDS[case.of[split][1] % 2])
    found = case.weigh()
    assert (found[id].outcome, found[other].outcome) == ("corrects", "known")
    child = case.merge("v1")
    row = child.rows.set_index("id").loc[id]
    assert (row["kind"], row["split"], row["source"]) == (KINDS[1 - n % 2], split, "feedback:ada")
    assert len(child.rows) == 80 and len(child.history) == 81
    assert child.card["counts"]["kind"][KINDS[0]] != case.dataset.card["counts"]["kind"][KINDS[0]]
    assert dict(child.images([id]))[id] == original(n), "the picture is still there, once"
    case.say(original(n), KINDS[n % 2])
    assert case.merge("v2", child).rows.set_index("id").loc[id, "kind"] == KINDS[n % 2], "and back again"


COPIES = {
    "saved anew": lambda im: jpeg(im, 35),
    "half the size": lambda im: jpeg(im.resize((75, 60))),
    "twice the size": lambda im: jpeg(im.resize((300, 240))),
    "squeezed": lambda im: png(im.resize((90, 90))),
    "mirrored": lambda im: jpeg(ImageOps.mirror(im)),
    "cut by 8 % all around": lambda im: jpeg(im.crop((12, 10, 138, 110))),
    "cut at two sides": lambda im: jpeg(im.crop((15, 12, 150, 120))),
    "mirrored and cut": lambda im: jpeg(ImageOps.mirror(im).crop((0, 6, 140, 114)), 50),
    "brighter": lambda im: jpeg(ImageEnhance.Brightness(im).enhance(1.15)),
    "framed": lambda im: jpeg(ImageOps.expand(im, 4, "white")),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_near_copy_of_a_held_out_image_never_joins(case, how):
    ids = {
        case.say(COPIES[how](scene(case.of[split][0])), KINDS[0]): image_id(original(case.of[split][0]))
        for split in ("validation", "test")
    }
    found = case.weigh()
    assert {found[i].outcome for i in ids} == {"left out"} and {i: found[i].like for i in ids} == ids
    assert case.merge("v1") is case.dataset


def test_different_pictures_are_no_copies(case):
    ids = [case.say(original(n), KINDS[n % 2]) for n in range(300, 340)]
    found = case.weigh()
    assert all(found[i].outcome == "joins" for i in ids)
    assert len({found[i].group for i in ids}) == 40 and all(found[i].split == hash_split(i) for i in ids)


def test_pictures_of_one_colour_say_nothing_about_being_copies(home):
    def flat(n): return png(Image.new("RGB", (30, 30), (n, 90, 255 - n)))
    case = Case(home)
    case.dataset = write_version(
        home / "flat", [Item(f"{n}", flat(n), {"kind": KINDS[n % 2]}) for n in range(40)], name="flat", source="drawn"
    )
    ids = [case.say(flat(n), KINDS[n % 2]) for n in range(100, 110)]
    assert {case.weigh()[i].outcome for i in ids} == {"joins"}


def test_a_near_copy_of_a_training_image_is_taught_wherever_its_hash_points(case):
    ids = [case.say(jpeg(scene(n), q), KINDS[n % 2]) for n in case.of["train"][:10] for q in (40, 60, 80)]
    assert {hash_split(i) for i in ids} > {"train"}, "some would be held out by their hash"
    child = case.merge("v1")
    assert set(child.rows.set_index("id").loc[ids, "split"]) == {"train"}


def test_new_copies_of_each_other_go_to_one_place(case):
    groups = [
        [
            case.say(copy, KINDS[n % 2])
            for copy in (original(n), jpeg(scene(n)), jpeg(ImageOps.mirror(scene(n))), jpeg(scene(n).resize((80, 64))))
        ]
        for n in range(400, 430)
    ]
    child = case.merge("v1")
    splits = child.rows.set_index("id")["split"]
    assert all(splits[g].nunique() == 1 for g in groups)
    assert {splits[g[0]] for g in groups} == {"train", "validation", "test"}


def test_where_all_pictures_are_alike_more_is_asked(home):
    "One camera, one machine: a small light tells the pictures apart."
    def machine(n):
        image = scene(0).resize((150, 120)).copy()
        image.paste(
            Image.fromarray(np.random.default_rng(n).integers(0, 256, (3, 4, 3), np.uint8)).resize(
                (60, 40), Image.Resampling.NEAREST
            ),
            (10 + n % 70, 10 + n % 50),
        )
        return image
    case = Case(home)
    case.dataset = write_version(
        home / "machine",
        [Item(f"{n}", png(machine(n)), {"kind": KINDS[n % 2]}) for n in range(100)],
        name="machine",
        source="drawn",
    )
    place = case.dataset.rows.set_index("id")["split"]
    ids = [case.say(png(machine(n)), KINDS[n % 2]) for n in range(200, 230)]
    held = next(n for n in range(100) if place[image_id(png(machine(n)))] == "test")
    copy = case.say(jpeg(machine(held), 70), KINDS[held % 2])
    found = case.weigh()
    assert sum(found[i].outcome == "joins" for i in ids) > 20 and found[copy].outcome == "left out"


def test_a_new_class_waits_until_it_is_as_large_as_the_smallest(home):
    case = Case(home, lambda n: {"kind": "kiwi" if n < 6 else KINDS[n % 2]})
    ids = [case.say(original(n), "nashi") for n in range(500, 505)]
    found = case.weigh()
    assert {found[i].reason for i in ids} == {"new class 'nashi': 5 of 6 images"} and case.merge("v1") is case.dataset
    case.say(jpeg(scene(case.of["test"][0])), "nashi")
    assert {case.weigh()[i].outcome for i in ids} == {"waits"}, "a copy of a test image does not count"
    ids.append(case.say(original(505), "nashi"))
    child = case.merge("v1")
    assert child.targets["kind"] == ["fig", "kiwi", "nashi", "plum"] and sum(child.card["counts"]["kind"]["nashi"]) == 6


def test_a_new_class_that_would_only_be_held_out_is_taught(home):
    case = Case(home, lambda n: {"kind": "kiwi" if n < 2 else KINDS[n % 2]})
    held = [
        n
        for n in range(1000, 1100)
        if hash_split(image_id(original(n))) != "train" and hash_split(image_id(jpeg(scene(n)))) != "train"
    ][:2]
    pairs = [[case.say(original(n), "nashi"), case.say(jpeg(scene(n)), "nashi")] for n in held]
    splits = case.merge("v1").rows.set_index("id")["split"]
    first, second = pairs
    assert set(splits[first]) == {"train"} and "train" not in set(splits[second])


def test_several_targets(home):
    case = Case(home, lambda n: {"kind": KINDS[n % 2], "ripe": ("yes", "no")[n // 2 % 2] if n % 5 else None})
    partly, strange = (
        case.say(original(600), {"kind": "fig"}),
        case.say(original(601), {"kind": "fig", "weight": "heavy"}),
    )
    unlabelled = next(n for n in range(0, 80, 5))
    filled = case.say(original(unlabelled), {"ripe": "yes"})
    both = case.say(original(602), {"kind": "fig", "ripe": "rotten"})
    found = case.weigh()
    assert [found[i].outcome for i in (partly, strange, filled, both)] == ["joins", "waits", "corrects", "waits"]
    assert "no target 'weight'" in found[strange].reason and "rotten" in found[both].reason
    rows = case.merge("v1").rows.set_index("id")
    assert rows.loc[partly, "kind"] == "fig" and rows["ripe"].isna()[partly]
    assert rows.loc[filled, ["kind", "ripe"]].tolist() == [KINDS[unlabelled % 2], "yes"]


def test_a_handful_is_no_version(home):
    (home / "settings.ini").write_text("[feedback]\nmin_new = 0.05\n")
    case = Case(home)
    ids = [case.say(original(n), "fig") for n in range(700, 703)]
    assert {a.reason for a in case.weigh(force=False).values()} == {"only 3 of the 4 images that make a version"}
    assert case.merge("v1", force=False) is case.dataset and len(case.merge("v1", force=True).rows) == 83
    corrected = case.say(original(0), "plum")
    assert {a.outcome for i, a in case.weigh(force=False).items()} == {"joins", "corrects"}, "a correction is new, too"
    assert corrected not in ids


def test_again_nothing_is_merged(case):
    for n in range(800, 812): case.say(original(n), KINDS[n % 2])
    case.say(original(1), "fig")
    child = case.merge("v1")
    assert len(child.rows) == 92 and case.merge("v2", child) is child
    assert set(Counter(a.outcome for a in case.weigh(dataset=child).values())) == {"known"}
    assert case.store.undo("ada")
    assert case.merge("v2", child) is child, "what is merged stays when its word is taken back"


def test_the_number_of_the_last_word(home):
    settings = load_settings(home)
    assert last_word("faces", settings) == 0 and not (home / "data" / "feedback").exists(), "looking makes nothing"
    case = Case(home)
    assert last_word("faces", settings) == 0
    case.say(original(900), "fig")
    before = last_word("faces", settings)
    case.store.undo("ada")
    assert before == 1 and last_word("faces", settings) == 2
    (home / "data" / "feedback" / "cats_vs_dogs").mkdir()
    (home / "data" / "feedback" / "cats_vs_dogs" / "feedback.sqlite").write_bytes(
        b"no database, but a text of some length" * 40
    )
    with pytest.raises(UserError, match="feedback.sqlite: cannot be read"): last_word("cats_vs_dogs", settings)
