"""The real loop, headless, on the embedded faces and on real photos: as a user runs it."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from browsers import OUTSIDE, browser, chromium, jupyterlab, open_notebook, shoot
from conftest import ROOT, SHARED, WANDB_SERVER
from small_data import picture

LOOPBOOK = Path(sys.executable).with_name("loopbook")
FACES = os.environ.get("FACES", "240")


def loopbook(home: Path, *words, code: int = 0, **environment):
    "What the command prints, with --json where it can; `code` is the exit code that it must end with."
    command = [LOOPBOOK, *map(str, words), *([] if words[0] in ("promote", "rollback") else ["--json"])]
    environment = OUTSIDE | {"LOOPBOOK_HOME": str(home), "NETRC": str(home / "no-netrc")} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=home, env=environment)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout + done.stderr


def faces(home: Path, *words, **environment):
    home.mkdir(exist_ok=True)
    # a few faces do not teach enough for the usual gate
    gate = {} if int(FACES) >= 1000 else {"LOOPBOOK_GATE__MIN_ACCURACY": "0.5"}
    return loopbook(home, "loop", *words, **{"LOOPBOOK_RECIPE_FACES__IMAGES": FACES}, **gate, **environment)


def summaries(answer: dict) -> dict:
    return {Path(s["notebook"]).stem.split("_")[1]: s["summary"] for s in answer["steps"]}


@pytest.fixture(scope="module")
def first(once):
    "A home in which the loop of the faces has run once, and what it printed; who changes it takes a copy."
    home, answer = once("first", lambda home: json.dumps(faces(home)))
    return home, json.loads(answer)


@pytest.fixture(scope="module")
def second(request, tmp_path_factory):
    "The same loop in another home, tracked by W&B where the server for tests is there."
    home = tmp_path_factory.mktemp("second")
    wandb = request.getfixturevalue("wandb_server").env if WANDB_SERVER.exists() else {}
    return home, faces(home, LOOPBOOK_PROJECT__NAME="whole-loop", **wandb)


def test_the_embedded_recipe_needs_nothing_and_puts_a_model_into_production(first):
    home, answer = first
    found = summaries(answer)
    assert answer["status"] == "completed" and found["download"]["rows"] == int(FACES)
    assert set(found["evaluate"]["accuracy"]) == {"beard", "moustache", "glasses", "hair_color", "hair_length"}
    assert min(found["evaluate"]["accuracy"].values()) > 0.5 and found["evaluate"]["production"] == "faces-model:v0"
    # at least: balance and samples; losses and confusion; one for each target
    plots = {"download": 2, "train": 2, "evaluate": 5}
    for step in answer["steps"]:
        folder = Path(step["folder"])
        name = Path(step["notebook"]).stem.split("_")[1]
        notebook = json.loads((folder / f"{name}.ipynb").read_text())
        assert all(c["metadata"]["papermill"]["status"] == "completed" for c in notebook["cells"])
        page = (folder / f"{name}.html").read_text()
        assert "The run" in page and page.count('<img') >= plots[name] and "Figure size" not in page
    assert sum(found[s]["images_embedded"] for s in ("train", "evaluate")) == int(FACES), "each image once"
    [model] = loopbook(home, "models")
    assert set(model["aliases"]) == {"latest", "candidate", "production"} and model["metadata"]["decision"] == "promote"


def test_names_of_classes_are_shown_as_text(tmp_path):
    home, kinds = tmp_path / "home", {"red": "<img src=x onerror=alert(1)>", "blue": "$x_$ & $^$"}
    home.mkdir()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for n in range(60):
            for kind, name in kinds.items(): archive.writestr(f"{name}/{n}.jpg", picture(kind, n))
    answer = loopbook(home, "loop", "--recipe", "cats_vs_dogs", "--source", tmp_path / "photos.zip")
    assert answer["status"] == "completed" and summaries(answer)["evaluate"]["decision"] == "promote"
    pages = [next(Path(step["folder"]).glob("*.html")).read_text() for step in answer["steps"]]
    assert not any("<img src=x" in page for page in pages) and "&lt;img src=x onerror" in pages[-1]


def test_nothing_changed_and_nothing_is_done(first, tmp_path):
    home = shutil.copytree(first[0], tmp_path / "home")
    assert [s["status"] for s in faces(home)["steps"]] == ["skipped"] * 3
    forced = faces(home, "--force")
    assert [s["status"] for s in forced["steps"]] == ["completed"] * 3
    assert len(loopbook(home, "datasets")) == len(loopbook(home, "models")) == 1, "the same content is the same version"
    assert summaries(forced)["evaluate"]["reasons"] == ["it is in production already"]


def test_the_same_seed_gives_the_same_numbers_to_the_last_digit(first, second):
    once, twice = summaries(first[1]), summaries(second[1])
    for step, keys in (("train", ["validation_accuracy"]), ("evaluate", ["accuracy", "test", "decision"])):
        for key in keys: assert once[step][key] == twice[step][key]
    def weights(home):
        return next((home / "data" / "artifacts" / "faces-model" / "v0").glob("model.safetensors")).read_bytes()
    assert weights(first[0]) == weights(second[0])


def test_every_run_and_artifact_of_a_loop_reaches_wandb(wandb_server, second):
    home, answer = second
    state = wandb_server.state("whole-loop")
    runs = {r["job_type"] if "job_type" in r else r["jobType"]: r for r in state["runs"]}
    states = [(r["name"], r["state"]) for r in state["runs"]]
    assert {"download", "train", "evaluate"} <= set(runs) and {how for _, how in states} == {"finished"}, states
    assert len({r["group"] for r in state["runs"]}) == 1
    versions = {f"{a['name'].split(':')[0]}" for a in state["artifacts"]}
    notebooks = {f"faces-{step}-notebook" for step in ("download", "train", "evaluate")}
    assert {"faces-dataset", "faces-model"} | notebooks <= versions
    [model] = [a for a in state["artifacts"] if a["name"].split(":")[0] == "faces-model"]
    assert "production" in str(model["aliases"]) and model["metadata"]["decision"] == "promote"
    assert runs["evaluate"]["summary"]["production"] == "faces-model:v0" == summaries(answer)["evaluate"]["production"]
    told = [p for p in home.rglob("*") if p.is_file() and p.suffix in (".ipynb", ".html", ".json", ".txt", ".log")]
    assert wandb_server.key not in "".join(p.read_text(errors="ignore") for p in told)


@pytest.mark.skipif(not (SHARED / "data").exists(), reason=f"no photos: {SHARED / 'data'} is missing")
def test_real_photos_growing_source_rollback_and_prediction(tmp_path):
    home, photos = tmp_path / "home", tmp_path / "my photos.zip"
    home.mkdir()
    with zipfile.ZipFile(SHARED / "data" / "cats_dogs.zip") as source:
        names = {kind: sorted(n for n in source.namelist() if n.startswith(kind))[:160] for kind in ("cat", "dog")}
        def add(first: int, last: int):
            with zipfile.ZipFile(photos, "a") as target:
                for kind in names:
                    for n in names[kind][first:last]: target.writestr(n, source.read(n))
        add(0, 120)
        words = ("loop", "--recipe", "cats_vs_dogs", "--source", "../my photos.zip")
        one = loopbook(home, *words)
        add(120, 160)
        two = loopbook(home, *words)
        picture = tmp_path / "a [red]cat.jpg"
        picture.write_bytes(source.read(names["cat"][159]))
    assert summaries(one)["evaluate"]["accuracy"]["label"] > 0.95
    assert summaries(one)["evaluate"]["decision"] == "promote"
    assert summaries(two)["download"]["rows"] == 320
    assert sum(summaries(two)[s]["images_embedded"] for s in ("train", "evaluate")) == 80, "only the new ones"
    assert "production_accuracy" in summaries(two)["evaluate"]
    loopbook(home, "promote", "v1", "--recipe", "cats_vs_dogs")
    loopbook(home, "rollback", "--recipe", "cats_vs_dogs")
    aliases = {a: m["version"] for m in loopbook(home, "models") for a in m["aliases"]} | {"candidate": ""}
    assert aliases == {"latest": "v1", "candidate": "", "previous": "v1", "production": "v0"}
    assert [s["status"] for s in loopbook(home, *words)["steps"]] == ["skipped"] * 3, "a rollback by hand stays"
    said = json.dumps(loopbook(home, "predict", picture, "--recipe", "cats_vs_dogs", "--top", "2"))
    assert '"cat"' in said and picture.name in said


def test_a_missing_source_is_said_in_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "home").mkdir()
    environment = OUTSIDE | {"LOOPBOOK_HOME": str(tmp_path / "home")}
    done = subprocess.run([LOOPBOOK, "loop", "--source", "nowhere.zip"], capture_output=True, text=True, timeout=600,
                          env=environment)
    assert done.returncode in (1, 2) and "nowhere.zip" in done.stderr
    assert not list((tmp_path / "home" / "data").rglob("*.parquet"))


@browser
def test_the_report_in_a_browser(first):
    page_file, problems, asked = Path(summaries_folder(first[1], "evaluate")) / "evaluate.html", [], []
    with chromium() as window:
        page = window.new_page(viewport={"width": 1000, "height": 1150}, device_scale_factor=1)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(page_file.as_uri())
        assert page.get_by_role("heading", name="The decision").is_visible()
        assert not page.get_by_text("calibration_error(labels").is_visible()
        page.get_by_text("How this step works").click()
        assert page.get_by_role("heading", name="How good").is_visible()
        page.get_by_text("How this step works").click()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
        shoot(page, "evaluate")
    assert not problems and all(u.startswith(("file:", "data:")) for u in asked)


@browser
def test_run_all_in_jupyterlab(first, tmp_path):
    from playwright.sync_api import expect
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    environment = OUTSIDE | {"LOOPBOOK_HOME": str(shutil.copytree(first[0], tmp_path / "home"))}
    with jupyterlab(tmp_path, tmp_path, environment) as (_, address), chromium() as window:
        page = window.new_page(viewport={"width": 1200, "height": 1000})
        open_notebook(page, f"{address}notebooks/{next((ROOT / 'notebooks').glob('*_train.ipynb')).name}")
        told = page.locator(".jp-OutputArea .jp-RenderedMarkdown", has_text="is the candidate;")
        expect(told).to_be_attached(timeout=400_000)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
        shoot(page, "jupyterlab")


def summaries_folder(answer: dict, step: str) -> str:
    return next(s["folder"] for s in answer["steps"] if Path(s["notebook"]).stem.endswith(step))
