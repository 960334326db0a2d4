"""The download step: versions, lineage, the choice of the source, and the executed notebook."""
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings, use_recipe

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys
from nbs_lib.steps.download import update_dataset
from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings, use_recipe
from nbs_lib.tracking.tracker import open_tracker
import json
settings = load_settings()
tracker = open_tracker(settings)
out = []
for recipe, source, images in json.loads(sys.argv[1]):
    name, config = use_recipe(settings, recipe, images=images)
    with tracker.start("download", "download") as run:
        try: data, is_new = update_dataset(name, config, source, settings, tracker, run)
        except UserError as error: out.append(str(error)); continue
    facts = [data.card[key] for key in ("rows", "source", "parent")]
    out.append([data.ref, is_new, *facts, tracker.lineage(data.ref)["inputs"]])
print(json.dumps(out))
"""


def steps(*asked) -> list:
    "Updates one after the other, in a process of their own: Trackio keeps to the first home it sees."
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(asked)], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def png(n: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (10, 10), (n, 0, 200)).save(file, "PNG")
    return file.getvalue()


def photos(path: Path, numbers, extra=()) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for n in numbers: archive.writestr(f"{('cat', 'dog')[n % 2]}/{n}.png", png(n))
        for name in extra: archive.writestr(f"cat/{name}", b"no image")


@pytest.fixture
def pets(home):
    (home / "settings.ini").write_text("[tracking]\nbackend = trackio\n[recipe.pets]\nsource = pets.zip\n"
                                       "target = animal\n[recipe.hares]\nsource = nowhere\n")
    photos(home / "pets.zip", range(30))
    return home


def test_versions_and_their_sources(pets):
    photos(pets / "more.zip", range(20, 40))
    photos(pets / "broken.zip", range(100, 110), extra=("a.jpg", "b.jpg"))
    first, again, more, stays, broken, unknown = steps(
        ("pets", None, None), ("pets", None, None), ("pets", "more.zip", None), ("pets", None, None),
        ("pets", "broken.zip", None), ("hares", None, None))
    assert first == ["pets-dataset:v0", True, 30, "pets.zip", None, []]
    assert again == ["pets-dataset:v0", False, 30, "pets.zip", None, []]
    assert more == ["pets-dataset:v1", True, 40, "more.zip", "pets-dataset:v0", ["pets-dataset:v0"]]
    kept = ["pets-dataset:v1", False, 40, "more.zip"]
    assert stays[:4] == kept, "the source of the last version is the dataset's own"
    assert "2 of 12 files" in broken and "nowhere" in unknown
    assert not list((pets / "data").glob(".*-dataset.next"))
    photos(pets / "other.zip", range(60, 70))
    (pets / "settings.ini").write_text((pets / "settings.ini").read_text().replace("pets.zip", "other.zip"))
    changed = ["pets-dataset:v2", True, 50, "other.zip"]
    assert steps(("pets", None, None))[0][:4] == changed, "until settings.ini names another"


def test_a_version_that_failed_leaves_the_last_one(pets):
    assert steps(("pets", None, None))[0][0] == "pets-dataset:v0"
    (pets / "pets.zip").write_bytes((pets / "pets.zip").read_bytes()[:500])
    failed, = steps(("pets", None, None))
    assert "not a zip" in failed and steps(("pets", str(pets / "pets.zip"), None))[0] == failed


def test_executed_notebook(pets):
    import papermill
    (pets / "data").mkdir(exist_ok=True)
    photos(pets / "pets.zip", range(30), extra=())
    (pets / "settings.ini").write_text((pets / "settings.ini").read_text() + "[data]\nmax_bad = 0.2\n")
    photos(pets / "more.zip", range(30, 45), extra=("letter.jpg",))
    texts = []
    for source in (None, "more.zip", "more.zip"):
        book = papermill.execute_notebook(str(ROOT / "notebooks" / "10_download.ipynb"), str(pets / "out.ipynb"),
                                          {"recipe": "pets", "source": source},
                                          cwd=str(ROOT / "notebooks"), progress_bar=False, kernel_name="python3")
        outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
        texts.append("".join(str(o.get("data", "")) for o in outputs))
        assert sum("image/png" in o.get("data", {}) for o in outputs) == 2, "the balance and the samples"
    assert "is a new version of 30 images" in texts[0] and "no two contradicted" in texts[0]
    assert "is a new version of 45 images" in texts[1] and "cat/letter.jpg" in texts[1]
    assert "pets-dataset:v0" in texts[1]
    assert "Nothing is new in the source" in texts[2]


def test_settings_reach_the_recipe(pets):
    settings = load_settings(pets)
    with pytest.raises(UserError): use_recipe(settings, "pets", images=0)
    assert use_recipe(settings, "pets", images=5)[1].images == 5
