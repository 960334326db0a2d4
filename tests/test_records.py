"""What runs leave: the page of all runs, their logs, and what is cleared away of it."""
import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from browsers import browser, chromium
from conftest import SHARED, WandbServer
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbs_lib.runs import records
from nbs_lib.runs.index import NEWEST, write_index
from nbs_lib.schedule import slots
from nbs_lib.schedule.jobs import Job

LOOPBOOK = [sys.executable, "-c", "from nbs_lib.cli.main import main; main()"]


def loopbook(*words, code: int = 0, **environment):
    done = subprocess.run([*LOOPBOOK, *map(str, words)], capture_output=True, text=True, timeout=120,
                          env=os.environ | environment)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def add(home: Path, number: int, step: str = "train", files: int = 1, **facts) -> records.Run:
    "The record of a run of so many days ago, and its folder."
    began = datetime.now(UTC) - timedelta(days=number)
    id = f"{began:%Y%m%dT%H%M%S}-{step}-{number:04x}"
    folder = home / "outputs" / id
    folder.mkdir(parents=True)
    for name in (f"{step}.html", f"{step}.ipynb", "log.txt", *map(str, range(files - 3))):
        (folder / name).write_text("x" * 1000)
    moment = began.isoformat(timespec="milliseconds")
    facts = {"status": "completed", "parameters": {"recipe": "faces"}, "started_at": moment, "ended_at": moment} | facts
    notebook = f"/somewhere/33_{step}.ipynb"
    run = records.Run(id, notebook, str(folder), known_as=notebook, **facts)
    insert(asdict(run))
    return run


def insert(facts: dict) -> None:
    "Write a row as it is."
    row = records._pack(facts)
    places = ", ".join("?" * len(row))
    records._execute(f"insert into runs ({records._quoted(row)}) values ({places})", list(row.values()))


# The page of all runs

def test_the_page_lists_runs_newest_first_and_loops_together(home):
    facts = {"inputs": ["faces-dataset:v1"], "outputs": ["faces-model:v2"], "group": "20261121T000000-loop-aaaa",
             "summary": {"decision": "keep", "reasons": ["<i>worse</i>"]}}
    loop = [add(home, 9 - n, step, **facts) for n, step in enumerate(("download", "train", "evaluate"))]
    alone = add(home, 8, "digest", trigger="job:report@2026-11-20T07:00:00Z")
    failed = add(home, 1, "ta<b>le & #1", status="failed", cell="2/7", error="KeyError: '<script>alert(1)</script>'")
    gone = add(home, 20, "label")
    shutil.rmtree(gone.folder)
    text = write_index().read_text()
    assert re.findall('<tr id="([^"]+)', text) == [html.escape(r.id) for r in (failed, *loop, alone, gone)]
    assert text.count('<tr class="loop">') == 1 and "1 failed · 5 completed" in text
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "<i>worse" not in text and "ta&lt;b&gt;le &amp; #1" in text
    assert "no longer kept" in text and "job:report<small>2026-11-20T07:00:00Z" in text and "faces-model:v2" in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text) and "default-src 'none'" in text
    links = re.findall(r'href="([^"#]+)', text)
    assert len(links) == 15 and all((home / "outputs" / unquote(html.unescape(link))).exists() for link in links)


BEGINS_AND_DIES = """
import os
from pathlib import Path
from nbs_lib.runs import records
print(records.begin(Path("a.ipynb")).id, flush=True)
os._exit(9)
"""


def test_a_running_run_links_to_its_log_and_a_killed_one_has_failed(home):
    run = records.begin(Path("33_train.ipynb"))
    (Path(run.folder) / "log.txt").touch()
    records.update(run.id, cell="3/9")
    text = write_index().read_text()
    assert "1 running" in text and f'href="{run.id}/log.txt"' in text
    assert "at cell 3/9" in text and "train.html" not in text
    killed = subprocess.run([sys.executable, "-c", BEGINS_AND_DIES], capture_output=True, text=True)
    text = write_index().read_text()
    assert "killed: its process ended" in text and killed.stdout.strip() in text
    records.finish(run.id, "completed")


def test_only_the_newest_are_listed_and_that_is_said(home):
    template = add(home, 0)
    for n in range(NEWEST):
        moment = f"2020-01-01T00:{n // 60:02}:{n % 60:02}.000+00:00"
        insert(asdict(template) | {"id": f"old-{n}", "started_at": moment})
    text = write_index().read_text()
    assert text.count("<tr id=") == NEWEST and f"only the newest {NEWEST} runs" in text
    assert 'id="old-0"' not in text and 'id="old-1"' in text


