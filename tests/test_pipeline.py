"""Executing one notebook: what is kept and what is told, however it ends."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import ANY

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbs_lib.core.errors import UserError
from nbs_lib.runs import records
from nbs_lib.runs.execute import find_notebook, run_notebook
from nbs_lib.runs.parameters import checked

CLI = [sys.executable, "-c", "from nbs_lib.cli.main import main; main()"]
PARAMETERS = '''
from typing import Literal
mode: Literal["head", "finetune"] = "head"
name: None | str = None
text = "a=b # c"
epochs: int = 1
rate: float = 0.1
flag: bool = True
names: list = []
'''


@pytest.fixture
def make(tmp_path):
    "Writes a notebook of these code cells; the first is tagged `parameters` where it is not None."
    def write(*cells, parameters=None, name="10_probe.ipynb", kernel="python3", folder=tmp_path):
        made = [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters is not None else []
        nb = new_notebook(cells=[new_markdown_cell("# Probe"), *made, *map(new_code_cell, cells)])
        if kernel: nb.metadata.kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, folder / name)
        return folder / name
    return write


def cells(run) -> list[str]:
    nb = json.loads((Path(run.folder) / f"{run.step}.ipynb").read_text())
    found = [c["metadata"].get("papermill") for c in nb["cells"] if c["cell_type"] == "code"]
    return [facts["status"] for facts in found if facts]


def page(run) -> str: return (Path(run.folder) / f"{run.step}.html").read_text()


def logged(run) -> list[str]: return sorted((Path(run.folder) / "log.txt").read_text().splitlines())


def test_completed(home, make):
    code = """import os, sys
