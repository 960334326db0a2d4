"""The loop: what is run again, what is skipped, where it stops, and that there is only one at a time."""
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

from nbs_lib.core.errors import UserError
from nbs_lib.loop import loop as loops
from nbs_lib.loop.changes import Step, done_before
from nbs_lib.loop.loop import run_loop
from nbs_lib.loop.steps import SOURCE
from nbs_lib.runs import records
from nbs_lib.tracking.promotion import promote
from nbs_lib.tracking.tracker import open_tracker

FETCH = """
import os, pathlib, tempfile
from nbs_lib.tracking.tracker import open_tracker
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "rows.txt").write_text(pathlib.Path(os.environ["LOOPBOOK_HOME"], "rows.txt").read_text())
with open_tracker().start("fetch", "download") as run:
    run.log_artifact(f"{recipe}-dataset", "dataset", folder, {"rows": 3})
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
             Step(write("31_fit.ipynb", FIT, "recipe: str = ''\nrate: float = 1.0"),
                  inputs=("{recipe}-dataset:latest",), keys=("epochs",)),
             Step(write("41_judge.ipynb", JUDGE), inputs=("{recipe}-dataset:latest", "{recipe}-model:candidate"),
                  sections=("gate",)))
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
    assert {r.group for r in first.steps} == {first.group} == {r.group for r in records.recent()}
    assert first.recipe == "faces"
    assert first.steps[1].inputs == first.steps[0].outputs != []

    again = run_loop()
    assert statuses(again) == ["skipped"] * 3 and len(records.recent()) == 3
    assert again.steps[2].summary == first.steps[2].summary

    # by hand: the loop does not mind, and so does not undo it
    promote(open_tracker(), "faces-model", "candidate")
    assert statuses(run_loop()) == ["skipped"] * 3
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n[gate]\nmin_accuracy = 0.5\n")
    assert statuses(run_loop()) == ["skipped", "skipped", "completed"]
    monkeypatch.setenv("LOOPBOOK_TRAIN__EPOCHS", "3")               # the model comes out the same: a known version
    assert statuses(run_loop()) == ["skipped", "completed", "skipped"]
    steps("31_fit.ipynb", FIT, "recipe: str = ''\nrate: float = 2.0")
    assert statuses(run_loop()) == ["skipped", "completed", "completed"]
    assert done_before(loops.STEPS[0].notebook, {"recipe": "birds"},
                       records.last_success(loops.STEPS[0].notebook).fingerprint, open_tracker()) is None

    shutil.rmtree(home / "data" / "tracking")
    forget_trackio()
    assert statuses(run_loop()) == ["completed"] * 3                # what it had made is gone


def test_unknown_recipe(home):
    with pytest.raises(UserError, match="did you mean 'faces'"): run_loop("face")


def test_stops_at_the_first_failure_and_goes_on_from_there(steps):
    steps("31_fit.ipynb", "raise OSError('no space')")
    loop = run_loop()
    assert statuses(loop) == ["completed", "failed"] and loop.status == "failed"
    assert loop.steps[1].error == "OSError: no space"
    steps("31_fit.ipynb", FIT, "recipe: str = ''\nrate: float = 1.0")
    assert statuses(run_loop()) == ["skipped", "completed", "completed"]


def test_one_at_a_time(steps, home):
    code = ("import time; from nbs_lib.runs.writer import writer\n"
            "with writer('20261121T053000-loop-a1b2'): print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        try:
            with pytest.raises(UserError, match="loop-a1b2 .*is writing here"): run_loop()
        finally: holder.kill()
        assert time.monotonic() - began < 30, "it has not waited for the 60 s that the other one needs"
        assert not records.recent()


def test_time_is_for_the_whole_loop(steps):
    began = time.monotonic()
    run_loop()
    enough = 2 * (time.monotonic() - began)     # for one step, where all three have taken half of it
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
    monkeypatch.setattr(loops, "STEPS", (Step(notebook, keys=SOURCE, sections=("data",), reads_source=True),))
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


# what has changed


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "Makes a copy of the repository's notebooks and module, and runs code in it as a process of its own."
    def copy():
        folder = tmp_path_factory.mktemp("checkout")
        for name in ("notebooks", "nbs_lib"):
            shutil.copytree(ROOT / name, folder / name,
                            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        return folder
    return copy


def said(checkout: Path, code: str, *words: str, **env: str):
    "What the code, run in that checkout, has printed as JSON."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_"))} | env
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=checkout, capture_output=True, text=True,
                          timeout=300,
                          env=clean | {"PYTHONPATH": str(checkout)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


STEPS_CHANGED = """
import json, sys
from nbs_lib.core.files import repository
from nbs_lib.loop.changes import code_digest
from nbs_lib.runs.execute import find_notebook
def digests(): return {s: code_digest(find_notebook(s)) for s in ("download", "merge", "train", "evaluate")}
before, changed = digests(), {}
for name in sys.argv[1:]:
    file = repository() / name
    content = file.read_bytes()
    file.write_bytes(content + b"\\n# edited\\n")
    changed[name] = [step for step, digest in digests().items() if digest != before[step]]
    file.write_bytes(content)
