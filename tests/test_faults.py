"""Everything dies at random moments: the daemon, its runs, their kernels; the disk is full; notebooks misbehave.

    make test-faults            a hundred kills (FAULTS=100)
    make test                   a few of them (FAULTS=6)
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock
from schedules import CLI, define, left, until, write

from nbs_lib.runs import records
from nbs_lib.runs.writer import busy
from nbs_lib.schedule import slots
from nbs_lib.schedule.attempts import recover
from nbs_lib.schedule.daemon import Daemon, run_now

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
FAULTS = int(os.environ.get("FAULTS", 6))
JOURNAL = """
import os, time
def note(what):
    line = f"{what} {os.environ['LOOPBOOK_TOKEN']} {os.environ['LOOPBOOK_RUN_ID']}\\n".encode()
    file = os.open(os.path.join(os.environ["LOOPBOOK_HOME"], "journal.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)
note("begin")
"""


def processes(home: Path, *words: str) -> list[psutil.Process]:
    "The living processes of a home whose command line holds one of the words."
    def lives(p: psutil.Process) -> bool:
        if p.pid == os.getpid(): return False
        try:
            theirs = p.environ().get("LOOPBOOK_HOME") == str(home) and p.status() != psutil.STATUS_ZOMBIE
            return theirs and any(w in " ".join(p.cmdline()) for w in words)
        except psutil.Error: return False
    return [p for p in psutil.process_iter() if lives(p)]


VICTIMS = {"daemon": ("import main; main()",), "runner": ("import run_slot",),
           "kernel": ("ipykernel_launcher", "import nursery")}


class Killer:
    "A daemon that is started again whenever it is dead, and somebody who kills."
    def __init__(self, home: Path, seed: int):
        self.home, self.random, self.killed, self.daemon = home, random.Random(seed), Counter(), None

    def keep_going(self) -> None:
        if self.daemon is None or self.daemon.poll() is not None:
            self.log = open(self.home.parent / "daemon.log", "ab")
            self.daemon = subprocess.Popen([*CLI, "schedule"], stdout=self.log, stderr=self.log,
                                           env=os.environ | {"LOOPBOOK_HOME": str(self.home)})

    def kill_one(self) -> None:
        "Kill somebody, at once or in the next seconds."
        self.keep_going()
        time.sleep(self.random.uniform(0.05, 1.5))
        kind = list(VICTIMS)[sum(self.killed.values()) % len(VICTIMS)]
        end = time.monotonic() + 60                        # none of a kind may be alive for long
        while not (alive := processes(self.home, *VICTIMS[kind])) and time.monotonic() < end: time.sleep(0.02)
        if kind != "daemon": time.sleep(self.random.uniform(0, 0.5))
        for victim in alive[:1]:
            try: victim.kill()
            except psutil.Error: continue
            self.killed[kind] += 1
        if kind == "daemon" and self.daemon: self.daemon.wait()
        self.keep_going()

    def stop(self) -> None:
        self.daemon.send_signal(signal.SIGTERM)
        assert self.daemon.wait(300) == 0


def assert_all_is_well(home: Path) -> None:
    "Nothing is running, nothing is locked, every notebook is whole, and every record tells how it ended."
    until(lambda: not left())                               # a process that has said its last word may still be leaving
    assert busy() is None and recover(datetime.now(UTC)) == []
    assert not [s for s in slots.history(10_000) if s.status in ("starting", "running")]
    outputs = home / "outputs"
    for lock in [*(outputs / ".schedule").glob("*.lock"), *outputs.glob("*/.lock"), outputs / "loop.lock"]:
        if lock.exists(): FileLock(lock).acquire(timeout=0).lock.release()
    for file in home.glob("outputs/*/*.ipynb"): nbformat.validate(nbformat.read(file, 4))
    assert {r.status for r in records._execute("select * from runs")} <= {"completed", "failed", "cancelled"}


def test_slots_are_neither_lost_nor_doubled(home):
    write(home, "quick", JOURNAL, "note('end')")
    write(home, "train", JOURNAL, "time.sleep(1)", "note('end')")      # a step of the loop by its name: it writes
    leave_a_child = "import subprocess; subprocess.Popen(['sleep', '300'], start_new_session=True)"
    write(home, "parent", JOURNAL, leave_a_child, "time.sleep(0.5)", "note('end')")
    (home / "settings.ini").write_text("[schedule]\nparallel = 3\nmax_failures = 1000\n")
    every = {"quick": 3, "train": 5, "parent": 4}
    def jobs(length: dict[str, str]) -> None:
        for name, every in length.items():
            define(home, name, notebook=f"{name}.ipynb", every=every, retries=3, backoff="0s")
    def completed() -> int: return len(slots.history(100_000, status="completed"))
    jobs({name: f"{seconds}s" for name, seconds in every.items()})
    killer = Killer(home, FAULTS)
    try:
        while sum(killer.killed.values()) < FAULTS: killer.kill_one()
        before = completed()
        until(lambda: completed() >= before + 3)           # and it goes on
    finally: killer.stop()
    jobs(dict.fromkeys(every, "10d"))
    subprocess.run([*CLI, "schedule", "--once"], capture_output=True, timeout=600)   # what was stopped on the way
    assert_all_is_well(home)
    print(killer.killed, Counter(s.status for s in slots.history(100_000)))

    rows = slots.history(100_000)
    assert {s.status for s in rows} <= {"completed", "failed", "missed"} and any(s.attempt > 1 for s in rows)
    journal = [line.split() for line in (home / "journal.txt").read_text().splitlines()]
    begun = Counter(token for what, token, _ in journal if what == "begin")
    assert max(begun.values()) == 1, "an attempt was begun twice"
    found = {r.id: r for r in records.recent(100_000)}
    finished = [found[run] for what, _, run in journal if what == "end"]
    ended = Counter(run.trigger for run in finished if run.status == "completed")
    expected = Counter(s.trigger for s in rows if s.status == "completed")
    assert ended == expected, "a slot is completed by one run, and one run only"
    for name, seconds in every.items():
        mine = sorted((s for s in rows if s.job == name), key=lambda s: s.slot)
        first, last = (datetime.fromisoformat(s.slot) for s in (mine[0], mine[-1]))
        assert sum(1 + s.missed for s in mine[1:]) == (last - first).total_seconds() / seconds, "a slot was lost"


FACES = {"LOOPBOOK_RECIPE_FACES__IMAGES": "60", "LOOPBOOK_GATE__MIN_ACCURACY": "0.2",
         "LOOPBOOK_TRACKING__BACKEND": "trackio"}
WHOLE = """
import hashlib, json
from nbs_lib.tracking.tracker import open_tracker
tracker, found = open_tracker(), {}
for kind in ("dataset", "model"):
    for name in tracker.artifacts(kind):
        for version in tracker.versions(name):
            folder = tracker.download(version.ref)
            files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
            assert sum(p.stat().st_size for p in files.values()) == version.size and f"{kind}.json" in files, version
            if "production" in version.aliases:
                found["weights"] = hashlib.sha256(files["model.safetensors"].read_bytes()).hexdigest()
            for alias in version.aliases: assert tracker.resolve(f"{name}:{alias}").ref == version.ref
print(json.dumps(found))
"""


def production(home: Path) -> str:
    "The digest of the weights in production; every version that bears an alias is whole."
    environment = os.environ | FACES | {"LOOPBOOK_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", WHOLE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["weights"]


def test_a_loop_that_is_killed_again_and_again_comes_to_the_same_model(home, tmp_path, monkeypatch):
    for name, value in FACES.items(): monkeypatch.setenv(name, value)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    environment = os.environ | {"LOOPBOOK_HOME": str(undisturbed)}
    done = subprocess.run([*CLI, "loop", "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (home / "settings.ini").write_text("[schedule]\nmax_failures = 1000\n")
    (home / "scheduled").mkdir()
    (home / "scheduled" / "loop.yaml").write_text("loop: true\nevery: 10d\nretries: 100\nbackoff: 0s\n")
    killer = Killer(home, FAULTS)
    killer.keep_going()
    until(lambda: "loop" in slots.states())
    slots.add_slot(Daemon().folder.jobs.get("loop") or slots.states()["loop"].defined, datetime.now(UTC))
    try:
        for _ in range(max(FAULTS // 4, 2)):
            time.sleep(killer.random.uniform(1, 8))
            killer.kill_one()
            if slots.history()[0].status not in slots.OPEN: break
        until(lambda: slots.history()[0].status not in slots.OPEN, 1200)
    finally: killer.stop()
    assert slots.history()[0].status == "completed" and killer.killed, slots.history()[0]
    print(killer.killed, slots.history()[0].attempt)
    assert_all_is_well(home)
    assert production(home) == production(undisturbed)


# misbehaving notebooks, disks and kernels


def test_notebooks_that_misbehave_are_told_and_harm_nobody(home):
    write(home, "hello", "print('hello')")
    write(home, "broken", "1")
    write(home, "endless", "while True: pass")
    (home / "settings.ini").write_text("[schedule]\nparallel = 4\n")
    define(home, "good", every="1d", notebook="hello.ipynb")
    define(home, "unreadable", every="1d", notebook="broken.ipynb")
    define(home, "kernelless", every="1d", notebook="hello.ipynb", kernel="julia")
    define(home, "endless", every="1d", notebook="endless.ipynb", timeout="3s")
    daemon = Daemon()
    daemon.plan()
    (home / "broken.ipynb").write_bytes(b'{"cells": [{"cell_type": "code", "sou')
    for job in daemon.folder.jobs.values(): slots.add_slot(job, datetime.now(UTC))
    ended = {s.job: (s.status, s.reason) for s in daemon.run(once=True, tick=0.1)}
    assert ended.pop("good") == ("completed", None)
    assert {s for s, _ in ended.values()} == {"failed"} and "not a readable notebook" in ended["unreadable"][1]
    assert "kernel 'julia' is not installed" in ended["kernelless"][1] and ended["endless"][1] == "timed out after 3 s"
    assert_all_is_well(home)


def test_a_notebook_that_prints_200_megabytes(home):
    write(home, "loud", "for _ in range(2_000_000): print('x' * 100)", "print('the last word')")
    define(home, "loud", notebook="loud.ipynb", every="1d")
    daemon, before = Daemon(), psutil.Process().memory_info().rss
    run_now("loud", daemon.folder).wait(900)
    daemon.reap()
    [run] = records.recent()
    assert run.status == "completed" and slots.history()[0].status == "completed"
    log = Path(run.folder) / "log.txt"
    assert log.stat().st_size > 200e6 and log.open("rb").seek(-14, 2) and log.read_bytes()[-14:] == b"the last word\n"
    assert psutil.Process().memory_info().rss - before < 100e6, "the daemon has read none of it"
    page, book = (Path(run.folder) / f"loud.{kind}" for kind in ("html", "ipynb"))
    assert max(p.stat().st_size for p in (page, book)) < 3e6
    assert "and more: see log.txt" in page.read_text() and "the last word" in page.read_text()
    shutil.rmtree(run.folder)


FULL = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["TESTS"])
from schedules import CLI, define, until, write
home = Path(os.environ["LOOPBOOK_HOME"])
from nbs_lib.runs import records
from nbs_lib.schedule import slots
write(home, "hello", "print('hello')")
(home / "settings.ini").write_text("[schedule]\\nmax_failures = 1000\\n")
define(home, "greet", every="2s", retries=2, backoff="0s")
daemon = subprocess.Popen([*CLI, "schedule"], stderr=subprocess.PIPE, text=True)
until(lambda: slots.history(status="completed"))
filler = open(home / "filler", "wb", buffering=0)
try:
    while True: filler.write(bytes(4096))
except OSError: pass
time.sleep(6)
assert daemon.poll() is None, "the daemon lives"
filler.truncate(0)
before = len(slots.history(1000, status="completed"))
until(lambda: len(slots.history(1000, status="completed")) >= before + 2)
daemon.send_signal(signal.SIGTERM)
print(daemon.communicate(timeout=300)[1])
assert daemon.returncode == 0
from test_faults import assert_all_is_well
assert_all_is_well(home)
"""


def test_a_full_disk_is_told_and_survived(home):
    apart = ["unshare", "--mount", "--map-root-user"]
    mount = [*apart, "mount", "-t", "tmpfs", "none", str(home)]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk: this user may not mount a tmpfs of its own here")
    script = f'mount -t tmpfs -o size=3m none "{home}" && exec "{sys.executable}" -c "$FULL"'
    done = subprocess.run([*apart, "sh", "-c", script], capture_output=True, text=True, timeout=900,
                          env=os.environ | {"FULL": FULL, "TESTS": str(Path(__file__).parent)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No space left" in done.stdout or "full" in done.stdout, done.stdout