print(epochs, os.environ['LOOPBOOK_RUN_ID'], os.environ['LOOPBOOK_GROUP'], os.getcwd())
os.system('echo from a child')"""
    file = make(code, "sys.executable", parameters="epochs: int = 1")
    seen = []
    run = run_notebook(file, {"epochs": 7}, group="g1", trigger="test", on_cell=lambda *n: seen.append(n))
    assert run.status == "completed" and run.error is None and run == records.get(run.id)
    assert (run.group, run.trigger, run.parameters, run.kernel) == ("g1", "test", {"epochs": 7}, "python3")
    assert run.pid == os.getpid() and logged(run) == [f"7 {run.id} g1 {file.parent}", "from a child"]
    assert set(cells(run)) == {"completed"} and seen == [(n, 4) for n in range(1, 5)]
    assert repr(sys.executable) in page(run).replace("&#39;", "'") and 'id="failed"' not in page(run)
    assert sorted(p.name for p in Path(run.folder).iterdir()) == ["log.txt", "probe.html", "probe.ipynb"]


def test_failing_cell(home, make):
    run = run_notebook(make("print('before')", "raise ValueError('<b>no</b>\\nsecond line')", "print('after')"))
    assert (run.status, run.cell, run.error) == ("failed", "2/3", "ValueError: <b>no</b> second line")
    assert cells(run) == ["completed", "failed", "skipped"]
    assert "before" in page(run) and "&lt;b&gt;no" in page(run) and page(run).count('<section id="failed">') == 1
    assert "ValueError" in (Path(run.folder) / "log.txt").read_text()


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "import sys; sys.exit(3)", "raise SystemExit"])
def test_exit_is_no_success(home, make, code):
    run = run_notebook(make(code, "print('never')"))
    assert run.status == "failed" and run.error.startswith("SystemExit") and cells(run) == ["failed", "skipped"]


KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def test_killed_kernel(home, make):
    run = run_notebook(make("print('last words', flush=True)", KILL, "1"))
    assert run.status == "failed" and "DeadKernelError" in run.error and run.cell == "2/3"
    assert cells(run) == ["completed", "failed", "skipped"] and 'id="failed"' in page(run)


def test_cell_timeout(home, make, tmp_path):
    from nbs_lib.runs.execute import Stop, _failure
    from nbs_lib.runs.papermill_engine import papermill
    out = tmp_path / "out.ipynb"
    with open(tmp_path / "log", "w") as log, pytest.raises(papermill.PapermillExecutionError):
        notebook = make("1", "import time; time.sleep(60)", "2")
        papermill.execute_notebook(str(notebook), str(out), engine_name="loopbook", progress_bar=False,
                                   kernel_name="python3", stop=Stop("x"), env=dict(os.environ), log=log, cell_timeout=4)
    nb = json.loads(out.read_text())
    status = [c["metadata"]["papermill"]["status"] for c in nb["cells"] if c["cell_type"] == "code"]
    assert status == ["completed", "failed", "skipped"] and nb["metadata"]["papermill"]["exception"]
    assert _failure(out) == ("2/3", ANY) and _failure(out)[1].startswith("CellTimeoutError")


SLEEPERS = '''
import subprocess, time, pathlib
a = subprocess.Popen(["sleep", "300"])
b = subprocess.Popen(["sleep", "300"], start_new_session=True)
pathlib.Path("{pids}").write_text(f"{{__import__('os').getpid()}} {{a.pid}} {{b.pid}}")
{then}
'''


def gone(file: Path, within: float = 60) -> bool:
    "Whether all processes named in the file have ended."
    end = time.monotonic() + within
    def alive(pid): return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    while left := [p for p in map(int, file.read_text().split()) if alive(p)]:
        if time.monotonic() > end:
            print("left:", left)
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def enough(home, make) -> int:
    "Seconds in which a notebook has surely begun: some more than a whole one has just taken."
    began = time.monotonic()
    assert run_notebook(make("1")).status == "completed"
    return round(4 + 3 * (time.monotonic() - began))


def test_run_timeout(home, make, tmp_path, enough):
    file = make(SLEEPERS.format(pids=tmp_path / "pids", then="time.sleep(300)"), "print('never')")
    began = time.monotonic()
    run = run_notebook(file, timeout=enough)
    assert time.monotonic() - began < 3 * enough < 300
    assert (run.status, run.error, run.cell) == ("failed", f"timed out after {enough} s", "1/2")
    assert cells(run) == ["failed", "skipped"] and "KeyboardInterrupt" in page(run) and gone(tmp_path / "pids")


def test_timeout_of_a_deaf_notebook(home, make, tmp_path, monkeypatch, enough):
    monkeypatch.setattr("nbs_lib.runs.execute.GRACE", 1)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"
    then = f"get_ipython().kernel.pre_handler_hook = lambda: None; {deaf}"
    run = run_notebook(make(SLEEPERS.format(pids=tmp_path / "pids", then=then)), timeout=enough)
    assert run.status == "failed" and run.error == f"timed out after {enough} s" and gone(tmp_path / "pids")


def test_swallowed_interrupt_is_no_success(home, make):
    run = run_notebook(make("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: pass"), timeout=2)
    assert (run.status, run.error) == ("failed", "timed out after 2 s")


def test_nothing_outlives_a_completed_run(home, make, tmp_path):
    run = run_notebook(make(SLEEPERS.format(pids=tmp_path / "pids", then="")))
    assert run.status == "completed" and gone(tmp_path / "pids")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal(home, make, tmp_path, number):
    file = make(SLEEPERS.format(pids=tmp_path / "pids", then="time.sleep(300)"), "print('never')")
    command = [*CLI, "run", str(file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 300
        while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 3:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=300)
    run = records.recent()[0]
    assert process.returncode == 130 and json.loads(out)["status"] == run.status == "cancelled"
    assert gone(tmp_path / "pids")
    assert cells(run) == ["failed", "skipped"] and "cancelled" in page(run)


def test_killed_runner(home, make, tmp_path):
    file = make("import os, time; open('kernel', 'w').write(str(os.getpid())); time.sleep(300)")
    with subprocess.Popen([*CLI, "run", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 300
        while not (tmp_path / "kernel").exists() or not (tmp_path / "kernel").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert records.recent()[0].status == "running" and records.recent()[0].cell == "1/1"
        process.kill()
    run = records.recent()[0]
    assert run.status == "failed" and "killed" in run.error and gone(tmp_path / "kernel")


def test_output_is_always_valid_json(home, make):
    file, torn, reads, done = make(*["print('x' * 2_000_000)"] * 8), [], [], threading.Event()
    def read():
        while not done.is_set():
            for out in home.glob("outputs/*/probe.ipynb"):
                try: reads.append(len(json.loads(out.read_text())["cells"]))
                except ValueError as error: torn.append(error)
    reader = threading.Thread(target=read)
    reader.start()
    try: run = run_notebook(file)
    finally:
        done.set()
        reader.join()
    assert run.status == "completed" and len(reads) > 5 and not torn


def test_saved_while_a_cell_runs(home, make):
    "The kernel itself reads the notebook as it is being saved."
    code = """import os, glob, json
