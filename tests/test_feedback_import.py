"""Feedback by the folder: what comes in, what is refused, and the table that goes out."""
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from stores import limit, png

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings
from nbs_lib.feedback import exchange
from nbs_lib.feedback.exchange import parse_labels
from nbs_lib.feedback.store import Store

ROOT = Path(__file__).resolve().parent.parent
INCOMING = ROOT.parent / "shared" / "data" / "cats_dogs_incoming.zip"
LOOPBOOK = [sys.executable, "-c", "from nbs_lib.cli.main import main; main()"]


NONE = {"label": []}  # what is known before there is a dataset
COLOURS = {"colour": ["blue", "red"]}


@pytest.fixture
def store(home): return Store("faces", load_settings(home))


def import_folder(store, path, user, table=None, classes=NONE):
    return exchange.import_folder(store, path, user, classes, table)


def add_files(store, paths, user, labels=(), classes=NONE):
    return exchange.add_files(store, paths, user, classes, labels)


def make(path: Path, files: dict[str, bytes | str], pack: bool = False) -> Path:
    files = {n: d.encode() if isinstance(d, str) else d for n, d in files.items()}
    if pack:
        with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
            for name, data in files.items(): archive.writestr(name, data)
        return path.with_suffix(".zip")
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def stands(store: Store) -> dict: return {r.name: r.labels for r in store.standing().itertuples(index=False)}


def is_empty(store: Store) -> bool:
    return (
        store.stats()["images"] == 0
        and store.history().empty
        and not (store.folder / "images").exists()
        and not list(store.folder.glob(".staging-*"))
    )


packed = pytest.mark.parametrize("pack", [False, True], ids=["folder", "zip"])


# ---- in

@packed
@pytest.mark.parametrize("top", ["", "photos/"])
def test_class_folders(store, tmp_path, pack, top):
    path = make(
        tmp_path / "source",
        {f"{top}cat/1.png": png(1), f"{top}cat/same.png": png(1), f"{top}犬/2.png": png(2), f"{top}.DS_Store": "x"},
        pack,
    )
    report = import_folder(store, path, "ann")
    assert (report["files"], report["images"], report["new"], report["said"]) == (3, 2, 2, 2)
    assert report["new_classes"] == {"label": {"cat": 1, "犬": 1}}
    assert stands(store) == {f"{top}cat/1.png": {"label": "cat"}, f"{top}犬/2.png": {"label": "犬"}}


@packed
@pytest.mark.parametrize("where", ["beside", "given", "given, photos in a folder"])
def test_table(store, tmp_path, pack, where):
    table = "file_name,label\na.png,cat\nb.png,dog\nb.png,dog\n"
    top = "photos/" if "folder" in where else ""
    path = make(
        tmp_path / "source",
        {f"{top}{n}.png": png(i) for i, n in enumerate("abc")} | ({"labels.csv": table} if where == "beside" else {}),
        pack,
    )
    given = make(tmp_path, {"said.csv": table}) / "said.csv" if where != "beside" else None
    report = import_folder(store, path, "ann", given)
    assert (report["images"], report["said"], report["unlabelled"]) == (3, 2, 1)
    assert stands(store) == {f"{top}a.png": {"label": "cat"}, f"{top}b.png": {"label": "dog"}}
    assert [q.name for q in store.queue("bob", 9)] == [f"{top}c.png"]  # nobody said what it is: it is to be looked at


def test_the_same_import_again_adds_nothing(store, tmp_path):
    path = make(tmp_path / "source", {"cat/1.png": png(1), "dog/2.png": png(2)})
    import_folder(store, path, "ann")
    [id] = [r.id for r in store.standing().itertuples() if r.name == "cat/1.png"]
    store.answer(id, "ann", "corrected", {"label": "fox"})
    before = store.history()
    again = import_folder(store, path, "ann")
    assert (again["new"], again["said"], again["repeated"]) == (0, 0, 2) and store.history().equals(before)
    assert stands(store)["cat/1.png"] == {"label": "fox"}
    # an import is not undone by a key
    assert store.undo("ann") == id and store.undo("ann") is None and stands(store)["cat/1.png"] == {"label": "cat"}
    (path / "cat/1.png").rename(path / "dog/1.png")
    assert import_folder(store, path, "ann")["said"] == 1 and stands(store)["cat/1.png"] == {"label": "dog"}
    assert import_folder(store, path, "bob")["said"] == 2 and len(store.history()) == 7  # another person, another word


