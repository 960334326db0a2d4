"""How fast the labelling page is: labels a minute that a scripted labeller reaches in a real browser, and the time from
a key to the next photo on screen."""
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

LOOPBOOK = Path(sys.executable).with_name("loopbook")
CHROMIUM = next((c for c in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if c), None)
WATCH = """() => {
    const photo = document.querySelector('.labeller img.photo');
    let pressed = 0, answered = null;
    window.delays = [];
    window.addEventListener('keydown', (event) => { pressed = event.timeStamp; answered = photo.src; }, true);
    new MutationObserver(async () => {
        if (photo.src === answered || answered === null) return;
        answered = null;
        await photo.decode();
        requestAnimationFrame(() => setTimeout(() => window.delays.push(performance.now() - pressed)));
    }).observe(photo, { attributes: true, attributeFilter: ['src'] });
}"""


def labelling(home: Path, recipe: str, photos: Iterable[tuple[str, bytes]], n: int = 200, pause: float = 0) -> dict:
    """`n` photos labelled by keyboard in the page of `loopbook label` for the home's `recipe`, whose queue gets
    `photos` (name, bytes) first.

    Returns labels a minute, p50 and p95 of the milliseconds from a key to the next photo (painted, measured in the
    page), and their number."""
    from playwright.sync_api import sync_playwright

    from nbs_lib.core.settings import load_settings
    from nbs_lib.feedback.store import Store
    store = Store(recipe, load_settings(home))
    before = len(store.history())
    for name, data in photos: store.add(data, name, "bench")
    command = [LOOPBOOK, "label", "--port", "0", "--recipe", recipe, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env=os.environ | {"LOOPBOOK_HOME": str(home)}) as server:
        try:
            lines = ""
            while not lines.endswith("}\n"): lines += server.stdout.readline() or "}\n"
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[
                    "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                page.goto(json.loads(lines)["address"] + "&user=bench", timeout=120_000)
                page.locator(".labeller img.photo").wait_for(timeout=120_000)
                page.wait_for_function("document.querySelector('.labeller').dataset.token > 0")
                page.evaluate(WATCH)
                start = page.evaluate("performance.now()")
                for done in range(n):
                    token = page.locator(".labeller").get_attribute("data-token")
                    page.keyboard.press("12"[done % 2])
                    page.wait_for_function("token => document.querySelector('.labeller').dataset.token !== token",
                                           arg=token)
                    if pause: page.wait_for_timeout(1000 * pause)
                seconds = (page.evaluate("performance.now()") - start) / 1000
                delays = sorted(page.evaluate("delays"))
                browser.close()
        finally: server.terminate()
    answered = len(store.history()) - before
    assert answered == n, f"{answered} of {n} labels are in the store"
    return {"labels_a_minute": 60 * n / seconds, "p50_ms": statistics.median(delays),
            "p95_ms": delays[int(0.95 * len(delays))], "measured": len(delays)}
