"""Suspected label errors: wrong labels on real photos, several targets, small classes, and the second look."""
import csv
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHARED
from sklearn.model_selection import StratifiedKFold
from small_data import picture

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings
from nbs_lib.data.images import image_id
from nbs_lib.data.items import Item
from nbs_lib.data.write import write_version
from nbs_lib.feedback.label_errors import FOLDS, out_of_sample, queue_suspects, suspects_of
from nbs_lib.feedback.merge import compare, write_merged
from nbs_lib.feedback.store import Store

INCOMING = SHARED / "data" / "cats_dogs_incoming.zip"


def points(classes: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Features (n, 16) of `classes` well separated classes, and their numbers."
    rng = np.random.default_rng(seed)
    numbers = np.arange(n) % classes
    return (rng.normal(size=(n, 16)) + 5 * np.eye(16)[numbers]).astype(np.float32), numbers


def table(**columns) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"id": [f"{i:04}" for i in range(n)], **columns, "split": "train"})


def test_labels_under_suspicion_have_no_say_in_how_they_are_judged():
    x, labels = points(2, 400)
    def part(y): return next(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(x, y))[1]
    asked, swapped = part(labels), labels.copy()
    for first in range(0, 400, 2):   # neighbours of the first part exchange their labels: the parts stay as they are
        if {first, first + 1} <= set(asked): swapped[[first, first + 1]] = labels[[first + 1, first]]
    assert 10 < (swapped != labels).sum() < len(asked) / 2 and np.array_equal(part(swapped), asked)
    assert np.array_equal(out_of_sample(x, labels)[asked], out_of_sample(x, swapped)[asked])


def test_every_target_by_itself_and_unlabelled_rows_are_no_suspects():
    x, numbers = points(4, 200)
    colour = np.array(["ash", "blue", "cyan", "dun"], object)[numbers]
    shape = np.array(["round", "square"], object)[numbers % 2]
    colour[:3], shape[10:13] = ["blue", "cyan", "ash"], ["square", "round", "square"]       # six wrong ones
    shape[50:60] = None
    classes = {"colour": ["ash", "blue", "cyan", "dun"], "shape": ["round", "square"]}
    found = suspects_of(x, table(colour=colour, shape=shape), classes)
    wrong = {("colour", f"{i:04}") for i in range(3)} | {("shape", f"{i:04}") for i in range(10, 13)}
    assert {(s.target, s.id) for s in found.itertuples()} >= wrong
    assert len(found) <= 9 and not set(found["id"]) & {f"{i:04}" for i in range(50, 60)} - {"0050"}
    first = found[(found["target"] == "colour") & (found["id"] == "0000")].iloc[0]
    assert (first["given"], first["suggested"]) == ("blue", "ash") and first["score"] < 0.3


def test_classes_too_small_to_be_judged_are_left_out():
    x, numbers = points(3, 90)
    labels = np.array(["ash", "elm", "oak"], object)[numbers]
    labels[:4] = "yew"
    found = suspects_of(x, table(tree=labels), {"tree": ["ash", "elm", "oak", "yew"]})
    assert "yew" not in set(found["given"]) | set(found["suggested"])
    with pytest.raises(UserError, match="two classes of at least 5 images"):
        suspects_of(x, table(tree=np.array(["ash"] * 86 + ["elm"] * 4, object)), {"tree": ["ash", "elm"]})


def test_who_has_had_the_second_look_is_not_asked_again(home):
    items = [Item(f"{n}.jpg", picture("red", n), {"colour": "blue", "size": "big"}) for n in range(12)]
    dataset = write_version(home / "v0", items, name="small", source="drawn")
    store = Store("faces", load_settings(home))
    ids = list(dataset.rows["id"][:3])
    found = pd.DataFrame({"id": [ids[0], ids[1], ids[0], ids[2]], "target": ["colour", "colour", "size", "colour"],
                          "given": ["blue", "blue", "big", "blue"], "suggested": ["red", "red", "small", "red"],
                          "score": [0.01, 0.02, 0.03, 0.04], "split": "train"})
    assert queue_suspects(store, dataset, found, most=2) == ids[:2]
    first, second = store.queue("ada", 9, "suspects")
    why = {"given": {"colour": "blue", "size": "big"}, "suggested": {"colour": "red", "size": "small"}, "score": 0.01}
    assert first.suspect == why and second.id == ids[1]
    store.answer(ids[0], "ada", "corrected", {"colour": "red"})
    store.release("ada")
    queue_suspects(store, dataset, found, most=3)
    assert [q.id for q in store.queue("bob", 9, "suspects")] == ids[1:]


