"""The daemon: what is due when, and which files say so."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
from datetime import UTC, datetime

import pytest
# noqa: F401  fixtures
from schedules import CLI, START, clock, define, five_minutes_later, go, here, planned, until, write
from test_loop import steps  # noqa: F401  a fixture

from nbs_lib.core.errors import UserError
from nbs_lib.schedule import slots
from nbs_lib.schedule.daemon import Daemon, Folder, job_table

# when


def test_a_day_of_slots(here, clock):
    define(here, "quarterly", every="6h")
    daemon = Daemon()
    for _ in range(24 * 4): go(daemon, clock, 900)
    assert planned() == [(s, "completed") for s in ("11-21T12:00", "11-21T18:00", "11-22T00:00", "11-22T06:00")]


@pytest.mark.parametrize("start, slot", [("2027-03-27T12:00", ["03-28T01:30", "03-29T00:30"]),
                                         ("2027-10-30T12:00", ["10-31T00:30", "11-01T01:30"])])
def test_once_on_the_days_when_clocks_change(here, clock, start, slot):
    clock.move_to(datetime.fromisoformat(start).replace(tzinfo=UTC))
    define(here, "nightly", daily="02:30", timezone="Europe/Berlin")
    daemon = Daemon()
    for _ in range(41 * 6): go(daemon, clock, 600)
    assert planned() == [(s, "completed") for s in slot]


def test_a_clock_that_is_put_back_runs_nothing_again(here, clock):
    define(here, "often", every="5m")
    daemon = Daemon()
    def minutes(n):
        for _ in range(n): go(daemon, clock, 60)
    minutes(60)
    before = planned()
    clock.shift(-3600)
    minutes(58)
    assert planned() == before, "an hour that has been"
    minutes(10)
    assert len(planned()) == len(before) + 1 and len(set(planned())) == len(planned())
    clock.shift(366 * 86400)                                           # a clock that was wrong for a moment
    minutes(1)
    clock.shift(-366 * 86400)
    count = len(planned())
    minutes(20)
    assert len(planned()) == count + 5, "it goes on"


@pytest.mark.parametrize("catch_up, status", [("one", "due"), ("none", "missed")])
def test_missed_slots_are_caught_up_once_or_not_at_all(here, clock, catch_up, status):
    (here / "settings.ini").write_text(f"[schedule]\ncatch_up = {catch_up}\n")
    define(here, "hourly", every="1h")
    define(here, "nightly", daily="03:00")
    Daemon().plan()
    clock.shift(3 * 86400 + 60)
    Daemon().plan()
    assert {(s.job, s.slot[5:16], s.status, s.missed)
            for s in slots.history()} == {("hourly", "11-24T10:00", status, 71), ("nightly", "11-24T03:00", status, 2)}
    Daemon().plan()
    assert len(slots.history()) == 2
    clock.shift(3600 - 3 * 60 + 20)
    Daemon().plan()
    assert len(slots.history(job="hourly")) == 2 and slots.history(job="hourly")[0].status == ("missed"
                                                                                               if catch_up == "one"
                                                                                               else "due")


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
    daemon = five_minutes_later(clock)
    [row] = slots.due(datetime.now(UTC))
    token = slots.claim(row, datetime.now(UTC)).token
    slots.take(token)
    clock.shift(300)
    daemon.plan()
    assert planned() == [("11-21T10:05", "running"),
                         ("11-21T10:10", "missed")] and "10:05:00Z was not over" in slots.history()[0].reason
    slots.end_attempt(token, "completed")
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
    assert [(r["job"], bool(r["problem"])) for r in job_table()] == [("a", True), ("broken", True)]
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