def test_no_run_yet_and_a_page_that_cannot_be_written(home):
    assert "No run yet" in write_index().read_text()
    (home / "outputs" / "index.html").unlink()
    (home / "outputs" / "index.html" / "in the way").mkdir(parents=True)
    assert write_index() is None


def test_many_write_the_page_and_nobody_reads_half_of_it(home):
    for n in range(50): add(home, n)
    page = write_index()
    code = "from nbs_lib.runs.index import write_index\nfor _ in range(15): assert write_index()"
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    looks = 0
    while any(w.poll() is None for w in writers):
        assert page.read_text().rstrip().endswith("</html>")
        looks += 1
    assert looks > 10 and [w.returncode for w in writers] == [0, 0, 0] and not list((home / "outputs").glob("*.tmp"))


@browser
def test_from_the_page_to_the_cell_that_failed(home, tmp_path):
    from nbs_lib.runs.execute import run_notebook
    code = [*(f"print('line\\n' * 30, {n})" for n in range(5)), "1 / 0", *["2"] * 40]
    long = new_notebook(cells=[new_markdown_cell("# Long"), *map(new_code_cell, code)])
    nbformat.write(long, tmp_path / "10_long.ipynb")
    run = run_notebook(tmp_path / "10_long.ipynb")
    with chromium() as shown:
        page = shown.new_page(viewport={"width": 1400, "height": 700})
        problems, asked = [], []
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: asked.append(r.url))
        page.goto(write_index().as_uri())
        assert page.get_by_text("ZeroDivisionError: division by zero").is_visible()
        assert page.locator(".status.failed").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.get_by_role("link", name="log").click()
        assert "ZeroDivisionError" in page.locator("body").inner_text()
        page.go_back()
        page.get_by_role("link", name="page").click()
        assert page.url.endswith(f"{run.id}/long.html#failed")
        box = page.locator("#failed").bounding_box()
        assert 0 <= box["y"] < 700 and page.evaluate("window.scrollY") > 300, "the page opens at the failing cell"
    assert not problems and all(u.startswith(("file:", "data:")) for u in asked)


# Logs

def test_logs(home):
    one, two = add(home, 3), add(home, 2, "evaluate")
    (Path(two.folder) / "log.txt").write_bytes(b"epoch 1\r\xff\x1b[31mred\n")
    as_bytes = subprocess.run([*LOOPBOOK, "logs", "last"], capture_output=True, timeout=60)
    assert as_bytes.stdout == b"epoch 1\r\xff\x1b[31mred\n" and as_bytes.returncode == 0
    assert loopbook("logs", one.id[:16]).stdout == "x" * 1000
    said = json.loads(loopbook("logs", two.id, "--json").stdout)
    assert said["id"] == two.id and said["status"] == "completed" and "epoch 1" in said["log"]
    wrong = {"2": f"2 runs begin with '2': {one.id}", "nothing": "no run 'nothing'", "": "no run ''",
             "../outputs": "no run"}
    for words, told in wrong.items():
        error = loopbook("logs", words, code=2)
        assert error.stdout == "" and error.stderr.startswith("error: ")
        assert told in error.stderr and error.stderr.count("\n") == 1
    shutil.rmtree(one.folder)
    assert "was pruned" in loopbook("logs", one.id, code=2).stderr
    assert "no run yet" in loopbook("logs", "last", code=2, LOOPBOOK_HOME=str(home / "other")).stderr


def test_following_a_log_until_the_run_has_ended(home):
    run = records.begin(Path("33_train.ipynb"))
    log = Path(run.folder) / "log.txt"
    with subprocess.Popen([*LOOPBOOK, "logs", "last", "--follow"], stdout=subprocess.PIPE) as following:
        time.sleep(0.5)
        log.write_text("epoch 1\n")
        assert following.stdout.readline() == b"epoch 1\n", "while the run is going on"
        with open(log, "a") as file: file.write("epoch 2\nhalf a li")
        assert following.stdout.readline() == b"epoch 2\n" and following.poll() is None
        with open(log, "a") as file: file.write("ne\n" + "y" * 3_000_000)
        records.finish(run.id, "completed")
        rest = following.stdout.read()
        assert rest == b"half a line\n" + b"y" * 3_000_000 and following.wait(300) == 0