def test_single_files_and_folders_of_them(store, tmp_path):
    path = make(tmp_path / "source", {"1.png": png(1), "sub/2.png": png(2), "sub/note.txt": "no image"})
    assert add_files(store, [path / "1.png"], "ann", ["cat"])["said"] == 1
    assert add_files(store, [path], "ann")["unlabelled"] == 2
    assert add_files(store, [path / "1.png"], "ann", ["cat"])["repeated"] == 1
    assert add_files(store, [path / "1.png"], "ann", ["dog"])["said"] == 1
    assert add_files(store, [path / "1.png"], "ann", ["cat"])["said"] == 1
    assert list(stands(store).values()) == [{"label": "cat"}]
    assert [q.name for q in store.queue("bob", 9)] == [str(path / "sub/2.png")]


def test_the_verdict_comes_from_the_dataset_and_the_prediction(store, tmp_path):
    store.add(
        png(1), "seen.png", "camera", {"model": "faces-model:v1", "targets": {"colour": {"red": 0.9, "blue": 0.1}}}
    )
    path = make(
        tmp_path / "source",
        {
            "labels.csv": "file_name,any name\n1.png,red\n2.png,red\n3.png,green\n",
            **{f"{n}.png": png(n) for n in (1, 2, 3)},
        },
    )
    report = import_folder(store, path, "ann", classes=COLOURS)
    assert report["new_classes"] == {"colour": {"green": 1}} and stands(store)["3.png"] == {"colour": "green"}
    history = store.history()
    assert history["verdict"].tolist() == ["confirmed", "corrected", "new"]
    assert history["model"].fillna("").tolist() == ["faces-model:v1", "", ""]


def test_targets_must_be_the_datasets(store, tmp_path):
    path = make(tmp_path / "source", {"labels.csv": "file_name,colour,shade\n1.png,red,dark\n", "1.png": png(1)})
    with pytest.raises(UserError, match="target 'shade' is not in the dataset.*colour"):
        import_folder(store, path, "ann", classes=COLOURS)
    with pytest.raises(UserError, match="target 'color' is not in the dataset.*did you mean 'colour'"):
        add_files(store, [path / "1.png"], "ann", ["color=red"], COLOURS)
    assert is_empty(store)


def test_several_targets(store):
    faces = {"beard": ["yes", "no"], "hair": ["black", "red"]}
    assert parse_labels(["hair=red", "beard=yes", "hair=red"], faces) == {"hair": "red", "beard": "yes"}
    assert parse_labels(["a=b"], {"letter": ["a=b"]}) == {"letter": "a=b"} and parse_labels([], faces) == {}
    for wrong, words in (
        (["red"], "of which target.*beard, hair"),
        (["hat=red"], "did you mean 'hair'"),
        (["hair=red", "hair=black"], "two labels"),
        (["hair="], "empty"),
    ):
        with pytest.raises(UserError, match=words): parse_labels(wrong, faces)


# ---- what is refused

TABLES = {
    "no file_name": ("name,label\n1.png,cat\n", "file_name"),
    "no target": ("file_name\n1.png\n", "one column a target"),
    "a column twice": ("file_name,label,label\n1.png,cat,cat\n", "each once"),
    "contradiction": ("file_name,label\n1.png,cat\n1.png,dog\n", "line 3: '1.png' has another label"),
    "ragged": ("file_name,label\n1.png,cat,dog\n", "line 2: 3 cells"),
    "empty": ("", "file_name"),
    "not UTF-8": (b"file_name,label\n1.png,\xff\xfe\n", "UTF-8"),
    "unknown file": ("file_name,label\n1.png,cat\ngone.png,cat\n", "gone.png: named in .*labels.csv, but not there"),
    "outside": ("file_name,label\n1.png,cat\n../../secret.png,cat\n", "not there"),
    "no label at all": ("file_name,label\n1.png,\n", "no labelled images"),
    "too long": (f"file_name,label\n1.png,{'x' * 101}\n", "1.png: label .* has 101 characters"),
    "control character": ("file_name,label\n1.png,a\x07b\n", "1.png: .*control"),
    "line break": ('file_name,label\n1.png,"a\nb"\n', "1.png: .*control"),
    "path": ("file_name,label\n1.png,../a\n", "1.png: .*path"),
    "dots": ("file_name,label\n1.png,..\n", "path"),
}


