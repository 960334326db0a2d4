"""Prediction while models change and files are broken."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
import gc
import io
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import picture
from small_models import NAME, bundle, forget_trackio, log, own_answers, production, project  # noqa: F401  fixtures

from nbs_lib.core.errors import UserError
from nbs_lib.data.images import BadImage, preprocess
from nbs_lib.models.backbone import create_backbone, preprocessing_of
from nbs_lib.models.classifier import load_model
from nbs_lib.serving.predictor import BATCH, Predictor
from nbs_lib.tracking.promotion import promote, rollback


def near(one: dict, other: dict) -> bool:
    if one.keys() != other.keys(): return False
    return all(abs(one[t][c] - p) < 1e-3 for t, said in other.items() for c, p in said.items())


# Following

def test_threads_are_answered_without_a_failure_while_versions_are_promoted_and_rolled_back(production):
    images = [picture(kind, seed) for seed in range(2) for kind in ("red", "blue")]
    start = time.perf_counter()
    own = {f"{NAME}:{v}": own_answers(production, v, images) for v in ("v0", "v1")}
    pace = time.perf_counter() - start                     # of this machine, now: two models loaded, eight answers
    assert not near(own[f"{NAME}:v0"][0], own[f"{NAME}:v1"][0])
    predictor, over, wrong = Predictor(settings=production[0]), threading.Event(), []
    latest = [None] * 4
    def ask(me: int):
        while not over.is_set():
            for number, data in enumerate(images):
                try:
                    said = predictor.predict_one(data)
                    if not near(said["targets"], own[said["model"]][number]): wrong.append(said)
                except Exception as error: wrong.append(error)
                latest[me] = said["model"]
                time.sleep(0.01)
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(latest))]
    for thread in threads: thread.start()
    took = []
    try:
        for change, then in ((partial(promote, version="v1"), "v1"), (rollback, "v0"), (rollback, "v1")):
            change(production[1], NAME)
            start = time.perf_counter()
            while set(latest) != {f"{NAME}:{then}"}:
                assert time.perf_counter() < start + 120, latest
                time.sleep(0.02)
            took.append(time.perf_counter() - start)
    finally:
        over.set()
        for thread in threads: thread.join()
    assert not wrong, wrong[:3]
    assert min(took) < 5 + 2 * pace, "the slowest one may have met a busy machine"


def test_a_stream_goes_over_to_the_new_version_between_two_batches(production):
    predictor = Predictor(settings=production[0], follow=False)
    def images():
        for number in range(20 * BATCH):
            if number == 10 * BATCH:
                promote(production[1], NAME, "v1")
                predictor.refresh()
            yield data
    data = picture("red", 0)
    said = [row["model"] for row in predictor.predict(images())]
    assert len(said) == 20 * BATCH and said == sorted(said) and {said[0], said[-1]} == {f"{NAME}:v0", f"{NAME}:v1"}


def test_a_version_given_by_number_is_kept(production):
    predictor = Predictor("faces", "v1", production[0])
    promote(production[1], NAME, "v0")
    predictor.refresh()
    assert predictor.version == f"{NAME}:v1" and not [t for t in threading.enumerate() if t.name == "predictor"]
    with pytest.raises(UserError, match="faces-model:v99"): Predictor(model="v99", settings=production[0])


@pytest.mark.parametrize("damage", ["weights", "card", "gone from the store"])
def test_a_version_that_cannot_be_taken_into_use_leaves_the_old_one_answering(production, tmp_path, damage):
    settings, tracker = production
    folder, data = bundle(tmp_path / "model", 7 + len(damage)), picture("red", 0)
    if damage == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5000])
    if damage == "card": (folder / "model.json").write_text("{}")
    bad = log(tracker, folder)
    if damage == "gone from the store":
        weights = tracker._backend.files(bad.ref)["model.safetensors"]     # its card is that of other versions, too
        weights.chmod(0o644)
        weights.unlink()
    predictor = Predictor(settings=settings, follow=False)
    before = predictor.predict_one(data)
    promote(tracker, NAME, bad.version)
    with pytest.warns(UserWarning, match=f"{bad.ref} cannot be taken into use .*; {NAME}:v0 goes on answering"):
        predictor.refresh()
    predictor.refresh()  # not tried again at once
    assert predictor.predict_one(data) == before and before["model"] == f"{NAME}:v0"
    promote(tracker, NAME, "v1")
    predictor.refresh()
    assert predictor.predict_one(data)["model"] == predictor.version == f"{NAME}:v1"


def test_a_tracker_out_of_reach_does_not_disturb(production, monkeypatch):
    predictor, data = Predictor(settings=production[0], follow=False), picture("red", 0)
    monkeypatch.setattr(production[1]._backend.storage, "get_artifact_manifest", lambda *a: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"): predictor.refresh()
    assert predictor.predict_one(data)["model"] == f"{NAME}:v0"


def test_a_predictor_that_nobody_uses_goes_away_with_its_thread(production):
    predictor = Predictor(settings=production[0])
    [thread] = [t for t in threading.enumerate() if t.name == "predictor"]
    del predictor
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_process_ends_in_order_while_a_version_is_being_loaded(production):
    code = """
