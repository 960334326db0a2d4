"""Small pictures and datasets that tests train on."""
import io
from pathlib import Path

import numpy as np
from PIL import Image

from nbs_lib.data.dataset import Dataset
from nbs_lib.data.items import Item
from nbs_lib.data.write import write_version


def picture(kind: str, seed: int, size: int = 48) -> bytes:
    "A noisy JPEG with more of one colour: `kind` is red, green or blue."
    rng, file = np.random.default_rng(seed), io.BytesIO()
    pixels = rng.integers(0, 140, (size, size, 3))
    pixels[..., ("red", "green", "blue").index(kind)] += 90
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def small_dataset(
    folder: Path,
    n: int = 40,                                # pictures
    kinds: tuple[str, ...] = ("red", "blue"),   # classes of the one target, colour; they take turns
    first: int = 0,                             # number of the first picture
    parent: Dataset | None = None,
) -> Dataset:
    def item(number: int, kind: str) -> Item:
        return Item(f"{kind}/{number}.jpg", picture(kind, number), {"colour": kind})
    items = [item(first + i, kinds[i % len(kinds)]) for i in range(n)]
    return write_version(folder, items, name="small", source="drawn by the tests", parent=parent)
