"""What is cleared away of what runs leave, and what stays."""
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import SHARED, WandbServer
from small_records import add, loopbook

from nbs_lib.runs import records
from nbs_lib.schedule import slots
from nbs_lib.schedule.jobs import Job


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
