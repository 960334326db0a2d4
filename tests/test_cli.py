"""The `loopbook` command: exit codes, what goes to which stream, predictions and decisions by hand."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

LOOPBOOK = [sys.executable, "-c", "from nbs_lib.cli import main; main()"]


def loopbook(*words, **env):
    return subprocess.run([*LOOPBOOK, *map(str, words)], capture_output=True, text=True, timeout=120, env=os.environ | env)


@pytest.fixture
def notebook(tmp_path):
    nb = new_notebook(cells=[new_code_cell("x: float = 1.0\nflag: bool = True", metadata={"tags": ["parameters"]}), new_code_cell("print(1 / x, flag)")])
    nbformat.write(nb, tmp_path / "10_invert.ipynb")
    return tmp_path / "10_invert.ipynb"


def test_run(home, notebook):
    done = loopbook("run", notebook, "-p", "x", "-4", "-p", "flag", "false", "--json")
    record = json.loads(done.stdout)
    assert done.returncode == 0 and record["status"] == "completed" and record["parameters"] == {"x": -4.0, "flag": False}
    assert Path(record["folder"], "log.txt").read_text() == "-0.25 False\n" and "completed" in done.stderr
    plain = loopbook("run", notebook)
    assert plain.returncode == 0 and Path(plain.stdout.strip()).read_text().startswith("<!DOCTYPE html>")


def test_failed_run(home, notebook):
    done = loopbook("run", notebook, "-p", "x", "0", "--json")
    record = json.loads(done.stdout)
    assert done.returncode == 1 and record["status"] == "failed" and record["error"] == "ZeroDivisionError: float division by zero"
    assert "ZeroDivisionError: float division by zero" in done.stderr and record["folder"] in done.stderr and "Traceback" not in done.stderr
    listed = json.loads(loopbook("runs", "--json").stdout)
    assert [r["id"] for r in listed] == [record["id"]] and "ZeroDivisionError" in loopbook("runs").stdout


@pytest.mark.parametrize("words, said", [
    (["run", "NOTEBOOK", "-p", "y", "1"], "parameter 'y'"), (["run", "NOTEBOOK", "-p", "x", "one"], "wants float"),
    (["run", "nowhere"], "neither a file nor a step"), (["run", "NOTEBOOK", "--kernel", "none"], "'none' is not installed"),
    (["loop", "--recipe", "face"], "did you mean 'faces'"), (["predict", "nowhere.jpg"], "no such file"),
    (["rollback"], "no previous"), (["promote", "v9"], "there is no model"), (["predict", "PICTURE"], "there is no model faces-model:production")])
def test_mistakes(home, notebook, tmp_path, words, said):
    from PIL import Image
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    words = [{"NOTEBOOK": notebook, "PICTURE": tmp_path / "picture.png"}.get(w, w) for w in words]
    done = loopbook(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_wrong_settings(home, notebook):
    (home / "settings.ini").write_text("[train]\nepochs = ten\n")
    done = loopbook("models")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "epochs" in done.stderr and done.stderr.count("\n") == 1


def test_usage(home, notebook):
    for words in (["run"], ["run", notebook, "-p", "x"], ["jump"], ["predict", "a.png", "--top", "0"]):
        done = loopbook(*words)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, words


def test_empty_lists(home):
    for words in (["datasets"], ["models"]):
        assert json.loads(loopbook(*words, "--json").stdout) == [] and "loopbook loop" in loopbook(*words).stdout


def test_help_is_light(home):
    code = "import sys; sys.argv = ['loopbook', '--help']\nfrom nbs_lib.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split()
    assert len(loaded) > 100 and not {"torch", "pandas", "numpy", "papermill", "wandb", "trackio", "matplotlib", "nbs_lib.tracking"} & set(loaded)
    for command in ("run", "loop", "runs", "datasets", "models", "promote", "rollback", "predict", "dashboard"):
        done = loopbook(command, "--help", COLUMNS="200")
        assert done.returncode == 0 and f"loopbook {command}" in done.stdout and "Example" in done.stdout


MAKE = """
import pathlib, tempfile, torch
from nbs_lib.backbone import create_backbone, preprocessing_of
from nbs_lib.gate import promote
from nbs_lib.model import Network, save_model
from nbs_lib.tracking import open_tracker
tracker, card = open_tracker(), {"backbone": "resnet10t", "mode": "finetune", "temperature": {"animal": 1.0, "beard": 1.0}}
with tracker.start("train", "train") as run:
    for seed in (0, 1):
        torch.manual_seed(seed)
        net, folder = create_backbone("resnet10t", pretrained=False), pathlib.Path(tempfile.mkdtemp())
        how = preprocessing_of(net, 64)
        save_model(folder, Network(net, how, {"animal": ["[red]cat", "dog", "owl"], "beard": ["no", "yes"]}).eval(), how, card)
        version = run.log_artifact("faces-model", "model", folder, {"accuracy": {"animal": 0.91}, "backbone": "resnet10t"}, aliases=("candidate",))
        if seed == 0: promote(tracker, "faces-model", version.version)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A home with two versions of a tiny model; the first is in production, the second is the candidate."
    folder = tmp_path_factory.mktemp("trained")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LOOPBOOK_", "WANDB_", "TRACKIO_"))}
    (folder / "settings.ini").write_text("[tracking]\nbackend = trackio\n[train]\nengine = torch\nprecision = fp32\n")
    subprocess.run([sys.executable, "-c", MAKE], check=True, env=env | {"LOOPBOOK_HOME": str(folder)})
    return str(folder)


