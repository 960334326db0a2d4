"""The labelling page as people meet it: in JupyterLab and behind `loopbook label`, in a real browser.

A kernel that predicts takes ten times as long to start as one that does not: most tests use the recipe `plain`, which
has no model and whose photos come with a prediction; two use `colours`, which has one in production."""
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path

import browsers
import numpy as np
import pytest
from browsers import CHROMIUM, OUTSIDE, jupyterlab, open_notebook, run_all
from conftest import ROOT
from label_pages import Page, Served, environment, fill, kernels, standing, stop, wait_for_kernels
from PIL import Image
from small_data import picture

from nbs_lib.core.settings import load_settings
from nbs_lib.feedback.store import Store

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")]
MODEL = """
import sys, tempfile, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_data import small_dataset
from nbs_lib.models.backbone import create_backbone, preprocessing_of
from nbs_lib.tracking.promotion import promote
from nbs_lib.models.classifier import Network, save_model
from nbs_lib.tracking.tracker import open_tracker
torch.manual_seed(1)
tracker, folder = open_tracker(), Path(tempfile.mkdtemp())
with tracker.start("model", "train") as run:
    dataset = small_dataset(folder / "dataset").folder
    for recipe in ("colours", "plain"): run.log_artifact(f"{recipe}-dataset", "dataset", dataset)
    net = create_backbone("resnet10t", pretrained=False)
    how, card = preprocessing_of(net, 64), {"backbone": "resnet10t", "mode": "finetune", "temperature": {"colour": 1.0}}
    save_model(folder / "model", Network(net, how, {"colour": ["blue", "red"]}).eval(), how, card)
    version = run.log_artifact("colours-model", "model", folder / "model", aliases=("candidate",))
promote(tracker, "colours-model", version.version)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A home with datasets of red and blue pictures, and for `colours` a model of them in production."
    home = tmp_path_factory.mktemp("labelling")
    recipes = "".join(f"[recipe.{name}]\nsource = nowhere\ntarget = colour\n" for name in ("colours", "plain"))
    (home / "settings.ini").write_text("[project]\nrecipe = colours\n[tracking]\nbackend = trackio\n[train]\n"
                                       f"engine = torch\nprecision = fp32\n[feedback]\nmax_upload_mb = 13\n"
                                       f"random_share = 0\n{recipes}")
    subprocess.run([sys.executable, "-c", MODEL, str(ROOT / "tests")], check=True, env=environment(home))
    return home


@pytest.fixture
def stores(place, monkeypatch):
    "Gives the store of one of that home's recipes; all of them are empty."
    for name in set(os.environ) - set(OUTSIDE): monkeypatch.delenv(name)
    shutil.rmtree(place / "data" / "feedback", ignore_errors=True)
    return lambda recipe: Store(recipe, load_settings(place))


@pytest.fixture
def store(stores) -> Store: return stores("plain")


@pytest.fixture
def chromium():
    with browsers.chromium() as found: yield found


# ---- in JupyterLab

@pytest.fixture(scope="module")
def lab(place, tmp_path_factory):
    "JupyterLab on a copy of the notebooks: its process and its address."
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    with jupyterlab(folder, folder, environment(place)) as (process, address):
        yield process, f"{address}notebooks/{next((ROOT / 'notebooks').glob('*_feedback.ipynb')).name}"


def test_in_jupyterlab_by_keyboard_and_mouse_with_a_kernel_that_dies(lab, store, chromium):
    fill(store, 60)
    process, address = lab
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    labeller = Page(page)
    open_notebook(page, address)
    labeller.enter("ann")
    for n in range(15): labeller.key("12"[n % 2])
    for n in range(15): labeller.click(f".press-pick-0-{n % 2}")
    labeller.shoot("labeller-jupyterlab")
    assert len(labeller.saved) == 30 and labeller.saved == standing(store)
    assert labeller.text("counter").startswith("30 done · 30 left")
    for _ in range(2): labeller.key("Backspace")
    labeller.click(".press-undo")
    assert len(labeller.saved) == 27 and labeller.saved == standing(store)
    [kernel] = kernels(process)
    labeller.key("1")
    os.kill(kernel.pid, signal.SIGKILL)
    page.keyboard.press("2")
    page.get_by_text("Not saved yet").wait_for(timeout=120_000)
    assert labeller.saved == standing(store)
    page.locator(".jp-Dialog button.jp-mod-accept").click(timeout=120_000)    # "the kernel has died and is restarted"
    run_all(page)
    labeller.enter("ann")
    for n in range(5): labeller.key("12"[n % 2])
    assert labeller.saved == standing(store) and len(labeller.saved) == 33
    while len(standing(store)) > 30:                                # also what was said before the kernel died
        page.keyboard.press("Backspace")
        time.sleep(0.2)
    assert not labeller.outside(), labeller.outside()
    page.close()


# ---- as a web page

@pytest.fixture(scope="module")
def servers(place):
    "Gives the one server of a recipe; a new one, where a test has ended it."
    living: dict[str, Served] = {}
    def of(recipe: str) -> Served:
        if recipe not in living or living[recipe].process.poll() is not None: living[recipe] = Served(place, recipe)
        return living[recipe]
    yield of
    for server in living.values(): server.process.terminate()


@pytest.fixture
def served(servers) -> Served: return servers("plain")


@pytest.fixture
def serve(place):
    "Start a server of one's own; it is stopped, however the test ends."
    own = []
    yield lambda code: own.append(Served(place, "plain", code)) or own[-1]
    for server in own: server.process.terminate()


def test_an_idle_kernel_ends_and_the_page_says_so(serve, store, chromium):
    fill(store, 5)
    server = serve("import json; from nbs_lib.web.label_page import serve\n"
                   "def ready(address): print(json.dumps({'address': address}), flush=True)\n"
                   "serve('127.0.0.1', 0, 'a-token', ready, 'plain', idle=15)")    # less ends it while it starts
    page = server.page(chromium).ready()
    page.key("1")
    wait_for_kernels(server, 0, seconds=120)
    assert not server.kernels() and page.saved == standing(store)
    page.page.keyboard.press("2")
    page.page.get_by_text("Not saved yet").wait_for(timeout=120_000)
    page.page.reload()
    page.ready().key("2")
    assert page.saved == standing(store) and len(page.saved) == 2
    assert not stop(server.process)


def test_double_clicks_and_late_clicks_label_nothing_wrong(served, store, chromium):
    fill(store, 12)
    page = served.page(chromium).ready()
    button = page.page.locator(".labeller .press-pick-0-0")
    page.do(button.dblclick)
    page.do(lambda: page.page.evaluate(
        "document.querySelectorAll('.press-pick-0-0').forEach((b) => { b.click(); b.click(); b.click() })"))
    time.sleep(0.5)
    assert len(store.history()) == 2
    page.do(lambda: page.page.evaluate("""() => {
        // the second half of a double click, 30 ms after the next photo was painted
        const root = document.querySelector('.labeller'), button = root.querySelector('.press-pick-0-0');
        const before = root.dataset.token;
        const second = () => button.dispatchEvent(new MouseEvent('click', { bubbles: true, detail: 2 }));
        const late = () => root.dataset.token === before ? setTimeout(late, 1) : setTimeout(second, 30);
        button.click();
        late();
    }"""))
    time.sleep(0.5)
    assert len(store.history()) == 3
    page.page.keyboard.down("1")                                      # a key that is held down is one answer
    for _ in range(20): page.page.keyboard.down("1")
    page.page.keyboard.up("1")
    time.sleep(0.5)
    assert len(store.history()) == 4 and not page.problems
    page.leave()


def test_names_and_labels_are_text(served, store, chromium):
    bad = "<img src=x onerror=window.hacked=1>"
    store.add(picture("red", 1), bad + r" $\href{javascript:window.hacked=1}{x}$.png", bad)
    fill(store, 8)
    store.answer(store.queue("zoe", 9, "newest")[0].id, "zoe", "new", {"colour": bad})
    store.release("zoe")
    page = served.page(chromium, "&user=" + urllib.request.quote(bad)).ready()
    assert page.text("who") == bad and page.text("press-pick-0-2").endswith(bad)
    while bad not in page.text("caption"): page.key("?")
    shown = page.page.content()
    page.key("3")
    page.page.locator(".new-class input").fill(bad + "2")
    page.page.keyboard.press("Enter")
    page.page.locator(".status", has_text=f"is {bad}2").wait_for()
    fill(store, 3, first=50)
    assert page.page.evaluate("window.hacked") is None and "<img src=x" not in shown and "&lt;img src=x" in shown
    assert page.page.locator(".labeller mjx-container, .labeller a").count() == 0
    assert any(bad in name and label == bad for name, label in standing(store).items())
    assert bad + "2" in standing(store).values()
    page.page.reload()
    page.ready()
    assert page.page.evaluate("window.hacked") is None and bad in page.page.locator("table").last.text_content()
    assert not page.problems
    page.leave()


def test_a_browser_that_fell_back_to_the_first_protocol(served, store, chromium):
    fill(store, 3)
    page = chromium.new_page()
    # as JupyterLab's services do where a first connection ended early
    page.add_init_script("window.WebSocket = class extends WebSocket { constructor(url) { super(url) } }")
    labeller = Page(page)
    page.goto(served.address + "&user=ann", timeout=300_000)
    labeller.ready().key("1")
    assert labeller.saved == standing(store) and len(labeller.saved) == 1 and not labeller.problems
    labeller.leave()


def test_photos_are_dropped_in_large_ones_too(served, store, chromium, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2000, 2000, 3)).astype(np.uint8))
    noise.save(tmp_path / "large.png")
    noise.resize((2200, 2200)).save(tmp_path / "too large.png")
    (tmp_path / "no photo.jpg").write_text("hello")
    (tmp_path / "small.jpg").write_bytes(picture("red", 5))
    large, too_large = (tmp_path / "large.png").stat().st_size, (tmp_path / "too large.png").stat().st_size
    assert 10 < large / 2**20 < 13 < too_large / 1e6
    page = served.page(chromium)
    page.page.get_by_text("Nothing waits here").wait_for(timeout=300_000)
    page.shoot("labeller-empty")
    with page.page.expect_file_chooser() as chooser: page.page.get_by_role("button", name="Add photos…").click()
    chooser.value.set_files([tmp_path / n for n in ("large.png", "too large.png", "no photo.jpg", "small.jpg")])
    page.page.get_by_text("Added: 2 new").wait_for(timeout=60_000)
    said = page.text("status")
    assert "too large.png was not added: larger than 13 MB" in said
    assert "no photo.jpg was not added: not an image" in said
    assert "bad" in page.page.locator(".status").first.get_attribute("class")
    page.ready()
    assert store.stats()["images"] == 2
    page.page.evaluate("""(base64) => {
        const drop = new DataTransfer();
        drop.items.add(new File([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], 'dropped.jpg'));
        const event = new DragEvent('drop', { bubbles: true, cancelable: true, dataTransfer: drop });
        document.querySelector('.labeller img.photo').dispatchEvent(event);
    }""", b64encode(picture("blue", 6)).decode())
    page.page.get_by_text("Added: 1 new", exact=True).wait_for(timeout=120_000)
    assert store.stats()["images"] == 3 and page.text("caption") in ("large.png", "small.jpg") and not page.problems
    assert not page.page.get_by_text("Add folder").count(), "a page's visitor has no business in the server's folders"
    page.leave()


def test_the_grid_and_narrow_windows(served, store, chromium):
    fill(store, 40)
    page = served.page(chromium).ready()
    page.page.get_by_role("button", name="Many at once").click()
    page.page.get_by_role("button", name="All 24 are right").wait_for()
    page.page.locator(".tile").nth(1).click()
    page.page.get_by_role("button", name="All 23 are right").wait_for()
    page.shoot("labeller-grid")
    assert page.key("Enter").startswith("Saved: 23 confirmed; 1 struck out") and len(standing(store)) == 23
    assert page.key("Backspace") == "Taken back: 23 answers" and not standing(store)
    page.page.get_by_role("button", name="One at a time").click()
    page.ready()
    places = []
    for _ in range(6):
        page.key("1")
        places.append(page.page.evaluate("""() => {
            const labeller = document.querySelector('.labeller');
            const parts = labeller.querySelectorAll('.press-right, .press-pick-0-1, .status');
            return [...parts].map((e) => Object.values(e.getBoundingClientRect().toJSON()).map(Math.round));
        }"""))
    assert all(p == places[0] for p in places), "nothing jumps"
    for width in (1024, 760, 480):
        page.page.set_viewport_size({"width": width, "height": 800})
        assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), width
        page.shoot(f"labeller-{width}")
    page.leave()


def test_five_hundred_in_a_row(servers, stores, chromium):
    store, served = stores("colours"), servers("colours")
    fill(store, 520)
    page, opened = served.page(chromium).ready(), time.monotonic()
    sockets = len(page.sockets)
    devtools = page.page.context.new_cdp_session(page.page)
    [kernel] = served.kernels()

    def weigh() -> tuple[float, float, int]:
        "MB of the kernel, MB of the page's objects, elements in the page."
        devtools.send("HeapProfiler.collectGarbage")
        numbers = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
        nodes = page.page.evaluate("document.querySelectorAll('*').length")
        return kernel.memory_info().rss / 1e6, numbers["JSHeapUsedSize"] / 1e6, nodes
    devtools.send("Performance.enable")
    weights = []
    for n in range(500):
        if n in (100, 300): weights.append(weigh())
        token = page.token()
        page.page.keyboard.press("12"[n % 2])
        page.page.wait_for_function("before => document.querySelector('.labeller').dataset.token > before",
                                    arg=token, polling=5)
    weights.append(weigh())
    assert len(standing(store)) == 500 and page.text("counter").startswith("500 done · 20 left")
    (kernel_before, heap_before, nodes_before), _, (kernel_after, heap_after, nodes_after) = weights
    assert kernel_after < kernel_before + 25 and heap_after < heap_before + 5 and nodes_after == nodes_before, weights
    page.page.wait_for_timeout(1000 * max(0, 35 - (time.monotonic() - opened)))   # pings are sent every 30 seconds
    assert not page.problems and len(page.sockets) == sockets
    page.leave()


def test_the_page_behind_its_token(servers, stores, chromium):
    store, server = stores("colours"), servers("colours")
    fill(store, 40)
    wait_for_kernels(server, 0)
    no_kernel = "-".join(["0" * 8] + ["0" * 4] * 3 + ["0" * 12])
    for path in ("", "?token=wrong", "?token=", "voila/static/voila.js", "voila/labextensions/anywidget/static/main.js",
                 "login", f"api/kernels/{no_kernel}", "voila/files/x.png", "static/favicon.ico", "?token=%C3%A9"):
        assert server.status(path) == 403, path
    assert server.status("voila/static/voila.js?token=a-token") == 200 and not server.kernels()
    page = server.page(chromium).ready()
    assert len(server.kernels()) == 1
    for n in range(6): page.key("12"[n % 2])
    page.click(".press-right")
    page.key("?")
    page.shoot("labeller-voila")
    assert len(page.saved) == 7 and page.saved == standing(store) and store.stats()["unknown"] == 1
    assert not page.outside() and not page.problems, (page.outside(), page.problems)
    sent = page.page.evaluate("fetch('https://example.org').then(() => 'sent', (e) => String(e))")
    assert sent.startswith("TypeError")
    wrong = page.page.context.new_page()
    refused = wrong.goto(server.address.replace("a-token", "wrong"))
    assert refused.status == 403, "a wrong token, whatever was right before"
    other = server.page(chromium, "")
    other.enter("bob")
    assert other.text("caption") != page.text("caption"), "nobody gets what somebody else looks at"
    assert len(server.kernels()) == 2
    page.leave()
    wait_for_kernels(server, 1)
    assert len(server.kernels()) == 1, "a kernel ends with its page"
    assert not store._rows("select 1 from images where leased_to = 'ann'"), "and lets go of the photos that it held"
    assert not stop(server.process) and server.process.returncode == 0
    other.page.keyboard.press("1")
    other.page.get_by_text("Not saved yet").wait_for(timeout=20_000)
