"""Tables of predictions: broken off, of one version, on a full disk."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from small_data import picture
from small_models import NAME, own_answers, production, project  # noqa: F401  fixtures

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import Data
from nbs_lib.data.images import BadImage
from nbs_lib.serving import batch
from nbs_lib.serving.batch import image_files, write_predictions
from nbs_lib.serving.predictor import BATCH, Predictor, read_image
from nbs_lib.tracking.promotion import promote


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3 * BATCH):
        (folder / f"{number:03}.jpg").write_bytes(picture(("red", "blue")[number % 2], number))
    return folder


@pytest.fixture
def computed(monkeypatch):
    "The names of the files that were given to a model."
    names, predict = [], Predictor.predict
    def counted(self, images):
        images = list(images)
        names.extend(f.name for f in images)
        return predict(self, images)
    monkeypatch.setattr(Predictor, "predict", counted)
    return names


DIES = """
import os, sys
from pathlib import Path
from nbs_lib.serving.batch import image_files, write_predictions
def tell(n):
    print(n, flush=True)
write_predictions(list(image_files([Path(sys.argv[1])])), Path(sys.argv[2]), on_rows=tell)
"""


@pytest.mark.faults
@pytest.mark.parametrize("name", ["said.parquet", "said.csv"])
def test_what_a_killed_process_computed_is_not_computed_again(production, photos, tmp_path, computed, name):
    out = tmp_path / name
    process = subprocess.Popen([sys.executable, "-c", DIES, photos, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n" and process.stdout.readline() == f"{BATCH}\n"
    process.send_signal(signal.SIGKILL)
    known = BATCH + sum(map(int, process.stdout.read().split()))
    process.wait()
    if known == 3 * BATCH: pytest.skip("it was faster than its murderer")
    assert not out.exists()
    said = write_predictions(list(image_files([photos])), out, settings=production[0])
    assert said["images"] == 3 * BATCH and len(computed) <= 3 * BATCH - known and computed == sorted(computed)
    again = write_predictions(list(image_files([photos])), tmp_path / f"whole {name}", settings=production[0])
    assert again["unreadable"] == 0 and out.read_bytes() == (tmp_path / f"whole {name}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if "said" in p.name) == [name, f"whole {name}"]


def broken_off(files: list[Path], out: Path, settings, after: int = 1) -> None:
    "A call that ends after so many batches."
    told = []
    def stop(n):
        told.append(n)
        if len(told) > after: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_predictions(files, out, settings=settings, on_rows=stop)


def test_what_changed_in_the_break_is_computed_again(production, photos, tmp_path, computed):
    settings, out = production[0], tmp_path / "said.parquet"
    (photos / "001.jpg").write_bytes(b"torn")
    broken_off(list(image_files([photos])), out, settings)
    computed.clear()
    (photos / "000.jpg").write_bytes(picture("green", 1))
    (photos / "0000.jpg").write_bytes(picture("green", 2))
    (photos / "001.jpg").write_bytes(picture("green", 3))
    (photos / "002.jpg").unlink()
    write_predictions(list(image_files([photos])), out, settings=settings)
    assert computed == ["000.jpg", "0000.jpg", "001.jpg", *(f"{n:03}.jpg" for n in range(BATCH, 3 * BATCH))]
    table = pd.read_parquet(out)
    assert [Path(p).name for p in table["path"]] == sorted(p.name for p in photos.iterdir())
    assert table["error"].isna().all()


def test_another_version_starts_anew(production, photos, tmp_path, computed):
    settings, out = production[0], tmp_path / "said.parquet"
    broken_off(list(image_files([photos])), out, settings)
    promote(production[1], NAME, "v1")
    computed.clear()
    write_predictions(list(image_files([photos])), out, settings=settings)
    assert len(computed) == 3 * BATCH and set(pd.read_parquet(out)["model"]) == {f"{NAME}:v1"}


def test_a_table_is_of_one_version_even_if_another_is_promoted_meanwhile(production, photos, tmp_path):
    def meddle(n): promote(production[1], NAME, "v1")
    write_predictions(list(image_files([photos])), tmp_path / "said.csv", settings=production[0], on_rows=meddle)
    assert set(pd.read_csv(tmp_path / "said.csv")["model"]) == {f"{NAME}:v0"}


def test_two_processes_do_not_write_one_table(production, photos, tmp_path):
    out, files = tmp_path / "said.parquet", list(image_files([photos]))
    def meanwhile(n):
        with pytest.raises(UserError, match="another process"): write_predictions(files, out, settings=production[0])
    write_predictions(files, out, settings=production[0], on_rows=meanwhile)
    assert len(pd.read_parquet(out)) == len(files)


FULL = """
import resource, signal, sys
from pathlib import Path
from nbs_lib.serving.batch import image_files, write_predictions
from nbs_lib.core.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
known, files = [], list(image_files([Path(sys.argv[1])]))
def tell(n):
    known.append(n)
    if sum(known) >= int(sys.argv[3]): resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try: write_predictions(files, Path(sys.argv[2]), on_rows=tell)
except UserError as error: print(error); sys.exit(2)
"""


@pytest.mark.parametrize("full_after", [BATCH, 3 * BATCH])   # while rows are kept, and when the table is written
def test_a_full_disk_is_told_in_one_line_and_loses_nothing(production, photos, tmp_path, computed, full_after):
    out = tmp_path / "said.csv"
    out.write_text("an older table")
    done = subprocess.run([sys.executable, "-c", FULL, photos, out, str(full_after)], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 2 and done.stdout.startswith(f"{out}: cannot be written")
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert out.read_text() == "an older table"
    report = write_predictions(list(image_files([photos])), out, settings=production[0])
    assert report["images"] == 3 * BATCH == len(pd.read_csv(out))
    assert len(computed) == 3 * BATCH - full_after


def test_a_damaged_file_of_rows_is_named(production, photos, tmp_path):
    (tmp_path / ".said.csv.part").write_bytes(b"no database" * 200)
    with pytest.raises(UserError, match=r"\.said\.csv\.part: damaged"):
        write_predictions(list(image_files([photos])), tmp_path / "said.csv", settings=production[0])


def test_paths_that_are_not_there_or_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"): list(image_files([tmp_path / "nowhere"]))
    (tmp_path / "closed").mkdir()
    def refuse(path): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(batch.os, "scandir", refuse)
    with pytest.raises(UserError, match="Permission denied"): list(image_files([tmp_path]))


def test_a_file_is_not_read_before_its_size_is_known(tmp_path, monkeypatch):
    big = tmp_path / "big.jpg"
    with open(big, "wb") as file: file.truncate(2_000_000)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    with pytest.raises(BadImage, match="2.0 MB, allowed are 1"): read_image(big, Data(max_file_mb=1))


def test_rows_are_what_the_model_says(production, photos, tmp_path):
    files = list(image_files([photos]))[:5]
    write_predictions(files, tmp_path / "said.parquet", settings=production[0])
    own = own_answers(production, "v0", [f.read_bytes() for f in files])
    for row, targets in zip(pd.read_parquet(tmp_path / "said.parquet").to_dict("records"), own, strict=True):
        for target, said in targets.items():
            assert row[f"{target}.class"] == next(iter(said))
            assert abs(row[f"{target}.probability"] - next(iter(said.values()))) < 0.03
        assert pd.isna(row["error"]) and row["model"] == f"{NAME}:v0"
