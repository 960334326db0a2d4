"""The same contract for every backend, for real; and what happens when processes die."""
import json
import os
import re
import signal
import subprocess
import sys
import time  # noqa: F401  scripts take all names from here
import urllib.request
from pathlib import Path

import pytest

from nbs_lib.core.errors import UserError
from nbs_lib.core.files import whole_folder  # noqa: F401 (used by code that runs in processes of its own)
from nbs_lib.core.settings import load_settings
from nbs_lib.tracking.tracker import open_tracker

BACKENDS = ["trackio", "wandb", "wandb-offline"]
SECRET = "correct-horse-battery"


def configure(home: Path, backend: str, project: str) -> None:
    (home / "settings.ini").write_text(f"[project]\nname = {project}\n[tracking]\nbackend = {backend}\n")


def python(code: str, *, env: dict | None = None, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    "Run code in a process of its own (Trackio stores in one folder per process), with this module's names."
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_tracking import *\n{code}"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | (env or {}), capture_output=True, text=True,
                          timeout=600, **kwargs)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def fill(folder: Path, text: str) -> Path:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(text)
    (folder / "sub" / "card.json").write_text("{}")
    return folder


def status_of(tracker, run_id: str) -> str | None:
    if tracker.backend == "wandb": return None  # asked of the server instead
    return tracker._backend.storage.get_run_config(tracker._backend.project, run_id=run_id)["status"]