@pytest.mark.skipif(not INCOMING.exists(), reason=f"no photos: {INCOMING} is missing")
def test_wrong_labels_of_real_photos_are_found_and_corrected(home):
    from nbs_lib.models.backbone import create_backbone, preprocessing_of
    from nbs_lib.models.classifier import Body
    from nbs_lib.models.engine import choose
    from nbs_lib.models.features import embed
    with zipfile.ZipFile(INCOMING) as source:
        answers = csv.DictReader(io.StringIO(source.read("labels.csv").decode()))
        truth = {row["file_name"]: row["label"] for row in answers}
        photos = {name: source.read(name) for name in truth}
    wrong = set(np.random.default_rng(0).permutation(sorted(truth))[:12])                   # one in twenty
    def said(name): return {"cat": "dog", "dog": "cat"}[truth[name]] if name in wrong else truth[name]
    items = [Item(n, photos[n], {"animal": said(n)}) for n in truth]
    dataset = write_version(home / "v0", items, name="pets", source="incoming")
    backbone = create_backbone("tf_efficientnet_lite0")
    how = preprocessing_of(backbone)
    features, _ = embed(Body(backbone, how), how, choose("cpu"), dataset, list(dataset.rows["id"]))
    found = suspects_of(features, dataset.rows, dataset.targets)
    errors = {image_id(photos[n]) for n in wrong}
    hits = len(errors & set(found["id"]))
    print(f"precision {hits / len(found):.2f}, recall {hits / len(errors):.2f} of {len(found)} suspects")
    assert hits / len(found) > 0.75 and hits / len(errors) > 0.75

    store, names = Store("faces", load_settings(home)), {image_id(photo): n for n, photo in photos.items()}
    queue_suspects(store, dataset, found, most=100)
    for item in store.queue("ada", 100, "suspects"):
        store.answer(item.id, "ada", "corrected", {"animal": truth[names[item.id]]})
    answers = compare(dataset, store.standing())
    assert {a.outcome for a in answers} <= {"corrects", "known"} and sum(a.taken for a in answers) == hits
    mended = write_merged(home / "v1", dataset, answers, store.image, store.settings)
    labels = mended.rows.set_index("id")["animal"]
    assert sum(labels[image_id(photos[n])] != truth[n] for n in truth) == 12 - hits and len(mended.rows) == 240


def test_the_notebook(home):
    (home / "settings.ini").write_text("[project]\nrecipe = small\n[tracking]\nbackend = trackio\n[train]\n"
                                       "image_size = 48\n[recipe.small]\nsource = small.zip\ntarget = colour\n")
    with zipfile.ZipFile(home / "small.zip", "w") as target:
        for n in range(120):
            kind, other = (("red", "blue"), ("blue", "red"))[n % 2]
            target.writestr(f"{other if n in (6, 10, 21) else kind}/{n}.jpg", picture(kind, n))
    def run(*words):
        command = [Path(sys.executable).with_name("loopbook"), "run", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
        assert not done.returncode, done.stdout[-1500:] + done.stderr[-1500:]
        return json.loads(done.stdout)
    run("download")
    record = run("label_errors", "-p", "most", "2")
    assert record["inputs"] == ["small-dataset:v0"]
    assert record["summary"] == {"dataset": "small-dataset:v0", "suspects": 3, "queued": 2, "images_embedded": 120}
    report = (Path(record["folder"]) / "label_errors.html").read_text()
    assert "the labels of <strong>3</strong> look wrong; 2 are queued" in report
    asked = Store("small", load_settings(home)).queue("ada", 5, "suspects")
    mislabelled = {image_id(picture(kind, n)) for kind, n in (("red", 6), ("red", 10), ("blue", 21))}
    assert len(asked) == 2 and {q.id for q in asked} < mislabelled
