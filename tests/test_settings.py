"""Wrong settings are refused in one line that names the place, the value and what is allowed."""
import pytest

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings, use_recipe


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch):
    import os
    for name in [v for v in os.environ if v.startswith("LOOPBOOK_")]: monkeypatch.delenv(name)


@pytest.mark.parametrize(("text", "words"), [
    ("[train]\nepochs = ten", ("[train] epochs", "'ten'", "whole number")),
    ("[train]\nepochs = 0", ("[train] epochs", "'0'", "1")),
    ("[train]\nepoch = 3", ("[train] epoch", "did you mean 'epochs'")),
    ("[trains]\nepochs = 3", ("[trains]", "did you mean 'train'")),
    ("[tracking]\nbackend = mlflow", ("backend", "'mlflow'", "trackio")),
    ("[gate]\nmargin = nan", ("margin", "nan")),
    ("[recipe.Bad Name]\nsource = x", ("[recipe.Bad Name]", "small letters")),
    ("[recipe.birds]\nsorce = x", ("[recipe.birds] sorce", "did you mean 'source'")),
    ("[recipe.birds]\nsha256 = 12", ("sha256", "'12'")),
    ("[train]\nepochs = 3\nepochs = 4", ("settings.ini", "epochs")),
    ("epochs = 3", ("settings.ini",)),
    ("[train]\ndevice = cuda:x", ("device", "cuda:x")),
])
def test_wrong_settings(tmp_path, text, words):
    (tmp_path / "settings.ini").write_text(text)
    with pytest.raises(UserError) as error: load_settings(tmp_path)
    assert all(word in str(error.value) for word in (*words, "settings.ini")) and "\n" not in str(error.value)


def test_not_a_text_file(tmp_path):
    (tmp_path / "settings.ini").write_bytes(b"\xff\xfe\x00[train]")
    with pytest.raises(UserError, match="settings.ini"): load_settings(tmp_path)


def test_environment_over_file_and_parameters_over_both(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[train]\nepochs = 3\nseed = 1\n[recipe.faces]\nimages = 10\nseed = 2")
    monkeypatch.setenv("LOOPBOOK_RECIPE_FACES__IMAGES", "20")
    monkeypatch.setenv("LOOPBOOK_TRAIN__EPOCHS", "4")
    _, faces = use_recipe(load_settings(tmp_path), "faces")
    assert (faces.images, faces.epochs, faces.seed) == (20, 4, 2)
    _, faces = use_recipe(load_settings(tmp_path), "faces", images=30, seed=0, epochs=None)
    assert (faces.images, faces.epochs, faces.seed) == (30, 4, 0)


@pytest.mark.parametrize(("name", "value", "words"), [
    ("LOOPBOOK_TRAIN__EPOCHS", "many", ("LOOPBOOK_TRAIN__EPOCHS", "'many'", "whole number")),
    ("LOOPBOOK_TRAIN__EPOCH", "1", ("LOOPBOOK_TRAIN__EPOCH", "did you mean 'epochs'")),
    ("LOOPBOOK_TRIAN__EPOCHS", "1", ("LOOPBOOK_TRIAN__EPOCHS", "section")),
])
def test_wrong_environment(tmp_path, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error: load_settings(tmp_path)
    assert all(word in str(error.value) for word in words)


def test_wrong_recipe_and_parameter(tmp_path):
    settings = load_settings(tmp_path)
    with pytest.raises(UserError, match="did you mean 'faces'"): use_recipe(settings, "face")
    with pytest.raises(UserError, match="parameter mode = 'heads'"): use_recipe(settings, "faces", mode="heads")


def test_a_file_with_a_byte_order_mark_and_empty_values(tmp_path):
    (tmp_path / "settings.ini").write_bytes("\ufeff[train]\nimage_size =\n[recipe.faces]\nimages =\n".encode())
    assert load_settings(tmp_path).recipes["faces"].images is None
