"""The store keeps every word, and clicks that arrive twice say one thing."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
import hashlib
import io
import random
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from stores import fill, png, said, store  # noqa: F401  a fixture

from nbs_lib.core.errors import UserError
from nbs_lib.data.images import BadImage
from nbs_lib.feedback import store as store_module
from nbs_lib.feedback.answers import check_label, check_user, verdict_of
from nbs_lib.feedback.store import Store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clock(monkeypatch):
    "The store's time, which stands still until it is set."
    now = SimpleNamespace(now=1_800_000_000.0)
    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: now.now))
    return now


def statuses(store: Store) -> dict: return dict(zip(store.standing()["id"], store.standing()["status"], strict=True))


# ---- what is said

@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a/b", "path"),
        ("a\\b", "path"),
        ("..", "path"),
        ("a\nb", "control"),
        ("a\x00b", "control"),
        ("\x1b[31mred", "control"),
        ("a\u202eb", "invisible"),
        ("a\u200bb", "invisible"),
        ("x" * 101, "101 characters"),
    ],
)
def test_bad_labels_and_users(store, text, words):
    [id] = fill(store, 1)
    for call in (
        lambda: check_label(text),
        lambda: store.answer(id, "ann", "corrected", {"animal": text}),
        lambda: store.answer(id, "ann", "corrected", {text: "cat"}),
    ):
        with pytest.raises(UserError, match=words) as error: call()
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    for call in (
        lambda: check_user(text),
        lambda: store.answer(id, text, "unknown"),
        lambda: store.queue(text, 1),
        lambda: store.add(png(1), "a", text),
    ):
        with pytest.raises(UserError): call()
    assert len(store.history()) == 0 and store.stats()["images"] == 1


def test_a_label_of_any_script_is_kept_as_it_is(store):
    [id] = fill(store, 1)
    store.answer(id, " Jürgen ", "new", {"animal": " Köter, 犬 <b>\"'%_;-- "})
    assert store.standing()["labels"][0] == {"animal": "Köter, 犬 <b>\"'%_;--"}
    assert store.standing()["users"][0] == ["Jürgen"]


def test_the_verdict_follows_from_the_label():
    classes = {"beard": ["yes", "no"], "hair": ["black"]}
    model = {"targets": {"beard": {"yes": 0.9, "no": 0.1}, "hair": {"black": 1.0}}}
    assert [
        verdict_of(labels, model, classes)
        for labels in (
            {"beard": "yes"},
            {"beard": "yes", "hair": "black"},
            {"beard": "no", "hair": "black"},
            {"hair": "red"},
        )
    ] == ["confirmed", "confirmed", "corrected", "new"]
    assert verdict_of({"beard": "yes"}, None, classes) == "corrected"
    assert verdict_of({"beard": "yes"}, None, {"beard": []}) == "new"


def test_history_has_a_row_for_each_word_with_what_the_user_saw(store):
    [id] = fill(store, 1)
    store.answer(id, "ann", "confirmed")
    store.predict(id, said(0.2, "pets-model:v4"))
    store.answer(id, "ann", "confirmed", {"animal": "dog"})
    store.answer(id, "ann", "corrected", {"animal": "cat"}, said(0.1, "pets-model:v5"))
    history = store.history()
    assert history["model"].tolist() == ["pets-model:v3", "pets-model:v4", "pets-model:v5"]
    assert history["labels"].tolist() == [{"animal": c} for c in ("cat", "dog", "cat")]
    assert history["prediction"][0]["targets"]["animal"]["cat"] == 0.5 and history["seq"].tolist() == [1, 2, 3]
    assert not history["review"].any()
    assert statuses(store) == {id: "agreed"} and store.standing()["model"][0] == "pets-model:v5"


def test_history_cannot_be_changed(store):
    [id] = fill(store, 1)
    store.answer(id, "ann", "confirmed")
    with sqlite3.connect(store.file) as db:
        for change in ("update history set user = 'bob'", "delete from history"):
            with pytest.raises(sqlite3.DatabaseError): db.execute(change)
    assert store.history()["user"].tolist() == ["ann"]


def test_an_answer_needs_an_image_a_verdict_and_a_class(store):
    [id] = fill(store, 1)
    with pytest.raises(KeyError): store.answer("0" * 64, "ann", "unknown")
    with pytest.raises(ValueError, match="maybe"): store.answer(id, "ann", "maybe")
    with pytest.raises(UserError, match="0.png"): store.answer(id, "ann", "corrected")
    blank = store.add(png(9), "blank.png", "camera")[0]
    with pytest.raises(UserError, match="blank.png"): store.answer(blank, "ann", "confirmed")
    with pytest.raises(KeyError): store.image("../../settings.ini")
    assert len(store.history()) == 0


def test_a_click_that_arrives_twice(store):
    first, second = fill(store, 2)
    seq = store.answer(first, "ann", "confirmed", key="click")
    assert store.answer(first, "ann", "confirmed", key="click") == seq
    assert Store("faces", store.settings).answer(first, "ann", "confirmed", key="click") == seq
    store.undo("ann")
    # late, and still the same click
    assert store.answer(first, "ann", "confirmed", key="click") == seq and store.standing().empty
    with pytest.raises(ValueError, match="click"): store.answer(second, "ann", "confirmed", key="click")
    assert store.history()["verdict"].tolist() == ["confirmed", "undone"]


# ---- what stands

def test_people_differ_until_a_reviewer_decides(store):
    [id] = fill(store, 1)
    def words(*rows):
        for user, label in rows: store.answer(id, user, "corrected", {"animal": label}, review=user == "expert")
        stands = store.standing().iloc[0]
        return stands["status"], stands["labels"], stands["users"]
    assert words(("ann", "dog"), ("bob", "dog")) == ("agreed", {"animal": "dog"}, ["ann", "bob"])
    assert words(("ann", "cat")) == ("disputed", {}, ["bob", "ann"])
    assert [q.said for q in store.queue("ann", 9, "review")] == [{"bob": {"animal": "dog"}, "ann": {"animal": "cat"}}]
    assert words(("expert", "cat")) == ("agreed", {"animal": "cat"}, ["expert"])
    assert store.queue("ann", 9, "review") == []
    assert words(("bob", "dog")) == ("disputed", {}, ["expert", "bob"])               # said after the review
    assert words(("bob", "cat")) == ("agreed", {"animal": "cat"}, ["expert", "bob"])


def test_targets_are_judged_one_by_one(store):
    [id] = fill(store, 1)
    store.answer(id, "ann", "corrected", {"beard": "yes", "hair": "black"})
    store.answer(id, "bob", "corrected", {"hair": "red"})
    assert (statuses(store)[id], store.standing()["labels"][0]) == ("disputed", {"beard": "yes"})
    store.answer(id, "expert", "corrected", {"hair": "red"}, review=True)
    stands = store.standing().iloc[0]
    assert (stands["status"], stands["users"]) == ("agreed", ["ann", "expert"])
    assert stands["labels"] == {"beard": "yes", "hair": "red"}


def test_unknown_is_parked_for_an_expert(store):
    first, second = fill(store, 2)
    for id in (first, second): store.answer(id, "ann", "unknown")
    assert set(statuses(store).values()) == {"unknown"} and store.queue("bob", 9) == [] and store.left() == 0
    assert {q.id for q in store.queue("expert", 9, "unknown")} == {first, second}
    store.answer(first, "expert", "corrected", {"animal": "dog"})
    store.answer(second, "expert", "unknown", review=True)
    assert statuses(store) == {first: "agreed", second: "unknown"} and store.queue("expert", 9, "unknown") == []
    assert [q.id for q in store.queue("another expert", 9, "unknown")] == [second]
    store.answer(first, "expert", "unknown")                                          # takes back the class
    assert statuses(store)[first] == "unknown"


# ---- undo

def test_undo_of_any_depth(store):
    ids = fill(store, 5)
    for id in ids: store.answer(id, "ann", "confirmed")
    store.answer(ids[0], "bob", "corrected", {"animal": "dog"})
    assert [store.undo("ann") for _ in range(6)] == [*reversed(ids), None]
    assert statuses(store) == {ids[0]: "agreed"} and store.standing()["users"][0] == ["bob"]
    assert len(store.history()) == 11
    assert [q.id for q in store.queue("ann", 9)] == ids[1:] and store.queue("bob", 9) == []   # they came back to ann
    store.answer(ids[4], "ann", "unknown")
    assert store.undo("ann") == ids[4] and store.undo("ann") is None and store.undo("nobody") is None


def test_undo_brings_the_word_before_it_back(store):
    [id] = fill(store, 1)
    store.answer(id, "ann", "confirmed")
    store.answer(id, "ann", "corrected", {"animal": "dog"})
    store.undo("ann")
    assert store.standing()["labels"][0] == {"animal": "cat"}
    store.answer(id, "bob", "corrected", {"animal": "dog"})
    store.answer(id, "expert", "corrected", {"animal": "dog"}, review=True)
    store.undo("expert")
    assert statuses(store) == {id: "disputed"} and store.left("review") == 1


# ---- queues and leases

def test_nobody_gets_what_another_holds(store, clock):
    fill(store, 10)
    ann, bob = ({q.id for q in store.queue(user, 4)} for user in ("ann", "bob"))
    assert len(ann) == len(bob) == 4 and not ann & bob
    assert {q.id for q in store.queue("ann", 4)} == ann and len(store.queue("carl", 9)) == 2
    assert store.queue("dora", 1) == []
    store.release("bob", list(bob)[:1])
    assert [q.id for q in store.queue("dora", 9)] == list(bob)[:1]
    store.release("ann", bob)                                                         # not hers to give
    assert store.queue("emil", 9) == []
    store.release("ann")
    assert {q.id for q in store.queue("emil", 9)} == ann


def test_a_lease_lasts_ten_minutes_from_the_last_look(store, clock):
    [id] = fill(store, 1)
    assert store.queue("ann", 1)
    clock.now += 599
    assert store.queue("bob", 1) == [] and store.queue("ann", 1)                      # she looks again
    clock.now += 599
    assert store.queue("bob", 1) == []
    clock.now += 2
    assert [q.id for q in store.queue("bob", 1)] == [id] and store.queue("ann", 1) == []
    store.answer(id, "ann", "confirmed")  # too late for the lease, and still kept
    assert statuses(store) == {id: "agreed"} and store.queue("carl", 1) == []


def test_the_lease_is_a_setting(home, monkeypatch, clock):
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__LEASE_MINUTES", "1")
    store = Store("faces")
    fill(store, 1)
    store.queue("ann", 1)
    clock.now += 61
    assert store.queue("bob", 1)


def test_most_doubtful_first_and_some_at_random(home, monkeypatch):
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__RANDOM_SHARE", "0")
    store = Store("faces")
    ids = fill(store, 20)
    unseen = store.add(png(99), "unseen.png", "camera")[0]
    assert [q.id for q in store.queue("ann", 21)] == [unseen, *ids]  # what the model has not seen is all doubt
    store.release("ann")
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__RANDOM_SHARE", "0.1")
    store, drawn = Store("faces"), 0
    random.seed(0)
    for _ in range(100):
        queue = [q.id for q in store.queue("ann", 5)]
        assert len(set(queue)) == 5
        drawn += len(set(queue) - {unseen, *ids[:4]})
        store.release("ann")
    assert 20 < drawn < 60  # of 500: 50, less those that would have come anyway


def test_newest_first_and_a_new_prediction_changes_the_doubt(home, monkeypatch):
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__RANDOM_SHARE", "0")
    store = Store("faces")
    ids = fill(store, 4)
    assert [q.id for q in store.queue("ann", 2, "newest")] == [ids[3], ids[2]]
    store.release("ann")
    store.predict(ids[3], said(0.5))
    store.predict(ids[0], said(0.99))
    assert [q.id for q in store.queue("ann", 4)] == [ids[3], ids[1], ids[2], ids[0]]
    assert store.item(ids[0]).prediction == said(0.99)


def test_suspects_get_a_second_look_once(store):
    ids = fill(store, 3)
    store.answer(ids[2], "ann", "confirmed")
    rows = [
        (ids[2], {"given": "cat", "suggested": "dog", "score": 0.01}),
        (ids[0], {"given": "cat", "suggested": "dog", "score": 0.2}),
    ]
    store.suspects(rows)
    assert [q.id for q in store.queue("bob", 9)] == [ids[1]] and store.left("suspects") == 2
    assert [(q.id, q.suspect["score"]) for q in store.queue("ann", 9, "suspects")] == [(ids[2], 0.01), (ids[0], 0.2)]
    assert statuses(store) == {ids[2]: "agreed"}  # what was said before still stands
    store.answer(ids[2], "ann", "confirmed")
    store.suspects(rows)
    assert [q.id for q in store.queue("ann", 9, "suspects")] == [ids[0]]
    store.suspects([(ids[2], {"given": "dog", "suggested": "cat", "score": 0.3})])  # another label is another question
    assert store.left("suspects") == 2
    with pytest.raises(KeyError): store.suspects([("0" * 64, {"given": "cat", "suggested": "dog", "score": 0})])


# ---- images

def test_the_same_image_sent_twice_is_one_item(store):
    assert [store.add(png(1), name, user)[1] for name, user in (("a.png", "ann"), ("b.png", "bob"))] == [True, False]
    [id] = fill(store, 2)[1:]
    assert store.stats()["images"] == 2 and store.image(id) == png(1) and store.item(id).name == "a.png"
    assert {p.name for p in store.folder.rglob("*") if p.is_file() and len(p.name) == 64} == {
        hashlib.sha256(png(n)).hexdigest() for n in (0, 1)
    }


def test_what_is_no_image_or_too_large_is_not_let_in(home, monkeypatch):
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__MAX_UPLOAD_MB", "0.001")
    monkeypatch.setenv("LOOPBOOK_DATA__MAX_MEGAPIXELS", "0.0001")
    store = Store("faces")
    for data in (b"", b"text", png(0)[:60]):
        with pytest.raises(BadImage): store.add(data, "a.png", "ann")
    bomb = io.BytesIO()
    Image.new("1", (11, 11)).save(bomb, "PNG")
    with pytest.raises(BadImage, match="megapixels"): store.add(bomb.getvalue(), "bomb.png", "ann")
    with pytest.raises(UserError, match="max_upload_mb"): store.add(png(0, 64), "large.png", "ann")
    assert store.stats()["images"] == 0 and not list(store.folder.glob(".staging-*"))
    assert not (store.folder / "images").exists()


def test_names_of_files_are_shown_without_control_characters(store):
    id, _ = store.add(png(0), "\x1b[31m" + "x" * 300 + "\n.png", "ann")
    assert store.item(id).name.isprintable() and len(store.item(id).name) <= 200


def test_an_image_that_somebody_deleted_is_told_and_can_be_sent_again(store):
    [id] = fill(store, 1)
    store._path(id).unlink()
    with pytest.raises(UserError, match="No such file"): store.image(id)
    assert store.add(png(0), "again.png", "ann") == (id, False) and store.image(id) == png(0)


# ---- the file

def test_a_store_of_a_newer_version_is_left_alone(store):
    fill(store, 1)
    with sqlite3.connect(store.file) as db: db.execute("pragma user_version = 99")
    before = store.file.read_bytes()
    with pytest.raises(UserError, match="newer Loopbook .format 99.*update"): Store("faces", store.settings)
    assert store.file.read_bytes() == before


def test_a_file_that_is_no_store(home):
    folder = home / "data" / "feedback" / "faces"
    folder.mkdir(parents=True)
    (folder / "feedback.sqlite").write_text(
        "not a database at all, but long enough to have a header of one hundred bytes, which is looked at " * 3
    )
    with pytest.raises(UserError, match="not a database"): Store("faces")
    assert (folder / "feedback.sqlite").read_text().startswith("not a database")


def test_full_sync_and_write_ahead_log(store):
    db = store._db()
    assert db.execute("pragma journal_mode").fetchone()[0] == "wal"
    assert db.execute("pragma synchronous").fetchone()[0] == 2


def test_stats_count_what_stands(store):
    ids = fill(store, 6)
    for id in ids[:3]: store.answer(id, "ann", "confirmed")
    store.answer(ids[2], "bob", "corrected", {"animal": "dog"})
    store.answer(ids[3], "bob", "unknown")
    store.answer(ids[4], "bob", "new", {"animal": "fox"})
    store.undo("bob")
    assert store.stats() == {
        "recipe": "faces",
        "images": 6,
        "waiting": 2,
        "answered": 4,
        "agreed": 2,
        "disputed": 1,
        "unknown": 1,
        "suspects": 0,
        "verdicts": {"confirmed": 3, "corrected": 1, "new": 0, "unknown": 1},
        "users": {"ann": 3, "bob": 2},
        "targets": {"animal": {"cat": 2}},
    }
