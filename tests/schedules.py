"""Homes with jobs, and a clock that stands still."""
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import psutil
import pytest
import time_machine
from nbformat.v4 import new_code_cell, new_notebook

from nbs_lib.schedule import slots
from nbs_lib.schedule.daemon import Daemon

CLI = [sys.executable, "-c", "from nbs_lib.cli.main import main; main()"]
START = datetime(2026, 11, 21, 10, 2, tzinfo=UTC)


def write(home: Path, name: str, *code: str) -> None:
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in code]), home / f"{name}.ipynb")


def define(home: Path, name: str, **keys) -> Path:
    (home / "scheduled").mkdir(exist_ok=True)
    file = home / "scheduled" / f"{name}.yaml"
    file.write_text("".join(f"{k}: {v}\n" for k, v in ({"notebook": "hello.ipynb"} | keys).items()))
    return file


def until(condition, seconds: float = 300):
    "What `condition` returns once it is true; a busy machine may take its time."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "this has not happened"
        time.sleep(0.1)
    return found


@pytest.fixture
def here(home):
    "A home with a notebook that says hello, one that fails and one that takes its time."
    write(home, "hello", "print('hello')")
    write(home, "bad", "1 / 0")
    write(home, "long", "import time; time.sleep(300)")
    return home


@pytest.fixture
def clock():
    with time_machine.travel(START, tick=False) as traveller: yield traveller


def go(daemon: Daemon, clock, seconds: float, status: str = "completed", reason: str | None = None) -> None:
    "What is due at once ends as `status`; then time passes."
    daemon.plan()
    for slot in slots.due(datetime.now(UTC)):
        slots.end_attempt(slots.claim(slot, datetime.now(UTC)).token, status, reason)
    clock.shift(seconds)


def five_minutes_later(clock) -> Daemon:
    "A daemon whose five-minute jobs have just become due."
    daemon = Daemon()
    daemon.plan()
    clock.shift(300)
    daemon.plan()
    return daemon


def planned(**equal) -> list[tuple[str, str]]:
    return [(s.slot[5:16], s.status) for s in reversed(slots.history(10_000, **equal))]


def left() -> list:
    "Processes that a runner of this home has left."
    home = os.environ["LOOPBOOK_HOME"]
    def theirs(p):
        try:
            alive = p.pid != os.getpid() and p.status() != psutil.STATUS_ZOMBIE
            return p.environ().get("LOOPBOOK_HOME") == home and alive
        except psutil.Error: return False
    return [p.cmdline() for p in psutil.process_iter() if theirs(p)]
