"""The `loopbook` command: exit codes, what goes to which stream, predictions and decisions by hand."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

LOOPBOOK = [sys.executable, "-c", "from nbs_lib.cli.main import main; main()"]


def loopbook(*words, **env):
    return subprocess.run([*LOOPBOOK, *map(str, words)], capture_output=True, text=True, timeout=120,
                          env=os.environ | env)


@pytest.fixture
def notebook(tmp_path):
    nb = new_notebook(cells=[new_code_cell("x: float = 1.0\nflag: bool = True", metadata={"tags": ["parameters"]}),
                             new_code_cell("print(1 / x, flag)")])
    nbformat.write(nb, tmp_path / "10_invert.ipynb")
    return tmp_path / "10_invert.ipynb"


def test_run(home, notebook):
    done = loopbook("run", notebook, "-p", "x", "-4", "-p", "flag", "false", "--json")
    record = json.loads(done.stdout)
    assert done.returncode == 0 and record["status"] == "completed"
    assert record["parameters"] == {"x": -4.0, "flag": False}
    assert record["step"] == "invert" and record["seconds"] > 0
    assert Path(record["folder"], "log.txt").read_text() == "-0.25 False\n" and "completed" in done.stderr
    plain = loopbook("run", notebook)
    assert plain.returncode == 0 and Path(plain.stdout.strip()).read_text().startswith("<!DOCTYPE html>")


def test_a_step_waits_for_who_is_writing_and_another_notebook_does_not(home, notebook):
    step = notebook.rename(notebook.with_name("31_train.ipynb"))
    held = ("import sys; from nbs_lib.runs.writer import writer\n"
            "with writer('the loop of somebody'): print('in', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as holder:
        holder.stdout.readline()
        assert loopbook("run", step.rename(notebook)).returncode == 0
        with subprocess.Popen([*LOOPBOOK, "run", notebook.rename(step)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as waiting:
            assert "the loop of somebody" in (said := waiting.stderr.readline())
            assert said.endswith("is writing here; waiting\n")
            assert waiting.poll() is None and len(json.loads(loopbook("runs", "--json").stdout)) == 1
            holder.stdin.close()
            waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert [r["step"] for r in json.loads(loopbook("runs", "--json").stdout)] == ["train", "invert"]


def test_failed_run(home, notebook):
    done = loopbook("run", notebook, "-p", "x", "0", "--json")
    record = json.loads(done.stdout)
    assert done.returncode == 1 and record["status"] == "failed"
    assert record["error"] == "ZeroDivisionError: float division by zero"
    assert "ZeroDivisionError: float division by zero" in done.stderr and record["folder"] in done.stderr
    assert "Traceback" not in done.stderr
    listed = json.loads(loopbook("runs", "--json").stdout)
    assert [r["id"] for r in listed] == [record["id"]] and "ZeroDivisionError" in loopbook("runs").stdout


@pytest.mark.parametrize("words, said", [
    (["run", "NOTEBOOK", "-p", "y", "1"], "parameter 'y'"), (["run", "NOTEBOOK", "-p", "x", "one"], "wants float"),
    (["run", "nowhere"], "neither a file nor a step"),
    (["run", "train", "-p", "mode", "headd"], "parameter mode = 'headd' is not allowed; allowed is head | finetune"),
    (["run", "evaluate", "-p", "recipe", "face"], "did you mean 'faces'"),
    (["run", "NOTEBOOK", "--kernel", "none"], "'none' is not installed"),
    (["loop", "--recipe", "face"], "did you mean 'faces'"), (["predict", "nowhere.jpg"], "no such file"),
    (["predict", "no\x1b[31mwhere.jpg"], "no\\x1b[31mwhere.jpg"),
    (["rollback"], "no previous"), (["promote", "v9"], "there is no model"),
    (["predict", "PICTURE"], "there is no model faces-model:production")])
def test_mistakes(home, notebook, tmp_path, words, said):
    from PIL import Image
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    words = [{"NOTEBOOK": notebook, "PICTURE": tmp_path / "picture.png"}.get(w, w) for w in words]
    done = loopbook(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_nothing_there_yet(home):
    assert loopbook("runs").stdout.startswith("nothing has run here yet")
    assert loopbook("runs", "--json").stdout == "[]\n"
    listed = loopbook("schedule", "--list").stdout
    assert listed.startswith("no jobs yet") and str(home / "scheduled") in listed and listed.count("\n") == 1
    assert not list(home.iterdir()), "who only looks leaves no trace"


def test_wrong_settings(home, notebook):
    (home / "settings.ini").write_text("[train]\nepochs = ten\n")
    done = loopbook("models")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "epochs" in done.stderr
    assert done.stderr.count("\n") == 1


def test_usage(home, notebook):
    for words in (["run"], ["run", notebook, "-p", "x"], ["jump"], ["predict", "a.png", "--top", "0"],
                  ["models", "--jsn"]):
        done = loopbook(*words)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "--help`" in done.stderr, words
    alone = loopbook()
    assert "rollback" in alone.stdout and alone.stderr == ""


def test_a_home_that_cannot_be_written_is_told_in_one_line(home, notebook, tmp_path):
    (tmp_path / "file").touch()
    for words in (["run", notebook], ["loop"], ["runs"]):
        done = loopbook(*words, LOOPBOOK_HOME=str(tmp_path / "file"))
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_json_has_no_value_that_only_python_reads(capsys):
    from nbs_lib.cli.terminal import print_json
    print_json({"loss": float("nan"), "more": [float("inf"), 0.5], "path": Path("a")})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": None, "more": [None, 0.5],
                                                                               "path": "a"}


def test_empty_lists(home):
    for words in (["datasets"], ["models"]):
        assert json.loads(loopbook(*words, "--json").stdout) == [] and "loopbook loop" in loopbook(*words).stdout


MADE = """
import tempfile
from pathlib import Path
from small_data import small_dataset
from nbs_lib.core.settings import load_settings
from nbs_lib.data.versions import add_version
from nbs_lib.tracking.tracker import open_tracker
settings, tracker = load_settings(), open_tracker()
with tracker.start("faces-download", "download") as run:
    def write(folder, parent): return small_dataset(folder, 12, ("red", "blue", "green"))
    add_version("faces", settings, tracker, run, write)
