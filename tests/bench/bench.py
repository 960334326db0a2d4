"""What Loopbook costs on two cores, beside what people use today, on real photos; a table, and outputs/bench.json.

    make bench                      everything
    python tests/bench/bench.py predict help      some of it
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT.parent / "shared" / "data"
LOOPBOOK = Path(sys.executable).with_name("loopbook")
WORK = Path(tempfile.mkdtemp(prefix="loopbook-bench-"))
HOME = WORK / "home"
os.environ.update(LOOPBOOK_HOME=str(HOME), LOOPBOOK_TRACKING__BACKEND="trackio")
results: dict[str, dict] = {}


def record(name: str, value: float, unit: str, target: str = "", beside: str = "") -> None:
    results[name] = {"value": round(value, 4), "unit": unit, "target": target, "beside": beside}
    print(f"  {name}: {value:,.4g} {unit}  {beside}", file=sys.stderr, flush=True)


def loop(source: Path) -> tuple[float, float, dict]:
    "Run the loop on a source; seconds, peak memory of all its processes together (GiB), and what it printed."
    import psutil
    start = time.perf_counter()
    command = [LOOPBOOK, "loop", "--recipe", "cats_vs_dogs", "--source", str(source), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, over = [0], threading.Event()

    def watch():
        while not over.wait(0.1):
            total = 0
            for p in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try: total += p.memory_info().rss
                except psutil.Error: pass
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    out = process.communicate()[0]
    over.set()
    if process.returncode: raise SystemExit(f"the loop failed: {out}")
    return time.perf_counter() - start, peak[0] / 2**30, json.loads(out)


def summary_of(answer: dict, step: str) -> dict:
    return next(s for s in answer["steps"] if s["notebook"].endswith(f"{step}.ipynb"))["summary"]


def extracted() -> Path:
    "The photos as the class folders that ImageFolder wants."
    folder = WORK / "folders"
    if not folder.exists():
        with zipfile.ZipFile(DATA / "cats_dogs.zip") as archive: archive.extractall(folder)
    return folder


def bench_loop() -> None:
    photos = Path(shutil.copy(DATA / "cats_dogs.zip", WORK / "photos.zip"))
    seconds, memory, answer = loop(photos)
    usual = plain_recipe()
    record("whole loop", seconds, "s", "< 60", f"plain ResNet-18 recipe {usual:,.0f} s")
    record("whole loop, times faster", usual / seconds, "x", ">= 30")
    record("whole loop, peak memory", memory, "GiB", "< 4")
    record("test accuracy", summary_of(answer, "evaluate")["accuracy"]["label"], "", ">= 0.985")
    with zipfile.ZipFile(DATA / "cats_dogs_incoming.zip") as incoming, zipfile.ZipFile(photos, "a") as archive:
        table = next(n for n in incoming.namelist() if n.endswith("labels.csv"))
        for row in incoming.read(table).decode().splitlines()[1:101]:
            name, label = row.split(",")
            archive.writestr(f"{label}/new_{name}", incoming.read(name))
    seconds, _, answer = loop(photos)
    record("loop after 100 new photos", seconds, "s", "< 20")
    new = summary_of(answer, "download")["rows"] - 2143
    embedded = sum(summary_of(answer, step)["images_embedded"] for step in ("train", "evaluate"))
    record("old photos embedded again", max(0, embedded - new), "photos", "0", f"{embedded} embedded, {new} new")
    said = WORK / "said"
    said.mkdir()
    with zipfile.ZipFile(DATA / "cats_dogs_incoming.zip") as incoming:
        rows = incoming.read(next(n for n in incoming.namelist() if n.endswith("labels.csv"))).decode().splitlines()
        (said / "labels.csv").write_text("\n".join([rows[0], *rows[101:201]]))
        for name in (row.split(",")[0] for row in rows[101:201]): (said / name).write_bytes(incoming.read(name))
    command = [LOOPBOOK, "feedback", "import", said, "--user", "bench", "--recipe", "cats_vs_dogs"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, _, answer = loop(photos)
    record("loop after 100 answers", seconds, "s", "< 20", str(answer["decision"]))
    embedded = sum(summary_of(answer, step)["images_embedded"] for step in ("train", "evaluate"))
    again = max(0, embedded - 100)
    record("old photos embedded again after answers", again, "photos", "0", f"{embedded} embedded, 100 new")


def plain_recipe(epochs: int = 10, steps: int = 20) -> float:
    """Seconds of the recipe people use today, extrapolated from a few steps: torchvision's ResNet-18, ImageFolder,
    batch 32, fp32, Adam."""
    import torch
    import torchvision
    from torchvision import transforms
    flip = transforms.RandomHorizontalFlip()
    how = transforms.Compose([transforms.RandomResizedCrop(224), flip, transforms.ToTensor()])
    images = torchvision.datasets.ImageFolder(extracted(), how)
    network = torchvision.models.resnet18()
    optimizer = torch.optim.Adam(network.parameters())
    batches = iter(torch.utils.data.DataLoader(images, 32, shuffle=True, num_workers=2))
    def step():
        x, y = next(batches)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    step()
    start = time.perf_counter()
    for _ in range(steps): step()
    return (time.perf_counter() - start) / steps * epochs * round(0.7 * len(images) / 32)


def bench_embed() -> None:
    import torch
    import torchvision
    from torchvision import transforms

    from nbs_lib.data.items import read_items
    from nbs_lib.models.backbone import create_backbone, preprocessing_of
    from nbs_lib.models.classifier import Body
    from nbs_lib.models.engine import Engine, choose
    from nbs_lib.models.features import run_images
    files = [item.data for item in read_items(DATA / "cats_dogs.zip") if item.data]
    for name in ("tf_efficientnet_lite1", "tf_efficientnet_lite0"):
        backbone = create_backbone(name)
        how = preprocessing_of(backbone)
        engine = Engine(Body(backbone, how), how.size, choose(), 64)
        engine(torch.zeros(1, 3, how.size, how.size, dtype=torch.uint8).numpy())
        start = time.perf_counter()
        done = sum(len(batch) for batch, _ in run_images(files, how, engine, 64))
        ours = done / (time.perf_counter() - start)
        resize = transforms.Compose([
            transforms.Resize(round(how.size / how.crop), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(how.size), transforms.ToTensor(), transforms.Normalize(how.mean, how.std)])
        backbone, done = create_backbone(name), 0
        images = torchvision.datasets.ImageFolder(extracted(), resize)
        batches = iter(torch.utils.data.DataLoader(images, 64, num_workers=2))
        with torch.no_grad():
            backbone(next(batches)[0])
            start = time.perf_counter()
            while done < 384: done += len(backbone(next(batches)[0]))
        theirs = done / (time.perf_counter() - start)
        record(f"embedding, {name}", ours, "images/s", "", f"plain torch loop {theirs:.0f} images/s")
        record(f"embedding, {name}, times faster", ours / theirs, "x", ">= 6")


def in_production() -> Path:
    "The folder of a production model of cats and dogs, which a loop has made."
    from nbs_lib.core.settings import load_settings
    from nbs_lib.tracking.tracker import open_tracker
    tracker = open_tracker(load_settings())
    if tracker.resolve("cats_vs_dogs-model:production") is None: loop(DATA / "cats_dogs.zip")
    return tracker.download("cats_vs_dogs-model:production")


def bench_predict() -> None:
    import numpy as np

    from nbs_lib.data.items import read_items
    from nbs_lib.models.classifier import load_model
    model = load_model(in_production())
    files = [item.data for item, _ in zip(read_items(DATA / "cats_dogs.zip"), range(600), strict=False)]
    for data in files[:50]: model.predict_one(data)
    times = []
    for data in files[50:]:
        start = time.perf_counter()
        model.predict_one(data)
        times.append(1000 * (time.perf_counter() - start))
    record("one prediction, p50", float(np.percentile(times, 50)), "ms", "< 8", str(model.plan))
    record("one prediction, p99", float(np.percentile(times, 99)), "ms", "< 15")


def bench_dataset() -> None:
    from nbs_lib.core.settings import load_settings
    from nbs_lib.data.dataset import Dataset
    from nbs_lib.data.items import Item, read_items
    from nbs_lib.data.write import write_version
    from nbs_lib.tracking.tracker import open_tracker
    tracker, folder = open_tracker(load_settings()), WORK / "cifar"
    held_back: list[Item] = []
    def sixty_thousand():
        for i, item in enumerate(read_items(DATA / "cifar10.zip")):
            if i % 600 == 0: held_back.append(item)
            else: yield item
    start = time.perf_counter()
    write_version(folder / "v0", sixty_thousand(), name="cifar", source="cifar10.zip")
    record("first version of 59,900 images", time.perf_counter() - start, "s")
    with tracker.start("cifar", "bench") as run: first = run.log_artifact("cifar", "dataset", folder / "v0")
    parent = Dataset(tracker.download(first.ref), first.ref)
    new = sum(len(item.data) for item in held_back)
    stored = HOME / "data" / "tracking"
    def size(): return sum(p.stat().st_size for p in stored.rglob("*") if p.is_file() and "artifacts" in str(p))
    before, start = size(), time.perf_counter()
    write_version(folder / "v1", held_back, name="cifar", source="cifar10.zip", parent=parent)
    with tracker.start("cifar", "bench") as run: run.log_artifact("cifar", "dataset", folder / "v1")
    record("child version with 100 more", time.perf_counter() - start, "s", "< 2")
    record("child version, bytes added per new byte", (size() - before) / new, "x", "<= 1.1", f"{new:,} new bytes")


def bench_help() -> None:
    def once():
        start = time.perf_counter()
        subprocess.run([LOOPBOOK, "--help"], capture_output=True, check=True)
        return time.perf_counter() - start
    once()
    record("loopbook --help, median of 9", statistics.median(once() for _ in range(9)), "s", "< 0.5")


def bench_feedback() -> None:
    import bench_feedback as feedback
    for measure in (feedback.import_images, feedback.store_writes):
        found = measure(Path(tempfile.mkdtemp(dir=WORK)), DATA / "cifar10.zip")
        for name, (value, unit) in found.items(): record(name, value, unit)


def bench_labelling() -> None:
    from bench_labelling import labelling
    with zipfile.ZipFile(DATA / "birds.zip") as archive:       # any photos will do
        photos = [(Path(n).name, archive.read(n)) for n in archive.namelist() if n.endswith(".jpg")][:200]
    targets = {"p95_ms": "< 100", "labels_a_minute": ">= 60"}
    in_production()
    for name, value in labelling(HOME, "cats_vs_dogs", photos).items():
        record(f"labelling page, {name.replace('_', ' ')}", value, "", targets.get(name, ""))


def alone(script: str) -> dict:
    "What a benchmark in a process and a home of its own has measured."
    command = [sys.executable, Path(__file__).with_name(script)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def bench_merge() -> None:
    for name, value in alone("bench_merge.py").items(): record(f"1,000 answers into 60,000 images, {name}", value, "")


def bench_schedule() -> None:
    targets = {"overhead, over papermill": "<= 0.5", "a_day, run / due": "1"}
    for group, found in alone("bench_schedule.py").items():
        for name, value in found.items():
            what = f"{group}, {name}"
            record(what, value, "s" if group == "overhead" else "", targets.get(what, ""))


BENCHES = {"help": bench_help, "loop": bench_loop, "predict": bench_predict, "embed": bench_embed,
           "dataset": bench_dataset, "labelling": bench_labelling, "feedback": bench_feedback, "merge": bench_merge,
           "schedule": bench_schedule}


def main(names: list[str]) -> None:
    if not DATA.exists(): raise SystemExit(f"no photos to measure with: {DATA} is missing")
    HOME.mkdir()
    try:
        for name in names or BENCHES:
            print(name, file=sys.stderr)
            BENCHES[name]()
    finally: shutil.rmtree(WORK, ignore_errors=True)
    from rich.console import Console
    from rich.table import Table
    table = Table("", "measured", "target", "beside", title=f"{os.cpu_count()} cores")
    for name, r in results.items(): table.add_row(name, f"{r['value']:,.4g} {r['unit']}", r["target"], r["beside"])
    Console(width=120).print(table)
    (ROOT / "outputs" / "bench.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__": main(sys.argv[1:])