import sys
from nbs_lib.serving import predictor
from nbs_lib.tracking.promotion import promote
predictor.POLL = 0.01
follower = predictor.Predictor()
load, begun = predictor._load_version, predictor.threading.Event()
def slow(*a):
    begun.set()
    return load(*a)
predictor._load_version = slow
promote(follower._tracker, "faces-model", "v1")
assert begun.wait(120)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_wandb_is_followed_too(wandb_server, tmp_path):
    code = f"""
import sys, time
from functools import partial
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_data import picture
from small_models import *
from nbs_lib.tracking.promotion import rollback
from nbs_lib.serving.predictor import Predictor
tracker = open_tracker()
for seed in (0, 1): log(tracker, bundle(Path("model") / str(seed), seed))
promote(tracker, NAME, "v0")
predictor, data, other = Predictor(), picture("red", 0), open_tracker()
for change, then in ((partial(promote, version="v1"), "v1"), (rollback, "v0")):
    assert predictor.predict_one(data)["model"] != NAME + ":" + then
    change(other, NAME)
    start = time.perf_counter()
    while predictor.predict_one(data)["model"] != NAME + ":" + then:
        assert time.perf_counter() < start + 120
        time.sleep(0.02)
"""
    env = {n: v for n, v in os.environ.items()
           if not n.startswith(("LOOPBOOK_", "WANDB_", "TRACKIO_"))} | wandb_server.env
    env |= {"LOOPBOOK_HOME": str(tmp_path), "LOOPBOOK_TRACKING__BACKEND": "wandb", "LOOPBOOK_PROJECT__NAME": "followed"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path,
                          env=env)
    assert done.returncode == 0, done.stderr[-3000:]


# One image, many images

def test_threads_that_meet_at_the_first_request_build_one_engine(project, monkeypatch):
    from nbs_lib.models import classifier as models
    built, engine = [], models.Engine
    def slow(*args):
        built.append(args)
        time.sleep(0.2)
        return engine(*args)
    monkeypatch.setattr(models, "Engine", slow)
    model, data, said = load_model(project[1].download(f"{NAME}:v0")), picture("red", 0), []
    threads = [threading.Thread(target=lambda: said.append(model.predict_one(data))) for _ in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(built) == 1 and len(said) == 6 and all(answer == said[0] for answer in said)


def test_a_broken_image_is_an_error_in_its_place(production, tmp_path):
    bomb, big = io.BytesIO(), tmp_path / "big.jpg"
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    with open(big, "wb") as file: file.truncate(60_000_000)
    (tmp_path / "good.jpg").write_bytes(picture("red", 0))
    images = [picture("red", 0), b"", bomb.getvalue(), picture("blue", 1)[:500], big, tmp_path / "nowhere.jpg",
              tmp_path, tmp_path / "good.jpg"]
    predictor = Predictor(settings=production[0])
    said = list(predictor.predict(images))
    assert ["error" in row for row in said] == [False] + [True] * 6 + [False] and said[0] == said[-1]
    for row, word in zip(said[1:], ("empty", "megapixels", "", "60.0 MB, allowed are 50", "No such file", "directory"),
                         strict=False):
        assert word in row["error"]
    with pytest.raises(BadImage, match="megapixels"): predictor.predict_one(bomb.getvalue())
    with pytest.raises(BadImage): predictor.predict_one(picture("blue", 1)[:500])
    assert list(predictor.predict([])) == []
    assert [row.keys() for row in predictor.predict([b""])] == [{"model", "error"}]


def test_a_stream_is_read_only_some_batches_ahead(production):
    taken, data = [], picture("red", 0)
    def endless():
        while True:
            taken.append(1)
            yield data
    stream = Predictor(settings=production[0]).predict(endless())
    for _ in range(3): next(stream)
    assert len(taken) <= BATCH * (2 * os.cpu_count() + 2)
    stream.close()


def test_pixels_are_those_of_torchvision():
    "The network's input is what torchvision's own transform gives."
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    from nbs_lib.data.images import decode_rgb
    how = preprocessing_of(create_backbone("tf_efficientnet_lite0", pretrained=False))
    for width, height in ((300, 200), (123, 457), (40, 40), (1, 9), (900, 5)):
        file = io.BytesIO()
        noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "JPEG")
        image, side = decode_rgb(file.getvalue()), max(1, round(min(width, height) * how.crop))
        wanted = F.resized_crop(image, (height - side) // 2, (width - side) // 2, side, side, [how.size] * 2,
                                InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(preprocess(file.getvalue(), how), wanted)


def test_preprocessing_leaves_torch_threads_alone():
    "Each of torch's threads that wakes up for a few pixels stands in the way of the network's."
    code = """
import psutil, torch
from small_data import picture
from nbs_lib.data.images import preprocess, Preprocessing
torch.set_num_threads(8)
how, data = Preprocessing(240, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3), picture("red", 0, 700)
before = psutil.Process().num_threads()
for _ in range(3): preprocess(data, how)
print(psutil.Process().num_threads() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent,
                          check=True)
    assert done.stdout.strip() == "0"
