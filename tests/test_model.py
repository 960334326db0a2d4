"""Backbones, engines, feature cache and model bundles with things that go wrong."""
import json
import pickle
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_data import picture, small_dataset

from nbs_lib.core.errors import UserError
from nbs_lib.data.images import BadImage, Preprocessing, preprocess
from nbs_lib.models import engine, features
from nbs_lib.models.backbone import create_backbone, preprocessing_of
from nbs_lib.models.classifier import Network, load_model, predict_dataset, save_model

HOW = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def bundle(home):
    torch.manual_seed(0)
    network = Network(create_backbone("tf_efficientnet_lite0", pretrained=False), HOW,
                      {"colour": ["blue", "red"], "size": ["big", "small"]})
    card = {"backbone": "tf_efficientnet_lite0", "mode": "head", "temperature": {"colour": 2.0, "size": 1.0}}
    return save_model(home / "model", network.eval(), HOW, card)


def test_weights_that_no_hub_gives(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error: create_backbone("resnet18")
    assert all(word in str(error.value) for word in ("resnet18", "weights =", "tf_efficientnet_lite0"))


def test_weights_from_a_file(home, tmp_path):
    packaged = create_backbone("tf_efficientnet_lite0")
    save_file({k: v.contiguous() for k, v in packaged.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = create_backbone("tf_efficientnet_lite0", str(tmp_path / "w.safetensors"))
    pairs = zip(packaged.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UserError, match="does not fit"):
        create_backbone("tf_efficientnet_lite1", str(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="weights = "):
        create_backbone("tf_efficientnet_lite0", str(tmp_path / "missing.safetensors"))


def test_a_pickle_is_never_loaded(home, tmp_path, bundle):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "sprung"), "w"))
    (tmp_path / "w.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError): create_backbone("tf_efficientnet_lite0", str(tmp_path / "w.safetensors"))
    (bundle / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="damaged"): load_model(bundle)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage", ["cut", "no card", "card of another format", "missing tensor"])
def test_a_damaged_bundle_is_refused(bundle, damage):
    weights, card = bundle / "model.safetensors", bundle / "model.json"
    if damage == "cut": weights.write_bytes(weights.read_bytes()[:-1000])
    if damage == "no card": card.unlink()
    if damage == "card of another format": card.write_text(json.dumps(json.loads(card.read_text()) | {"format": 99}))
    if damage == "missing tensor":
        save_file({k: v for k, v in load_file(weights).items() if "heads.0" not in k}, weights)
    with pytest.raises(UserError, match=str(bundle)): load_model(bundle)


def test_prediction_needs_nothing_but_the_bundle(bundle, tmp_path, monkeypatch):
    first = load_model(bundle).predict_one(picture("red", 1))
    monkeypatch.setenv("LOOPBOOK_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("nbs_lib.models.backbone.packaged_weights",
                        lambda name: pytest.fail("the bundle has the weights"))
    moved = bundle.rename(tmp_path / "moved")
    assert load_model(moved).predict_one(picture("red", 1)) == first


def test_an_image_gets_the_same_answer_alone_and_in_company(bundle):
    model, images = load_model(bundle), [picture("red", i) for i in range(7)]
    together = list(model.predict(images, batch_size=3))
    for image, answer in zip(images, together, strict=True):
        assert list(model.predict([image], batch_size=3)) == [answer]
        alone = model.predict_one(image)
        assert alone.keys() == answer.keys()
        assert all(abs(alone[t][c] - answer[t][c]) < 0.03 for t in alone for c in alone[t])
        for table in answer.values():
            assert abs(sum(table.values()) - 1) < 1e-9 and list(table.values()) == sorted(table.values(), reverse=True)


def test_a_bad_image_is_an_error_and_not_an_answer(bundle):
    model = load_model(bundle)
    for bad in (b"", b"hello", picture("red", 0)[:300]):
        with pytest.raises(BadImage): model.predict_one(bad)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 400), (3000, 20), (48, 48)])
def test_every_shape_becomes_the_network_input(width, height):
    import io

    from PIL import Image
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    pixels = preprocess(file.getvalue(), HOW)
    assert pixels.shape == (3, 32, 32) and int(pixels.float().std(dim=(1, 2)).max()) == 0


def test_engines_agree_on_a_real_backbone(home):
    backbone = create_backbone("tf_efficientnet_lite0")
    how = preprocessing_of(backbone, 96)
    from nbs_lib.models.classifier import Body
    body = Body(backbone, how).eval()
    images = np.stack([preprocess(picture("red", i, 120), how).numpy() for i in range(4)])
    results = [engine.Engine(body, 96, engine.Plan("cpu", *plan), 4)(images)
               for plan in (("torch", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))]
    def cosine(a, b): return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine(results[0], results[1]).min() > 0.9999 and cosine(results[0], results[2]).min() > 0.99


@pytest.mark.parametrize("runs_on", ["torch", "openvino"])
def test_an_engine_takes_any_number_of_images_and_their_company_does_not_matter(home, runs_on):
    from nbs_lib.models.classifier import Body
    body = Body(create_backbone("tf_efficientnet_lite0", pretrained=False), HOW).eval()
    run = engine.Engine(body, 32, engine.Plan("cpu", runs_on, "fp32"), 6)
    images = np.random.default_rng(0).integers(0, 256, (13, 3, 32, 32), dtype=np.uint8)
    together = run(images)
    assert together.shape == (13, 1280)
    for first, last in ((0, 1), (5, 7), (12, 13), (3, 13)):
        assert np.array_equal(run(images[first:last]), together[first:last])