"""


def test_datasets_show_their_targets(home):
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n")
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", MADE], check=True, env=env)
    lines = loopbook("datasets").stdout.splitlines()
    assert "targets (classes)" in lines[0] and "faces-dataset:v0" in lines[1] and "colour (3)" in lines[1]
    assert " 12 " in lines[1]
    [version] = json.loads(loopbook("datasets", "--json").stdout)
    assert version["ref"] == "faces-dataset:v0" and version["metadata"]["classes"] == {"colour": 3}


def test_help_is_light(home):
    code = ("import sys; sys.argv = ['loopbook', '--help']\nfrom nbs_lib.cli.main import main\n"
            "try: main()\nfinally: print(*sys.modules, file=sys.stderr)")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split()
    assert len(loaded) > 100 and not {"torch", "pandas", "numpy", "papermill", "wandb", "trackio", "matplotlib",
                                      "nbs_lib.tracking.tracker"} & set(loaded)
    for command in ("run", "loop", "runs", "datasets", "models", "promote", "rollback", "predict", "dashboard"):
        done = loopbook(command, "--help", COLUMNS="200")
        assert done.returncode == 0 and f"loopbook {command}" in done.stdout and "Example" in done.stdout


MAKE = """
import pathlib, tempfile, torch
from nbs_lib.models.backbone import create_backbone, preprocessing_of
from nbs_lib.tracking.promotion import promote
from nbs_lib.models.classifier import Network, save_model
from nbs_lib.tracking.tracker import open_tracker
tracker, calm = open_tracker(), {"label": 1.0, "beard": 1.0}
card = {"backbone": "resnet10t", "mode": "finetune", "temperature": calm}
classes = {"label": ["[red]cat", "dog", "owl"], "beard": ["no", "yes"]}
with tracker.start("train", "train") as run:
    for seed in (0, 1):
        torch.manual_seed(seed)
        net, folder = create_backbone("resnet10t", pretrained=False), pathlib.Path(tempfile.mkdtemp())
        how = preprocessing_of(net, 64)
        save_model(folder, Network(net, how, classes).eval(), how, card)
        known = {"accuracy": {"label": 0.91}, "backbone": "resnet10t"}
        version = run.log_artifact("faces-model", "model", folder, known, aliases=("candidate",))
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
    def production():
        return {a: m["version"] for m in json.loads(loopbook("models", "--json", LOOPBOOK_HOME=trained).stdout)
                for a in m["aliases"]}
    first = production()
    assert first["production"] != first["candidate"] == first["latest"]
    table = loopbook("models", LOOPBOOK_HOME=trained).stdout
    assert "label 91.0%" in table and "resnet10t" in table and "production" in table
    done = loopbook("promote", "candidate", LOOPBOOK_HOME=trained)
    assert done.returncode == 0 and done.stdout == f"faces-model:{first['candidate']} is in production\n"
    assert production()["previous"] == first["production"]
    assert loopbook("rollback", LOOPBOOK_HOME=trained).stdout == f"faces-model:{first['production']} is in production\n"
    again = json.loads(loopbook("promote", f"faces-model:{first['candidate']}", "--json", LOOPBOOK_HOME=trained).stdout)
    assert again["ref"] == f"faces-model:{first['candidate']}" and "production" in again["aliases"]
    assert json.loads(loopbook("rollback", "--json", LOOPBOOK_HOME=trained).stdout)["version"] == first["production"]


@pytest.fixture
def photos(tmp_path):
    "Five good images, one broken file and one text, with names that look like markup."
    from PIL import Image
    folder = tmp_path / "photos [b]"
    (folder / "deep").mkdir(parents=True)
    for i in range(3): Image.new("RGB", (40, 30), (80 * i, 9, 9)).save(folder / "deep" / f"[red]{i}.png")
    for name in ("a.jpg", "z.jpg"): Image.new("RGB", (40, 30), "navy").save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    return folder


