"""Fixtures for all tests: a home of one's own, and a W&B server on the loopback interface."""
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
WANDB_SERVER = SHARED / "tools" / "wandb_server.py"
LONGEST = ("test_closing_loop", "test_whole_loop", "test_faults", "test_labelling", "test_train", "test_runner")
FAILED = pytest.StashKey[bool]()
# a shell's background job ignores it, and so would all that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
# workers side by side, and the processes that they start, share the cores
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1: os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "What takes longest begins first, so that all workers end together; browser tests of a file stay with one worker."
    for item in items:
        if item.get_closest_marker("browser"): item.add_marker(pytest.mark.xdist_group(item.path.stem))
    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator:
    report = yield
    if report.failed: item.stash[FAILED] = True
    return report


def end_processes(home: Path) -> None:
    "Kill what this process has started in a home: a daemon that a failed test has left would go on starting runs."
    for process in psutil.Process().children(recursive=True):
        try:
            if process.environ().get("LOOPBOOK_HOME") == str(home): process.kill()
        except psutil.Error: pass


def pytest_runtest_setup(item) -> None:
    "The browser that browser tests share ends where a test of another kind begins."
    if "browsers" in sys.modules and not item.get_closest_marker("browser"): sys.modules["browsers"].end()


@pytest.fixture
def home(request, tmp_path, monkeypatch) -> Iterator[Path]:
    "An empty home in a temporary folder; no key, no settings and no run of the outer environment reach the test."
    for name in list(os.environ):
        if name.startswith(("LOOPBOOK_", "WANDB_", "TRACKIO_")): monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("LOOPBOOK_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield tmp_path / "home"
    if request.node.stash.get(FAILED, False): end_processes(tmp_path / "home")
    for thread in threading.enumerate():                   # a message on its way would arrive in the next test's home
        if thread.name == "message": thread.join(60)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], str]], tuple[Path, str]]:
    "A folder that `make(folder)` fills once for all workers, and the text that it returned."
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: base = base.parent
    def made(name: str, make: Callable[[Path], str]) -> tuple[Path, str]:
        folder, note = base / name, base / f"{name}.txt"
        with FileLock(base / f"{name}.lock"):
            if not note.exists():
                folder.mkdir()                             # fails where a worker has failed to fill it
                text = make(folder)
                note.write_text(text)
        return folder, note.read_text()
    return made


@dataclass
class WandbServer:
    url: str
    key: str = "0123456789abcdef0123456789abcdef01234567"

    @property
    def env(self) -> dict: return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key}

    def state(self, project: str) -> dict:
        "What clients logged to the project: lists of runs and artifacts."
        with urllib.request.urlopen(f"{self.url}/debug/state?history") as reply: state = json.load(reply)
        found = {k: [x for x in state[k] if x["project"] == project] for k in ("runs", "artifacts")}
        return found | {"errors": state["errors"]}


@pytest.fixture(scope="session")
def wandb_server(tmp_path_factory):
    "A W&B server for tests; tests that share it use projects of different names."
    if not WANDB_SERVER.exists(): pytest.skip(f"no W&B server for tests: {WANDB_SERVER} is missing")
    folder = tmp_path_factory.mktemp("wandb-server")
    command = [sys.executable, str(WANDB_SERVER), "--port", "0", "--data-dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield WandbServer(server.stdout.readline().split()[-1])
        server.kill()
