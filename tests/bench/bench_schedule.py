"""What the schedule costs: a run beyond its notebook's own cells, a thousand jobs, a day of one-minute jobs.

    python tests/bench/bench_schedule.py        prints them as JSON
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

LOOPBOOK = Path(sys.executable).with_name("loopbook")


@contextmanager
def home():
    "An empty home."
    before = os.environ.get("LOOPBOOK_HOME")
    with tempfile.TemporaryDirectory(prefix="loopbook-bench-") as folder:
        os.environ["LOOPBOOK_HOME"] = folder
        try: yield Path(folder)
        finally: os.environ.pop("LOOPBOOK_HOME") if before is None else os.environ.update(LOOPBOOK_HOME=before)


NBCLIENT = """
import nbformat, nbclient
notebook = nbformat.read("trivial.ipynb", 4)
nbclient.NotebookClient(notebook).execute()
nbformat.write(notebook, "out.ipynb")
"""


def overhead(cells: int = 10, times: int = 5) -> dict:
    """Seconds of one run, start to end of its process, of a notebook of trivial cells: a scheduled run, papermill and
    nbclient, by turns; medians."""
    from nbs_lib.schedule import slots
    from nbs_lib.schedule.attempts import start
    from nbs_lib.schedule.jobs import Job
    with home() as folder:
        notebook = folder / "trivial.ipynb"
        kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        trivial = [new_code_cell(f"x = {i}") for i in range(cells)]
        nbformat.write(new_notebook(cells=trivial, metadata=kernel), notebook)
        job, at = Job(name="bench", notebook="trivial.ipynb", every="1d"), datetime.now(UTC)
        slots.sync([job], at)

        def scheduled(n):
            now = at + timedelta(seconds=n + 1)
            assert start(slots.claim(slots.add_slot(job, now), now)).wait() == 0
            assert slots.history()[0].status == "completed"

        def cli(*words):
            return lambda n: subprocess.run([*map(str, words)], check=True, capture_output=True, cwd=folder)
        ways = {"scheduled run": scheduled, "papermill": cli(LOOPBOOK.with_name("papermill"), notebook, "out.ipynb"),
                "nbclient": cli(sys.executable, "-c", NBCLIENT)}
        took = {name: [] for name in ways}
        for n in range(times):
            for name, way in ways.items():
                began = time.perf_counter()
                way(n)
                took[name].append(time.perf_counter() - began)
    found = {name: statistics.median(values) for name, values in took.items()}
    return found | {"over papermill": found["scheduled run"] - found["papermill"]}


THOUSAND = """
import json, os, time, psutil
from nbs_lib.schedule.daemon import Daemon
began = time.perf_counter()
daemon = Daemon()
daemon.tick()
first, ticks = time.perf_counter() - began, []
for _ in range(20):
    began = time.perf_counter()
    daemon.tick()
    ticks.append(time.perf_counter() - began)
memory = psutil.Process().memory_info().rss / 2**20
print(json.dumps({"first look (s)": first, "tick (s)": sorted(ticks)[10], "memory (MiB)": memory}))
"""


def thousand_jobs(jobs: int = 1000) -> dict:
    """A daemon with so many jobs: seconds of its first look at their files and of a tick, and its memory; beside a
    daemon without jobs."""
    found = {}
    cell = new_code_cell("a: int = 1", metadata={"tags": ["parameters"]})
    for count in (0, jobs):
        with home() as folder:
            (folder / "scheduled").mkdir()
            nbformat.write(new_notebook(cells=[cell]), folder / "a.ipynb")
            for n in range(count):
                when = f"daily: {n % 24:02}:{n % 60:02}\ntimezone: Europe/Berlin\n"
                file = folder / "scheduled" / f"job{n}.yaml"
                file.write_text(f"notebook: a.ipynb\n{when}parameters: {{a: {n}}}\n")
            done = subprocess.run([sys.executable, "-c", THOUSAND], check=True, capture_output=True, text=True)
            found[count] = json.loads(done.stdout)
    return found[jobs] | {"memory without jobs (MiB)": found[0]["memory (MiB)"]}


NOTHING = """
import os, sqlite3, sys
with sqlite3.connect(os.path.join(os.environ["LOOPBOOK_HOME"], "outputs", "schedule.sqlite"), timeout=30) as db:
    db.execute("update slots set status = 'completed', attempt = attempt + 1, token = null "
               "where token = ? and status = 'starting'", sys.argv[2:])
"""


def a_day(jobs: int = 1) -> dict:
    """A day of one-minute jobs on a fast clock: slots that ran, each in a process of its own that only writes so down,
    for slots that were due."""
    import time_machine

    from nbs_lib.schedule import attempts, slots
    from nbs_lib.schedule.daemon import Daemon
    began, code, attempts.CODE = time.perf_counter(), attempts.CODE, NOTHING
    try:
        with home() as folder:
            (folder / "scheduled").mkdir()
            nbformat.write(new_notebook(cells=[]), folder / "a.ipynb")
            for n in range(jobs): (folder / "scheduled" / f"job{n}.yaml").write_text("notebook: a.ipynb\nevery: 1m\n")
            with time_machine.travel(datetime(2026, 11, 21, tzinfo=UTC), tick=False) as clock:
                daemon = Daemon(lambda line: None)
                daemon.tick()
                for _ in range(24 * 60):
                    clock.shift(60)
                    daemon.tick()
                    while daemon.running: daemon.reap(), daemon.launch()
            rows = slots.history(10**6)
    finally: attempts.CODE = code
    ran = sum(s.status == "completed" and s.attempt == 1 and s.missed == 0 for s in rows)
    due = jobs * 24 * 60
    return {"slots due": due, "slots run": ran, "run / due": ran / due, "seconds": time.perf_counter() - began}


if __name__ == "__main__": print(json.dumps({f.__name__: f() for f in (overhead, thousand_jobs, a_day)}, indent=1))
