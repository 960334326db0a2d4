"""Jobs: what a file may say, how its mistakes are told, and when it is due, on days of 23 and of 25 hours too."""
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings
from nbs_lib.runs.execute import find_notebook
from nbs_lib.runs.records import step_name
from nbs_lib.schedule.jobs import Job, count_slots, last_slot, locate, next_slot, read_job


@pytest.fixture
def read(home):
    "Reads a job from a text, in a home with a notebook `hello.ipynb` that knows the parameter `epochs`."
    cells = [new_code_cell("epochs: int = 1\nname: str = ''", metadata={"tags": ["parameters"]}),
             new_code_cell("print(epochs)")]
    nbformat.write(new_notebook(cells=cells), home / "hello.ipynb")
    (home / "scheduled").mkdir()
    def from_text(text: str, name: str = "nightly") -> Job:
        (home / "scheduled" / f"{name}.yaml").write_text(text)
        return read_job(home / "scheduled" / f"{name}.yaml")
    return from_text


def test_all_keys(read):
    job = read("""# a comment
notebook: hello.ipynb
weekly: Monday 7:05
timezone: Europe/Berlin
parameters: {epochs: 3, name: "on"}
timeout: 1h30m
retries: 2
backoff: 30s
kernel: python3
enabled: no
notify: always
""")
    assert (job.name, job.notebook, job.weekly, job.timezone) == ("nightly", "hello.ipynb", "monday 07:05",
                                                                  "Europe/Berlin")
    assert (job.parameters, job.timeout, job.retries, job.backoff) == ({"epochs": 3, "name": "on"}, 5400, 2, 30)
    assert (job.kernel, job.enabled, job.notify, job.loop) == ("python3", False, "always", False)
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_yamls_own_ideas_of_on_and_of_times_do_no_harm(read):
    job = read("loop: yes\non: dataset\ndaily: 12:30\nkernel:\n")
    assert job.loop and job.on == ("dataset",) and job.daily == "12:30" and job.kernel is None
    assert read("loop: true\non: [dataset, feedback]").every == 300


@pytest.mark.parametrize("text, told", [
    ("notebook: hello.ipynb\nevry: 5m", ":2: evry: no such key; did you mean 'every'?"),
    ("notebook: hello.ipynb\nevery: 5", ":2: every: '5' is not a length of time; write 30s, 5m, 1h30m or 1d"),
    ("notebook: hello.ipynb\nevery: 0s", ":2: every: "),
    ("notebook: hello.ipynb\ndaily: 24:00", ":2: daily: '24:00' is not a time of day"),
    ("notebook: hello.ipynb\nweekly: mondy 06:00", ":2: weekly: 'mondy' is not a weekday; did you mean 'monday'?"),
    ("notebook: hello.ipynb\nweekly: monday", ":2: weekly: a time is missing; write monday 06:30"),
    ("notebook: hello.ipynb\ndaily: 06:00\ntimezone: Europe/Berln",
     ":3: timezone: 'Europe/Berln' is not a time zone; did you mean 'Europe/Berlin'?"),
    ("notebook: hello.ipynb\nevery: 5m\ndaily: 06:00", ":1: only one of every, daily and weekly"),
    ("notebook: hello.ipynb", ":1: say when: every, daily, weekly or on"),
    ("notebook: hello.ipynb\nloop: true\nevery: 5m", ":1: say either notebook: NAME or loop: true"),
    ("every: 5m", ":1: say either notebook: NAME or loop: true"),
    ("loop: maybe\nevery: 5m", ":1: loop: 'maybe' is not allowed: input should be a valid boolean"),
    ("loop: true\nkernel: python3\nevery: 5m", ":1: a loop has no kernel of its own"),
    ("notebook: helo\nevery: 5m", ":1: notebook: notebook 'helo': neither a file nor a step"),
    ("notebook: hello.ipynb\nevery: 5m\nparameters:\n  epoch: 3",
     ":3: parameters: parameter 'epoch': hello.ipynb has none of that name; did you mean 'epochs'?"),
    ("notebook: hello.ipynb\nevery: 5m\nparameters: {epochs: '3'}",
     ":3: parameters: parameter epochs = '3': hello.ipynb wants int there"),
    ("notebook: hello.ipynb\nevery: 5m\nparameters: [1]", ":3: parameters: [1] is not allowed"),
    ("loop: true\nevery: 5m\nparameters: {recip: faces}",
     ":3: parameters: parameter 'recip': the loop has none of that name; did you mean 'recipe'?"),
    ("loop: true\nevery: 5m\nparameters: {force: 'yes'}", ":3: parameters: parameter force = 'yes'"),
    ("loop: true\nevery: 5m\nparameters: {recipe: face}", "recipe 'face' is neither built in nor in"),
    ("notebook: hello.ipynb\nevery: 5m\nretries: some", ":3: retries: 'some' is not allowed"),
    ("notebook: hello.ipynb\nevery: 5m\nnotify: sometimes",
     ":3: notify: 'sometimes' is not allowed: input should be 'never', 'failure' or 'always'"),
    ("notebook: hello.ipynb\nevery: 5m\non: datasets", ":3: on: 'datasets' is not allowed"),
    ("notebook: hello.ipynb\nevery: 5m\nevery: 6m", ":3: every: is here twice, also in line 2"),
    ("notebook: hello.ipynb\nevery: [5m", ":3: this is not YAML"),
    ("notebook: hello.ipynb\nevery: {5m: 1}", ":2: every: "),
    ("- notebook\n- every", ":1: a job is lines of the form key: value"),
    ("", ":1: a job is lines of the form key: value"),
    ("notebook: hello.ipynb\nevery: 5m\nparameters: {name: !!python/object/apply:os.system [true]}",
     ":3: parameters: could not determine a constructor"),
    ("notebook: !!python/name:os.system\nevery: 5m", ":1: "),
])
def test_a_mistake_is_told_with_file_line_and_key(read, home, text, told):
    with pytest.raises(UserError) as error: read(text)
    assert str(home / "scheduled" / "nightly.yaml") in str(error.value) and told in str(error.value)
    assert "\n" not in str(error.value)