nb = json.load(open(glob.glob(os.environ['LOOPBOOK_RUN_DIR'] + '/*.ipynb')[0]))
print(nb['cells'][1]['outputs'][0]['text'], nb['cells'][2]['metadata']['papermill']['status'])"""
    run = run_notebook(make("print('first')", code))
    assert "['first\\n'] running" in (Path(run.folder) / "log.txt").read_text()


def test_widgets_stay_out(home, make):
    run = run_notebook(make("import ipywidgets; ipywidgets.IntSlider()"))
    nb = json.loads((Path(run.folder) / "probe.ipynb").read_text())
    assert run.status == "completed" and "widgets" not in nb["metadata"] and "IntSlider" in page(run)


def add_kernel(folder: Path, name: str) -> None:
    "Install a kernel that does not start, to be found by JUPYTER_PATH."
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "alien", "language": "python"}
    (folder / "jupyter" / "kernels" / name).mkdir(parents=True)
    (folder / "jupyter" / "kernels" / name / "kernel.json").write_text(json.dumps(spec))


def test_own_interpreter(home, make, tmp_path, monkeypatch):
    "A `python3` kernel that another project has installed is not used."
    add_kernel(tmp_path, "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert run_notebook(make("1")).status == "completed"


def test_failing_kernel_start(home, make, tmp_path, monkeypatch):
    add_kernel(tmp_path, "broken")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    run = run_notebook(make("1", "2", kernel="broken"))
    assert run.status == "failed" and "Kernel died" in run.error and cells(run) == ["failed", "skipped"]


def test_odd_places(home, make, tmp_path):
    run = run_notebook(make("print('x')", name="my {odd} näme.ipynb", folder=tmp_path / "a {b}", kernel=None))
    assert run.status == "completed" and (Path(run.folder) / "my {odd} näme.html").exists()


@pytest.mark.parametrize("given, words", [
    ({"epoch": 1}, "did you mean 'epochs'"), ({"epochs": "3"}, "wants int"), ({"epochs": 1.5}, "wants int"),
    ({"mode": "heads"}, "Literal"), ({"flag": 1}, "wants bool"), ({"text": 3}, "wants str"),
    ({"rate": None}, "wants float")])
def test_wrong_parameters(home, make, given, words):
    with pytest.raises(UserError, match=words): run_notebook(make("1", parameters=PARAMETERS), given)
    assert not records.recent()


def test_right_parameters(home, make):
    given = dict(mode="finetune", name="x=y", text='say "#1"', epochs=2, rate=1, flag=False, names=["a"])
    run = run_notebook(make("print(mode, name, text, epochs, rate, flag, names)", parameters=PARAMETERS), given)
    assert (Path(run.folder) / "log.txt").read_text() == "finetune x=y say \"#1\" 2 1.0 False ['a']\n"


def test_texts_become_values(make):
    file = make(parameters=PARAMETERS)
    texts = dict(mode="head", name="none", text="null", epochs="3", rate="1e-3", flag="false", names="['a', 'b']")
    values = dict(mode="head", name=None, text="null", epochs=3, rate=0.001, flag=False, names=["a", "b"])
    assert checked(file, texts, texts=True) == values
    for name, text in dict(epochs="three", flag="maybe", names="a", rate="").items():
        with pytest.raises(UserError, match=name): checked(file, {name: text}, texts=True)


def test_no_parameters_cell(home, make):
    with pytest.raises(UserError, match="no cell tagged"): run_notebook(make("1"), {"x": 1})


def test_mistakes_before_the_start(home, make, tmp_path):
    (tmp_path / "broken.ipynb").write_text("{")
    for notebook, options, words in [("trian", {}, "did you mean 'train'"),
                                     (make("1"), {"kernel": "julia"}, "'julia' is not installed"),
                                     (tmp_path / "broken.ipynb", {}, "not a readable notebook"),
                                     (make("1"), {"timeout": 0}, "more than 0")]:
        with pytest.raises(UserError, match=words): run_notebook(notebook, **options)
    assert find_notebook("train").name == "20_train.ipynb" and not records.recent()


def test_unwritable_outputs(home, make):
    (home / "outputs").write_text("a file")
    with pytest.raises(UserError, match="outputs"): run_notebook(make("1"))


def test_damaged_records(home, make):
    (home / "outputs").mkdir()
    (home / "outputs" / "runs.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="runs.sqlite"): run_notebook(make("1"))


def test_tracked_run(home, make):
    from nbs_lib.tracking.tracker import open_tracker
    for name in [m for m in list(sys.modules) if m.partition(".")[0] == "trackio"]:
        del sys.modules[name]                              # it stores in one folder per process
    code = """from nbs_lib.tracking.tracker import open_tracker
import pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp()); (folder / "a.txt").write_text("a")
with open_tracker().start("probe", "test") as run:
    run.log_artifact("things", "dataset", folder)
    run.summary({"rows": 3, "loss": float("nan")})"""
    run = run_notebook(make(code), group="g")
    assert run.status == "completed", run.error
    assert run.outputs == [open_tracker().resolve("things").ref]
    assert run.summary == {"rows": 3, "loss": None}
    assert open_tracker().resolve("probe-notebook"), logged(run)


def test_warm_kernel(home, make, tmp_path, enough):
    "A kernel from the nursery: the same environment, folder, log, exit handlers and end as any other."
    from nbs_lib.runs import kernels
    code = """import atexit, os, pathlib, sys
atexit.register(lambda: pathlib.Path('left').write_text('in order'))
print(os.environ['LOOPBOOK_RUN_ID'], os.getcwd(), os.getppid(), flush=True)"""
    with kernels.warm_kernels():
        run = run_notebook(make(code, "os.system('echo from a child')"))
        assert run.status == "completed" and (tmp_path / "left").read_text() == "in order"
        assert logged(run) == [f"{run.id} {tmp_path} {kernels._nursery.process.pid}", "from a child"]
        assert run_notebook(make(SLEEPERS.format(pids=tmp_path / "pids", then=""))).status == "completed"
        assert gone(tmp_path / "pids")
        for code, word in [("raise ValueError('no')", "ValueError"), (KILL, "DeadKernelError")]:
            assert word in run_notebook(make(code, "1")).error
        sleepers = SLEEPERS.format(pids=tmp_path / "pids", then="time.sleep(300)")
        run = run_notebook(make("import os\nif not os.fork():\n    while True: pass", sleepers), timeout=enough)
        assert run.error == f"timed out after {enough} s" and gone(tmp_path / "pids")
        session = int((tmp_path / "pids").read_text().split()[0])
        left = [p for p in psutil.process_iter()
                if p.status() != psutil.STATUS_ZOMBIE and os.getsid(p.pid) == session]
        assert not left, "a forked child of the kernel is left"


def test_plots_of_a_warm_kernel(home, make):
    from nbs_lib.runs import kernels
    def plots() -> int:
        run = run_notebook(make("import matplotlib.pyplot as plt; plt.plot([1, 2])"))
        return (Path(run.folder) / "probe.ipynb").read_text().count('"image/png"')
    with kernels.warm_kernels():
        assert plots() == 1
        while psutil.Process(kernels._nursery.process.pid).cpu_percent(0.5) > 5: pass
        assert plots() == 1, "also after it has imported everything"


def test_dead_nursery(home, make):
    from nbs_lib.runs import kernels
    with kernels.warm_kernels():
        kernels._nursery.process.kill()
        assert run_notebook(make("1")).status == "completed"


def test_killed_runner_of_a_warm_kernel(home, make, tmp_path):
    file = make("import os, time; open('kernel', 'w').write(f'{os.getpid()} {os.getppid()}'); time.sleep(300)")
    code = f"""from nbs_lib.runs.execute import run_notebook
from nbs_lib.runs.kernels import warm_kernels
with warm_kernels(): run_notebook({str(file)!r})"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        end = time.monotonic() + 300
        while not (tmp_path / "kernel").exists() or not (tmp_path / "kernel").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.kill()
    assert "killed" in records.recent()[0].error and gone(tmp_path / "kernel")