def contract(folder: Path) -> None:
    "What every backend does; runs in a process of its own and leaves result.json in $LOOPBOOK_RUN_DIR."
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image

    tracker = open_tracker()
    def result(): return json.loads((Path(os.environ["LOOPBOOK_RUN_DIR"]) / "result.json").read_text())
    assert tracker.resolve("birds") is None and tracker.versions("birds") == [] and tracker.artifacts("dataset") == []

    prepare = tracker.start("prepare", "dataset", config={"source": f"https://me:{SECRET}@host/birds.zip"})
    assert result()["status"] == "running" and result()["run"]["id"] == prepare.id
    v0 = prepare.log_artifact("birds", "dataset", fill(folder, "1"), metadata={"images": np.int64(7)})
    again = prepare.log_artifact("birds", "dataset", folder)
    assert v0.ref == "birds:v0" == again.ref and v0.digest == again.digest
    assert v0.size == 3 and v0.metadata == {"images": 7}
    v1 = prepare.log_artifact("birds", "dataset", fill(folder, "22"), aliases=("candidate",))
    assert (v1.version, set(v1.aliases)) == ("v1", {"latest", "candidate"})
    back = prepare.log_artifact("birds", "dataset", fill(folder, "1"))
    assert back.version == "v0" and "latest" not in back.aliases and tracker.resolve("birds").version == "v1"
    with pytest.raises(UserError, match="type 'dataset', not 'model'"): prepare.log_artifact("birds", "model", folder)
    prepare.finish()
    assert result()["status"] == "completed" and result()["outputs"] == ["birds:v0", "birds:v1"]

    with tracker.start("train", "train", config={"epochs": 2, "rate": np.float32(0.5)}) as train:
        assert train.id.startswith("train-R7-") and train.name == train.id
        assert train.use("birds:candidate").ref == "birds:v1"
        for step in range(3): train.log({"loss": 1 / (step + 1), "acc": np.float64(step)}, step=step)
        figure = plt.figure()
        figure.gca().plot([1, 2])
        train.figure("curve", figure)
        rows = [[Image.new("RGB", (8, 8), c), c, p] for c, p in (("red", np.float32(0.5)), ("blue", "?"))]
        train.table("wrong", ["image", "said", "p"], rows)
        train.table("none", ["a"], [])
        train.summary({"test": {"accuracy": np.float64(0.9), "by": {"cat": 1.0}}, "note": "fine"})
        weights = fill(folder, "m")
        model = train.log_artifact("model", "model", weights, metadata={"accuracy": 0.9}, aliases=["candidate"])
    assert result() == {
        "run": {"id": train.id, "name": train.name, "url": train.url, "backend": tracker.backend},
        "inputs": ["birds:v1"], "outputs": ["model:v0"], "status": "completed",
        "summary": {"test": {"accuracy": 0.9, "by": {"cat": 1.0}}, "note": "fine"}}

    with pytest.raises(ZeroDivisionError), tracker.start("fail", "train", group="mine") as failed: 1 / 0  # noqa: B018
    assert result()["status"] == "failed" and status_of(tracker, failed.id) in ("failed", None)

    assert [v.version for v in tracker.versions("birds")] == ["v1", "v0"]
    assert tracker.versions("birds")[1].metadata == {"images": 7}
    assert tracker.artifacts("dataset") == ["birds"] and tracker.artifacts("model") == ["model"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", model.created_at)
    assert "production" in tracker.set_alias("birds:v1", "production").aliases
    assert "production" in tracker.set_alias("birds:v0", "production").aliases
    assert tracker.resolve("birds:production").version == "v0" and tracker.resolve("birds").version == "v1"
    assert tracker.annotate("birds:v0", {"rows": 3}).metadata == {"images": 7, "rows": 3}
    with tracker.start("repeat", "dataset") as repeat:
        same = repeat.log_artifact("birds", "dataset", fill(folder, "1"), metadata={"images": 7})
    assert same.ref == "birds:v0" and same.metadata == {"images": 7, "rows": 3} and "production" in same.aliases
    assert tracker.resolve("birds:v0").aliases == tracker.resolve("birds:production").aliases
    assert tracker.resolve("birds:v9") is None and tracker.resolve("birds:nobody") is None
    assert tracker.lineage("model") == {"produced_by": train.id, "inputs": ["birds:v1"], "used_by": []}
    assert tracker.lineage("birds:v1") == {"produced_by": prepare.id, "inputs": [], "used_by": [train.id]}

    got = tracker.download("birds:production")
    assert got == tracker.settings.home / "data" / "artifacts" / "birds" / "v0"
    assert {p.relative_to(got).as_posix() for p in got.rglob("*") if p.is_file()} == {"weights", "sub/card.json"}
    file = (got / "weights").stat()
    assert tracker.download("birds:v0") == got and (got / "weights").read_text() == "1"
    assert (file.st_ino, file.st_mtime_ns) == ((now := (got / "weights").stat()).st_ino, now.st_mtime_ns), \
        "it is not fetched again"
    mine = tracker.download("birds:v1", folder / "mine")
    assert (mine / "weights").read_text() == "22" and tracker.download("birds:v1", mine) == mine
    with pytest.raises(UserError, match="holds something else"): tracker.download("birds:v0", mine)

    there = r"no 'birds:v9' in project .*there are: v1 \(candidate, latest\), v0 \(production\)"
    with pytest.raises(UserError, match=there): tracker.get("birds:v9")
    with pytest.raises(UserError, match="nothing was logged as 'cats'"): tracker.download("cats")
    for alias in ("v3", "Production", "latest", "a:b", ""):
        with pytest.raises(UserError, match="alias"): tracker.set_alias("birds", alias)

    (folder / "train.ipynb").write_text("{}")
    (folder / "train.html").write_text("<p>")
    attached = tracker.attach(train.id, [folder / "train.ipynb", folder / "train.html"], "completed")
    assert attached.ref == "train-notebook:v0"
    assert status_of(tracker, train.id) in ("completed", None)
    with pytest.warns(UserWarning, match="could not be attached"): tracker.attach("no-such-run", [], "failed")
    if tracker.backend == "wandb": assert "/local/contract" in tracker.open_dashboard()
    print(json.dumps({"prepare": prepare.id, "train": train.id, "failed": failed.id, "url": train.url}))


def run_contract(home: Path, env: dict) -> dict:
    done = python(f"contract(Path({str(home.parent / 'work')!r}))", cwd=home.parent,
                  env=env | {"LOOPBOOK_RUN_DIR": str(home / "outputs"), "LOOPBOOK_RUN_ID": "R7",
                             "LOOPBOOK_GROUP": "loop-1"})
    noise = [line for line in done.stdout.splitlines()[:-1] + done.stderr.splitlines() if line.strip()]
    assert not noise, "the notebook would show: " + "\n".join(noise)
    assert sorted(p.name for p in home.parent.iterdir()) == ["home", "work"], "files outside of home"
    for file in home.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for secret in (SECRET, env.get("WANDB_API_KEY", SECRET)):
                assert secret.encode() not in content, f"a secret in {file}"
    return json.loads(done.stdout.splitlines()[-1])


def check_server(state: dict, ids: dict, annotated: dict) -> None:
    "What a W&B server knows once the contract has run, online or by a sync."
    runs = {r["id"]: r for r in state["runs"]}
    train, artifacts = runs[ids["train"]], {f"{a['name']}:{a['version']}": a for a in state["artifacts"]}
    assert not state["errors"]
    found = (train["state"], train["group"], train["job_type"], train["name"])
    assert found == ("finished", "loop-1", "train", ids["train"])
    assert train["config"].items() >= {"epochs": 2, "rate": 0.5, "step": "train"}.items()
    rows = [row for row in train["history"] if "loss" in row]
    assert [(row["_step"], row["loss"], row["acc"]) for row in rows] == [(0, 1, 0), (1, 0.5, 1), (2, 1 / 3, 2)]
    assert train["summary"]["test"] == {"accuracy": 0.9, "by": {"cat": 1.0}} and train["summary"]["note"] == "fine"
    files = " ".join(train["files"])
    assert re.search(r"media/images/curve\S+\.png", files) and re.search(r"media/table/wrong\S+\.table\.json", files)
    for unwanted in ("requirements", "wandb-metadata", "code/", "output.log"): assert unwanted not in files
    assert runs[ids["prepare"]]["config"]["source"] == "https://host/birds.zip"
    assert (runs[ids["failed"]]["state"], runs[ids["failed"]]["group"]) == ("failed", "mine")
    assert set(artifacts["birds:v0"]["aliases"]) == {"production"}
    assert set(artifacts["birds:v1"]["aliases"]) == {"latest", "candidate"}
    assert artifacts["birds:v0"]["metadata"] == {"images": 7} | annotated and artifacts["model:v0"]["type"] == "model"
    assert [f["path"] for f in artifacts["model:v0"]["files"]] == ["sub/card.json", "weights"]
    assert "model:v0" in train["logged_artifacts"] and "train-notebook:v0" in train["logged_artifacts"]
    assert [f["path"] for f in artifacts["train-notebook:v0"]["files"]] == ["train.html", "train.ipynb"]
    assert len([a for a in state["artifacts"] if a["name"] == "birds"]) == 2


def test_contract_trackio(home):
    configure(home, "auto", "birds")  # no key: Trackio
    ids = run_contract(home, {})
    assert ids["url"] is None
    shown = python(f"""
tracker = open_tracker()
storage = tracker._backend.storage
config = storage.get_run_config("birds", run_id={ids['train']!r})
print(json.dumps([tracker.backend, config, storage.get_logs("birds", {ids['train']!r}, run_id={ids['train']!r})]))""")
    backend, config, rows = json.loads(shown.stdout)
    assert backend == "trackio" and config["_Group"] == "loop-1"
    assert config["summary"]["note"] == "fine" and config["status"] == "completed"
    assert [row["loss"] for row in rows if "loss" in row] == [1, 0.5, 1 / 3]
    assert any(row.get("test/accuracy") == 0.9 for row in rows)
    media = [p.suffix for p in (home / "data" / "tracking" / "media").rglob("*") if p.is_file()]
    assert media.count(".png") == 3  # the figure, and an image in each row of the table


def test_contract_wandb(home, wandb_server):
    configure(home, "auto", "contract")  # a key: W&B
    ids = run_contract(home, wandb_server.env)
    assert ids["url"].startswith(wandb_server.url)
    state = wandb_server.state("contract")
    check_server(state, ids, {"rows": 3})
    train = next(r for r in state["runs"] if r["id"] == ids["train"])
    assert train["used_artifacts"] == ["birds:v1"]
    assert (home / "data" / "cache" / "wandb").is_dir() and any((home / "data" / "wandb").glob("run-*"))


def sync(home: Path, server) -> None:
    "As the documentation says: one `wandb sync` after the other."
    for recording in sorted((home / "data" / "wandb").glob("offline-run-*")):
        cache = {"WANDB_CACHE_DIR": str(home / "data" / "cache" / "wandb")}
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(recording)], check=True, capture_output=True,
                       timeout=60, env=os.environ | server.env | cache, cwd=home)