@pytest.mark.parametrize("given", [False, True], ids=["beside", "given"])
@pytest.mark.parametrize(("table", "words"), TABLES.values(), ids=TABLES)
def test_bad_tables(store, tmp_path, table, words, given):
    path = make(tmp_path / "source", {"1.png": png(1), "2.png": png(2)})
    where = make(tmp_path / ("elsewhere" if given else "source"), {"labels.csv": table}) / "labels.csv"
    with pytest.raises(UserError, match=words) as error: import_folder(store, path, "ann", where if given else None)
    assert "\n" not in str(error.value) and "\x07" not in str(error.value) and is_empty(store)


@packed
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("cat/text.png", b"text", "not an image"),
        ("cat/empty.png", b"", "empty file"),
        ("cat/broken.png", png(5)[:100], "cat/broken.png: "),
        ("cat/bomb.png", png(5, 40), "megapixels"),
        ("cat/large.png", png(5, 64), "cat/large.png: 0.0 MB, allowed are 0.006"),
        (f"{'x' * 101}/1.png", png(5), "101 characters"),
    ],
    ids=["text", "empty", "broken", "bomb", "large", "class"],
)
def test_bad_files(home, monkeypatch, tmp_path, pack, name, data, words):
    for key, value in (("FEEDBACK__MAX_UPLOAD_MB", "0.006"), ("DATA__MAX_MEGAPIXELS", "0.001")):
        monkeypatch.setenv(f"LOOPBOOK_{key}", value)
    store = Store("faces")
    path = make(tmp_path / "source", {"cat/good.png": png(1), name: data}, pack)
    with pytest.raises(UserError, match=words): import_folder(store, path, "ann")
    if name.startswith("cat") and not pack:
        with pytest.raises(UserError, match="nothing was taken in: 1 of 2"):
            add_files(store, [path / "cat/good.png", path / name], "ann", ["cat"])
    assert is_empty(store)


