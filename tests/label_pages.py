"""The labelling page in a browser, and the server behind it."""
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import browsers
import psutil
import pytest
from browsers import OUTSIDE
from small_data import picture

from nbs_lib.feedback.store import Store

BIN = Path(sys.executable).parent


def environment(home: Path) -> dict:
    "Of a process of that home's recipe `plain`, where it is not told another one."
    return OUTSIDE | {"LOOPBOOK_HOME": str(home), "NETRC": str(home / "no-netrc"), "LOOPBOOK_PROJECT__RECIPE": "plain"}


def fill(store: Store, n: int, first: int = 0) -> None:
    "Add `n` photos, with what a model has said of them where the recipe has none."
    for i in range(first, first + n):
        colour, other = ("red", "blue")[i % 2], ("blue", "red")[i % 2]
        said = {"model": "another-model:v0", "targets": {"colour": {colour: 0.9, other: 0.1}}}
        prediction = said if store.recipe == "plain" else None
        store.add(picture(colour, 1000 + i), f"{i:03} {colour}.jpg", "camera", prediction)


class Page:
    "A labelling page in the browser, and what it has shown as saved."
    def __init__(self, page):
        self.page, self.saved, self.problems, self.asked, self.sockets = page, {}, [], [], []
        page.on("pageerror", lambda e: self.problems.append(str(e)))
        page.on("request", lambda r: self.asked.append(r.url))
        page.on("websocket", lambda s: self.sockets.append(s.url))

    def ready(self, timeout: float = 300):
        self.page.locator(".labeller img.photo").wait_for(timeout=timeout * 1000)
        self.page.wait_for_function("document.querySelector('.labeller').dataset.token > 0")
        return self

    def enter(self, name: str) -> None:
        "Give a name, as the page asks for one."
        self.page.locator(".enter-name input").fill(name, timeout=300_000)
        # nobody types as quickly: the field is seen a moment before the labeller listens
        self.page.wait_for_function("document.querySelector('.labeller').dataset.token > 0", timeout=60_000)
        self.page.keyboard.press("Enter")
        self.ready()

    def token(self) -> int: return int(self.page.locator(".labeller").get_attribute("data-token"))
    def text(self, what: str) -> str: return self.page.locator(f".labeller .{what}").first.text_content()

    def do(self, action) -> str:
        "Do something, wait until the labeller is ready for the next, note what was saved; returns what it says."
        before, said = self.token(), self.text("status")
        action()
        self.page.wait_for_function(f"document.querySelector('.labeller').dataset.token > {before}", timeout=60_000)
        self.page.wait_for_function("said => document.querySelector('.labeller .status').textContent !== said",
                                    arg=said, timeout=60_000)
        if found := re.fullmatch(r"Saved: (.*) is (.*)", self.text("status")): self.saved[found[1]] = found[2]
        elif found := re.fullmatch(r"Taken back: (.*)", self.text("status")): self.saved.pop(found[1], None)
        return self.text("status")

    def key(self, key: str) -> str: return self.do(lambda: self.page.keyboard.press(key))
    def click(self, selector: str) -> str:
        return self.do(lambda: self.page.locator(f".labeller {selector}").first.click())

    def leave(self) -> None:
        "Close the page as people do, which ends its kernel."
        self.page.close(run_before_unload=True)
        time.sleep(0.5)

    def outside(self) -> list[str]:
        return [u for u in self.asked if not u.startswith(("blob:", "data:")) and "://127.0.0.1:" not in u]

    def shoot(self, name: str) -> None: browsers.shoot(self.page, name)


def standing(store: Store) -> dict:
    return {r.name: r.labels["colour"] for r in store.standing().itertuples(index=False) if r.labels}


def kernels(server: subprocess.Popen) -> list[psutil.Process]:
    "The living kernels of a server."
    def lives(p) -> bool:
        try: return "ipykernel_launcher" in " ".join(p.cmdline())
        except psutil.Error: return False
    return [p for p in psutil.Process(server.pid).children() if lives(p)]


def wait_for_kernels(server, n: int, seconds: int = 30) -> None:
    "Wait until the server has only `n` kernels left, or the time is over."
    end = time.monotonic() + seconds
    while len(server.kernels()) > n and time.monotonic() < end: time.sleep(0.1)


def stop(process: subprocess.Popen) -> list[psutil.Process]:
    "Ask a server to end; returns the processes it had and that live on."
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(120)
    return psutil.wait_procs(children, timeout=60)[1]


class Served:
    "`loopbook label` for a recipe on a free port, or what `code` serves."
    def __init__(self, home: Path, recipe: str, code: str | None = None):
        command = [BIN / "loopbook", "label", "--port", "0", "--json", "--recipe", recipe]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code] if code else command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment(home) | {"LOOPBOOK_LABEL_TOKEN": "a-token"})
        lines = ""
        while not lines.endswith("}\n"):
            lines += self.process.stdout.readline() or pytest.fail(self.process.stderr.read())
        self.address = json.loads(lines)["address"]

    def status(self, path: str, **headers) -> int:
        request = urllib.request.Request(self.address.partition("?")[0] + path, headers=headers)
        try: return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error: return error.code

    def kernels(self) -> list[psutil.Process]: return kernels(self.process)

    def page(self, chromium, query: str = "&user=ann", **options) -> Page:
        page = chromium.new_context(viewport={"width": 1280, "height": 800}, **options).new_page()
        opened = Page(page)
        page.goto(self.address + query, timeout=300_000)
        return opened
