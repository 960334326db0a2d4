"""Stores of feedback with a few small pictures."""
import io
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from nbs_lib.core.settings import load_settings
from nbs_lib.feedback.store import Store


def png(n: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (size, size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def said(p: float, model: str = "pets-model:v3") -> dict:
    return {"model": model, "targets": {"animal": {"cat": p, "dog": 1 - p}}}


@pytest.fixture
def store(home): return Store("faces", load_settings(home))


def fill(store: Store, n: int) -> list[str]:
    "`n` images, the first one the most doubtful."
    return [store.add(png(i), f"{i}.png", "camera", said(0.5 + i / (2 * n)))[0] for i in range(n)]


@contextmanager
def limit(bytes: int):
    "Within, no file of this process can grow beyond so many bytes."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
