"""Folders, zips, addresses, Hugging Face, torchvision; and all that may be wrong with them."""
import io
import os
import stat
import struct
import time
import zipfile

import pytest
from PIL import Image
from small_archives import found, jpg, make_folder, make_zip

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import Data, Recipe, load_settings
from nbs_lib.data.faces import draw_face
from nbs_lib.data.items import read_items
from nbs_lib.data.sources import open_source, source_signature


@pytest.fixture
def settings(home): return load_settings(home)


both = pytest.mark.parametrize("make", [make_zip, make_folder])


# ---- layouts

@both
@pytest.mark.parametrize("top", ["", "my photos/", "a/b/"])
def test_class_folders(tmp_path, make, top):
    names = ["it's a cat/1.jpg", 'the "dog"/a b.jpg', "Köter, 犬/1.JPG", "Köter, 犬/deep/er/2.png",
             "Köter, 犬/note.txt"]
    junk = [".DS_Store", "__MACOSX/._1.jpg", "it's a cat/Thumbs.db", ".git/x.jpg", "desktop.ini"]
    items = found(make(tmp_path / "source", {top + n: b"" for n in names + junk} | {top + "empty/": b""}))
    wanted = {n: {"label": n.split("/")[0]} for n in names} | {"empty/": "empty class folder"}
    assert {n.removeprefix(top): v for n, v in items.items()} == wanted


@both
def test_split_folders_are_joined(tmp_path, make):
    files = {f"cifar/{s}/{c}/{n}.jpg": b"" for s in ("train", "Val", "test") for c in ("cat", "dog") for n in range(2)}
    files |= {"cifar/README.md": b"", "cifar/test/bird/": b""}
    items = found(make(tmp_path / "source", files), target="animal")
    assert len(items) == 13 and items["cifar/Val/dog/1.jpg"] == {"animal": "dog"}
    assert items["cifar/test/bird/"] == "empty class folder"


@both
@pytest.mark.parametrize("table", ["labels.csv", "metadata.csv", "top/labels.csv"])
def test_table(tmp_path, make, table):
    top = table.rpartition("/")[0] + "/" if "/" in table else ""
    text = ('\ufefffile_name,beard,hair\r\n1.jpg,yes,"black, long"\r\nsub/2.jpg,,blonde\r\n3.jpg,no,\r\n'
            'gone.jpg,no,red\r\n\r\n')
    images = {top + n: b"" for n in ("1.jpg", "sub/2.jpg", "3.jpg", "unnamed.jpg", "licence.txt")}
    items = found(make(tmp_path / "source", {table: text.encode()} | images))
    assert {n.removeprefix(top): v for n, v in items.items()} == {
        "1.jpg": {"beard": "yes", "hair": "black, long"}, "sub/2.jpg": {"beard": None, "hair": "blonde"},
        "3.jpg": {"beard": "no", "hair": None},
        "unnamed.jpg": {"beard": None, "hair": None}, "gone.jpg": f"named in {table}, but not there"}


@pytest.mark.parametrize(("text", "words"), [
    ("", "file_name"), ("name,label\n1.jpg,cat\n", "file_name"), ("file_name\n1.jpg\n", "file_name"),
    ("file_name,a,a\n1.jpg,b,c\n", "each once"), ("file_name,label\n1.jpg,cat,dog\n", "line 2: 3 cells"),
    ("file_name,label\n1.jpg,cat\n1.jpg,dog\n", "line 3: '1.jpg' has another label"),
    ("file_name,label\n1.jpg,\n", "no labelled images"),
    (b"file_name,label\n1.jpg,\xff\xfe\n", "not a CSV table in UTF-8")])
def test_broken_tables(tmp_path, text, words):
    make_folder(tmp_path / "source", {"labels.csv": text if isinstance(text, bytes) else text.encode(), "1.jpg": jpg()})
    with pytest.raises(UserError, match=words): found(tmp_path / "source")


@both
def test_nothing_to_learn_from(tmp_path, make):
    with pytest.raises(UserError, match="no labelled images"):
        found(make(tmp_path / "source", {"1.jpg": jpg(), "2.jpg": jpg()}))
    with pytest.raises(UserError, match="no such folder"): found(tmp_path / "nowhere")


def test_some_of_the_images_are_the_same_ones_again(tmp_path):
    files = {f"{c}/{n}.jpg": b"" for c in ("cat", "dog") for n in range(50)}
    a, b = found(make_zip(tmp_path / "a.zip", files), images=20), found(make_folder(tmp_path / "b", files), images=20)
    assert a == b and len(a) == 20 and 4 < sum(v["label"] == "cat" for v in a.values()) < 16


