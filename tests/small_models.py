"""A project with two versions of a model that nobody trained."""
import os
import sys
from pathlib import Path

import pytest
import torch

from nbs_lib.core.settings import load_settings
from nbs_lib.models.backbone import create_backbone, preprocessing_of
from nbs_lib.models.classifier import Network, load_model, save_model
from nbs_lib.tracking.promotion import promote
from nbs_lib.tracking.tracker import open_tracker

NAME = "faces-model"


def forget_trackio():
    "Trackio stores in one folder per process: imported again, it takes that of the home there is then."
    for name in [m for m in list(sys.modules) if m.partition(".")[0] == "trackio"]: del sys.modules[name]


def bundle(folder: Path, seed: int) -> Path:
    "A model on real weights with heads drawn by `seed`."
    backbone = create_backbone("tf_efficientnet_lite0")
    how = preprocessing_of(backbone, 96)
    torch.manual_seed(seed)
    network = Network(backbone, how, {"colour": ["blue", "green", "red"], "size": ["big", "small"]}).eval()
    card = {"backbone": "tf_efficientnet_lite0", "mode": "head", "temperature": {"colour": 1.0, "size": 2.0}}
    return save_model(folder, network, how, card)


def log(tracker, folder: Path):
    with tracker.start("train", "train") as run: return run.log_artifact(NAME, "model", folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "Settings and tracker of a home with two versions."
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("LOOPBOOK_", "WANDB_", "TRACKIO_"))]: patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("LOOPBOOK_HOME", str(home))
        (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n")
        forget_trackio()
        settings = load_settings()
        tracker = open_tracker(settings)
        for seed in (0, 1): log(tracker, bundle(home / f"model {seed}", seed))
        yield settings, tracker
        forget_trackio()


@pytest.fixture
def production(project):
    "The same with v0 in production, v1 before it."
    settings, tracker = project
    promote(tracker, NAME, "v1")
    promote(tracker, NAME, "v0")
    return settings, tracker


def own_answers(project, version: str, images: list[bytes]) -> list[dict]:
    model = load_model(project[1].download(f"{NAME}:{version}"))
    return [model.predict_one(data) for data in images]