def test_a_classifier_says_what_its_network_says(bundle):
    model = load_model(bundle, "cpu", "torch", "fp32")
    pixels = np.stack([preprocess(picture("red", i), HOW).numpy() for i in range(3)])
    with torch.inference_mode(): logits = model.network(torch.from_numpy(pixels))
    for row, said in zip(logits, model.answers(pixels, 4), strict=True):
        wanted = dict(zip(("blue", "red"), (row[:2] / 2).softmax(0).tolist(), strict=True))
        wanted |= dict(zip(("big", "small"), row[2:].softmax(0).tolist(), strict=True))
        assert all(abs(wanted[c] - p) < 1e-4 for table in said.values() for c, p in table.items())


@pytest.mark.parametrize("wanted", [dict(device="cuda"), dict(device="cpu", precision="fp16"),
                                    dict(device="mps", engine="openvino")])
def test_what_this_machine_cannot_run_is_refused(wanted):
    if wanted["device"] == "cuda" and torch.cuda.is_available(): pytest.skip("there is a CUDA device here")
    with pytest.raises(UserError, match="use"): engine.choose(**wanted)


FIRST_LOOKS = """
import sys, threading
from nbs_lib.core.light_imports import load_openvino
openvino, together = load_openvino(), threading.Barrier(2)
sys.setswitchinterval(1e-6)
def first_look():
    together.wait()
    openvino.Type.u8.to_dtype()
threads = [threading.Thread(target=first_look) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""

def test_openvino_in_two_threads_at_once():
    # as two threads' first answers are: each waited for the other, with the interpreter's lock held
    subprocess.run([sys.executable, "-c", FIRST_LOOKS], check=True, timeout=300)


def test_without_openvino_torch_runs(monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert engine.choose("cpu").engine == "torch"


def test_no_image_is_embedded_twice_even_by_two_at_once(home, request):
    data = small_dataset(home / "data.set", 24)
    backbone = create_backbone("tf_efficientnet_lite0", pretrained=False)
    from nbs_lib.models.classifier import Body
    body, plan, ids = Body(backbone, HOW), engine.choose("cpu", "torch", "fp32"), list(data.rows["id"])
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)  # threads that share a network's weights meet in the middle of a change
    results = []
    threads = [threading.Thread(target=lambda: results.append(features.embed(body, HOW, plan, data, ids, 8)))
               for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(results) == 2 and np.array_equal(results[0][0], results[1][0])
    again, computed = features.embed(body, HOW, plan, data, ids[::-1], 8)
    assert computed == 0 and np.array_equal(again, results[0][0][::-1])
    child = small_dataset(home / "child", 5, first=1000, parent=data)
    assert features.embed(body, HOW, plan, child, list(child.rows["id"]), 8)[1] == 5


def test_a_killed_embedding_keeps_what_it_had(home, monkeypatch):
    data = small_dataset(home / "data.set", 24)
    from nbs_lib.models.classifier import Body
    body = Body(create_backbone("tf_efficientnet_lite0", pretrained=False), HOW)
    plan = engine.choose("cpu", "torch", "fp32")
    ids = list(data.rows["id"])
    stored, put = [], features.VectorCache.put
    def dies(self, ids, vectors):
        if len(stored) == 2: raise KeyboardInterrupt
        stored.append(ids)
        put(self, ids, vectors)
    with monkeypatch.context() as patch:
        patch.setattr(features.VectorCache, "put", dies)
        with pytest.raises(KeyboardInterrupt): features.embed(body, HOW, plan, data, ids, 8)
    assert features.embed(body, HOW, plan, data, ids, 8)[1] == 24 - 16


def test_heads_share_the_features_of_their_backbone(bundle, home):
    data = small_dataset(home / "data.set", 10)
    model, ids = load_model(bundle), list(data.rows["id"])
    _, computed = predict_dataset(model, data, ids)
    model.network.heads[0].weight.data += 1
    tables, again = predict_dataset(model, data, ids)
    assert (computed, again) == (10, 0) and tables["size"].shape == (10, 2)
    assert predict_dataset(model, data, [])[0]["size"].shape == (0, 2)


FREED = """
import gc, signal, subprocess, threading
import torch
from nbs_lib.models.backbone import create_backbone, preprocessing_of
from nbs_lib.models.engine import choose, Engine
from nbs_lib.models.classifier import Body
told = []
signal.signal(signal.SIGCHLD, lambda *_: told.append("handled"))
backbone = create_backbone("tf_efficientnet_lite0", pretrained=False)
size = preprocessing_of(backbone).size
engines = [Engine(Body(backbone, preprocessing_of(backbone)), size, choose(), 1)]
engines[0](torch.zeros(1, 3, size, size, dtype=torch.uint8).numpy())
thread = threading.Thread(target=lambda: (engines.clear(), gc.collect()))
thread.start(), thread.join()
subprocess.run(["true"])
assert told == ["handled"]
"""


def test_signals_are_handled_after_another_thread_has_freed_an_engine(home):
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-1000:])