SAYS_HELLO = """
import time
from pathlib import Path
from nbs_lib.runs import records
run = records.begin(Path("a.ipynb"))
Path(run.folder, "log.txt").write_text("hello\\n" * 100000)
print(flush=True)
time.sleep(60)
"""


def test_following_ends_when_the_run_is_killed_or_the_reader_has_enough(home):
    follow, pipe = [*LOOPBOOK, "logs", "last", "-f"], subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SAYS_HELLO], stdout=pipe) as run:
        run.stdout.readline()
        with subprocess.Popen(follow, stdout=pipe, stderr=pipe) as impatient:
            assert impatient.stdout.readline() == b"hello\n"
            impatient.stdout.close()
            with open(next(home.glob("outputs/*/log.txt")), "a") as file: file.write("more\n")
            assert impatient.wait(20) == 0 and impatient.stderr.read() == b""
        with subprocess.Popen(follow, stdout=pipe) as following:
            threading.Timer(1, run.kill).start()
            assert following.stdout.read().endswith(b"more\n") and following.wait(300) == 0


# Clearing up

@pytest.fixture
def settings(home):
    retention = "[retention]\nkeep_days = 10\nkeep_runs = 3\nkeep_versions = 2\n"
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n" + retention)
    return home / "settings.ini"


def kept(home: Path) -> set[str]:
    return {p.name for p in (home / "outputs").iterdir() if p.is_dir()}


def test_what_is_pruned(home, settings):
    train = [add(home, n) for n in range(20)]
    add(home, 40, "evaluate")
    rare, failed = add(home, 90, "digest"), [add(home, 100 + n, "merge", status="failed", error="no") for n in range(5)]
    stray = home / "outputs" / "screenshots"
    stray.mkdir()
    before = kept(home)
    dry = json.loads(loopbook("prune", "--dry-run", "--json").stdout)
    assert kept(home) == before and dry["bytes"] == 12 * 3000
    assert {i["name"] for i in dry["items"]} == {r.id for r in train[10:]} | {r.id for r in failed[3:]}
    done = loopbook("prune")
    assert "gone: 12 things, 0.0 MB" in done.stdout and train[15].id in done.stdout
    assert kept(home) == before - {i["name"] for i in dry["items"]} and stray.exists() and rare.id in kept(home)
    assert len(records.recent(1000)) == 27 and records.get(train[15].id).status == "completed", "the rows stay"
    assert "no longer kept" in (home / "outputs" / "index.html").read_text()
    assert json.loads(loopbook("prune", "--json").stdout)["items"] == [] and not (home / "outputs" / ".pruned").exists()


def test_old_slots_are_pruned_but_open_ones_and_the_last_of_each_job(home, settings):
    now = datetime.now(UTC)
    def done(job, days):
        moment = now - timedelta(days=days)
        added = slots.add_slot(Job(name=job, notebook="a.ipynb", every="1d"), moment)
        slots.end_attempt(slots.claim(added, moment).token, "completed")
    for days in (30, 20, 12, 5): done("daily", days)
    for days in (40, 30): done("retired", days)
    open_one = slots.add_slot(Job(name="waits", notebook="a.ipynb", every="1d"), now - timedelta(days=60))
    for days in (50, 49): done("other", days)
    [item] = json.loads(loopbook("prune", "--dry-run", "--json").stdout)["items"]
    assert item["kind"] == "slots" and item["name"].startswith("5 before ") and len(slots.history(100)) == 9
    loopbook("prune")
    left = slots.history(100)
    assert sorted(s.job for s in left) == ["daily", "other", "retired", "waits"] and open_one in left
    assert not json.loads(loopbook("prune", "--dry-run", "--json").stdout)["items"]


def test_what_runs_is_never_pruned(home, settings):
    run = records.begin(Path("/somewhere/33_train.ipynb"))
    records.update(run.id, started_at="2020-01-01T00:00:00.000+00:00")
    killed = add(home, 50, status="running", ended_at=None)
    for n in range(4): add(home, n)
    loopbook("prune")
    assert run.id in kept(home) and killed.id not in kept(home)
    loopbook("runs")
    assert killed.id not in kept(home) and "killed" in records.get(killed.id).error
    records.finish(run.id, "cancelled")


def test_the_last_success_stays_so_that_the_loop_has_nothing_to_do(home, settings):
    old = {r: add(home, 100 + n, parameters={"recipe": r}) for n, r in enumerate(("faces", "birds"))}
    for n in range(5): add(home, 50 + n, status="failed", parameters={"recipe": "faces"})
    older = add(home, 200)
    loopbook("prune")
    assert {r.id for r in old.values()} <= kept(home) and older.id not in kept(home)


