"""What the feedback store costs: answers a second, images a second. Each function returns {what: (value, unit)}."""
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def _store(folder: Path):
    from nbs_lib.core.settings import Recipe, Settings
    from nbs_lib.feedback.store import Store
    return Store("bench", Settings(home=folder, recipes={"bench": Recipe()}))


def _items(zip: Path, images: int, labelled: bool = True) -> Iterable:
    from nbs_lib.data.items import read_items
    for item in islice(read_items(zip), images):
        if not labelled: item.labels = {}
        yield item


def import_images(folder: Path, zip: Path, images: int = 10_000) -> dict:
    "Import so many images of a zip into a new store in `folder`, and once more."
    from nbs_lib.feedback.exchange import export, take_in
    store, seconds = _store(folder), []
    for _ in range(2):
        start = time.perf_counter()
        take_in(store, _items(zip, images), "bench", {"label": ["cat", "dog"]}, imported=True)
        seconds.append(time.perf_counter() - start)
    import pandas  # noqa: F401  not what is measured
    start = time.perf_counter()
    export(store, folder / "answers.csv")
    return {f"feedback, import of {images:,} images": (seconds[0], "s"),
            "feedback, images imported": (images / seconds[0], "images/s"),
            "feedback, the same import again": (seconds[1], "s"),
            f"feedback, export of {images:,} answers": (time.perf_counter() - start, "s")}


WRITER = """
import sys
from pathlib import Path
from tests.bench.bench_feedback import _store
store, user = _store(Path(sys.argv[1])), sys.argv[2]
ids = [q.id for q in store.queue(user, int(sys.argv[3]))]
print(flush=True)
sys.stdin.readline()
for id in ids: store.answer(id, user, "corrected", {"label": "cat"})
"""


def store_writes(folder: Path, zip: Path, answers: int = 2000, processes: int = 4) -> dict:
    """Answers a second of one labeller, each on disk before the next one, the 95th percentile of one, and answers a
    second of several processes."""
    from nbs_lib.feedback.exchange import take_in
    store, times = _store(folder), []
    take_in(store, _items(zip, 2 * answers, labelled=False), "bench", {"label": []})
    for q in store.queue("one", answers):
        start = time.perf_counter()
        store.answer(q.id, "one", "corrected", {"label": "cat"})
        times.append(1000 * (time.perf_counter() - start))
    def writer(n: int) -> subprocess.Popen:
        command = [sys.executable, "-c", WRITER, folder, f"writer {n}", str(answers // processes)]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    writers = [writer(n) for n in range(processes)]
    for p in writers: p.stdout.readline()
    start = time.perf_counter()
    for p in writers: print("go", file=p.stdin, flush=True)
    for p in writers: p.communicate()
    together = answers // processes * processes / (time.perf_counter() - start)
    return {"feedback, answers saved": (1000 * len(times) / sum(times), "answers/s"),
            "feedback, one answer, p95": (statistics.quantiles(times, n=20)[-1], "ms"),
            f"feedback, answers saved by {processes} processes": (together, "answers/s")}
