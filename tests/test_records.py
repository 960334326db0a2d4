"""What runs leave: the page of all runs, and their logs."""
import html
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from urllib.parse import unquote

import nbformat
from browsers import browser, chromium
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from small_records import LOOPBOOK, add, insert, loopbook

from nbs_lib.runs import records
from nbs_lib.runs.index import NEWEST, write_index

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
