"""The schedule as its users see it: commands, the panel in JupyterLab, and the digest."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import urljoin

import pytest
from browsers import browser, chromium, jupyterlab, open_notebook, shoot
from conftest import ROOT
from schedules import (  # noqa: F401  fixtures
    CLI,
    START,
    clock,
    define,
    here,
    planned,
    until,
    write,
)
from test_loop import steps  # noqa: F401  a fixture

from nbs_lib.runs import records
from nbs_lib.schedule import slots
from nbs_lib.schedule.jobs import Job
from nbs_lib.schedule.panel import Panel


def loopbook(*words, code: int = 0) -> str:
    done = subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code == 2 else "")


def test_commands(here):
    define(here, "greet", every="1s")
    define(here, "fails", notebook="bad.ipynb", every="1s")
    assert json.loads(loopbook("schedule", "--list", "--json"))[0]["job"] == "fails"
    assert not (here / "outputs" / "schedule.sqlite").exists(), "who only looks leaves no trace"
    assert loopbook("schedule", "--once", "--json") == "[]\n"           # from now on they are known
    time.sleep(1.1)
    found = json.loads(loopbook("schedule", "--once", "--json", code=1))
    assert {s["job"]: s["status"] for s in found} == {"greet": "completed", "fails": "failed"}
    listed = loopbook("schedule", "--list")
    assert "every 1s" in listed and "ZeroDivisionError" in listed and "no daemon is running here" in listed
    assert "runs again" in loopbook("schedule", "--resume", "greet")
    assert "did you mean 'greet'" in loopbook("schedule", "--resume", "gret", code=2)
    assert "nothing new" in loopbook("watch", "--once")
    assert "job:greet@" in loopbook("runs")


def test_the_panel(here, monkeypatch):
    (here / "notebooks").mkdir()
    monkeypatch.chdir(here / "notebooks")                              # where JupyterLab runs a kernel of that folder
    define(here, "greet", every="1d")
    define(here, "broken", every="5")
    panel = Panel()
    assert panel.following is None and "No daemon" in panel.daemon.value
    def texts(): return [c.value for c in panel.grid.children if hasattr(c, "value")]
    assert "greet" in texts() and any("is not a length of time" in t for t in texts())
    panel.rows["greet"][-1].click()
    assert panel.said.value == "greet was started"
    until(lambda: not (panel.update(), panel.started)[1])
    assert any(t.startswith("completed") for t in texts())
    table = panel.table.outputs[0]["data"]["text/markdown"]
    assert "| completed |" in table and f"[report](../outputs/{records.recent()[0].id}/hello.html)" in table
    assert panel.rows["broken"][-1].disabled and not panel.rows["greet"][-1].disabled
    panel.rows["broken"][-1].click()
    assert "is not a length of time" in panel.said.value


@pytest.mark.parametrize("with_data", [False, True])
def test_the_digest_is_readable_with_and_without_anything_to_tell(here, with_data):
    from nbs_lib.runs.execute import run_notebook
    (here / "settings.ini").write_text("[schedule]\nmax_failures = 1\n")
    if with_data:
        run_notebook(here / "bad.ipynb")
        slots.sync([Job(name="sick", notebook="bad.ipynb", every="1h")], START)
        slot = slots.claim(slots.add_slot(Job(name="sick", notebook="bad.ipynb", every="1h"), START), START)
        slots.end_attempt(slot.token, "failed", "no network")
    run = run_notebook("digest")
    assert run.status == "completed", run.error
    page = (Path(run.folder) / "digest.html").read_text()
    assert run.summary["runs"] == run.summary["failed"] == with_data
    assert run.summary["paused"] == (["sick"] if with_data else [])
    assert ("ZeroDivisionError" in page
            and "no network" in page) if with_data else "no run failed, and no job is paused" in page


def test_the_notebooks_of_the_jobs_that_ship_are_there():
    assert all((ROOT / "notebooks").glob(f"*_{n}.ipynb") for n in ("download", "evaluate", "digest"))


@browser
def test_run_all_in_jupyterlab_and_run_now(here, tmp_path):
    from playwright.sync_api import expect
    for name, notebook in (("fails", "bad"), ("greet", "hello")):
        define(here, name, notebook=f"{notebook}.ipynb", every="1d")
    (here / "notebooks").mkdir()
    shutil.copy(next((ROOT / "notebooks").glob("*_schedule.ipynb")), here / "notebooks" / "schedule.ipynb")
    with jupyterlab(here, tmp_path, dict(os.environ)) as (_, address), chromium() as shown:
        page = shown.new_page(viewport={"width": 1200, "height": 1000})
        open_notebook(page, f"{address}notebooks/schedule.ipynb")
        page.locator(".widget-html-content", has_text="No daemon is running here").wait_for(timeout=300_000)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
        for n in range(2): page.get_by_role("button", name="Run now").nth(n).click()
        expect(page.locator(".widget-gridbox")).to_contain_text("ZeroDivisionError", timeout=300_000)
        expect(page.locator(".widget-gridbox")).to_contain_text("completed 20", timeout=300_000)
        expect(page.locator(".widget-output table tbody tr")).to_have_count(2, timeout=300_000)
        page.locator(".widget-output").scroll_into_view_if_needed()
        report = urljoin(page.url, page.locator(".widget-output a", has_text="report").first.get_attribute("href"))
        assert "started by job:" in page.request.get(report, params={"token": "tok"}).text()
        shoot(page, "schedule")
    assert {s.job: s.status for s in slots.history()} == {"greet": "completed", "fails": "failed"}
