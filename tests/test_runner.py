"""The runs of jobs: what happens when one fails, waits, is told to stop, or has nothing to do."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from filelock import FileLock
from schedules import (  # noqa: F401  fixtures
    CLI,
    START,
    clock,
    define,
    five_minutes_later,
    go,
    here,
    left,
    planned,
    until,
    write,
)
from small_data import picture
from test_loop import steps  # noqa: F401  a fixture

from nbs_lib.core.errors import UserError
from nbs_lib.runs import records
from nbs_lib.runs.writer import writer
from nbs_lib.schedule import attempts, slots
from nbs_lib.schedule.daemon import Daemon, job_table, run_now
from nbs_lib.schedule.jobs import Job


def test_a_run_has_its_job_and_slot_in_its_record(here):
    define(here, "greet", every="1d")
    process = run_now("greet")
    assert process.wait(300) == 0
    [run], [slot] = records.recent(), slots.history()
    assert (run.status, run.trigger, slot.status, slot.attempt) == ("completed", f"job:greet@{slot.slot}", "completed",
                                                                    1)
    assert (here / "outputs" / ".schedule" / "greet.log").read_text() == ""
    assert "started by job:greet@" in (Path(run.folder) / "hello.html").read_text()


def test_clearing_up_is_a_job_too(here):
    (here / "settings.ini").write_text("[tracking]\nbackend = trackio\n[retention]\nkeep_days = 0\nkeep_runs = 0\n")
    old = [records.finish(records.begin(here / "old.ipynb").id, "failed") for _ in range(2)]
    define(here, "tidy", notebook="retention", every="1d", parameters="{dry_run: false}")
    assert run_now("tidy").wait(300) == 0
    [slot], run = slots.history(), records.recent()[0]
    assert (slot.status, run.step, run.status) == ("completed", "retention", "completed")
    assert run.parameters == {"dry_run": False}
    assert not any(Path(r.folder).exists() for r in old) and "Went" in (Path(run.folder) / "retention.html").read_text()


def test_failures_are_tried_again_with_longer_and_longer_waits(here):
    define(here, "fails", notebook="bad.ipynb", every="1d", retries=2, backoff="1s")
    said, waits = [], []
    run_now("fails").wait(300)
    waits.append(slots.history()[0].not_before - time.time())
    daemon = Daemon(said.append)
    until(lambda: not daemon.tick() and slots.history()[0].status == "failed" and not daemon.running)
    [slot] = slots.history()
    assert (slot.status, slot.attempt, slot.reason) == ("failed", 3, "ZeroDivisionError: division by zero")
    begun = [datetime.fromisoformat(r.started_at) for r in reversed(records.recent())]
    assert len(begun) == 3 and begun[1] - begun[0] >= timedelta(seconds=1)
    assert begun[2] - begun[1] >= timedelta(seconds=2)
    assert waits[0] <= 1 and said[0] == "fails: started again (1 of 2 retries)"
    assert said[-1] == "fails: failed: ZeroDivisionError: division by zero"


def test_too_many_failures_in_a_row_pause_a_job(here, clock):
    (here / "settings.ini").write_text("[schedule]\nmax_failures = 2\n")
    define(here, "fails", every="5m")
    daemon = Daemon()
    daemon.plan()
    def slot_that_is(status):
        clock.shift(300)
        go(daemon, clock, 0, status, "no network")
        return len(planned())
    assert [slot_that_is(s) for s in ("failed", "completed", "failed", "failed", "completed", "completed")] == [1, 2, 3,
                                                                                                                4, 4, 4]
    assert slots.states()["fails"].paused == "failed 2 times in a row, the last time: no network"
    assert job_table()[0]["next"] is None
    slots.resume("fails", datetime.now(UTC))
    assert [slot_that_is("completed") for _ in range(2)] == [5, 6] and job_table()[0]["next"]
    with pytest.raises(UserError, match="did you mean 'fails'"): slots.resume("fail", START)


def test_two_daemons_on_one_home_run_each_slot_once(here):
    (here / "settings.ini").write_text("[schedule]\nparallel = 4\n")
    define(here, "a", every="2s")
    define(here, "b", every="3s")
    daemons = [subprocess.Popen([*CLI, "schedule"], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    until(lambda: len(slots.history(status="completed")) >= 6)
    for d in daemons: d.send_signal(signal.SIGTERM)
    said = [d.communicate(timeout=300)[1] for d in daemons]
    assert [d.returncode for d in daemons] == [0, 0]
    done = [s for s in slots.history(1000) if s.status == "completed"]
    per_slot = Counter(r.trigger for r in records.recent(1000) if r.status == "completed")
    assert per_slot == Counter(s.trigger for s in done) and set(per_slot.values()) == {1}
    others = [s for s in slots.history(1000) if s.status not in ("completed", "missed", "due")]
    assert not others, (others, said)
    assert not any("rror" in s for s in said), said


def test_a_run_that_takes_too_long_is_ended(here):
    write(here, "deaf",
          "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); get_ipython().kernel.pre_handler_hook = "
          "lambda: None\nwhile True: time.sleep(1)")
    define(here, "endless", notebook="deaf.ipynb", every="1d", timeout="2s")
    run_now("endless").wait(300)
    [slot], [run] = slots.history(), records.recent()
    assert (slot.status, slot.reason, run.status) == ("failed", "timed out after 2 s", "failed")


def test_sigterm_stops_the_daemon_and_its_runs_and_a_new_one_takes_them_up(here):
    define(here, "slow", notebook="long.ipynb", every="2s")
    daemon = subprocess.Popen([*CLI, "schedule"], stderr=subprocess.PIPE, text=True)
    until(lambda: any(r.cell for r in records.recent()))
    daemon.send_signal(signal.SIGTERM)
    said = daemon.communicate(timeout=300)[1]
    assert daemon.returncode == 0 and "slow: stopped" in said and not left()
    assert records.recent()[0].status == "cancelled"
    waiting = slots.history(status="due")
    assert [(s.attempt, s.reason) for s in waiting] == [(0, "the scheduler was stopped")]
    write(here, "long", "print('short now')")
    done = subprocess.run([*CLI, "schedule", "--once", "--json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert ("completed", waiting[0].slot) in [(s["status"], s["slot"]) for s in json.loads(done.stdout)]


def test_what_one_daemon_has_stopped_another_does_not_take_for_killed(here):
    daemon, now = Daemon(print), datetime.now(UTC)
    ready = "import signal, sys, time; signal.signal(signal.SIGTERM, {}); print(flush=True); time.sleep({})"
    for name, how, seconds in (("lingers", "signal.SIG_IGN", 6), ("ends", "signal.SIG_DFL", 300)):
        job = Job(name=name, notebook="long.ipynb", every="1d")
        slots.sync([job], now)
        slot = slots.take(slots.claim(slots.add_slot(job, now), now).claimed_token)
        process = subprocess.Popen([sys.executable, "-c", ready.format(how, seconds)], stdout=subprocess.PIPE)
        process.stdout.readline()
        daemon.running[slot.claimed_token] = slot, process
    stopping = threading.Thread(target=daemon.stop)
    stopping.start()
    until(lambda: slots.history(job="ends")[0].status != "running", 4)
    assert slots.history(job="ends")[0].reason == "the scheduler was stopped", "while the other one lingers"
    assert slots.history(job="lingers")[0].status == "running" and stopping.is_alive()
    stopping.join()
    assert {(s.job, s.status, s.attempt) for s in slots.history()} == {("lingers", "due", 0), ("ends", "due", 0)}


def test_a_run_that_was_completed_when_it_was_told_to_stop_is_not_run_again(here):
    job, now = Job(name="greet", notebook="hello.ipynb", every="1d"), datetime.now(UTC)
    slots.sync([job], now)
    slot = slots.claim(slots.add_slot(job, now), now)
    with FileLock(here / "outputs" / ".index.lock"):         # for which it waits when its notebook has completed
        process = attempts.start(slot)
        until(lambda: any(r.status == "completed" for r in records.recent()))
        process.terminate()
        process.wait(300)
    assert slots.history()[0].status == "completed"


def test_a_job_that_is_cancelled_alone_stays_cancelled(here):
    define(here, "slow", notebook="long.ipynb", every="1d")
    process = run_now("slow")
    until(lambda: records.recent() and records.recent()[0].cell)
    with pytest.raises(UserError, match="slow: its run of .* is running"): run_now("slow")
    process.terminate()
    process.wait(300)
    assert slots.history()[0].status == records.recent()[0].status == "cancelled" and not left()


def test_who_writes_waits_visibly_and_who_reads_does_not(here):
    write(here, "train", "print('trained')")
    for name, keys in (("writes", {"notebook": "train.ipynb"}), ("reads", {})): define(here, name, every="1d", **keys)
    daemon, now = Daemon(lambda line: None), datetime.now(UTC)
    daemon.plan()
    for name in ("writes", "reads"): slots.add_slot(daemon.folder.jobs[name], now)
    other = ("import sys; from nbs_lib.runs.writer import writer\n"
             "with writer('the loop of somebody'): print('in', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as holder:
        holder.stdout.readline()
        daemon.tick()
        until(lambda: slots.history(job="reads")[0].status == "completed")
        daemon.launch()
        [waiting] = slots.history(job="writes")
        assert waiting.status == "due" and "waits: the loop of somebody" in waiting.reason
        assert "the loop of somebody" in next(r for r in job_table() if r["job"] == "writes")["reason"]
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
    assert [p.wait(300) for p in processes] == [0, 0]
    first, second = reversed(records.recent())
    assert first.status == second.status == "completed" and second.started_at >= first.ended_at
    assert [s.reason for s in slots.history()] == [None, None]


def test_a_writer_may_skip_instead(here):
    (here / "settings.ini").write_text("[schedule]\nbusy = skip\n")
    write(here, "train", "print('trained')")
    define(here, "writes", notebook="train.ipynb", every="1d")
    with writer("the test"): run_now("writes").wait(300)
    [slot] = slots.history()
    assert slot.status == "skipped" and "the test" in slot.reason and not records.recent()


def test_no_more_runs_at_once_than_allowed(here, clock):
    for n in range(5): define(here, f"job{n}", every="5m")
    five_minutes_later(clock)
    assert [bool(slots.claim(s, START, parallel=2)) for s in slots.due(datetime.now(UTC))] == [True, True, False, False,
                                                                                               False]


def test_a_lease_runs_out_and_the_late_process_is_refused(here, clock):
    define(here, "a", every="5m")
    five_minutes_later(clock)
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
    monkeypatch.setattr(attempts, "CODE", "raise OSError('no room for me')")
    said = []
    Daemon().plan()
    time.sleep(1.1)
    slot, *_ = Daemon(said.append).run(once=True, tick=0.1)
    assert slot.status == "failed" and "its process did not start: OSError: no room for me" in slot.reason


def test_a_damaged_schedule_is_told_and_a_new_one_begins_when_it_is_moved_away(here, clock):
    define(here, "often", every="5m")
    daemon, file = Daemon(), here / "outputs" / "schedule.sqlite"
    daemon.plan()
    for name in here.glob("outputs/schedule.sqlite*"): name.unlink()
    file.write_bytes(b"no database" * 1000)
    clock.shift(300)
    said = "schedule.sqlite: the schedule cannot be kept there .*move a damaged file away"
    with pytest.raises(UserError, match=said):
        daemon.plan()
    file.unlink()
    for _ in range(2):
        daemon.plan()
        clock.shift(300)
    assert planned() == [("11-21T10:10", "due")]


# is there anything new


def done(job, **keys): return attempts.attempt(job, "test", before=slots.recall(job), **keys)


def test_a_loop_runs_once_for_each_new_dataset_version_and_word(steps, home, tmp_path):
    from nbs_lib.feedback.store import Store
    from nbs_lib.tracking.tracker import open_tracker
    job = Job(name="watch", loop=True, on=("dataset", "feedback"))
    assert done(job) == attempts.Outcome("skipped", "nothing new")
    (tmp_path / "data").mkdir()
    for n in range(2):
        (tmp_path / "data" / "rows.txt").write_text(f"from outside, {n}")
        with open_tracker().start("outside", "download") as run:
            run.log_artifact("faces-dataset", "dataset", tmp_path / "data", {})
        (home / "rows.txt").write_text(f"from outside, {n}")
        seen = done(job)
        assert seen.status == "completed" and seen.mark["dataset"] == f"faces-dataset:v{n}"
        assert seen.result == "keep: too [bold]few[/bold]"
        assert {r.trigger for r in records.recent()} == {"test"}
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
    from nbs_lib.tracking.tracker import open_tracker
    file = steps("90_judge.ipynb", "print('judged')")
    job = Job(name="judge", notebook=str(file), on="dataset")
    assert done(job).status == "skipped"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.txt").write_text("1")
    with open_tracker().start("outside", "download") as run:
        run.log_artifact("faces-dataset", "dataset", tmp_path / "data", {})
        run.log_artifact("faces-model", "model", tmp_path / "data", {"dataset": "faces-dataset:v0"},
                         aliases=("production",))
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
    job = Job(name="source", notebook=str(file), on="source", daily="03:00",
              parameters={"source": str(tmp_path / "photos")})
    for _ in range(2):
        seen = done(job)
        assert seen.status == "completed"
        slots.remember(job, seen.mark)
        assert done(job).status == "skipped"
        Image.new("RGB", (8, 8), "red").save(photos / "2.png")
