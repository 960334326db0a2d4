"""Both ways to train, on small pictures; whole runs are in test_loop.py."""
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_data import picture, small_dataset

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import Recipe
from nbs_lib.data.dataset import Dataset, class_numbers
from nbs_lib.data.images import Preprocessing, preprocess
from nbs_lib.data.items import Item
from nbs_lib.data.write import write_version
from nbs_lib.models.backbone import create_backbone, preprocessing_of
from nbs_lib.models.classifier import Network, load_model, save_model
from nbs_lib.models.engine import choose
from nbs_lib.models.finetune import GROUPS, GroupOrder, ShardImages
from nbs_lib.steps.train import finetune, make_classifier, train_heads, train_whole

PLAIN = {"image_size": 32, "batch_size": 8, "device": "cpu", "engine": "torch", "precision": "fp32"}


def test_a_head_learns_and_is_the_same_to_the_last_bit(home):
    data, recipe, plan = small_dataset(home / "small", 40), Recipe(**PLAIN), choose("cpu", "torch", "fp32")
    first, second = (make_classifier(train_heads(data, recipe, plan), data, recipe, plan) for _ in range(2))
    assert first.card == second.card and first.card["validation"]["colour"]["accuracy"] == 1.0
    assert np.array(first.card["validation"]["colour"]["confusion"]).sum() == 6
    for name, model in (("a", first), ("b", second)): save_model(home / name, model.network, model.how, model.card)
    assert (home / "a/model.safetensors").read_bytes() == (home / "b/model.safetensors").read_bytes()
    answer = load_model(home / "a", "cpu", "torch", "fp32").predict_one(picture("red", 999))
    assert next(iter(answer["colour"])) == "red"


def test_several_targets_with_missing_labels_and_a_rare_class(home):
    def item(i):
        colour, large = ("red", "blue")[i % 2], i // 2 % 2
        size = None if i % 5 == 0 else ("small", "large")[large]
        return Item(f"{i}.jpg", picture(colour, i, 40 + 20 * large), {"colour": colour, "size": size})
    items = [item(i) for i in range(60)]
    items.append(Item("rare.jpg", picture("green", 77), {"colour": "green", "size": None}))
    data = write_version(home / "both", items, name="both", source="tests")
    recipe, plan = Recipe(**PLAIN), choose("cpu", "torch", "fp32")
    model = make_classifier(train_heads(data, recipe, plan), data, recipe, plan)
    assert model.targets == {"colour": ["blue", "green", "red"], "size": ["large", "small"]}
    assert model.card["validation"]["colour"]["accuracy"] > 0.9


def test_one_class_cannot_be_trained(home):
    data = small_dataset(home / "one", 12, kinds=("red",))
    with pytest.raises(UserError, match="colour.*at least two"):
        train_heads(data, Recipe(**PLAIN), choose("cpu", "torch", "fp32"))


def test_two_images_are_enough_to_train_something(home):
    data, recipe, plan = small_dataset(home / "two", 2), Recipe(**PLAIN), choose("cpu", "torch", "fp32")
    model = make_classifier(train_heads(data, recipe, plan), data, recipe, plan)
    assert model.card["validation"] == {} and model.card["temperature"] == {"colour": 1.0}
    with pytest.raises(UserError, match="validation"): train_whole(data, Recipe(mode="finetune", **PLAIN), plan)


