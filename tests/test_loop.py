"""The loop: what is run again, what is skipped, where it stops, and that there is only one at a time."""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from nbs_lib.core.errors import UserError
from nbs_lib.loop import loop as loops
from nbs_lib.loop.changes import Step, done_before
from nbs_lib.loop.loop import run_loop
from nbs_lib.runs import records
from nbs_lib.tracking.promotion import promote
from nbs_lib.tracking.tracker import open_tracker

FETCH = """
import os, pathlib, tempfile
from nbs_lib.tracking.tracker import open_tracker
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "rows.txt").write_text(pathlib.Path(os.environ["LOOPBOOK_HOME"], "rows.txt").read_text())
with open_tracker().start("fetch", "download") as run: run.log_artifact(f"{recipe}-dataset", "dataset", folder, {"rows": 3})
"""
FIT = """
import os, pathlib, tempfile
from nbs_lib.tracking.tracker import open_tracker
folder = pathlib.Path(tempfile.mkdtemp())
with open_tracker().start("fit", "train") as run:
    data = run.use(f"{recipe}-dataset:latest")
    (folder / "model.txt").write_text(f"{data.ref} {rate}")
    run.log_artifact(f"{recipe}-model", "model", folder, {"accuracy": {"beard": 0.9}}, aliases=("candidate",))
"""
JUDGE = """
import json, os, pathlib
said = {"accuracy": {"[beard]": 0.9}, "decision": "keep", "reasons": ["too [bold]few[/bold]"], "production": None}
pathlib.Path(os.environ["LOOPBOOK_RUN_DIR"], "result.json").write_text(json.dumps({"summary": said}))
"""


def forget_trackio():
    "Trackio stores in one folder per process, said when it is imported."
    for name in [m for m in list(sys.modules) if m.partition(".")[0] == "trackio"]: del sys.modules[name]


@pytest.fixture
def steps(home, tmp_path, monkeypatch):
    "Three tiny steps, a tracker of their own, and the file `rows.txt` as their source."
    def write(name, code, parameters="recipe: str = ''"):
        nb = new_notebook(cells=[new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(code)])
        nbformat.write(nb, tmp_path / name)
        return tmp_path / name
    (home / "rows.txt").write_text("1 2 3")
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n")
    table = (Step(write("30_fetch.ipynb", FETCH), keys=("source", "images")),
             Step(write("31_fit.ipynb", FIT, "recipe: str = ''\nrate: float = 1.0"), inputs=("{recipe}-dataset:latest",), keys=("epochs",)),
             Step(write("41_judge.ipynb", JUDGE), inputs=("{recipe}-dataset:latest", "{recipe}-model:candidate"), sections=("gate",)))
    monkeypatch.setattr(loops, "STEPS", table)
    forget_trackio()
    yield write
    forget_trackio()


def statuses(loop): return [r.status for r in loop.steps]


def test_skips_what_has_not_changed(steps, home, monkeypatch):
    seen = []
    first = run_loop(on_step=lambda name, run: seen.append((name, run and run.status)))
    assert statuses(first) == ["completed"] * 3 and first.status == "completed", [r.error for r in first.steps]
    assert seen == [(n, s) for n in ("fetch", "fit", "judge") for s in (None, "completed")]
    assert {r.group for r in first.steps} == {first.group} == {r.group for r in records.recent()} and first.recipe == "faces"
    assert first.steps[1].inputs == first.steps[0].outputs != []

    again = run_loop()
    assert statuses(again) == ["skipped"] * 3 and len(records.recent()) == 3
    assert again.steps[2].summary == first.steps[2].summary

    promote(open_tracker(), "faces-model", "candidate")             # by hand: the loop does not mind, and so does not undo it
    assert statuses(run_loop()) == ["skipped"] * 3
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n[gate]\nmin_accuracy = 0.5\n")
    assert statuses(run_loop()) == ["skipped", "skipped", "completed"]
    monkeypatch.setenv("LOOPBOOK_TRAIN__EPOCHS", "3")               # the model comes out the same: a known version
    assert statuses(run_loop()) == ["skipped", "completed", "skipped"]
    steps("31_fit.ipynb", FIT, "recipe: str = ''\nrate: float = 2.0")
    assert statuses(run_loop()) == ["skipped", "completed", "completed"]
    assert done_before(loops.STEPS[0].notebook, {"recipe": "birds"}, records.last_success(loops.STEPS[0].notebook).fingerprint, open_tracker()) is None

    shutil.rmtree(home / "data" / "tracking")
    forget_trackio()
    assert statuses(run_loop()) == ["completed"] * 3                # what it had made is gone


