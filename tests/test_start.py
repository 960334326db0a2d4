"""The front door: what it says of a home at each stage, that it leaves no trace, and that its links lead there."""
import os
import re
import shutil
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from small_data import picture, small_dataset
from test_loop import forget_trackio

from nbs_lib.core.settings import load_settings
from nbs_lib.feedback.store import Store
from nbs_lib.runs import records
from nbs_lib.runs.execute import run_notebook
from nbs_lib.schedule import slots
from nbs_lib.schedule.daemon import Folder, job_table
from nbs_lib.steps.start import failures, next_todo, read_state, runs_before, tracker_of
from nbs_lib.tracking.promotion import promote
from nbs_lib.tracking.tracker import open_tracker

START = ROOT / "notebooks" / "00_start.ipynb"


@pytest.fixture
def own(home):
    "A home whose tracker is Trackio."
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n[recipe.birds]\nsource = birds.zip\n")
    forget_trackio()
    yield home
    forget_trackio()


def ran(step: str, status: str = "completed", **fields) -> records.Run:
    "A record of a run of a step, with the pages that a run leaves."
    run = records.begin(next((ROOT / "notebooks").glob(f"*_{step}.ipynb")), parameters={"recipe": "faces"})
    for ending in ("html", "ipynb"): Path(run.folder, f"{step}.{ending}").write_text("a page")
    return records.finish(run.id, status, **fields)


def dataset(home: Path, rows: int) -> str:
    "A version of the dataset of faces; its reference."
    data = small_dataset(home / "drawn" / str(rows), rows)
    with open_tracker().start("faces-download", "download") as run:
        return run.log_artifact("faces-dataset", "dataset", data.folder, {"rows": rows, "classes": {"colour": 2}}).ref


def model(home: Path, trained_on: str, **metadata) -> str:
    "A version of the model of faces, the candidate; its reference."
    (home / "weights").mkdir(exist_ok=True)
    (home / "weights" / "model.txt").write_text(trained_on)
    with open_tracker().start("faces-train", "train") as run:
        return run.log_artifact("faces-model", "model", home / "weights", {"dataset": trained_on, **metadata},
                                aliases=("candidate",)).ref


def todo():
    "What the front door says is to be done."
    settings, runs = load_settings(), runs_before()
    tracker = tracker_of(settings)
    return next_todo([read_state("faces", settings, tracker, runs)], failures(runs), job_table(Folder(remember=False)))


def test_the_next_thing_to_do_at_each_stage(own):
    assert todo().step == "download" and todo().command == "make loop RECIPE=faces"
    data = dataset(own, 20)
    assert (todo().step, todo().command) == ("train", "loopbook run train -p recipe faces")
    first = model(own, data)
    assert todo().step == "evaluate" and first in todo().why
    open_tracker().annotate(first, {"decision": "keep", "accuracy": {"colour": 0.7}})
    assert "kept faces's model back" in todo().why
    promote(open_tracker(), "faces-model", "candidate")
    assert todo().step == "predict"
    newer = dataset(own, 24)
    assert todo().step == "train" and newer in todo().why
    open_tracker().annotate(model(own, newer), {"decision": "promote", "accuracy": {"colour": 0.9}})
    assert todo().step == "predict"

    store = Store("faces")
    id, _ = store.add(picture("red", 1), "a.jpg", "ada")
    assert (todo().step, todo().command) == ("feedback", "loopbook label --recipe faces") and "1 waiting" in todo().why
    store.answer(id, "ada", "new", {"colour": "red"})
    assert todo().step == "merge" and todo().why.startswith("1 answers")
    ran("merge")
    assert todo().step == "predict", "the merge has seen it"
    store.answer(id, "ada", "unknown")
    assert todo().step == "feedback" and "somebody who knows" in todo().why


