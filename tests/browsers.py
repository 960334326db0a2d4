"""Chromium and JupyterLab, for the tests in which a person looks at a page."""
import atexit
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

CHROMIUM = next((c for c in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if c), None)
SHOTS = ROOT / "outputs" / "screenshots"
OUTSIDE = {n: v for n, v in os.environ.items() if not n.startswith(("LOOPBOOK_", "WANDB_", "TRACKIO_"))}
started: list = []                # the browser of the session, once a test has asked for it
running = ExitStack()             # what it needs
atexit.register(running.close)


def browser(test):
    "Marks a test that needs Chromium; it is skipped where there is none."
    return pytest.mark.browser(pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")(test))


@contextmanager
def chromium() -> Iterator:
    "The one browser of the session, which finds this machine and nothing else; its pages are closed afterwards."
    if not started:
        from playwright.sync_api import sync_playwright
        playwright = running.enter_context(sync_playwright())
        options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        started.append(running.enter_context(playwright.chromium.launch(executable_path=CHROMIUM, args=options)))
    try: yield started[0]
    finally:
        for context in started[0].contexts: context.close()


def end() -> None:
    "End the browser and its event loop, which a test of another kind would find running."
    running.close()
    started.clear()


def shoot(page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


@contextmanager
def jupyterlab(folder: Path, own: Path, environment: dict) -> Iterator[tuple[subprocess.Popen, str]]:
    "JupyterLab in `folder`, with its settings in `own`: its process, and the address before a notebook's path."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = {"HOME": own / "user", "JUPYTERLAB_SETTINGS_DIR": own / "settings",
              "JUPYTERLAB_WORKSPACES_DIR": own / "workspaces"}
    command = [Path(sys.executable).with_name("jupyter-lab"), "--no-browser", "--allow-root", "--ip=127.0.0.1",
               f"--port={port}", "--IdentityProvider.token=tok", "--LabApp.expose_app_in_browser=True",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    lab = subprocess.Popen(command, cwd=folder, env=environment | {k: str(v) for k, v in places.items()},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: yield lab, f"http://127.0.0.1:{port}/lab/tree/"
    finally:
        lab.terminate()
        lab.wait(120)


def open_notebook(page, address: str) -> None:
    "Open a notebook in JupyterLab, which may still be starting, and run all of it."
    for _ in range(600):
        try:
            page.goto(f"{address}?token=tok&reset")
            break
        except Exception: time.sleep(0.5)
    run_all(page)


def run_all(page) -> None:
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=300_000)
    page.evaluate("""async () => {
        await window.jupyterapp.restored;
        await window.jupyterapp.commands.execute('runmenu:run-all');
    }""")