def test_contract_offline_then_sync(home, wandb_server):
    configure(home, "wandb-offline", "synced")
    ids = run_contract(home, {})
    assert not wandb_server.state("synced")["runs"]
    recorded = (home / "data" / "wandb").glob("*-production-*")
    assert [p.name.split("-")[5] for p in recorded] == ["v0"]  # the move to v1 is outdated
    sync(home, wandb_server)
    state = wandb_server.state("synced")
    check_server(state, ids, {})
    assert next(r for r in state["runs"] if r["id"] == ids["train"])["config"]["inputs"] == ["birds:v1"]


LOG_TWO = """
tracker = open_tracker()
with tracker.start("train", "train") as run:
    for text in "12": run.log_artifact("m", "model", fill(Path("work"), text))
tracker.set_alias("m:v0", "production")
"""


@pytest.mark.parametrize("backend", ["trackio", "wandb"])
def test_alias_is_on_exactly_one_version_at_every_moment(home, backend, request):
    configure(home, backend, "alias")
    env = request.getfixturevalue("wandb_server").env if backend == "wandb" else {}
    python(LOG_TWO, cwd=home, env=env)
    reader = subprocess.Popen([sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_tracking import *
tracker, seen = open_tracker(), set()
tracker.resolve("m")
print("ready", flush=True)
while not Path("stop").exists():
    bearers = [v.version for v in tracker.versions("m") if "production" in v.aliases]
    assert len(bearers) == 1, bearers
    seen |= {{*bearers, tracker.resolve("m:production").version}}
assert seen == {{"v0", "v1"}}, seen
"""], env=os.environ | env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "ready\n"
    python("tracker = open_tracker()\nfor i in range(40): tracker.set_alias(f'm:v{(i + 1) % 2}', 'production')",
           cwd=home, env=env)
    (home / "stop").touch()
    _, errors = reader.communicate(timeout=300)
    assert reader.returncode == 0, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_run_is_marked_failed_and_gets_its_notebook(home, backend, wandb_server):
    configure(home, backend, f"killed-{backend}")
    env = wandb_server.env if backend == "wandb" else {}
    dead = python("""
run = open_tracker().start("train", "train", config={"epochs": 2})
for step in range(2): run.log({"loss": 1.0}, step=step)
run.summary({"note": "so far"})
time.sleep(2)
os.kill(os.getpid(), signal.SIGKILL)
""", cwd=home, env=env | {"LOOPBOOK_RUN_DIR": str(home)}, check=False)
    assert dead.returncode == -signal.SIGKILL
    result = json.loads((home / "result.json").read_text())
    assert result["status"] == "running" and result["summary"] == {"note": "so far"}
    run_id = result["run"]["id"]
    (home / "train.ipynb").write_text("{}")
    done = python(f"""
tracker = open_tracker()
tracker.attach({run_id!r}, [Path("train.ipynb")], "failed")
print(status_of(tracker, {run_id!r}), tracker.lineage("train-notebook")["produced_by"])""", cwd=home, env=env)
    assert done.stdout.split() == ["None" if backend == "wandb" else "failed", run_id]
    if backend == "wandb-offline":
        sync(home, wandb_server)
    if backend != "trackio":
        [run] = wandb_server.state(f"killed-{backend}")["runs"]
        assert run["state"] == "failed" and run["logged_artifacts"] == ["train-notebook:v0"]
        assert run["config"]["epochs"] == 2
        # online, the SDK sends metrics every 15 s; it holds the newest step back until the next begins
        if backend == "wandb-offline":
            assert [row["loss"] for row in run["history"]] == [1] and run["summary"]["note"] == "so far"


@pytest.mark.parametrize("backend", ["trackio", "wandb"])
def test_download_is_whole_after_a_kill_and_beside_another_download(home, backend, wandb_server):
    configure(home, backend, "download")
    env = wandb_server.env if backend == "wandb" else {}
    python(LOG_TWO, cwd=home, env=env)
    target = home / "data" / "artifacts" / "m" / "v0"
    dead = python(f"""
def half(part):
    (part / "weights").write_text("1"[:0])
    os.kill(os.getpid(), signal.SIGKILL)
whole_folder(Path({str(target)!r}), half)""", check=False)
    assert dead.returncode == -signal.SIGKILL and not target.exists() and target.with_name(".v0.part").exists()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_tracking import *\n" \
           "folder = open_tracker().download('m:v0')\n" \
           "print(len(list(folder.rglob('*'))), (folder / 'weights').read_text())"
    both = [subprocess.Popen([sys.executable, "-c", code], env=os.environ | env, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    assert [p.communicate(timeout=300)[0].split() for p in both] == [["3", "1"]] * 2
    assert not target.with_name(".v0.part").exists()


def test_process_that_ends_without_finish_leaves_a_failed_run(home):
    configure(home, "trackio", "birds")
    python("""run = open_tracker().start("train", "train")\nfor i in range(1000): run.log({"loss": 1.0}, step=i)""",
           env={"LOOPBOOK_RUN_DIR": str(home)})
    result = json.loads((home / "result.json").read_text())
    assert result["status"] == "failed"
    rows = python(f"""logs = open_tracker()._backend.storage.get_logs("birds", {result['run']['id']!r})
print(len([r for r in logs if "loss" in r]))""")
    assert rows.stdout == "1000\n"


def test_nothing_but_the_users_own_output_is_in_the_notebook(home):
    import nbformat
    from nbclient import NotebookClient
    configure(home, "wandb-offline", "birds")  # both packages at once
    cells = LOG_TWO.split("tracker.set_alias")
    code = ["from pathlib import Path\nfrom nbs_lib.tracking.tracker import open_tracker", "def fill(folder, text):\n"
            "    folder.mkdir(exist_ok=True)\n    (folder / 'weights').write_text(text)\n    return folder",
            cells[0], "tracker.set_alias" + cells[1], "still_open = tracker.start('train', 'train')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(home)}})
    client.execute(env=os.environ | {"LOOPBOOK_RUN_DIR": str(home)})
    outputs = [str(o) for c in notebook.cells for o in c.outputs]
    assert len(outputs) == 1 and "Version(name=" in outputs[0], outputs
    assert json.loads((home / "result.json").read_text())["status"] == "failed"


def test_wandb_without_a_key_is_refused(home):
    configure(home, "wandb", "birds")
    with pytest.raises(UserError, match="no key for it; run `wandb login`"): open_tracker(load_settings(home))


def test_wandb_out_of_reach_is_told_in_one_line(home):
    configure(home, "wandb", "birds")
    done = python("""
with pytest.raises(UserError, match="W&B says") as caught: open_tracker().resolve("birds")
assert "\\n" not in str(caught.value)
""", env={"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40})
    assert done.stderr == ""


def test_one_process_does_not_mix_two_homes(home, tmp_path):
    configure(home, "trackio", "birds")
    python(f"""
open_tracker()
other = load_settings(Path({str(tmp_path)!r}))
with pytest.raises(UserError, match="restart the notebook's kernel"): open_tracker(other)""")


def test_dashboard_is_served_on_the_loopback_interface(home):
    configure(home, "trackio", "birds")
    python(LOG_TWO, cwd=home)
    code = "from nbs_lib.tracking.tracker import open_tracker; open_tracker().open_dashboard()"
    process = subprocess.Popen([sys.executable, "-c", code],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/\?project=birds", line)
        assert url and "token" not in line, line
        with urllib.request.urlopen(url[0], timeout=120) as page: assert page.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in errors, errors