def test_unknown_recipe(home):
    with pytest.raises(UserError, match="did you mean 'faces'"): run_loop("face")


def test_stops_at_the_first_failure_and_goes_on_from_there(steps):
    steps("31_fit.ipynb", "raise OSError('no space')")
    loop = run_loop()
    assert statuses(loop) == ["completed", "failed"] and loop.status == "failed" and loop.steps[1].error == "OSError: no space"
    steps("31_fit.ipynb", FIT, "recipe: str = ''\nrate: float = 1.0")
    assert statuses(run_loop()) == ["skipped", "completed", "completed"]


def test_one_at_a_time(steps, home):
    code = "import time; from nbs_lib.runs.writer import writer\nwith writer('20261121T053000-loop-a1b2'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        try:
            with pytest.raises(UserError, match="loop-a1b2 .*is writing here"): run_loop()
        finally: holder.kill()
        assert time.monotonic() - began < 30 and not records.recent(), "it has not waited for the 60 s that the other one needs"


def test_time_is_for_the_whole_loop(steps):
    began = time.monotonic()
    run_loop()
    enough = 2 * (time.monotonic() - began)                         # for one step, where all three have taken half of it
    steps("31_fit.ipynb", "import time; time.sleep(3000)", "recipe: str = ''\nrate: float = 1.0")
    loop = run_loop(force=True, timeout=enough)
    assert statuses(loop) == ["completed", "failed"] and "timed out" in loop.steps[1].error


def test_source_signature_decides(home, steps, tmp_path, monkeypatch):
    sources = pytest.importorskip("nbs_lib.data.sources", reason="the sources of images are not there yet")
    from PIL import Image
    for i in range(4):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
    notebook = steps("30_fetch.ipynb", "print(source)", "recipe: str = ''\nsource: str | None = None")
    monkeypatch.setattr(loops, "STEPS", (Step(notebook, keys=loops.SOURCE, sections=("data",), reads_source=True),))
    assert sources.source_signature and statuses(run_loop(source=str(tmp_path / "photos"))) == ["completed"]
    assert statuses(run_loop(source=str(tmp_path / "photos"))) == ["skipped"]
    (tmp_path / "photos" / "a" / "0.png").unlink()
    assert statuses(run_loop(source=str(tmp_path / "photos"))) == ["completed"]


def test_the_real_steps_take_what_the_loop_gives():
    from nbs_lib.runs.execute import find_notebook
    from nbs_lib.runs.parameters import declared
    for step in loops.STEPS:
        try: known = declared(find_notebook(step.notebook))
        except UserError: pytest.skip(f"notebook {step.notebook} is not there yet")
        assert {"recipe"} | ({"source"} if step.reads_source else set()) <= set(known)


def test_summary_on_the_command_line(steps, capsys):
    import typer

    from nbs_lib.cli.runs import loop
    with pytest.raises(typer.Exit) as ended: loop()
    out, err = capsys.readouterr()
    assert ended.value.exit_code == 0 and "[beard]" in out and "90.0%" in out
    assert "keep: too [bold]few[/bold]" in out and "loopbook dashboard" in out and err.count("completed") == 3
    with pytest.raises(typer.Exit): loop(as_json=True)
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["status"] == "completed" and document["decision"] == "keep" and document["seconds"] > 0
    assert [s["status"] for s in document["steps"]] == ["skipped"] * 3 and err.count("unchanged") == 3
    assert Path(document["steps"][0]["folder"]).is_dir()