def test_nobody_prunes_while_somebody_writes(home, settings):
    from nbs_lib.runs.writer import writer
    for n in range(20, 30): add(home, n)
    with writer("loop of faces"):
        said = loopbook("prune", code=2).stderr
        assert "loop of faces" in said and len(kept(home)) == 10
        assert len(json.loads(loopbook("prune", "--dry-run", "--json").stdout)["items"]) == 7, "to look is allowed"


def test_nothing_is_pruned_where_the_tracker_cannot_be_asked(home, settings):
    for n in range(20, 30): add(home, n)
    assert "no key" in loopbook("prune", code=2, LOOPBOOK_TRACKING__BACKEND="wandb").stderr and len(kept(home)) == 10


def test_caches_that_nobody_uses(home, settings):
    data, long_ago = home / "data", time.time() - 20 * 86400
    for name in ("cache/features/old.sqlite", "cache/features/new.sqlite", "cache/openvino/net/a.bin",
                 "cache/openvino/net/b.xml", "cache/wandb/artifacts/obj/md5/ab/cdef", "wandb/run-1/logs/debug.log",
                 "wandb/offline-run-2/run.wandb", "wandb/offline-run-3/run.wandb.synced", "raw/photos.zip",
                 "feedback/faces/feedback.sqlite"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("12345")
    for path in [*data.rglob("*")]:
        if path.name not in ("new.sqlite", "b.xml"): os.utime(path, (long_ago, long_ago))
    found = json.loads(loopbook("prune", "--json").stdout)
    gone = {"cache/features/old.sqlite", "cache/wandb/artifacts/obj/md5/ab/cdef", "wandb/run-1", "wandb/offline-run-3"}
    assert {i["name"] for i in found["items"]} == gone and found["bytes"] == 20
    assert (data / "raw/photos.zip").exists() and (data / "feedback/faces/feedback.sqlite").exists()
    assert (data / "cache/openvino/net/a.bin").exists()
    assert (data / "wandb/offline-run-2/run.wandb").exists(), "was not sent yet" and not (data / ".pruned").exists()


MAKE = """
import os, sys, tempfile
from pathlib import Path
from nbs_lib.runs import records
from nbs_lib.tracking.tracker import open_tracker
tracker, made = open_tracker(), {}
def step(name, reads, writes, type, decision=None):
    run = records.begin(Path(f"30_{name}.ipynb"), parameters={"recipe": "faces"})
    os.environ |= {"LOOPBOOK_RUN_ID": run.id, "LOOPBOOK_RUN_DIR": run.folder}
    with tracker.start(f"faces-{name}", name) as tracked:
        for ref in reads: tracked.use(ref)
        folder = Path(tempfile.mkdtemp())
        (folder / "content").write_text(run.id * 100)
        if writes: tracked.log_artifact(writes, type, folder)
    (Path(run.folder) / "notebook.ipynb").write_text(run.id)
    tracker.attach(tracked.id, [Path(run.folder) / "notebook.ipynb"], "completed")
    if writes: tracker.download(writes)
    records.finish(run.id, "completed", summary=decision or {})
    return run.id
for n in range(6):
    made[n, "download"] = step("download", ["faces-dataset"] if n else [], "faces-dataset", "dataset")
    made[n, "train"] = step("train", ["faces-dataset"], "faces-model", "model")
    promoted, kept = {"decision": "promote", "production": f"faces-model:v{n}"}, {"decision": "keep"}
    made[n, "evaluate"] = step("evaluate", ["faces-model"], None, None, promoted if n in (1, 2) else kept)
    if n == 1: tracker.set_alias("faces-model:v1", "production"), tracker.set_alias("faces-model:v1", "previous")
    if n == 2: tracker.set_alias("faces-model:v2", "production")
records._execute("update runs set started_at = '2020' || substr(started_at, 5)")
print({f"{n} {step}": id for (n, step), id in made.items()})
"""


def lineage_stays(home) -> tuple[dict, dict]:
    "Make six rounds of which the third is in production, prune them; returns the ids of the runs and what was said."
    done = subprocess.run([sys.executable, "-c", MAKE], capture_output=True, text=True, check=True, timeout=300)
    made = eval(done.stdout.strip().splitlines()[-1])
    said = json.loads(loopbook("prune", "--json").stdout)
    stay = {f"{n} download" for n in (0, 1, 2)}                                           # each came from the last
    stay |= {f"{n} {s}" for n in (1, 2) for s in ("train", "evaluate")}
    stay |= {f"{n} {s}" for n in (3, 4, 5) for s in ("download", "train", "evaluate")}    # the newest three
    assert {name for name, id in made.items() if id in kept(home)} == stay
    return made, said


def test_the_lineage_of_production_stays(home, settings):
    _, said = lineage_stays(home)
    [note] = said["notes"]
    assert re.match(r"trackio cannot delete versions: \d+ that nobody needs stay", note)
    assert not [i for i in said["items"] if i["kind"] == "version"]
    assert len(json.loads(loopbook("models", "--json").stdout)) == 6
    copies = [i for i in said["items"] if i["kind"] == "copy"]
    assert not copies, "hard links into Trackio's store: deleting them gives nothing back"


DELETING_SERVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("wandb_server", sys.argv.pop(1))
server = importlib.util.module_from_spec(spec)
sys.modules["wandb_server"] = server
spec.loader.exec_module(server)
def deleteArtifact(self, input):
    artifact = server.node(server.Artifact, input["artifactID"])
    if artifact.aliases() and not input.get("deleteAliases"): raise server.GQLError("the artifact has aliases")
    for member in artifact._memberships: del member.artifactCollection._members[member.versionIndex]
    artifact.state = "DELETED"
    return {"artifact": artifact}
server.Mutation.deleteArtifact = deleteArtifact
server.main()
"""


@pytest.fixture
def deleting_server(tmp_path):
    "The W&B server for tests, taught to delete versions."
    script = SHARED / "tools" / "wandb_server.py"
    if not script.exists(): pytest.skip(f"no W&B server for tests: {script} is missing")
    command = [sys.executable, "-c", DELETING_SERVER, script, "--port", "0", "--data-dir", tmp_path / "server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield WandbServer(server.stdout.readline().split()[-1])
        server.kill()


def test_versions_are_deleted_where_that_can_be_done(home, settings, deleting_server, monkeypatch):
    for name, value in deleting_server.env.items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOOPBOOK_TRACKING__BACKEND", "wandb")
    _, said = lineage_stays(home)
    assert not said["notes"]
    assert {m["version"] for m in json.loads(loopbook("models", "--json").stdout)} == {"v1", "v2", "v4", "v5"}
    assert {d["version"] for d in json.loads(loopbook("datasets", "--json").stdout)} == {"v0", "v1", "v2", "v4", "v5"}
    copies = {p.name for p in (home / "data" / "artifacts" / "faces-model").iterdir()}
    assert {name for name in copies if not name.startswith(".")} == {"v1", "v2", "v4", "v5"}
    artifacts = [a for a in deleting_server.state("loopbook")["artifacts"] if a["state"] != "DELETED"]
    there = {f"{a['name'].split(':')[0]}:{a['version']}" for a in artifacts}
    assert {v for v in there if "train-notebook" in v} == {f"faces-train-notebook:v{n}" for n in (1, 2, 4, 5)}


KILLS = """
import os, random, signal, sys, time
from datetime import UTC, datetime
from nbs_lib.schedule.retention import prune
from nbs_lib.core.settings import load_settings
from nbs_lib.tracking.tracker import open_tracker
open_tracker(load_settings())
for _ in range(int(sys.argv[1])):
    if not (child := os.fork()):
        prune(wait=True)
        os._exit(0)
    time.sleep(random.uniform(0.005, 0.08))
    os.kill(child, signal.SIGKILL)
    print(os.WEXITSTATUS(os.waitpid(child, 0)[1]), flush=True)
    for folder in os.scandir(os.environ["LOOPBOOK_HOME"] + "/outputs"):
        if folder.is_dir() and not folder.name.startswith("."): assert len(os.listdir(folder)) == 60, folder.name
"""


@pytest.mark.faults
def test_a_killed_prune_leaves_whole_folders_or_none(home, settings):
    for n in range(60): add(home, 20 + n, files=60)
    subprocess.run([sys.executable, "-c", KILLS, "25"], check=True, timeout=300, stdout=subprocess.DEVNULL)
    left = kept(home) - {".pruned"}
    assert 3 <= len(left) and len(records.recent(1000)) == 60
    loopbook("prune")
    assert len(kept(home)) == 3 and not (home / "outputs" / ".pruned").exists()
    assert (home / "outputs" / "index.html").exists()


