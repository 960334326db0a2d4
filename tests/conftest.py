"""Fixtures for all tests: a home of one's own, and a W&B server on the loopback interface."""
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job ignores it, and so would all that the tests start


def pytest_runtest_setup(item) -> None:
    "The browser that browser tests share ends where a test of another kind begins."
    if "browsers" in sys.modules and not item.get_closest_marker("browser"): sys.modules["browsers"].end()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    "An empty home in a temporary folder; no key, no settings and no run of the outer environment reach the test."
    for name in list(os.environ):
        if name.startswith(("LOOPBOOK_", "WANDB_", "TRACKIO_")): monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("LOOPBOOK_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield tmp_path / "home"
    for thread in threading.enumerate():                   # a message on its way would arrive in the next test's home
        if thread.name == "message": thread.join(60)


@dataclass
class WandbServer:
    url: str
    key: str = "0123456789abcdef0123456789abcdef01234567"

    @property
    def env(self) -> dict: return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key}

    def state(self, project: str) -> dict:
        "What clients logged to the project: lists of runs and artifacts."
        with urllib.request.urlopen(f"{self.url}/debug/state?history") as reply: state = json.load(reply)
        return {k: [x for x in state[k] if x["project"] == project] for k in ("runs", "artifacts")} | {"errors": state["errors"]}


@pytest.fixture(scope="session")
def wandb_server(tmp_path_factory):
    "A W&B server for tests; tests that share it use projects of different names."
    script = SHARED / "tools" / "wandb_server.py"
    if not script.exists(): pytest.skip(f"no W&B server for tests: {script} is missing")
    command = [sys.executable, str(script), "--port", "0", "--data-dir", str(tmp_path_factory.mktemp("wandb-server"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield WandbServer(server.stdout.readline().split()[-1])
        server.kill()
