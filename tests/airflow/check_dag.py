"""The Airflow DAG under a real Airflow, in its own environment: `make test-airflow`."""
import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest

# read when Airflow is imported
os.environ |= {"AIRFLOW_HOME": tempfile.mkdtemp(), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
from airflow.dag_processing.dagbag import DagBag  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = ROOT / "scheduled" / "airflow" / "loopbook_dag.py"
LOOPBOOK = ROOT / ".venv" / "bin" / "loopbook"


@pytest.fixture(scope="module")
def dag():
    bag = DagBag(FILE)
    assert not bag.import_errors and list(bag.dags) == ["loopbook"]
    return bag.dags["loopbook"]


def test_one_task_a_step_one_after_the_other(dag):
    order = [t.task_id for t in dag.topological_sort()]
    assert order == ["download", "merge", "train", "evaluate"]
    assert [sorted(t.downstream_task_ids) for t in dag.topological_sort()] == [["merge"], ["train"], ["evaluate"], []]
    for task in dag.tasks: assert f"run {task.task_id} -p recipe" in task.bash_command


def test_daily_one_at_a_time_with_retries(dag):
    assert dag.schedule == "@daily"
    assert dag.catchup is False and dag.max_active_runs == 1
    for task in dag.tasks:
        assert task.retries == 2 and task.retry_delay == timedelta(minutes=5) and task.execution_timeout


def test_a_recipe_cannot_smuggle_a_command(dag):
    assert dag.params["recipe"] == "faces"
    param = dag.params.get_param("recipe")
    for name in ("faces; rm -rf .", "$(date)", "", "Faces"):
        with pytest.raises(Exception, match="(?i)invalid input|does not match"): param.resolve(name)


@pytest.mark.skipif(not LOOPBOOK.exists(), reason=f"{LOOPBOOK} is not installed: `make install`")
def test_airflow_goes_round_the_loop(tmp_path):
    (tmp_path / "home").mkdir()
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path / "airflow"), "AIRFLOW__CORE__DAGS_FOLDER": str(FILE.parent),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "LOOPBOOK": str(LOOPBOOK), "LOOPBOOK_HOME": str(tmp_path / "home"),
        "NETRC": str(tmp_path / "none"), "LOOPBOOK_RECIPE_FACES__IMAGES": "120",
        "LOOPBOOK_TRACKING__BACKEND": "trackio", "LOOPBOOK_GATE__MIN_ACCURACY": "0.5"}
    def run(*words, **keys):
        return subprocess.run(words, env=environment, capture_output=True, text=True, **keys)
    airflow = Path(sys.executable).with_name("airflow")
    run(airflow, "db", "migrate", check=True, timeout=600)
    done = run(airflow, "dags", "test", "loopbook", timeout=1800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = json.loads(run(LOOPBOOK, "runs", "--json", check=True).stdout)
    ended = [(Path(r["notebook"]).stem.split("_")[1], r["status"]) for r in reversed(runs)]
    assert ended == [(s, "completed") for s in ("download", "merge", "train", "evaluate")]
    assert runs[0]["summary"]["production"] == "faces-model:v0"
