"""Folders and zips of a few small photos."""
import io
import zipfile
from pathlib import Path

from PIL import Image

from nbs_lib.data.items import read_items


def jpg(n: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (n % 256, 90, 9)).save(file, "JPEG")
    return file.getvalue()


def make_zip(path: Path, files: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items(): archive.writestr(name, data)
    return path


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).mkdir(exist_ok=True) if name.endswith("/") else (path / name).write_bytes(data)
    return path


def found(path: Path, **options) -> dict: return {i.name: i.problem or i.labels for i in read_items(path, **options)}