def test_models_promote_rollback(home, trained):
    def production(): return {a: m["version"] for m in json.loads(loopbook("models", "--json", LOOPBOOK_HOME=trained).stdout) for a in m["aliases"]}
    first = production()
    assert first["production"] != first["candidate"] == first["latest"]
    table = loopbook("models", LOOPBOOK_HOME=trained).stdout
    assert "animal 91.0%" in table and "resnet10t" in table and "production" in table
    done = loopbook("promote", "candidate", LOOPBOOK_HOME=trained)
    assert done.returncode == 0 and done.stdout == f"faces-model:{first['candidate']} is in production\n"
    assert production()["previous"] == first["production"]
    assert loopbook("rollback", LOOPBOOK_HOME=trained).stdout == f"faces-model:{first['production']} is in production\n"


def test_predict(home, trained, tmp_path):
    from PIL import Image
    photos = tmp_path / "photos [b]"
    for i in range(3):
        (photos / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (80 * i, 9, 9)).save(photos / "deep" / f"[red]{i}.png")
    (photos / "notes.txt").write_text("no image")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    done = loopbook("predict", photos, "--json", "--top", 2, LOOPBOOK_HOME=trained)
    said = json.loads(done.stdout)
    assert done.returncode == 0 and [Path(p["path"]).name for p in said["predictions"]] == [f"[red]{i}.png" for i in range(3)]
    assert [Path(e["path"]).name for e in said["errors"]] == ["broken.jpg"] and done.stderr.startswith("error: ") and "broken.jpg" in done.stderr
    for row in said["predictions"]:
        values = list(row["targets"]["animal"].values())
        assert len(values) == 2 and values == sorted(values, reverse=True) and abs(sum(row["targets"]["beard"].values()) - 1) < 1e-5
    table = loopbook("predict", photos / "deep" / "[red]0.png", "--model", "candidate", LOOPBOOK_HOME=trained).stdout
    assert "photos [b]" in table and "[red]0.png" in table and "%" in table
    unread = loopbook("predict", photos / "broken.jpg", photos / "notes.txt", LOOPBOOK_HOME=trained)
    assert unread.returncode == 2 and unread.stdout == "" and unread.stderr.count("error: ") == 2 and "Traceback" not in unread.stderr