def test_predict_as_json(home, trained, photos):
    done = loopbook("predict", photos / "z.jpg", photos, "--json", "--top", 2, LOOPBOOK_HOME=trained)
    said = json.loads(done.stdout)
    assert done.returncode == 0 and [str(Path(row["path"]).relative_to(photos)) for row in said] == [
        "z.jpg", "a.jpg", "broken.jpg", "z.jpg", "deep/[red]0.png", "deep/[red]1.png", "deep/[red]2.png"]
    assert said[2].keys() == {"path", "model", "error"} and "broken.jpg" in done.stderr and done.stderr.count("\n") == 1
    for row in said[:2] + said[3:]:
        assert row.keys() == {"path", "model", "targets"} and row["model"].startswith("faces-model:v")
        assert list(row["targets"]) == ["label", "beard"]
        for target in row["targets"].values():
            assert target.keys() == {"class", "probability", "top"} and len(target["top"]) == 2
            assert target["top"][0] == [target["class"], target["probability"]]
            assert target["top"][0][1] >= target["top"][1][1]
        assert abs(sum(p for _, p in row["targets"]["beard"]["top"]) - 1) < 1e-5
    assert said[0]["targets"] == said[3]["targets"]


def test_predict_as_a_table(home, trained, photos):
    picture = photos / "deep" / "[red]0.png"
    table = loopbook("predict", picture, "--model", "candidate", LOOPBOOK_HOME=trained).stdout
    assert "photos [b]" in table and "[red]0.png" in table and "%" in table
    assert loopbook("predict", picture, "--model", "faces-model:v0", LOOPBOOK_HOME=trained).returncode == 0


def test_nothing_but_broken_files_is_an_error_with_all_reasons(home, trained, photos):
    unread = loopbook("predict", photos / "broken.jpg", photos / "notes.txt", LOOPBOOK_HOME=trained)
    assert unread.returncode == 2 and unread.stdout == "" and unread.stderr.count("error: ") == 2
    assert "Traceback" not in unread.stderr
    told = loopbook("predict", photos / "broken.jpg", "--json", LOOPBOOK_HOME=trained)
    assert told.returncode == 2 and [row.keys() for row in json.loads(told.stdout)] == [{"path", "model", "error"}]


@pytest.mark.parametrize("name", ["said.parquet", "said.csv"])
def test_predict_into_a_file(home, trained, photos, tmp_path, name):
    import pandas as pd
    done = loopbook("predict", photos, "--out", tmp_path / name, "--json", LOOPBOOK_HOME=trained)
    table = pd.read_parquet(tmp_path / name) if name.endswith("parquet") else pd.read_csv(tmp_path / name)
    assert done.returncode == 0 and json.loads(done.stdout) | {"model": ""} == {"out": str(tmp_path / name),
                                                                                "model": "", "images": 6,
                                                                                "unreadable": 1}
    assert list(table) == ["path", "model", "label.class", "label.probability", "beard.class", "beard.probability",
                           "error"]
    said = json.loads(loopbook("predict", photos, "--json", LOOPBOOK_HOME=trained).stdout)
    assert list(table["path"]) == [row["path"] for row in said]
    assert list(table["error"].notna()) == ["error" in row for row in said]
    good, told = table[table["error"].isna()], [row["targets"]["label"] for row in said if "targets" in row]
    assert list(good["label.class"]) == [t["class"] for t in told]
    assert all(abs(p - t["probability"]) < 1e-9 for p, t in zip(good["label.probability"], told, strict=True))
    assert {p.name for p in tmp_path.iterdir() if "said" in p.name} == {name}


@pytest.mark.parametrize("out, said", [("said.xlsx", ".parquet or .csv"), ("said", ".parquet or .csv"),
                                       ("nowhere/said.csv", "cannot be written"), ("folder.csv", "is a folder")])
def test_a_place_that_cannot_be_written_is_told_in_one_line(home, trained, photos, tmp_path, out, said):
    (tmp_path / "folder.csv").mkdir()
    done = loopbook("predict", photos, "--out", tmp_path / out, LOOPBOOK_HOME=trained)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: "), done.stderr
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_file_name_that_is_no_text(home, trained, photos, tmp_path):
    name = os.fsencode(photos) + b"/caf\xe9.jpg"
    try: os.link(photos / "a.jpg", name)
    except OSError: pytest.skip("this file system has no such names")
    assert "caf" in loopbook("predict", photos, LOOPBOOK_HOME=trained).stdout
    assert "caf" in loopbook("predict", photos, "--json", LOOPBOOK_HOME=trained).stdout
    assert loopbook("predict", photos, "--out", tmp_path / "said.csv", LOOPBOOK_HOME=trained).returncode == 0
    assert "caf" in (tmp_path / "said.csv").read_text()
