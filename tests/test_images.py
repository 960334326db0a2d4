"""What people's image files are like, and what they may do to us: nothing."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from nbs_lib.data.images import BadImage, check_image, decode_rgb, image_id, picture


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def photo() -> Image.Image:
    "Smooth, with three different corners, 60 x 40."
    y, x = np.mgrid[:40, :60]
    return Image.fromarray(np.stack([x * 4, y * 6, 255 - x * 2 - y * 3], -1).astype(np.uint8))


def pixels(image: Image.Image) -> torch.Tensor: return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
def distance(a: torch.Tensor, b: torch.Tensor) -> float: return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_formats(photo, format):
    data = encode(photo, format)
    assert check_image(data) == (60, 40, format)
    assert decode_rgb(data).shape == (3, 40, 60) and decode_rgb(data).dtype == torch.uint8
    assert distance(decode_rgb(data), pixels(photo)) < (12 if format == "GIF" else 4)
    assert torch.equal(decode_rgb(data), decode_rgb(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_truncated(photo, format):
    data = encode(photo.resize((300, 200)), format)
    for share in (0.5, 0.9):
        with pytest.raises(BadImage): check_image(data[:int(len(data) * share)])
    with pytest.raises(BadImage): decode_rgb(data[:len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"Dear Ada,\nthis is no picture.\n" * 20, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n",
                                  b"\x00" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_not_an_image(data):
    for read in (check_image, decode_rgb, picture):
        with pytest.raises(BadImage): read(data)


def test_corrupt_never_raises_anything_else(photo):
    rng = np.random.default_rng(0)
    for data in (encode(photo), encode(photo, "PNG"), encode(photo, "GIF"),
                 encode(photo, "TIFF", compression="tiff_lzw"), encode(photo, "WEBP")):
        for _ in range(60):
            bad = bytearray(data)
            for place in rng.integers(0, len(bad), rng.integers(1, 12)): bad[place] = rng.integers(256)
            for read in (check_image, decode_rgb):
                try: read(bytes(bad))
                except BadImage as error: assert str(error)


def test_bomb_is_refused_by_its_header():
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    idat = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match="megapixels"): check_image(data)
    with pytest.raises(BadImage, match="0.001 megapixels"): check_image(encode(Image.new("RGB", (60, 40))), 0.001)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_rotation(photo, orientation, format):
    # what undoes the rotation of a viewer
    turned = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    image = photo
    for operation in turned: image = image.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    assert check_image(data)[:2] == (60, 40)
    assert distance(decode_rgb(data), pixels(photo)) < 4


def test_modes(photo):
    gray = photo.convert("L")
    assert distance(decode_rgb(encode(gray)), pixels(gray)) < 3
    assert torch.equal(decode_rgb(encode(photo.quantize(64), "PNG")), pixels(photo.quantize(64)))
    assert distance(decode_rgb(encode(photo.convert("CMYK"))), pixels(photo)) < 12
    assert distance(decode_rgb(encode(photo.convert("CMYK"), "TIFF")), pixels(photo)) < 12
    assert torch.equal(decode_rgb(encode(photo.convert("1"), "PNG")), pixels(photo.convert("1")))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(format):
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    result = decode_rgb(encode(Image.fromarray(deep), format))
    assert result[0].flatten().tolist() == list(range(256)) and torch.equal(result[0], result[2])


def test_alpha_lies_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True, exact=True)):
        result = decode_rgb(data)
        assert result[:, 7, 7].tolist() == [255] * 3 and result[:, 0, 0].tolist() == [0, 0, 255]
        assert abs(int(result[0, 0, 1]) - 127) <= 1
    see_through = Image.new("P", (8, 8), 1)
    see_through.putpalette([0, 0, 0, 9, 9, 9])
    assert decode_rgb(encode(see_through, "PNG", transparency=1))[:, 0, 0].tolist() == [255] * 3


def test_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue", "lime")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert check_image(data) == (20, 10, format)
        assert decode_rgb(data)[0].float().mean() > 240 > 30 > decode_rgb(data)[2].float().mean()


def test_id_is_of_the_bytes():
    assert image_id(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