FINETUNE = Recipe(mode="finetune", epochs=2, learning_rate=1e-3, patience=5, **PLAIN)
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from small_data import small_dataset
from nbs_lib.models.engine import choose
from nbs_lib.core.files import home
from nbs_lib.core.settings import Recipe
from nbs_lib.data.dataset import Dataset
from nbs_lib.steps.train import train_whole
data = Dataset(home() / "small") if (home() / "small").exists() else small_dataset(home() / "small", 40)
def show(epoch, row): print("epoch", epoch, flush=True)
trained = train_whole(data, Recipe(**json.loads({recipe!r})), choose("cpu", "torch", "fp32"), on_epoch=show)
print(json.dumps([trained.history, sum(p.double().sum().item() for p in trained.network.parameters())]))
"""


def finetune_process(home: Path) -> subprocess.Popen:
    code = SCRIPT.format(tests=str(Path(__file__).parent), recipe=FINETUNE.model_dump_json())
    environment = os.environ | {"LOOPBOOK_HOME": str(home)}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_finetuning_ends_where_an_undisturbed_one_does(home):
    for name in ("undisturbed", "killed"): (home / name).mkdir()
    whole = finetune_process(home / "undisturbed").communicate()[0].splitlines()
    assert whole[:2] == ["epoch 1", "epoch 2"]
    victim = finetune_process(home / "killed")
    assert victim.stdout.readline() == "epoch 1\n"
    time.sleep(0.3)
    victim.kill()
    victim.communicate()
    resumed = finetune_process(home / "killed").communicate()[0].splitlines()
    assert resumed[0] != "epoch 1" and json.loads(resumed[-1]) == json.loads(whole[-1])
    assert not list((home / "killed/data/cache/finetune").iterdir())


def shard_images(folder: Path, n: int, draw, how, first: int = 0) -> ShardImages:
    "A dataset version of `n` pictures of two kinds, drawn by `draw(kind, seed)`, to train on or to judge by."
    kinds = np.arange(n) % 2
    items = [Item(f"{i}.png", draw(kind, first + i), {"kind": f"kind {kind}"}) for i, kind in enumerate(kinds)]
    data = write_version(folder, items, name="kinds", source="tests")
    labels = class_numbers(data.rows, data.targets)["kind"][:, None]
    return ShardImages(data, list(data.rows["id"]), labels, how)


def test_finetuning_learns_in_two_processes(home):
    torch.manual_seed(0)
    backbone = create_backbone("tf_efficientnet_lite0")
    how = preprocessing_of(backbone, 32)
    def draw(kind, seed): return picture(("red", "blue")[kind], seed)
    train, valid = shard_images(home / "train", 32, draw, how), shard_images(home / "valid", 16, draw, how, first=32)
    network, rows = Network(backbone, how, {"colour": ["red", "blue"]}), []
    before = network.heads[0].weight.detach().clone()
    def keep(epoch, row): rows.append(epoch)
    plan = choose("cpu", "torch", "fp32")
    history = finetune(network, train, valid, FINETUNE, plan, home / "work", on_epoch=keep, processes=2)
    assert rows == [1, 2] and history[-1]["train_loss"] < history[0]["train_loss"]
    assert not torch.equal(before, network.heads[0].weight)
    assert not (home / "work").exists()


def stripes(kind: int, seed: int) -> bytes:
    "A photo-sized PNG of bright stripes: `kind` 0 lies, 1 stands."
    rng, file = np.random.default_rng(seed), io.BytesIO()
    wave = np.sin(np.indices((96, 96))[kind] / rng.uniform(3, 5) + rng.uniform(0, 6))
    pixels = wave[..., None] * rng.uniform(60, 120, 3) + 128
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_network_that_has_never_seen_anything_learns_stripes(home):
    how = Preprocessing(64, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(0)
    network = Network(create_backbone("resnet10t", pretrained=False), how, {"stripes": ["lying", "standing"]})
    recipe = Recipe(mode="finetune", epochs=4, batch_size=16, learning_rate=3e-3, crop="whole", patience=4)
    train = shard_images(home / "train", 96, stripes, how)
    valid = shard_images(home / "valid", 32, stripes, how, first=1000)
    history = finetune(network, train, valid, recipe, choose("cpu", "torch", "fp32"), home / "work")
    assert max(row["valid_accuracy"] for row in history) > 0.9


def test_a_process_holds_a_few_row_groups_and_the_order_asks_for_no_more(home):
    def draw(kind, seed): return picture(("red", "blue")[kind], seed)
    how = Preprocessing(32, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)
    shard_images(home / "many", 150, draw, how)
    [shard] = (home / "many" / "data").glob("*.parquet")
    pq.write_table(pq.read_table(shard), shard, row_group_size=3)
    data = Dataset(home / "many")
    images = ShardImages(data, list(data.rows["id"]), np.arange(150)[:, None], how)
    order, read = GroupOrder(images), 0
    assert order.groups.max() + 1 == 50 > 5 * GROUPS and sorted(order) == list(range(150))
    for position in order:
        before = set(images.cached)
        assert images[position][1] == position
        read += set(images.cached) != before
        assert len(images.cached) <= GROUPS
    assert read == 50, "each row group is read once an epoch"
    assert torch.equal(images[7][0], preprocess(data.image(data.rows["id"][7]), how))


@pytest.mark.parametrize("change", [dict(optimizer="adam", schedule="step"), dict(crop="whole", label_smoothing=0.0),
                                    dict(precision="bf16")])
def test_the_other_choices_of_finetuning(home, change):
    data = small_dataset(home / "small", 24)
    recipe = FINETUNE.model_copy(update=dict(epochs=1) | change)
    trained = train_whole(data, recipe, choose("cpu", "torch", recipe.precision))
    assert len(trained.history) == 1 and np.isfinite(trained.history[0]["train_loss"])


def test_early_stopping_keeps_the_best(home):
    data = small_dataset(home / "small", 24)
    recipe = FINETUNE.model_copy(update=dict(epochs=30, patience=2, learning_rate=0.9, optimizer="adam"))
    trained = train_whole(data, recipe, choose("cpu", "torch", "fp32"))
    losses = [row["valid_loss"] for row in trained.history]
    assert len(losses) < 30 and losses.index(min(losses)) == len(losses) - 3
