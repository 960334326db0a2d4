"""What runs the jobs elsewhere: systemd, Kubernetes, Airflow; `make test-airflow` runs the DAG under a real one."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

LOOPBOOK = Path(sys.executable).with_name("loopbook")
SCHEDULED = ROOT / "scheduled"


def commands() -> list[str]:
    "Command lines of the service files, as words."
    unit = re.search(r"^ExecStart=(.+)$", (SCHEDULED / "systemd" / "loopbook.service").read_text(), re.M)[1]
    documents = yaml.safe_load_all((SCHEDULED / "kubernetes" / "cronjob.yaml").read_text())
    job = [d for d in documents if d["kind"] == "CronJob"][0]
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return [unit, " ".join(pod["containers"][0]["command"])]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze on this machine")
def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path):
    text = (SCHEDULED / "systemd" / "loopbook.service").read_text()
    unit = tmp_path / "loopbook.service"
    text = text.replace("/opt/loopbook/.venv/bin/loopbook", str(LOOPBOOK))
    unit.write_text(text.replace("User=loopbook", "User=root"))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0 and str(unit) not in checked.stderr, checked.stderr
    unit.write_text(text)
    offline = subprocess.run(["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
                             capture_output=True, text=True, timeout=300)
    exposure = re.search(r"Overall exposure level[^:]*: ([0-9.]+)", offline.stdout)
    if not exposure: pytest.skip(f"this systemd-analyze cannot judge a file: {offline.stderr.strip()}")
    assert float(exposure[1]) <= 2.5


def test_the_unit_restarts_and_survives_a_notebook_without_memory():
    text = (SCHEDULED / "systemd" / "loopbook.service").read_text()
    assert "ExecStart=/opt/loopbook/.venv/bin/loopbook schedule\n" in text
    assert "Restart=on-failure\n" in text and "OOMPolicy=continue\n" in text
    assert "MemoryDenyWriteExecute=yes" not in text, "compiled networks could not run"
    assert "LOOPBOOK_HOME=/var/lib/loopbook" in text and "StateDirectory=loopbook\n" in text, "all else is read only"


def test_the_cron_job():
    volume, job = yaml.safe_load_all((SCHEDULED / "kubernetes" / "cronjob.yaml").read_text())
    assert (volume["kind"], job["apiVersion"], job["kind"]) == ("PersistentVolumeClaim", "batch/v1", "CronJob")
    spec, pod = job["spec"], job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert re.fullmatch(r"(\S+ ){4}\S+", spec["schedule"]) and spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
    [container] = pod["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert container["command"][-2:] == ["schedule", "--once"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert mounts["home"] == env["LOOPBOOK_HOME"] and set(mounts) == set(volumes)
    assert volumes["home"]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
    secrets = [n for n in env if re.search("KEY|PASSWORD|TOKEN", n)]
    assert container["envFrom"] == [{"secretRef": {"name": "loopbook", "optional": True}}] and not secrets


def test_the_commands_exist():
    for line in commands():
        path, *words = line.split()
        assert path == "/opt/loopbook/.venv/bin/loopbook"
        options = subprocess.run([LOOPBOOK, words[0], "--help"], capture_output=True, text=True, timeout=300)
        assert options.returncode == 0 and all(w in options.stdout for w in words[1:])


def test_the_dag_has_the_steps_of_the_loop():
    from nbs_lib.loop.steps import STEPS
    tree = ast.parse((SCHEDULED / "airflow" / "loopbook_dag.py").read_text())
    [steps] = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "STEPS"]
    assert steps == tuple(str(s.notebook) for s in STEPS)
    nodes = list(ast.walk(tree))
    imported = {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"airflow", "datetime", "pendulum"}


def test_the_daemon_does_not_take_them_for_jobs(home):
    from nbs_lib.schedule.daemon import Folder
    shutil.copytree(SCHEDULED, home / "scheduled")
    from datetime import UTC, datetime
    folder = Folder()
    folder.read(datetime.now(UTC))
    assert not {"cronjob", "loopbook"} & {*folder.jobs, *folder.problems} and not folder.problems


def test_airflow_is_pinned_without_an_address():
    lines = (ROOT / "tests" / "airflow" / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("apache-airflow==") for line in lines)
    assert all(re.fullmatch(r"[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==[0-9a-z.+!]+( ; .+)?", line) for line in lines)
