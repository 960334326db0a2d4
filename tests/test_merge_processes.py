"""The merge with a tracker: killed between any two actions, by several at once, and by its notebook.

All runs in processes of its own, as Trackio keeps to the first home that it sees."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from merge_cases import KINDS, Case, original

from nbs_lib.core.settings import load_settings
from nbs_lib.feedback.store import Store

DRIVER = """
import json, os, shutil, sys
import filelock, numpy, pandas, pyarrow.parquet, scipy.sparse.csgraph       # once for all: each attempt is a fork
from pathlib import Path
from nbs_lib.data.versions import newest
from nbs_lib.steps.merge import merge
from nbs_lib.core.settings import load_settings
base, out = Path(sys.argv[1]), Path(sys.argv[2])

def state(tracker):
    "The versions there are; rows, rows ever, images and parent of the newest."
    data = newest(tracker, "faces")
    versions = [v.version for v in tracker.versions("faces-dataset")]
    return [versions, len(data.rows), len(data.history), len(dict(data.images())), data.card["parent"]]

def attempt(home, kill_at=None):
    '''Merge in a process of its own; returns the state before and after, and at which calls it began to write, to log,
    and ended; None where it killed itself at call `kill_at`.'''
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.environ["LOOPBOOK_HOME"] = str(home)
            from nbs_lib.tracking.tracker import open_tracker
            settings = load_settings()
            tracker = open_tracker(settings)
            before, calls, marks = state(tracker), 0, {}
            def count(frame, event, arg):
                nonlocal calls
                name, file = frame.f_code.co_name, frame.f_code.co_filename
                if event == "call" and name in ("write_version", "log_artifact"): marks.setdefault(name, calls)
                if event not in ("call", "c_call"): return
                if not any(p in file for p in ("nbs_lib", "trackio", "shutil")): return
                calls += 1
                if calls == kill_at: os.kill(os.getpid(), 9)
            with tracker.start("faces-merge", "merge") as run:
                sys.setprofile(count)
                merge("faces", settings, tracker, run)
                sys.setprofile(None)
            os.write(writing, json.dumps([before, state(tracker), [*marks.values(), calls]]).encode())
        except BaseException:
            import traceback
            traceback.print_exc()
        finally: os._exit(0)
    os.close(writing)
    with open(reading) as pipe: said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None
"""


def in_a_process(home: Path, code: str, *words) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + code, str(home), str(home.parent), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
    )
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


FIRST = """
from nbs_lib.data.versions import add_version
from nbs_lib.data.dataset import Dataset
from nbs_lib.tracking.tracker import open_tracker
os.environ["LOOPBOOK_HOME"] = str(base)
tracker = open_tracker(load_settings())
with tracker.start("first", "download") as run:
    def copied(folder, parent):
        shutil.copytree(base / "v0", folder)
        return Dataset(folder)
    data, _ = add_version("faces", load_settings(), tracker, run, copied)
print(json.dumps(data.ref))
"""


@pytest.fixture
def waiting(home):
    "A home with a logged dataset of 80, and five answers that wait: four new images and a correction."
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n")
    case = Case(home)
    for n in range(950, 954): case.say(original(n), KINDS[n % 2])
    case.say(original(1), "fig")
    assert in_a_process(home, FIRST) == "faces-dataset:v0"
    return home


BEFORE, AFTER = [["v0"], 80, 80, 80, None], [["v1", "v0"], 84, 85, 84, "faces-dataset:v0"]


@pytest.mark.faults
def test_killed_between_any_two_actions(waiting):
    whole, killed = in_a_process(
        waiting,
        """
def copy(name):
    shutil.copytree(base, out / name)
    return out / name
whole, killed = attempt(copy("whole")), []
write, log, end = whole[2]
points = [write // 2, write, (write + log) // 2, log - 2, log, *(log + (end - log) * n // 6 for n in range(1, 6))]
for n, point in enumerate(points):
    home = copy(f"killed-{n}")
    killed.append([attempt(home, point), attempt(home), [p.name for p in (home / "data").glob(".*-dataset.next")]])
    shutil.rmtree(home)
print(json.dumps([whole, killed]))
""",
    )
    assert whole[:2] == [BEFORE, AFTER]
    for dead, (found, after, _), left in killed:
        assert dead is None and found in (BEFORE, AFTER) and after == AFTER and not left
    assert {str(found) for _, (found, *_), _ in killed} == {str(BEFORE), str(AFTER)}, (
        "both sides of the one moment that counts were hit"
    )


def test_several_at_once_make_one_version(waiting):
    found = in_a_process(waiting, """
import threading
results = []
threads = [threading.Thread(target=lambda: results.append(attempt(base))) for _ in range(3)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps([r[1] for r in results]))
""")
    assert found == [AFTER] * 3


def test_without_a_dataset_it_says_so(home):
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("loopbook"), "merge", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    answer = json.loads(done.stdout)
    assert done.returncode == 1 and "has no dataset yet" in answer["error"]
    assert "loopbook run download" in answer["error"]


def test_the_notebook_and_the_command(waiting):
    def merged(*words):
        done = subprocess.run(
            [Path(sys.executable).with_name("loopbook"), "merge", "--json", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )
        assert not done.returncode, done.stdout + done.stderr
        answer = json.loads(done.stdout)
        return answer, (Path(answer["folder"]) / "merge.html").read_text()
    store = Store("faces", load_settings(waiting))
    for n in range(2):
        store.answer(store.add(original(960 + n), "<i>.png", "<u>")[0], "<u>", "new", {"kind": ("$<b>kiwi", "$x_$")[n]})
    answer, page = merged()
    assert (answer["dataset"], answer["new_version"], answer["rows"], answer["joins"], answer["corrects"]) == (
        "faces-dataset:v1",
        True,
        84,
        4,
        1,
    )
    assert "is a new version of 84 images" in page and page.count("<img") == 2 and "a label that was wrong" in page
    assert "&lt;b&gt;kiwi" in page and "<b>kiwi" not in page and "$x_$" in page
    answer, page = merged("--force")
    assert (answer["dataset"], answer["new_version"], answer["known"]) == ("faces-dataset:v1", False, 5)
    assert "Nothing is merged" in page
    assert answer["why"][-1] == {"outcome": "known", "reason": "the dataset says so already", "images": 5}
    assert answer["waits"] == 2
    records = [json.loads(p.read_text()) for p in sorted(waiting.glob("outputs/*merge*/result.json"))]
    assert records[0]["inputs"] == ["faces-dataset:v0"] and records[0]["outputs"] == ["faces-dataset:v1"]
    assert not records[1]["outputs"]