def test_what_is_not_there_or_not_readable(store, tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    for path, words in (
        (tmp_path / "nowhere", "no such folder or zip"),
        (tmp_path / "broken.zip", "not a zip"),
        (make(tmp_path / "photos", {"1.png": png(1)}), "no labelled images"),
    ):
        with pytest.raises(UserError, match=words): import_folder(store, path, "ann")
    with pytest.raises(UserError, match="nowhere.csv: cannot be read"):
        import_folder(store, tmp_path / "photos", "ann", tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="nowhere.png: no such file"):
        add_files(store, [tmp_path / "photos" / "1.png", tmp_path / "nowhere.png"], "ann")
    with pytest.raises(UserError, match="user name"):
        import_folder(store, make(tmp_path / "source", {"cat/1.png": png(1)}), "a/b")
    assert is_empty(store)


def test_a_zip_that_wants_out_is_refused(store, tmp_path):
    with pytest.raises(UserError, match="outside of the archive"):
        import_folder(store, make(tmp_path / "source", {"cat/1.png": png(1), "../../cat/2.png": png(2)}, True), "ann")
    assert is_empty(store)


def test_a_few_bad_files_are_left_out_and_told(home, monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPBOOK_DATA__MAX_BAD", "0.25")
    store = Store("faces")
    path = make(
        tmp_path / "source",
        {
            "labels.csv": "file_name,label\n1.png,cat\n2.png,dog\n3.png,a/b\n4.png,cat\n",
            **{f"{n}.png": png(n) for n in (1, 2, 3)},
            "4.png": png(4),
        },
    )
    report = import_folder(store, path, "ann")
    assert (report["files"], report["images"], report["bad"]) == (4, 3, 1) and report["bad_files"][0][0] == "3.png"
    assert "path" in report["bad_files"][0][1]
    assert set(stands(store)) == {"1.png", "2.png", "4.png"} and store.stats()["images"] == 3


def test_one_picture_under_two_labels_is_left_out_and_told(store, tmp_path):
    path = make(tmp_path / "source", {"cat/1.png": png(1), "dog/same.png": png(1), "dog/2.png": png(2)})
    report = import_folder(store, path, "ann")
    assert report["conflicts"] == 1
    assert report["conflicting_files"] == [[["cat/1.png", {"label": "cat"}], ["dog/same.png", {"label": "dog"}]]]
    assert stands(store) == {"dog/2.png": {"label": "dog"}}


@pytest.mark.faults
def test_a_full_disk_lets_nothing_in(store, tmp_path):
    path = make(tmp_path / "source", {f"cat/{n}.png": png(n, 16 + n) for n in range(40)})
    import_folder(store, make(tmp_path / "before", {"dog/1.png": png(99)}), "ann")
    with limit(5000), pytest.raises(UserError, match="disk is full"): import_folder(store, path, "ann")
    assert stands(store) == {"dog/1.png": {"label": "dog"}} and store.stats()["images"] == 1
    assert not list(store.folder.glob(".staging-*"))
    assert len([p for p in (store.folder / "images").rglob("*") if p.is_file()]) == 1
    assert import_folder(store, path, "ann")["said"] == 40


@pytest.mark.faults
def test_a_killed_import_lets_nothing_in(store, tmp_path):
    path = make(tmp_path / "source", {f"cat/{n}.png": png(n) for n in range(300)})
    code = """
import sys
from nbs_lib.feedback.exchange import import_folder
from nbs_lib.feedback.store import Store
store = Store("faces")
print(1, flush=True)
import_folder(store, sys.argv[1], "ann", {"label": []})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    process.stdout.readline()
    while process.poll() is None and len(list(store.folder.glob(".staging-*/*"))) < 20: time.sleep(0.001)
    process.kill()
    process.communicate()
    assert len(store.history()) == store.stats()["images"] and store.stats()["images"] in (0, 300)
    assert import_folder(store, path, "ann")["images"] == 300 == len(store.history())


# ---- the command

def loopbook(*words):
    return subprocess.run(
        [*LOOPBOOK, "feedback", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"LOOPBOOK_TRACKING__BACKEND": "trackio"},
    )


DATASET = """
import sys
from tests.small_data import small_dataset
from nbs_lib.tracking.tracker import open_tracker
with open_tracker().start("fetch", "download") as run:
    run.log_artifact("faces-dataset", "dataset", small_dataset(sys.argv[1], 8).folder, {"rows": 8})
"""


def test_commands(home, tmp_path):
    environment = os.environ | {"LOOPBOOK_TRACKING__BACKEND": "trackio"}
    subprocess.run(
        [sys.executable, "-c", DATASET, tmp_path / "dataset"],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
    )
    path = make(tmp_path / "photos [red]", {"red/1.png": png(1), "green/2.png": png(2)}, True)
    done = loopbook("import", path, "--user", "ann", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["said"] == 2, done.stderr
    again = loopbook("import", path, "--user", "ann")
    assert again.returncode == 0 and "answers 0 (2 said before)" in again.stdout
    assert "new classes of colour: green (1)" in again.stdout
    make(tmp_path, {"3.png": png(3), "labels.csv": "file_name,colour\n3.png,blue\n"})
    added = loopbook("add", tmp_path / "3.png", "--label", "colour=red", "--user", "ann", "--json")
    assert json.loads(added.stdout)["said"] == 1
    facts = json.loads(loopbook("stats", "--json").stdout)
    assert facts["targets"] == {"colour": {"red": 2, "green": 1}} and facts["users"] == {"ann": 3}
    assert "green" in loopbook("stats").stdout
    exported = json.loads(loopbook("export", tmp_path / "out.csv", "--json").stdout)
    assert exported == {"path": str(tmp_path / "out.csv"), "rows": 3}
    assert sorted(pd.read_csv(tmp_path / "out.csv")["colour"]) == ["green", "red", "red"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "nowhere.png", "--label", "cat"], "nowhere.png: no such file"),
        (["import", "nowhere"], "no such folder or zip"),
        (["export", "out.txt"], ".csv or .parquet"),
        (["stats", "--recipe", "face"], "did you mean 'faces'"),
    ],
)
def test_mistakes_are_one_line(home, words, said):
    done = loopbook(*words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: "), done.stderr
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ---- real photos

@pytest.mark.skipif(not INCOMING.exists(), reason=f"no photos: {INCOMING} is missing")
def test_real_photos(store):
    report = import_folder(store, INCOMING, "ann")
    with zipfile.ZipFile(INCOMING) as archive:
        rows = archive.read(next(n for n in archive.namelist() if n.endswith("labels.csv"))).decode().split()[1:]
    assert report["files"] == len(rows) == 240 and report["bad"] == 0
    assert report["said"] == report["images"] == store.stats()["answered"]
    assert sum(report["new_classes"]["label"].values()) == report["images"]
    assert set(report["new_classes"]["label"]) == {"cat", "dog"}
    again = import_folder(store, INCOMING, "ann")
    assert (again["new"], again["said"]) == (0, 0) and len(store.history()) == report["said"]
