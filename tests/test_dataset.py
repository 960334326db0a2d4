"""Dataset versions: what joins, what is left out, where it lies in the split, and what a version costs."""
import io
import json
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import Data
from nbs_lib.data import write as module
from nbs_lib.data.dataset import SPLITS, Dataset
from nbs_lib.data.images import image_id
from nbs_lib.data.items import Item, read_items
from nbs_lib.data.write import hash_split, write_version

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def png(n: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (n % 256, n // 256, 7)).save(file, "PNG")
    return file.getvalue()


def item(n: int, label: str | None = "even or odd", source: str = "download", **more) -> Item:
    if label == "even or odd": label = ("even", "odd")[n % 2]
    return Item(f"{n}.png", png(n), {"label": label, **more}, source=source)


def write(folder, items, parent=None, **options):
    return write_version(folder, items, name="numbers", source="here", parent=parent, **options)
def label_of(dataset: Dataset, n: int): return dataset.rows.set_index("id").loc[image_id(png(n)), "label"]


def test_reads_back_what_was_written(tmp_path):
    data = write(tmp_path / "a", (item(n) for n in range(200)), signature="s1")
    assert list(data.rows.columns) == ["id", "label", "split", "source", "added_at"]
    assert dict(data.images()) == {image_id(png(n)): png(n) for n in range(200)}
    assert [id for id, _ in data.images()] == list(data.rows["id"]) == [image_id(png(n)) for n in range(200)]
    some = list(data.rows["id"][[150, 3, 77]])
    assert [id for id, _ in data.images(some)] == [some[1], some[2], some[0]]
    assert data.image(some[0]) == png(150)
    with pytest.raises(KeyError): data.image("0" * 64)
    assert data.card["splits"] == {"train": 140, "validation": 30, "test": 30} and data.card["signature"] == "s1"
    assert data.card["report"]["width"] == [12, 12, 12] and data.card["report"]["formats"] == {"PNG": 200}


def test_several_shards_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(module._shares, "__defaults__", (3000,))
    monkeypatch.setattr(module._write_shard, "__defaults__", (500,))
    data = write(tmp_path / "a", map(item, range(150)))
    assert len(data.shards) > 2 and dict(data.images()) == {image_id(png(n)): png(n) for n in range(150)}
    assert data.image(image_id(png(149))) == png(149) and len(list(data.images(data.rows["id"][40:90]))) == 50


def test_other_tools_read_it(tmp_path):
    import datasets
    import pandas as pd
    data = write(tmp_path / "a", [item(n, beard="yes" if n % 3 else None) for n in range(30)])
    data = write(tmp_path / "b", [item(n, beard="no") for n in range(30, 40)], data)
    table = datasets.load_dataset(str(data.folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == 40 and table.features["image"] == datasets.Image()
    assert table[5]["image"].size == (12, 8) and table[0]["beard"] is None
    table = datasets.load_dataset("parquet", data_dir=str(data.folder / "data"), split="train",
                                  cache_dir=str(tmp_path / "cache"))
    assert table[39]["label"] == "odd"
    frame = pd.concat([pd.read_parquet(s) for s in data.shards])
    assert frame["image"].iloc[3]["bytes"] == png(3) and frame["image"].iloc[3]["path"] == "3.png"


# ---- the split

def test_split_is_of_the_ids_alone(tmp_path):
    items = [item(n) for n in range(300)]
    a, b = write(tmp_path / "a", items), write(tmp_path / "b", items[::-1])
    assert a.rows.set_index("id")["split"].to_dict() == b.rows.set_index("id")["split"].to_dict()


def test_small_classes_are_spread_fairly(tmp_path):
    data = write(tmp_path / "a", [item(n, f"class {n // 5}", rare="one" if n == 7 else None) for n in range(300)])
    assert all(counts[0] >= 1 for target in data.card["counts"].values() for counts in target.values())
    assert all(abs(data.card["splits"][s] - 300 * share) <= 3 for s, share in module.SHARES.items())
    tests = [c[2] + c[1] for c in data.card["counts"]["label"].values()]
    assert min(tests) >= 1 and max(tests) <= 2


def test_class_with_one_image_is_trained_on(tmp_path):
    data = write(tmp_path / "a", [*map(item, range(40)), item(100, "lonely")])
    assert data.card["counts"]["label"]["lonely"] == [1, 0, 0]
    child = write(tmp_path / "b", [item(n, "new" if n == 200 else "even") for n in range(200, 230)], data)
    assert child.card["counts"]["label"]["new"] == [1, 0, 0]


def test_nothing_moves_in_later_versions(tmp_path):
    data, splits = write(tmp_path / "0", map(item, range(50))), {}
    for version in range(1, 6):
        now = data.rows.set_index("id")["split"].to_dict()
        assert splits.items() <= now.items() and data.rows["id"].is_unique and set(now.values()) <= set(SPLITS)
        splits = now
        data = write(tmp_path / str(version), [item(n) for n in range(version * 20, version * 20 + 60)]
                     + [item(n, "odd", "feedback:ada") for n in range(version)], data)
    later = data.rows[50:]
    assert all(hash_split(r.id) == r.split for r in later.itertuples()) and len(set(later["split"])) == 3
    assert list(data.rows["id"]) == [id for id, _ in data.images()]


# ---- corrections

def test_words_of_sources_and_people(tmp_path):
    a = write(tmp_path / "a", map(item, range(20)))
    b = write(tmp_path / "b", [item(2, "odd", "feedback:ada")], a)
    assert label_of(b, 2) == "odd" and label_of(a, 2) == "even" and len(b.rows) == 20 and len(b.history) == 21
    assert b.rows["source"].tolist().count("feedback:ada") == 1 and b.image(image_id(png(2))) == png(2)
    assert write(tmp_path / "c", map(item, range(20)), b) is b, "the source's old word reverts nothing"
    assert write(tmp_path / "c", [item(2, "odd", "feedback:bob")], b) is b, "what is so already is no news"
    c = write(tmp_path / "c", [*map(item, range(4, 20)), item(2, "prime"), item(3, "prime")], b)
    assert label_of(c, 2) == label_of(c, 3) == "prime"
    assert c.card["report"]["relabelled"] == 2, "the source's new word counts"
    d = write(tmp_path / "d", [item(2, "odd", "feedback:ada")], c)
    assert label_of(d, 2) == "odd", "a person may say the same again"
    assert write(tmp_path / "e", [item(2, "prime")], d) is d
    assert sum(d.card["counts"]["label"]["prime"]) == 1


def test_first_word_of_a_source_does_not_overrule_a_person(tmp_path):
    a = write(tmp_path / "a", map(item, range(20)))
    b = write(tmp_path / "b", [item(50, "odd", "feedback:ada"), item(51, None, "feedback:ada")], a)
    c = write(tmp_path / "c", [item(50), item(51)], b)
    assert label_of(c, 50) == "odd" and label_of(c, 51) == "odd"
    assert c.card["report"]["relabelled"] == 1, "but it fills a gap"
    assert write(tmp_path / "d", [item(51, None)], c) is c, "and an empty cell takes nothing away"


def test_one_target_of_several(tmp_path):
    a = write(tmp_path / "a", [item(n, glasses="no", hair="long") for n in range(20)])
    b = write(tmp_path / "b", [Item("x", png(4), {"hair": "short"}, source="feedback:ada")], a)
    row = b.rows.set_index("id").loc[image_id(png(4))]
    assert (row["label"], row["glasses"], row["hair"]) == ("even", "no", "short")
    with pytest.raises(UserError, match="'hat' is not in the dataset"): write(tmp_path / "c", [item(1, hat="no")], b)
    assert not (tmp_path / "c").exists()


# ---- what is left out

def test_duplicates_and_conflicts(tmp_path):
    items = [*map(item, range(20)), item(3), item(4, "odd"), item(4), item(5, None), item(30, None), item(30, "odd")]
    for number, i in enumerate(items): i.name = f"{number}.png"
    data = write(tmp_path / "a", items)
    report = data.card["report"]
    assert len(data.rows) == 20 and image_id(png(4)) not in set(data.rows["id"])
    assert report["duplicates"] == 4 and report["duplicate_files"][0] == ["20.png", "3.png"]
    assert report["conflicts"] == 1 and [name for name, _ in report["conflicting_files"][0]] == ["4.png", "21.png"]
    assert label_of(data, 30) == "odd" and label_of(data, 5) == "odd" and report["files"] == 26
    assert write(tmp_path / "b", items, data) is data
    contradiction = [item(7, "x"), item(7, "y")]
    assert write(tmp_path / "b", contradiction, data) is data, "a source that contradicts itself changes nothing"


def test_bad_files_are_named(tmp_path):
    bad = [Item("letter.jpg", b"Dear Ada", {"label": "odd"}), Item("gone.jpg", None, {"label": "odd"}, "not there"),
           Item("half.png", png(3)[:50], {"label": "odd"})]
    data = write(tmp_path / "a",
                 [*map(item, range(40)), *bad, Item("bird/", None, {"label": "bird"}, "empty class folder")],
                 limits=Data(max_bad=0.1))
    assert dict(data.card["report"]["unreadable_files"]).keys() == {"letter.jpg", "gone.jpg", "half.png"}
    assert data.card["report"]["unreadable"] == 3
    assert data.card["report"]["empty_folders"] == ["bird/"] and data.targets == {"label": ["even", "odd"]}
    with pytest.raises(UserError, match=r"3 of 43 files .* letter.jpg: not an image"):
        write(tmp_path / "b", [*map(item, range(40)), *bad])
    with pytest.raises(UserError, match="no image"): write(tmp_path / "b", [])
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "and nothing is written"


@pytest.mark.parametrize("column", ["id", "split", "image", "source", "added_at"])
def test_reserved_names(tmp_path, column):
    with pytest.raises(UserError, match=column): write(tmp_path / "a", [Item("1", png(1), {column: "x"})])
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_when_the_source_breaks(tmp_path):
    def broken():
        yield from map(item, range(200))
        raise OSError("the cable was pulled")
    with pytest.raises(OSError, match="cable"): write(tmp_path / "a", broken())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="not a dataset version"): Dataset(tmp_path)


def test_names_of_all_kinds(tmp_path):
    names = ["it's", 'a "cat"', "Katze, groß", "猫", "a/b", " spaced", "😀", "x" * 200]
    data = write(tmp_path / "a", [item(n, names[n % len(names)]) for n in range(80)])
    assert data.targets["label"] == sorted(names) and label_of(data, 3) == "猫"


# ---- what it costs

def test_a_child_costs_what_is_new(tmp_path):
    rng, fresh = np.random.default_rng(0), []
    for n in range(100):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG", compress_level=0)
        fresh.append(Item(f"upload {n}.png", file.getvalue(), {"label": "odd"}, source=f"feedback:{n % 5}"))
    parent = write(tmp_path / "a", map(item, range(1000)))
    child = write(tmp_path / "b", fresh, parent)
    added = child.shards[-1].stat().st_size + (child.folder / "dataset.json").stat().st_size
    assert added <= 1.1 * sum(len(i.data) for i in fresh)
    assert child.shards[0].samefile(parent.shards[0]) and len(child.shards) == 2
    relabelled = write(tmp_path / "c", [Item("u", fresh[0].data, {"label": "even"}, source="feedback:0")], child)
    assert relabelled.shards[-1].stat().st_size < 5000 and relabelled.image(image_id(fresh[0].data)) == fresh[0].data


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    def large():
        for n in range(400):
            file = io.BytesIO()
            Image.fromarray(np.roll(noise, n)).save(file, "BMP")  # 270 kB
            yield Item(f"{n}", file.getvalue(), {"label": "odd"})
    tracemalloc.start()
    try: data = write(tmp_path / "a", large())
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(data.rows) == 400 and peak < 64e6, f"{peak / 1e6:.0f} MB of 108"


@pytest.mark.skipif(not (SHARED / "cifar10.zip").exists(), reason="../shared/data/cifar10.zip is absent")
@pytest.mark.parametrize("count", [6_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_a_dataset_of_many_images_is_written_fast_and_extended_faster(tmp_path, count):
    items = list(islice(read_items(SHARED / "cifar10.zip"), count))
    start = time.perf_counter()
    few = write(tmp_path / "few", items[:count // 10])
    tenth, start = time.perf_counter() - start, time.perf_counter()
    data = write(tmp_path / "a", items)
    whole, start = time.perf_counter() - start, time.perf_counter()
    assert whole < 30 * tenth, "time grows with the number of images, not faster"
    assert len(few.rows) == count // 10
    assert data.card["splits"] == {"train": 0.7 * count, "validation": 0.15 * count, "test": 0.15 * count}
    child = write(tmp_path / "b", map(item, range(100)), data) if data.targets.keys() == {"label"} else None
    assert time.perf_counter() - start < whole + 1 and len(child.rows) == count + 100
    assert json.loads((child.folder / "dataset.json").read_text())["rows"] == count + 100
