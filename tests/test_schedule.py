"""The daemon: what is due when, who runs it, and what happens when it fails, waits, or is told to stop."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
import psutil
import pytest
import time_machine
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook
from small_data import picture
from test_loop import steps  # noqa: F401  a fixture

from nbs_lib import runner, runs, slots
from nbs_lib.jobs import Job
from nbs_lib.schedule import Daemon, Folder, Panel, overview, run_now
from nbs_lib.settings import UserError
from nbs_lib.writer import writer

CHROMIUM = next((c for c in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if c), None)
CLI = [sys.executable, "-c", "from nbs_lib.cli import main; main()"]
START = datetime(2026, 11, 21, 10, 2, tzinfo=UTC)


def write(home: Path, name: str, *code: str) -> None:
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in code]), home / f"{name}.ipynb")


def define(home: Path, name: str, **keys) -> Path:
    (home / "scheduled").mkdir(exist_ok=True)
    file = home / "scheduled" / f"{name}.yaml"
    file.write_text("".join(f"{k}: {v}\n" for k, v in ({"notebook": "hello.ipynb"} | keys).items()))
    return file


def until(condition, seconds: float = 60):
    "What `condition` returns once it is true."
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


def planned(**equal) -> list[tuple[str, str]]:
    return [(s.slot[5:16], s.status) for s in reversed(slots.history(10_000, **equal))]


# when


def test_a_day_of_slots(here, clock):
    define(here, "quarterly", every="6h")
    daemon = Daemon()
    for _ in range(24 * 4):
        daemon.plan()
        for slot in slots.due(datetime.now(UTC)): slots.finish(slots.claim(slot, datetime.now(UTC)).token, "completed")
        clock.shift(900)
    assert planned() == [(s, "completed") for s in ("11-21T12:00", "11-21T18:00", "11-22T00:00", "11-22T06:00")]


@pytest.mark.parametrize("start, slot", [("2027-03-27T12:00", ["03-28T01:30", "03-29T00:30"]), ("2027-10-30T12:00", ["10-31T00:30", "11-01T01:30"])])
def test_once_on_the_days_when_clocks_change(here, clock, start, slot):
    clock.move_to(datetime.fromisoformat(start).replace(tzinfo=UTC))
    define(here, "nightly", daily="02:30", timezone="Europe/Berlin")
    daemon = Daemon()
    for _ in range(41 * 6):
        daemon.plan()
        for row in slots.due(datetime.now(UTC)): slots.finish(slots.claim(row, datetime.now(UTC)).token, "completed")
        clock.shift(600)
    assert planned() == [(s, "completed") for s in slot]


def test_a_clock_that_is_put_back_runs_nothing_again(here, clock):
    define(here, "often", every="5m")
    daemon = Daemon()
    def go(minutes):
        for _ in range(minutes):
            daemon.plan()
            for row in slots.due(datetime.now(UTC)): slots.finish(slots.claim(row, datetime.now(UTC)).token, "completed")
            clock.shift(60)
    go(60)
    before = planned()
    clock.shift(-3600)
    go(58)
    assert planned() == before, "an hour that has been"
    go(10)
    assert len(planned()) == len(before) + 1 and len(set(planned())) == len(planned())
    clock.shift(366 * 86400)                                           # a clock that was wrong for a moment
    go(1)
    clock.shift(-366 * 86400)
    count = len(planned())
    go(20)
    assert len(planned()) == count + 5, "it goes on"


@pytest.mark.parametrize("catch_up, status", [("one", "due"), ("none", "missed")])
def test_missed_slots_are_caught_up_once_or_not_at_all(here, clock, catch_up, status):
    (here / "settings.ini").write_text(f"[schedule]\ncatch_up = {catch_up}\n")
    define(here, "hourly", every="1h")
    define(here, "nightly", daily="03:00")
    Daemon().plan()
    clock.shift(3 * 86400 + 60)
    Daemon().plan()
    assert {(s.job, s.slot[5:16], s.status, s.missed) for s in slots.history()} == {("hourly", "11-24T10:00", status, 71), ("nightly", "11-24T03:00", status, 2)}
    Daemon().plan()
    assert len(slots.history()) == 2
    clock.shift(3600 - 3 * 60 + 20)
    Daemon().plan()
    assert len(slots.history(job="hourly")) == 2 and slots.history(job="hourly")[0].status == ("missed" if catch_up == "one" else "due")


def test_a_slot_of_a_minute_ago_is_not_missed(here, clock):
    (here / "settings.ini").write_text("[schedule]\ncatch_up = none\n")
    define(here, "hourly", every="1h")
    Daemon().plan()
    clock.move_to(START.replace(hour=11, minute=0, second=50))
    Daemon().plan()
    assert planned() == [("11-21T11:00", "due")]


def test_a_job_is_not_due_for_what_was_before_it_or_before_its_change(here, clock):
    daemon, file = Daemon(), define(here, "a", every="1h")
    daemon.plan()
    clock.shift(1800)
    file.write_text("notebook: hello.ipynb\nevery: 10m\n")              # 10:10, :20 and :30 were not its own
    daemon.plan()
    file.write_text("notebook: hello.ipynb\nevery: 10m\nenabled: false\n")
    daemon.plan()
    clock.shift(7200)
    daemon.plan()
    file.write_text("notebook: hello.ipynb\nevery: 10m\ntimeout: 5m\n")
    daemon.plan()
    file.unlink()
    daemon.plan()
    clock.shift(7200)
    define(here, "a", every="10m")
    daemon.plan()
    assert not planned()
    clock.shift(600)
    daemon.plan()
    assert len(planned()) == 1


def test_a_run_that_is_still_going_is_not_started_again(here, clock):
    define(here, "often", every="5m")
    daemon = Daemon()
    daemon.plan()
    clock.shift(300)
    daemon.plan()
    [row] = slots.due(datetime.now(UTC))
    token = slots.claim(row, datetime.now(UTC)).token
    slots.take(token)
    clock.shift(300)
    daemon.plan()
    assert planned() == [("11-21T10:05", "running"), ("11-21T10:10", "missed")] and "10:05:00Z was not over" in slots.history()[0].reason
    slots.finish(token, "completed")
    clock.shift(300)
    daemon.plan()
    assert planned()[-1] == ("11-21T10:15", "due")


# the files


def test_files_are_read_again_and_mistakes_are_told(here, clock):
    said = []
    file = define(here, "a", every="5m")
    define(here, "broken", every="5")
    daemon = Daemon(said.append)
    daemon.plan()
    assert set(daemon.folder.jobs) == {"a"} and len(said) == 1 and "broken.yaml:2: every: '5'" in said[0]
    file.write_text("notebook: hello.ipynb\nevry: 1h\n")
    daemon.plan(), daemon.plan()
    assert daemon.folder.jobs["a"].every == 300 and len(said) == 2 and "did you mean 'every'?; a goes on as it was" in said[1]
    again = Daemon(said.append)
    again.plan()
    assert again.folder.jobs["a"].every == 300, "its last good version, also after a restart"
    assert [(r["job"], bool(r["problem"])) for r in overview()] == [("a", True), ("broken", True)]
    file.write_text("notebook: hello.ipynb\nevery: 1h\n")
    daemon.plan()
    assert daemon.folder.jobs["a"].every == 3600 and "a" not in daemon.folder.problems
    (here / "hello.ipynb").write_text("{")
    file.write_text("notebook: hello.ipynb\nevery: 2h\n")
    daemon.plan()
    assert daemon.folder.jobs["a"].every == 3600 and "is not a readable notebook" in said[-1]
    (here / "settings.ini").write_text("[schedule]\nparallel = many\n")
    daemon.plan()
    assert daemon.folder.settings.schedule.parallel == 2 and "[schedule] parallel = 'many' is not allowed" in said[-1]
    with pytest.raises(UserError): Daemon()
    (here / "settings.ini").write_text("[schedule]\nparallel = 7\n")
    daemon.plan()
    assert daemon.folder.settings.schedule.parallel == 7 and "settings.ini" not in daemon.folder.problems


def test_a_folder_that_is_not_there_and_files_that_go(here, clock):
    folder = Folder()
    assert folder.read(START) == [] == folder.read(START)
    file = define(here, "a", every="5m")
    assert folder.read(START) == ["a"] and folder.read(START) == []
    file.unlink()
    assert folder.read(START) == [] and not folder.jobs and slots.states()["a"].timing == "gone"


# runs


def test_a_run_has_its_job_and_slot_in_its_record(here):
    define(here, "greet", every="1d")
    process = run_now("greet")
    assert process.wait(60) == 0
    [run], [slot] = runs.recent(), slots.history()
    assert (run.status, run.trigger, slot.status, slot.attempt) == ("completed", f"job:greet@{slot.slot}", "completed", 1)
    assert (here / "outputs" / ".schedule" / "greet.log").read_text() == ""
    assert "started by job:greet@" in (Path(run.folder) / "hello.html").read_text()


def test_failures_are_tried_again_with_longer_and_longer_waits(here):
    define(here, "fails", notebook="bad.ipynb", every="1d", retries=2, backoff="1s")
    said, waits = [], []
    run_now("fails").wait(60)
    waits.append(slots.history()[0].not_before - time.time())
    daemon = Daemon(said.append)
    until(lambda: not daemon.tick() and slots.history()[0].status == "failed" and not daemon.running)
    [slot] = slots.history()
    assert (slot.status, slot.attempt, slot.reason) == ("failed", 3, "ZeroDivisionError: division by zero")
    begun = [datetime.fromisoformat(r.started_at) for r in reversed(runs.recent())]
    assert len(begun) == 3 and begun[1] - begun[0] >= timedelta(seconds=1) and begun[2] - begun[1] >= timedelta(seconds=2)
    assert waits[0] <= 1 and said[0] == "fails: started again (1 of 2 retries)" and said[-1] == "fails: failed: ZeroDivisionError: division by zero"


def test_too_many_failures_in_a_row_pause_a_job(here, clock):
    (here / "settings.ini").write_text("[schedule]\nmax_failures = 2\n")
    define(here, "fails", every="5m")
    daemon = Daemon()
    daemon.plan()
    def slot_that_is(status):
        clock.shift(300)
        daemon.plan()
        for row in slots.due(datetime.now(UTC)): slots.finish(slots.claim(row, datetime.now(UTC)).token, status, "no network")
        return len(planned())
    assert [slot_that_is(s) for s in ("failed", "completed", "failed", "failed", "completed", "completed")] == [1, 2, 3, 4, 4, 4]
    assert slots.states()["fails"].paused == "failed 2 times in a row, the last time: no network" and overview()[0]["next"] is None
    slots.resume("fails", datetime.now(UTC))
    assert [slot_that_is("completed") for _ in range(2)] == [5, 6] and overview()[0]["next"]
    with pytest.raises(UserError, match="did you mean 'fails'"): slots.resume("fail", START)


def test_two_daemons_on_one_home_run_each_slot_once(here):
    (here / "settings.ini").write_text("[schedule]\nparallel = 4\n")
    define(here, "a", every="2s")
    define(here, "b", every="3s")
    daemons = [subprocess.Popen([*CLI, "schedule"], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    until(lambda: len(slots.history(status="completed")) >= 6, 90)
    for d in daemons: d.send_signal(signal.SIGTERM)
    said = [d.communicate(timeout=60)[1] for d in daemons]
    assert [d.returncode for d in daemons] == [0, 0]
    done = [s for s in slots.history(1000) if s.status == "completed"]
    per_slot = Counter(r.trigger for r in runs.recent(1000) if r.status == "completed")
    assert per_slot == Counter(s.trigger for s in done) and set(per_slot.values()) == {1}
    assert all(s.status in ("completed", "missed", "due") for s in slots.history(1000)) and not any("rror" in s for s in said), said


def test_a_run_that_takes_too_long_is_ended(here):
    write(here, "deaf", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); get_ipython().kernel.pre_handler_hook = lambda: None\nwhile True: time.sleep(1)")
    define(here, "endless", notebook="deaf.ipynb", every="1d", timeout="2s")
    run_now("endless").wait(60)
    [slot], [run] = slots.history(), runs.recent()
    assert (slot.status, slot.reason, run.status) == ("failed", "timed out after 2 s", "failed")


def left(token_of=None) -> list:
    "Processes that a runner of this home has left."
    home = os.environ["LOOPBOOK_HOME"]
    def theirs(p):
        try: return p.environ().get("LOOPBOOK_HOME") == home and p.pid != os.getpid() and p.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return [p.cmdline() for p in psutil.process_iter() if theirs(p)]


def test_sigterm_stops_the_daemon_and_its_runs_and_a_new_one_takes_them_up(here):
    define(here, "slow", notebook="long.ipynb", every="2s")
    daemon = subprocess.Popen([*CLI, "schedule"], stderr=subprocess.PIPE, text=True)
    until(lambda: any(r.cell for r in runs.recent()))
    daemon.send_signal(signal.SIGTERM)
    said = daemon.communicate(timeout=40)[1]
    assert daemon.returncode == 0 and "slow: stopped" in said and not left()
    assert runs.recent()[0].status == "cancelled"
    waiting = slots.history(status="due")
    assert [(s.attempt, s.reason) for s in waiting] == [(0, "the scheduler was stopped")]
    write(here, "long", "print('short now')")
    done = subprocess.run([*CLI, "schedule", "--once", "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("completed", waiting[0].slot) in [(s["status"], s["slot"]) for s in json.loads(done.stdout)]


def test_a_job_that_is_cancelled_alone_stays_cancelled(here):
    define(here, "slow", notebook="long.ipynb", every="1d")
    process = run_now("slow")
    until(lambda: runs.recent() and runs.recent()[0].cell)
    with pytest.raises(UserError, match="slow: its run of .* is running"): run_now("slow")
    process.terminate()
    process.wait(30)
    assert slots.history()[0].status == runs.recent()[0].status == "cancelled" and not left()


def test_who_writes_waits_visibly_and_who_reads_does_not(here):
    write(here, "train", "print('trained')")
    for name, keys in (("writes", {"notebook": "train.ipynb"}), ("reads", {})): define(here, name, every="1d", **keys)
    daemon, now = Daemon(lambda line: None), datetime.now(UTC)
    daemon.plan()
    for name in ("writes", "reads"): slots.add(daemon.folder.jobs[name], now)
    other = "import sys; from nbs_lib.writer import writer\nwith writer('the loop of somebody'): print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        daemon.tick()
        until(lambda: slots.history(job="reads")[0].status == "completed")
        daemon.launch()
        [waiting] = slots.history(job="writes")
        assert waiting.status == "due" and "waits: the loop of somebody" in waiting.reason
        assert "the loop of somebody" in next(r for r in overview() if r["job"] == "writes")["reason"]
        holder.stdin.close()
        holder.wait()
        daemon.launch()
        until(lambda: slots.history(job="writes")[0].status == "completed")
    daemon.reap()


def test_two_writers_at_once_wait_in_their_own_process(here):
    write(here, "train", "import time; time.sleep(2)")
    for name in ("one", "two"): define(here, name, notebook="train.ipynb", every="1d")
    processes = [run_now("one"), run_now("two")]
    until(lambda: any("is writing here" in (s.reason or "") for s in slots.history(status="running")))
    assert [p.wait(60) for p in processes] == [0, 0]
    first, second = reversed(runs.recent())
    assert first.status == second.status == "completed" and second.started_at >= first.ended_at
    assert [s.reason for s in slots.history()] == [None, None]


def test_a_writer_may_skip_instead(here):
    (here / "settings.ini").write_text("[schedule]\nbusy = skip\n")
    write(here, "train", "print('trained')")
    define(here, "writes", notebook="train.ipynb", every="1d")
    with writer("the test"): run_now("writes").wait(60)
    [slot] = slots.history()
    assert slot.status == "skipped" and "the test" in slot.reason and not runs.recent()


def test_no_more_runs_at_once_than_allowed(here, clock):
    for n in range(5): define(here, f"job{n}", every="5m")
    daemon = Daemon()
    daemon.plan()
    clock.shift(300)
    daemon.plan()
    assert [bool(slots.claim(s, START, parallel=2)) for s in slots.due(datetime.now(UTC))] == [True, True, False, False, False]


def test_a_lease_runs_out_and_the_late_process_is_refused(here, clock):
    define(here, "a", every="5m")
    daemon = Daemon()
    daemon.plan()
    clock.shift(300)
    daemon.plan()
    first = slots.claim(slots.due(datetime.now(UTC))[0], datetime.now(UTC))
    assert not slots.due(datetime.now(UTC)) and slots.expire(datetime.now(UTC)) == []
    clock.shift(10)
    slots.renew([first.token], datetime.now(UTC))
    clock.shift(10)
    slots.expire(datetime.now(UTC))
    assert not slots.due(datetime.now(UTC)), "renewed"
    clock.shift(10)
    slots.expire(datetime.now(UTC))
    second = slots.claim(slots.due(datetime.now(UTC))[0], datetime.now(UTC))
    assert slots.take(first.token) is None and slots.take(second.token).attempt == 1


def test_a_process_that_cannot_start_is_a_failure_that_is_told(here, monkeypatch):
    define(here, "a", every="1s")
    monkeypatch.setattr(runner, "CODE", "raise OSError('no room for me')")
    said = []
    Daemon().plan()
    time.sleep(1.1)
    [slot] = Daemon(said.append).run(once=True, tick=0.1)
    assert slot.status == "failed" and "its process did not start: OSError: no room for me" in slot.reason


def test_a_damaged_schedule_is_told_and_a_new_one_begins_when_it_is_moved_away(here, clock):
    define(here, "often", every="5m")
    daemon, file = Daemon(), here / "outputs" / "schedule.sqlite"
    daemon.plan()
    for name in here.glob("outputs/schedule.sqlite*"): name.unlink()
    file.write_bytes(b"no database" * 1000)
    clock.shift(300)
    with pytest.raises(UserError, match="schedule.sqlite: the schedule cannot be kept there .*move a damaged file away"): daemon.plan()
    file.unlink()
    for _ in range(2):
        daemon.plan()
        clock.shift(300)
    assert planned() == [("11-21T10:10", "due")]


# is there anything new


def done(job, **keys): return runner.attempt(job, "test", before=slots.recall(job), **keys)


def test_a_loop_runs_once_for_each_new_dataset_version_and_word(steps, home, tmp_path):
    from nbs_lib.feedback_store import Store
    from nbs_lib.tracking import open_tracker
    job = Job(name="watch", loop=True, on=("dataset", "feedback"))
    assert done(job) == runner.Outcome("skipped", "nothing new")
    (tmp_path / "data").mkdir()
    for n in range(2):
        (tmp_path / "data" / "rows.txt").write_text(f"from outside, {n}")
        with open_tracker().start("outside", "download") as run: run.log_artifact("faces-dataset", "dataset", tmp_path / "data", {})
        (home / "rows.txt").write_text(f"from outside, {n}")
        seen = done(job)
        assert seen.status == "completed" and seen.mark["dataset"] == f"faces-dataset:v{n}" and seen.result == "keep: too [bold]few[/bold]"
        assert {r.trigger for r in runs.recent()} == {"test"}
        slots.remember(job, seen.mark)
        assert done(job).status == "skipped", "the gate has refused, and that was that"
    store = Store("faces")
    id, _ = store.add(picture("red", 1), "a.jpg", "ada")
    store.answer(id, "ada", "new", {"beard": "yes"})
    seen = done(job)
    assert seen.status == "completed" and seen.mark["feedback"] == 1
    slots.remember(job, seen.mark)
    assert done(job).status == "skipped"
    assert done(job.model_copy(update={"parameters": {"force": True}})).status == "completed"


def test_a_notebook_runs_once_for_each_new_dataset_version_whatever_production_was_trained_on(steps, home, tmp_path):
    from nbs_lib.tracking import open_tracker
    file = steps("90_judge.ipynb", "print('judged')")
    job = Job(name="judge", notebook=str(file), on="dataset")
    assert done(job).status == "skipped"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.txt").write_text("1")
    with open_tracker().start("outside", "download") as run:
        run.log_artifact("faces-dataset", "dataset", tmp_path / "data", {})
        run.log_artifact("faces-model", "model", tmp_path / "data", {"dataset": "faces-dataset:v0"}, aliases=("production",))
    seen = done(job)
    assert seen.status == "completed" and seen.mark == {"dataset": "faces-dataset:v0"}
    slots.remember(job, seen.mark)
    assert done(job).status == "skipped"
    assert done(Job(name="watch", loop=True, on="dataset")).status == "skipped", "production was trained on it"


def test_a_source_is_read_when_it_has_changed(steps, home, tmp_path):
    from PIL import Image
    photos = tmp_path / "photos" / "a"
    photos.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(photos / "1.png")
    file = steps("90_fetch.ipynb", "print(source)", "recipe: str = ''\nsource: str = ''")
    job = Job(name="source", notebook=str(file), on="source", daily="03:00", parameters={"source": str(tmp_path / "photos")})
    for _ in range(2):
        seen = done(job)
        assert seen.status == "completed"
        slots.remember(job, seen.mark)
        assert done(job).status == "skipped"
        Image.new("RGB", (8, 8), "red").save(photos / "2.png")


# the command line


def loopbook(*words, code: int = 0) -> str:
    done = subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code == 2 else "")


def test_commands(here):
    define(here, "greet", every="1s")
    define(here, "fails", notebook="bad.ipynb", every="1s")
    assert json.loads(loopbook("schedule", "--list", "--json"))[0]["job"] == "fails"
    time.sleep(1.1)
    found = json.loads(loopbook("schedule", "--once", "--json", code=1))
    assert {s["job"]: s["status"] for s in found} == {"greet": "completed", "fails": "failed"}
    listed = loopbook("schedule", "--list")
    assert "every 1s" in listed and "ZeroDivisionError" in listed and "no daemon is running here" in listed
    assert "runs again" in loopbook("schedule", "--resume", "greet") and "did you mean 'greet'" in loopbook("schedule", "--resume", "gret", code=2)
    assert "nothing new" in loopbook("watch", "--once")
    assert "job:greet@" in loopbook("runs")


def test_the_panel(here):
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
    assert "| completed |" in table and f"[report]({os.path.relpath(runs.recent()[0].folder)}/hello.html)" in table
    panel.rows["broken"][-1].click()
    assert "is not a length of time" in panel.said.value


@pytest.mark.parametrize("with_data", [False, True])
def test_the_digest_is_readable_with_and_without_anything_to_tell(here, with_data):
    from nbs_lib.pipeline import run_notebook
    (here / "settings.ini").write_text("[schedule]\nmax_failures = 1\n")
    if with_data:
        run_notebook(here / "bad.ipynb")
        slots.sync([Job(name="sick", notebook="bad.ipynb", every="1h")], START)
        slot = slots.claim(slots.add(Job(name="sick", notebook="bad.ipynb", every="1h"), START), START)
        slots.finish(slot.token, "failed", "no network")
    run = run_notebook("digest")
    assert run.status == "completed", run.error
    page = (Path(run.folder) / "digest.html").read_text()
    assert run.summary["runs"] == run.summary["failed"] == with_data and run.summary["paused"] == (["sick"] if with_data else [])
    assert ("ZeroDivisionError" in page and "no network" in page) if with_data else "no run failed, and no job is paused" in page


def test_the_notebooks_of_the_jobs_that_ship_are_there():
    assert all((ROOT / "notebooks").glob(f"*_{n}.ipynb") for n in ("download", "evaluate", "digest"))


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_run_all_in_jupyterlab_and_run_now(here, tmp_path):
    from playwright.sync_api import expect, sync_playwright
    define(here, "greet", every="1d")
    define(here, "fails", notebook="bad.ipynb", every="1d")
    (here / "notebooks").mkdir()
    shutil.copy(next((ROOT / "notebooks").glob("*_schedule.ipynb")), here / "notebooks" / "schedule.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folders = {"HOME": tmp_path / "user", "JUPYTERLAB_SETTINGS_DIR": tmp_path / "settings", "JUPYTERLAB_WORKSPACES_DIR": tmp_path / "workspaces"}
    lab = subprocess.Popen([Path(sys.executable).with_name("jupyter-lab"), "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=tok",
                            "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
                           cwd=here, env=os.environ | {k: str(v) for k, v in folders.items()}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            for _ in range(120):
                try: page.goto(f"http://127.0.0.1:{port}/lab/tree/notebooks/schedule.ipynb?token=tok&reset"); break
                except Exception: time.sleep(0.5)
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=90_000)
            page.evaluate("async () => { await window.jupyterapp.restored; await window.jupyterapp.commands.execute('runmenu:run-all') }")
            page.locator(".widget-html-content", has_text="No daemon is running here").wait_for(timeout=90_000)
            assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
            for job in ("greet", "fails"): page.get_by_role("button", name="Run now").nth(sorted(("greet", "fails")).index(job)).click()
            expect(page.locator(".widget-gridbox")).to_contain_text("ZeroDivisionError", timeout=90_000)
            expect(page.locator(".widget-gridbox")).to_contain_text("completed 20", timeout=90_000)
            expect(page.locator(".widget-output table tbody tr")).to_have_count(2, timeout=30_000)
            page.locator(".widget-output").scroll_into_view_if_needed()
            report = page.locator(".widget-output a", has_text="report").first.get_attribute("href")
            assert "hello" in page.request.get(report if report.startswith("http") else f"http://127.0.0.1:{port}{report}", params={"token": "tok"}).text() or "bad" in report
            (ROOT / "outputs" / "screenshots").mkdir(parents=True, exist_ok=True)
            page.screenshot(path=ROOT / "outputs" / "screenshots" / "schedule.png")
            print(report)
            browser.close()
    finally:
        lab.terminate()
        lab.wait(20)
    assert {s.job: s.status for s in slots.history()} == {"greet": "completed", "fails": "failed"}