def test_names_and_bytes_that_are_no_job(read, home):
    with pytest.raises(UserError, match="a b.yaml: a job's file is named with letters"):
        read("loop: true\nevery: 5m", "a b")
    (home / "scheduled" / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="x.yaml: cannot be read"): read_job(home / "scheduled" / "x.yaml")
    (home / "settings.ini").write_text("[schedule]\ntimezone = Mars/Base\n")
    with pytest.raises(UserError, match="'Mars/Base' is not a time zone"): read("loop: true\nevery: 5m")


def test_the_time_zone_of_the_settings(read, home):
    (home / "settings.ini").write_text("[schedule]\ntimezone = America/New_York\n")
    assert read("notebook: hello.ipynb\ndaily: 02:30").timezone == "America/New_York"
    assert read("notebook: hello.ipynb\ndaily: 02:30\ntimezone: UTC").timezone == "UTC"


def test_the_jobs_that_ship(home):
    shipped = {f.stem: read_job(f) for f in (ROOT / "scheduled").glob("*.yaml")}
    assert {n: (j.loop, j.notebook, j.timing) for n, j in shipped.items()} == {
        "watch": (True, None, "every 5m"), "source": (False, "download", "daily 03:00 UTC"),
        "evaluate": (False, "evaluate", "daily 05:30 UTC"), "report": (False, "digest", "monday 07:00 UTC")}
    assert shipped["watch"].on == ("dataset", "feedback") and shipped["source"].on == ("source",)
    assert {n for n, j in shipped.items() if j.writes} == {"watch", "source", "evaluate"}
    assert all(len([line for line in f.read_text().splitlines() if line.strip()]) <= 8
               for f in (ROOT / "scheduled").glob("*.yaml"))


@pytest.mark.parametrize("name, step", [
    *((name, name) for name in ("feedback", "digest", "retention", "label_errors", "merge", "download", "schedule")),
    ("33_train", "train"), ("33_train.ipynb", "train"), ("60_digest.ipynb", "digest")])
def test_steps_by_their_names_and_by_file_names_that_they_once_had(read, home, name, step):
    job = read(f"notebook: {name}\ndaily: 05:30\n")
    file = locate(job.notebook, load_settings())
    assert job.notebook == name and step_name(file) == step and file.parent == ROOT / "notebooks"
    assert file == find_notebook(name)
    assert job.writes == (step in ("download", "merge", "train"))


def utc(text: str) -> datetime: return datetime.fromisoformat(text).replace(tzinfo=UTC)
def job(**when) -> Job: return Job(name="a", notebook="train", **when)


@pytest.mark.parametrize("place, clock, day, expected", [
    # 02:30 does not exist on the 28th
    ("Europe/Berlin", "02:30", "2027-03-27", ["27T01:30", "28T01:30", "29T00:30"]),
    # and is there twice on the 31st
    ("Europe/Berlin", "02:30", "2027-10-30", ["30T00:30", "31T00:30", "01T01:30"]),
    ("America/New_York", "01:30", "2026-10-31", ["31T05:30", "01T05:30", "02T06:30"]),
    ("Australia/Lord_Howe", "02:15", "2026-10-03", ["03T15:45", "04T15:15"]),             # half an hour of summer time
    ("Asia/Kolkata", "00:00", "2026-11-21", ["21T18:30", "22T18:30"])])
def test_a_daily_job_runs_once_on_days_of_23_and_25_hours(place, clock, day, expected):
    daily, at, found = job(daily=clock, timezone=place), utc(day), []
    for _ in expected:
        at = next_slot(daily, at)
        found.append(f"{at:%dT%H:%M}")
    assert found == expected


@pytest.mark.parametrize("when", [{"every": "5m"}, {"every": "7h"}, {"daily": "02:30", "timezone": "Europe/Berlin"},
                                  {"daily": "00:00", "timezone": "Pacific/Apia"},
                                  {"weekly": "sunday 02:30", "timezone": "Europe/Berlin"},
                                  {"daily": "23:59", "timezone": "America/St_Johns"}])
@pytest.mark.parametrize("start", ["2027-03-26", "2027-10-29", "2011-12-28"])
def test_slots_are_the_same_from_all_sides(when, start):
    some, first, minute = job(**when), utc(start), timedelta(minutes=1)
    step = timedelta(minutes=1 if "every" not in when else 7)
    seen, at = [], first
    while (at := next_slot(some, at)) < first + timedelta(days=4): seen.append(at)
    assert seen == sorted(set(seen))
    assert count_slots(some, first, first + timedelta(days=4)) in (len(seen), len(seen) + 1)
    for slot in seen:
        assert last_slot(some, slot) == slot and last_slot(some, slot + minute) == slot
        assert next_slot(some, slot - timedelta(seconds=1)) == slot
        assert slot not in (last_slot(some, slot - timedelta(seconds=1)), next_slot(some, slot))
    at = first
    while at < first + timedelta(days=3):
        assert last_slot(some, at) <= at < next_slot(some, at) and count_slots(some, last_slot(some, at), at) == 0
        at += step * 37
    if "daily" in when and start != "2011-12-28":
        days = [s.astimezone(ZoneInfo(when["timezone"])).date() for s in seen]
        assert days == sorted(set(days)) and len(days) in (3, 4), "once a day of its own zone"