def test_what_has_failed_comes_first(own):
    (own / "scheduled").mkdir()
    (own / "scheduled" / "watch.yaml").write_text("loop: true\nevery: 5m\n")
    Folder().read(datetime.now(UTC))
    assert todo().step == "download"
    run = ran("download", "failed", error="no network")
    assert todo().why == "download failed: no network" and todo().command == f"loopbook logs {run.id}"
    ran("download")
    assert todo().step == "download" and "no data yet" in todo().why, "it was mended"
    now = datetime.now(UTC)
    (own / "settings.ini").write_text("[tracking]\nbackend = trackio\n[schedule]\nmax_failures = 1\n")
    claimed = slots.claim(slots.add_slot(slots.states()["watch"].defined, now), now)
    slots.end_attempt(claimed.token, "failed", "no disk")
    assert todo().command == "loopbook schedule --resume watch" and "no disk" in todo().why
    (own / "scheduled" / "watch.yaml").write_text("loop: true\nevry: 5m\n")
    assert todo().step == "schedule" and "did you mean 'every'?" in todo().why


def outputs(notebook) -> str:
    "All that the cells of the run have shown, as HTML."
    shown = [o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])]
    return "\n".join(d.get("text/html") or d.get("text/markdown") or "" for d in shown)


def links(page: str) -> list[str]:
    return [unquote(unescape(a).partition("#")[0]) for a in re.findall(r'<a href="([^"#][^"]*)"', page)]


def executed(folder: Path):
    "The front door, run as JupyterLab does from `folder`."
    book = nbformat.read(START, as_version=4)
    NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return outputs(book)


def test_an_empty_home_stays_empty_and_is_told_how_to_begin(home):
    page = executed(ROOT / "notebooks")
    assert not list(home.iterdir())
    assert "make loop RECIPE=faces" in page and 'href="10_download.ipynb"' in page and "Nothing has run yet" in page
    assert "cats_vs_dogs" in page and "lies outside the folder that JupyterLab serves" in page and str(home) in page


@pytest.fixture
def lived(own):
    "A home in which something has happened."
    ref = model(own, dataset(own, 20))
    dataset(own, 24)
    open_tracker().annotate(ref, {"decision": "promote", "accuracy": {"<colour>": 0.934}})
    promote(open_tracker(), "faces-model", "candidate")
    (own / "scheduled").mkdir()
    (own / "scheduled" / "nightly.yaml").write_text("loop: true\ndaily: 02:30\n")
    Store("faces").add(picture("red", 1), "a.jpg", "ada")
    ran("train")
    ran("evaluate", "failed", error="<b>no</b> disk")
    return own


def check(page: str, home: Path) -> None:
    "The page tells what there is."
    assert "evaluate failed: &lt;b&gt;no&lt;/b&gt; disk" in page and "<b>no</b>" not in page
    assert 'aria-label="v0: 20 images; v1: 24 images"' in page and "2 versions, 24 images" in page
    assert "faces-model:v0" in page and "&lt;colour&gt; 93.4%" in page
    assert "birds.zip" in page
    assert "nightly" in page and "02:30" in page and "<td" in page


def test_a_report_whose_links_lead_there(lived):
    run = run_notebook("start")
    assert run.status == "completed", run.error
    page = Path(run.folder, "start.html").read_text()
    check(page, lived)
    found = links(page)
    assert all((Path(run.folder) / a).exists() for a in found), found
    names = {os.path.basename(a) for a in found}
    assert {"train.html", "train.ipynb", "evaluate.html", "30_evaluate.ipynb", "50_feedback.ipynb", "70_schedule.ipynb",
            "settings.ini"} <= names
    assert 'evaluate.html#failed"' in page


def test_links_in_jupyterlab(lived):
    page = executed(ROOT / "notebooks")
    check(page, lived)
    assert "lies outside the folder" in page and not any("outputs" in a
                                                         for a in links(page)) and f"<code>{lived / 'settings.ini'}</code>" in page
    assert all((ROOT / "notebooks" / a).exists() for a in links(page))
    (lived / "notebooks").mkdir()                          # as where the home is the folder that JupyterLab serves
    shutil.copy(START, lived / "notebooks")
    inside = executed(lived / "notebooks")
    assert "lies outside the folder" not in inside and "../settings.ini" in links(inside)
    assert any(a.startswith("../outputs/") and a.endswith("train.html") for a in links(inside))
    assert all((lived / "notebooks" / a).exists() for a in links(inside))