def test_files_that_cannot_be_read(tmp_path):
    make_folder(tmp_path / "source", {"cat/1.jpg": jpg(), "cat/large.jpg": bytes(2_000_000)})
    (tmp_path / "source" / "cat" / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    items = found(tmp_path / "source", limits=Data(max_file_mb=1))
    assert "2.0 MB, allowed are 1" in items["cat/large.jpg"] and "cannot be read" in items["cat/dangling.jpg"]
    assert items["cat/1.jpg"] == {"label": "cat"}
    path = make_zip(tmp_path / "a.zip", {"cat/1.jpg": jpg(1), "cat/2.jpg": jpg(2)})
    data = bytearray(path.read_bytes())
    data[data.index(jpg(1)) + 200] ^= 255
    path.write_bytes(data)
    assert "Bad CRC" in found(path)["cat/1.jpg"] and found(path)["cat/2.jpg"] == {"label": "cat"}


@pytest.mark.skipif(os.name != "posix", reason="names of bytes are a thing of POSIX")
def test_names_that_are_no_text(tmp_path):
    (tmp_path / "source" / "cat").mkdir(parents=True)
    with open(os.fsencode(tmp_path) + b"/source/cat/\xff.jpg", "wb") as file: file.write(jpg())
    assert list(found(tmp_path / "source")) == ["cat/\ufffd.jpg"]


# ---- zips of strangers

@pytest.mark.parametrize("name", ["../x.jpg", "cat/../../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "..\\x.jpg",
                                  "\\\\server\\x.jpg"])
def test_zip_that_leaves_its_place(tmp_path, name):
    path = make_zip(tmp_path / "a.zip", {"cat/1.jpg": jpg(), name: jpg()})
    with pytest.raises(UserError, match="outside of the archive"): found(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_zip_with_links_or_password(tmp_path):
    link = zipfile.ZipInfo("cat/2.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = make_zip(tmp_path / "a.zip", {"cat/1.jpg": jpg()})
    with zipfile.ZipFile(path, "a") as archive: archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="link"): found(path)
    path = make_zip(tmp_path / "b.zip", {"cat/1.jpg": jpg()})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="encrypted"): found(path)


def test_zip_bomb(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"cat/{n}.jpg": bytes(3_000_000) for n in range(4)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="unpacks to 0.01 GB"): found(path, limits=Data(max_archive_gb=0.01))
    data = path.read_bytes()  # one that lies about its sizes is read no further than it says
    path.write_bytes(data.replace(struct.pack("<I", 3_000_000), struct.pack("<I", 1000)))
    items = list(read_items(path, limits=Data(max_archive_gb=0.01)))
    assert all(i.problem and not i.data for i in items)
    for n, broken in enumerate((b"", b"<html>", data[:len(data) // 2])):
        (tmp_path / f"{n}.zip").write_bytes(broken)
        with pytest.raises(UserError, match="not a zip"): found(tmp_path / f"{n}.zip")


# ---- libraries

def test_hugging_face(settings):
    import datasets
    features = datasets.Features({"img": datasets.Image(), "animal": datasets.ClassLabel(names=["cat", "dog"]),
                                  "caption": datasets.Value("string")})
    rows = [{"img": {"bytes": jpg(n), "path": None}, "animal": n % 2 if n else -1, "caption": f"number {n}"}
            for n in range(20)]
    table = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(train=table, test=table.select(range(5))).save_to_disk(str(settings.home / "saved"))
    items = list(open_source("hf:saved", Recipe(), settings))
    assert len(items) == 25 and items[3].data == jpg(3) and items[3].labels == {"animal": "dog"}
    assert items[0].labels == {"animal": None}
    assert len(list(open_source("hf:saved@test", Recipe(), settings))) == 5
    assert len(list(open_source("hf:saved", Recipe(images=7), settings))) == 7
    with pytest.raises(UserError, match="there are: train, test"):
        list(open_source("hf:saved@other", Recipe(), settings))
    table.remove_columns("animal").to_parquet(str(settings.home / "text" / "data.parquet"))
    assert next(open_source("hf:text", Recipe(), settings)).labels == {"caption": "number 0"}
    table.remove_columns("img").to_parquet(str(settings.home / "none" / "data.parquet"))
    with pytest.raises(UserError, match="needs an image column"): list(open_source("hf:none", Recipe(), settings))
    assert source_signature("hf:saved", Recipe(), settings)
    assert source_signature("hf:ada/photos", Recipe(), settings) is None


def test_hugging_face_out_of_reach(settings, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="give a folder or zip"):
        list(open_source("hf:nobody/nothing-here", Recipe(), settings))


def test_own_version_as_source(settings):
    from nbs_lib.data.items import Item
    from nbs_lib.data.write import write_version
    written = write_version(settings.home / "version",
                            [Item(f"{n}", jpg(n), {"animal": ("cat", "dog")[n % 2]}) for n in range(0, 40)], name="a",
                            source="b")
    items = list(open_source("hf:version", Recipe(), settings))
    assert len(items) == len(written.rows) and {i.labels["animal"] for i in items} == {"cat", "dog"}
    assert items[0].labels.keys() == {"animal"}


def test_oxford_pets(settings):
    pets = settings.home / "data" / "raw" / "torchvision" / "oxford-iiit-pet"
    for folder in ("images", "annotations/trimaps"): (pets / folder).mkdir(parents=True)
    for part, numbers in (("trainval", (1, 2)), ("test", (3,))):
        lines = "".join(f"Abyssinian_{n} 1 1 1\nbeagle_{n} 2 2 1\n" for n in numbers)
        (pets / "annotations" / f"{part}.txt").write_text(lines)
        for n in numbers:
            for breed in ("Abyssinian", "beagle"): (pets / "images" / f"{breed}_{n}.jpg").write_bytes(jpg(n))
    items = list(open_source("torchvision:OxfordIIITPet", Recipe(target="animal"), settings))
    assert {i.name: i.labels["animal"] for i in items} == {
        f"{b}_{n}.jpg": a for n in (1, 2, 3) for b, a in (("Abyssinian", "cat"), ("beagle", "dog"))}
    assert items[0].data == jpg(1)


def test_other_torchvision_datasets(settings):
    with pytest.raises(UserError, match="no such dataset"): list(open_source("torchvision:Cats", Recipe(), settings))
    with pytest.raises(UserError, match="no such dataset"): list(open_source("torchvision:utils", Recipe(), settings))
    folder = settings.home / "data" / "raw" / "torchvision" / "eurosat" / "2750"
    for c in ("Forest", "River"):
        for n in range(2): make_folder(folder, {f"{c}/{n}.jpg": jpg(n)})
    items = list(open_source("torchvision:EuroSAT", Recipe(target="land"), settings))
    assert [i.labels["land"] for i in items] == ["Forest", "Forest", "River", "River"]
    assert Image.open(io.BytesIO(items[0].data)).format == "PNG"


def test_torchvision_out_of_reach(settings, monkeypatch):
    import urllib.request
    def refuse(*_, **__): raise urllib.error.URLError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="SOURCE=folder or zip"):
        list(open_source("torchvision:OxfordIIITPet", Recipe(), settings))


# ---- faces and signatures

def test_faces(settings):
    items = list(open_source("faces", Recipe(images=25, seed=3), settings))
    assert [(i.data, i.labels) for i in items] == [draw_face(3, n) for n in range(25)]
    assert source_signature("faces", Recipe(seed=1), settings) != source_signature("faces", Recipe(seed=2), settings)


def test_every_class_of_the_faces_is_drawn():
    from collections import Counter
    labels = [draw_face(0, n)[1] for n in range(150)]
    for target, classes in (("beard", 2), ("moustache", 2), ("glasses", 3), ("hair_color", 5), ("hair_length", 3)):
        counts = Counter(row[target] for row in labels if row[target] is not None)
        assert len(counts) == classes and min(counts.values()) >= 8
    assert all(row["moustache"] == "yes" for row in labels if row["beard"] == "yes")
    assert all((row["hair_color"] is None) == (row["hair_length"] == "bald") for row in labels)


@both
def test_signature_of_local_sources(home, settings, make):
    path, recipe = make(home / "source", {"cat/1.jpg": jpg(1), "dog/1.jpg": jpg(2)}), Recipe()
    first = source_signature("source", recipe, settings)
    assert first == source_signature("source", recipe, settings)
    assert first != source_signature("source", Recipe(images=1), settings)
    file = path if path.is_file() else path / "cat" / "1.jpg"
    os.utime(file, (time.time() + 5,) * 2)
    assert source_signature("source", recipe, settings) != first
    assert source_signature("nowhere", recipe, settings) is None