assert digests() == before
print(json.dumps(changed))
"""


def test_an_edit_runs_those_steps_again_that_use_what_was_edited(checkout):
    labelling = [f for f in (ROOT / "nbs_lib" / "labelling").rglob("*") if f.suffix in (".py", ".js", ".css")]
    outside = [f.relative_to(ROOT).as_posix() for f in labelling]
    outside += [f"nbs_lib/{name}.py" for name in ("runs/messages", "cli/main", "web/label_page", "schedule/daemon",
                                                  "loop/loop")]
    everywhere = ["download", "merge", "train", "evaluate"]
    inside = {"nbs_lib/data/images.py": everywhere, "nbs_lib/feedback/merge.py": ["merge"],
              "nbs_lib/models/head.py": ["train"], "nbs_lib/evaluation/gate.py": ["evaluate"]}
    found = said(checkout(), STEPS_CHANGED, "nbs_lib/data/sources.py", *inside, *outside)
    assert "download" in found.pop("nbs_lib/data/sources.py") and found == inside | {name: [] for name in outside}


CLOSURE = """
import json, sys
from pathlib import Path
from nbs_lib.core.files import repository
from nbs_lib.loop.changes import import_closure
print(json.dumps(sorted(f.relative_to(repository()).as_posix() for f in import_closure(Path(sys.argv[1])))))
"""


def test_the_closure_has_imports_inside_functions_those_by_string_and_files_that_are_named(checkout):
    place = checkout()
    probe = place / "nbs_lib" / "probe"
    probe.mkdir()
    (probe / "__init__.py").touch()
    (probe / "first.py").write_text("from .relative import x\nPAGE = 'page.html'\ndef f():\n    from nbs_lib.probe "
                                    "import inside\n    return inside\n")
    (probe / "inside.py").write_text("ENGINE = 'nbs_lib.probe.by_string:Engine'\n")
    (probe / "by_string.py").write_text("import nbs_lib.probe.plain\nTABLE = 'static/table.csv'\n")
    for name in ("relative.py", "plain.py", "unused.py", "page.html", "unused.html"):
        (probe / name).write_text("x = 1\n")
    (probe / "static").mkdir()
    (probe / "static" / "table.csv").write_text("a,b\n")
    cells = [new_code_cell("%matplotlib inline"), new_code_cell("from nbs_lib.probe.first import f")]
    nbformat.write(new_notebook(cells=cells), place / "notebooks" / "99_probe.ipynb")
    found = said(place, CLOSURE, "notebooks/99_probe.ipynb")
    names = ("by_string.py", "first.py", "inside.py", "page.html", "plain.py", "relative.py", "static/table.csv")
    assert found == [f"nbs_lib/probe/{name}" for name in names]


DONE = """
import json
from nbs_lib.core.settings import load_settings
from nbs_lib.loop.changes import done_before, fingerprint
from nbs_lib.loop.steps import STEPS
from nbs_lib.runs import records
from nbs_lib.runs.execute import find_notebook
from nbs_lib.tracking.tracker import open_tracker
notebook, parameters, tracker = find_notebook("download"), {"recipe": "faces"}, open_tracker()
mark = fingerprint(STEPS[0], notebook, parameters, load_settings(), tracker)
last = done_before(notebook, parameters, mark, tracker)
if not last: records.finish(records.begin(notebook, parameters=parameters, fingerprint=mark).id, "completed")
print(json.dumps([str(notebook), last and last.id]))
"""


def test_what_one_checkout_has_done_is_done_in_another_of_the_same_home(checkout, home):
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n")
    mine, theirs = checkout(), checkout()
    first, nothing = said(mine, DONE)
    again, run = said(theirs, DONE)
    assert nothing is None and first != again and run == records.recent()[0].id
    with open(theirs / "nbs_lib" / "data" / "sources.py", "a") as file: file.write("# edited\n")
    assert said(theirs, DONE)[1] is None and said(mine, DONE)[1] is None, "the last success is that of the edited one"


def test_records_of_a_time_when_steps_were_known_by_their_path(home):
    (home / "outputs").mkdir()
    columns = [c for c in records.Run.__dataclass_fields__ if c != "known_as"]
    row = dict.fromkeys(columns) | {"status": "completed", "inputs": "[]", "outputs": "[]", "summary": "{}",
                                    "parameters": '{"recipe": "faces"}'}
    with sqlite3.connect(home / "outputs" / "runs.sqlite") as db:
        db.execute("create table runs (" + ", ".join(f'"{c}"' for c in columns) + ", primary key (id))")
        for n, notebook in enumerate(("/old/checkout/notebooks/33_train.ipynb", "/somewhere/my.ipynb")):
            values = row | {"id": f"2026-{n}", "notebook": notebook, "folder": str(home / "outputs" / str(n)),
                            "started_at": f"2026-11-2{n}T05:30:00.000+00:00"}
            db.execute(f"insert into runs values ({', '.join('?' * len(values))})", list(values.values()))
    db.close()
    assert [r.known_as for r in records.recent()] == ["/somewhere/my.ipynb", "train"]
    train = ROOT / "notebooks" / "20_train.ipynb"
    assert records.last_success(train, recipe="faces").id == "2026-0"
    assert records.last_success(train, recipe="birds") is None
    assert records.begin(train).known_as == "train" and len(records.recent(known_as="train")) == 2
