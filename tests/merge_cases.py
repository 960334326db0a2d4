"""Datasets of small pictures, and what people say of them."""
import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from nbs_lib.core.settings import load_settings
from nbs_lib.data.images import image_id
from nbs_lib.data.items import Item
from nbs_lib.data.write import write_version
from nbs_lib.feedback.merge import weigh, write_merged
from nbs_lib.feedback.store import Store

KINDS = ("fig", "plum")


def scene(n: int) -> Image.Image:
    "A picture unlike all others: 7 x 7 colours, blurred into each other."
    pixels = np.random.default_rng(n).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize((150, 120), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


@cache
def original(n: int) -> bytes: return png(scene(n))


def jpeg(image: Image.Image, quality: int = 60) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()



class Case:
    "A dataset of 80 scenes and a store of its own."
    def __init__(self, home: Path, targets=None):
        self.home, self.settings = home, load_settings(home)
        self.dataset = write_version(
            home / "v0",
            [Item(f"{n}.png", original(n), targets(n) if targets else {"kind": KINDS[n % 2]}) for n in range(80)],
            name="fruit",
            source="drawn",
        )
        self.store = Store("faces", self.settings)
        self.place = dict(zip(self.dataset.rows["id"], self.dataset.rows["split"], strict=True))
        self.of = {
            s: [n for n in range(80) if self.place[image_id(original(n))] == s] for s in ("train", "validation", "test")
        }

    def say(self, data: bytes, label: str | dict | None, user: str = "ada", review: bool = False) -> str:
        id, _ = self.store.add(data, "a photo.png", user)
        labels = {"kind": label} if isinstance(label, str) else label
        self.store.answer(id, user, "corrected" if label else "unknown", labels, review=review)
        return id

    def weigh(self, force: bool = True, dataset=None):
        answers = weigh(
            dataset or self.dataset,
            self.store.standing(),
            lambda ids: ((i, self.store.image(i)) for i in ids),
            self.settings.feedback,
            force,
        )
        return {a.id: a for a in answers}

    def merge(self, folder: str, dataset=None, force: bool = True):
        dataset = dataset or self.dataset
        return write_merged(
            self.home / folder, dataset, list(self.weigh(force, dataset).values()), self.store.image, self.settings
        )
