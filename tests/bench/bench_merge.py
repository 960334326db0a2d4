"""What it costs to take 1,000 answers into a dataset of 60,000 images; they are those of ../shared/data/cifar10.zip."""
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CIFAR = ROOT.parent / "shared" / "data" / "cifar10.zip"


def stored(home: Path) -> int:
    "Bytes on the disk, shared files counted once."
    files = [p.stat() for p in (home / "data").rglob("*") if p.is_file()]
    return sum({(s.st_dev, s.st_ino): s.st_size for s in files}.values())


def bench_merge(answers: int = 1000) -> dict:
    "Seconds and bytes added of a merge into 60,000 images: the first one, which makes all thumbnails, and a later one."
    from PIL import Image

    from nbs_lib.core.settings import load_settings
    from nbs_lib.data.items import read_items
    from nbs_lib.data.versions import add_version
    from nbs_lib.data.write import write_version
    from nbs_lib.feedback.store import Sent, Store
    from nbs_lib.steps.merge import merge
    from nbs_lib.tracking.tracker import open_tracker
    settings = load_settings()
    tracker, store = open_tracker(settings), Store("faces", settings)
    with tracker.start("cifar-download", "download") as run:
        def write(folder: Path, parent):
            return write_version(folder, read_items(CIFAR, "label"), name="faces", source="cifar10.zip")
        data, _ = add_version("faces", settings, tracker, run, write)
    labels, numbers = data.rows.set_index("id")["label"], {"images": len(data.rows)}

    def turned(file: bytes) -> bytes:
        out = io.BytesIO()
        Image.open(io.BytesIO(file)).transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=95)
        return out.getvalue()

    for name, first in (("first", 0), ("later", answers)):
        chosen = list(labels.index[first:first + answers])
        with store.staging() as place:             # photos that the dataset has not: turned upright to the left
            def sent(id: str, file: bytes) -> Sent:
                return Sent(store.stage(place, turned(file)), "turned.jpg", "ada", {"label": labels[id]})
            store.admit(place, [sent(id, file) for id, file in data.images(chosen)], data.targets)
        before, start = stored(settings.home), time.perf_counter()
        with tracker.start("cifar-merge", "merge") as run: data, _, found = merge("faces", settings, tracker, run)
        numbers |= {f"{name} merge, s": round(time.perf_counter() - start, 2),
                    f"{name} merge, bytes added": stored(settings.home) - before,
                    f"{name} merge, joined": sum(a.outcome == "joins" for a in found),
                    f"{name} merge, left out": sum(a.outcome == "left out" for a in found)}
    return numbers


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.environ.update(LOOPBOOK_HOME=place, LOOPBOOK_TRACKING__BACKEND="trackio")
        json.dump(bench_merge(), sys.stdout, indent=1)
