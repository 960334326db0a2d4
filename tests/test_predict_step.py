"""The notebook that answers: a folder of photos by itself with a report, or photos that somebody drops."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from small_data import picture
from small_models import own_answers, production, project  # noqa: F401  fixtures

from nbs_lib.runs.execute import run_notebook
from nbs_lib.steps.predict import class_counts, least_sure, read_answers

ROOT = Path(__file__).resolve().parent.parent
LOOPBOOK = Path(sys.executable).with_name("loopbook")


@pytest.fixture
def photos(production):
    "Eight photos in a folder of the home, and a file that is none: their bytes by name."
    folder = production[0].home / "photos"
    (folder / "more").mkdir(parents=True, exist_ok=True)
    files = {f"{'more/' if n > 5 else ''}{n}.jpg": picture(("red", "blue", "green")[n % 3], n) for n in range(8)}
    for name, data in files.items(): (folder / name).write_bytes(data)
    (folder / "broken <b>.jpg").write_bytes(b"no picture at all")
    return files


def expected(project, files: dict[str, bytes]) -> dict[str, dict]:
    "Class and probability by target of the version in production, by the file's name."
    said = zip(files, own_answers(project, "v0", list(files.values())), strict=True)
    return {name: {t: max(p.items(), key=lambda item: item[1]) for t, p in answer.items()} for name, answer in said}


def check(table: pd.DataFrame, wanted: dict[str, dict], folder: Path) -> None:
    rows = table[table["error"].isna()].set_index("path")
    assert set(rows.index) == {str(folder / name) for name in wanted} and set(rows["model"]) == {"faces-model:v0"}
    for name, targets in wanted.items():
        for target, (label, p) in targets.items():
            assert rows.loc[str(folder / name), f"{target}.class"] == label
            assert rows.loc[str(folder / name), f"{target}.probability"] == pytest.approx(p, abs=0.02)


def test_a_folder_by_itself(production, photos):
    home = production[0].home
    words = ["run", "predict", "-p", "source", "photos/", "-p", "most", "4", "--json"]
    done = subprocess.run([LOOPBOOK, *words], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert not done.returncode, done.stdout + done.stderr
    run = json.loads(done.stdout)
    folder = Path(run["folder"])
    said = run["summary"]
    assert (said["images"], said["unreadable"], said["model"]) == (9, 1, "faces-model:v0")
    assert Path(said["out"]) == folder / "predictions.parquet" and run["inputs"] == ["faces-model:v0"]
    table = pd.read_parquet(folder / "predictions.parquet")
    check(table, expected(production, photos), home / "photos")
    [(bad, why)] = table.loc[table["error"].notna(), ["path", "error"]].values.tolist()
    assert bad == str(home / "photos" / "broken <b>.jpg") and "not an image" in why
    page = (folder / "predict.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert "faces-model:v0 was asked about 9 images: photos/. 8 are answered, 1 cannot be read." in text
    assert page.count("<img") == 2 and "The 4 least sure of 8" in text and "colour" in text
    assert "broken &lt;b&gt;.jpg" in page and "broken <b>" not in page and why in text
    assert text.index("was asked") < text.index("How sure") < text.index("least sure of") < text.index("could not be read")

    answers = read_answers(folder / "predictions.parquet")
    sure = answers["sure"].dropna().sort_values()
    shown = least_sure(answers, 4)
    assert [number for number, _ in shown] == list(sure.index[:4]) and sure.iloc[0] == sure.min()
    assert [title.split("\n")[-1] for _, title in shown] == [Path(answers["path"][n]).name for n in sure.index[:4]]
    assert class_counts(answers).groupby("target")["images"].sum().to_dict() == {"colour": 8, "size": 8}


def test_a_table_of_ones_own_and_nothing_that_can_be_read(production, photos):
    home = production[0].home
    run = run_notebook("predict", {"source": "photos/broken <b>.jpg", "out": "nothing.csv"})
    assert run.status == "completed" and run.summary["unreadable"] == 1 and run.summary["sure"] is None
    assert pd.read_csv(home / "nothing.csv")["error"].str.contains("not an image").all()
    assert "<img" not in (Path(run.folder) / "predict.html").read_text()
    run = run_notebook("predict", {"source": str(home / "photos" / "more"), "out": str(home / "said.csv"), "model": "v0"})
    assert run.status == "completed" and run.summary["out"] == str(home / "said.csv") and run.summary["unreadable"] == 0
    check(read_answers(home / "said.csv"), expected(production, {n: d for n, d in photos.items() if "/" in n}), home / "photos")


@pytest.mark.parametrize(("parameters", "words"), [
    ({}, "UserError: no photos to look at; name a folder of them: loopbook run predict -p source photos/"),
    ({"source": "nowhere"}, "nowhere: no such file or folder"),
    ({"source": "photos", "model": "best"}, "UserError: there is no model faces-model:best; `loopbook models` lists them")])
def test_what_is_missing_is_said_in_a_line(production, photos, parameters, words):
    run = run_notebook("predict", parameters)
    assert run.status == "failed" and words in run.error and "\n" not in run.error


def test_photos_that_somebody_drops(production, photos):
    home = production[0].home
    book = nbformat.read(ROOT / "notebooks" / "40_predict.ipynb", as_version=4)
    drop = f"""
from datetime import datetime
folder = Path({str(home / "photos")!r})
box.children[0].value = tuple(
    {{"name": f.name, "type": "image/jpeg", "size": 1, "content": memoryview(f.read_bytes()), "last_modified": datetime.now()}}
    for f in sorted(folder.iterdir()) if f.is_file())"""
    look = "print([o['output_type'] for o in box.children[1].outputs])\nprint(box.children[1].outputs[0]['data'])"
    book.cells += [nbformat.v4.new_code_cell(drop), nbformat.v4.new_code_cell(look)]
    assert "LOOPBOOK_RUN_DIR" not in os.environ
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    [table] = (home / "data" / "predictions").glob("*/predictions.parquet")
    kept = {n: d for n, d in photos.items() if "/" not in n}
    check(pd.read_parquet(table), expected(production, kept), table.parent / "photos")
    shown = book.cells[-1].outputs[0].text
    assert "was asked about **7** images" in shown and "error" not in shown.split("\n")[0]
