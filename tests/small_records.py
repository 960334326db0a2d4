"""Records of runs that nobody ran, and the command in a process of its own."""
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nbs_lib.runs import records

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
