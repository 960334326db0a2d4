"""What the labeller does with what is pressed, without a browser."""
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import picture, small_dataset

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings
from nbs_lib.labelling.browser import Keyboard
from nbs_lib.labelling.labeller import Labeller
from nbs_lib.tracking.tracker import open_tracker

BIN = Path(sys.executable).parent


def forget_trackio() -> None:
    "It stores in one folder a process."
    for name in [m for m in list(sys.modules) if m.partition(".")[0] == "trackio"]: del sys.modules[name]


@pytest.fixture(scope="module")
def with_dataset(tmp_path_factory) -> Path:
    "A home whose recipe has a dataset of red and blue pictures, and no model."
    home = tmp_path_factory.mktemp("labeller")
    (home / "settings.ini").write_text("[project]\nrecipe = colours\n[tracking]\nbackend = trackio\n"
                                       "[recipe.colours]\nsource = nowhere\ntarget = colour\n")
    forget_trackio()
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("LOOPBOOK_", "WANDB_", "TRACKIO_"))]: patch.delenv(name)
        with open_tracker(load_settings(home)).start("dataset", "download") as run:
            run.log_artifact("colours-dataset", "dataset", small_dataset(home / "dataset").folder)
        yield home
    forget_trackio()


@pytest.fixture
def pets(home, with_dataset, monkeypatch) -> Path:
    "That home, with nothing in the feedback store."
    monkeypatch.setenv("LOOPBOOK_HOME", str(with_dataset))
    shutil.rmtree(with_dataset / "data" / "feedback", ignore_errors=True)
    return with_dataset


def said(p: float = 0.9, **more) -> dict:
    return {"model": "colours-model:v0", "targets": {"colour": {"red": p, "blue": 1 - p}} | more}


def labeller(*photos: tuple[int, dict | None], user: str = "ann") -> Labeller:
    "A labeller that has been greeted, after `photos` (seed, prediction) were added."
    made = Labeller(user=user)
    for seed, prediction in photos: made.store.add(picture("red", seed), f"{seed}.jpg", "camera", prediction)
    made._press("hello")
    return made


def test_a_headless_run_holds_nothing_back(pets):
    ann = Labeller(user="ann")
    ann.store.add(picture("red", 1), "1.jpg", "camera")
    assert ann.store.queue("bob", 9) and ann.questions is None
    ann._press("1")
    ann._press("Enter")
    assert not len(ann.store.history())


def test_no_model_yet(pets):
    ann = labeller((1, None), (2, None), (3, None))
    assert "No model" in ann.model.value
    assert [b.description for b in ann.targets[0].buttons[:2]] == ["1   blue", "2   red"]
    ann._press("Enter")
    assert "pick a class" in ann.status.value and ann.status.bad and not len(ann.store.history())
    ann._press("7")
    assert "no class with the key 7" in ann.status.value
    ann._press("2")
    assert ann.status.value.endswith("is red") and not ann.status.bad
    assert list(ann.store.history()["verdict"]) == ["corrected"]
    ann._press("switch")
    assert not ann.many and ann.question, "nothing can be confirmed in a grid where no model has said anything"


def test_verdicts(pets):
    ann = labeller(*((n, said()) for n in range(4)))
    for what, text in (("Enter", ""), ("1", ""), ("new", " fox "), ("?", "")): ann._press(what, text)
    history = ann.store.history()
    assert list(history["verdict"]) == ["confirmed", "corrected", "new", "unknown"]
    assert list(history["model"]) == ["colours-model:v0"] * 4
    assert history["labels"].tolist() == [{"colour": "red"}, {"colour": "blue"}, {"colour": "fox"}, {}]
    ann._press("1")
    assert len(ann.store.history()) == 4, "nothing is on screen, so nothing is answered"
    assert ann.parts["empty"].layout.display is None
    for _ in range(5): ann._press("Backspace")
    assert ann.status.value == "There is nothing to take back" and ann.done == 0 and ann.left == 4
    assert not len(ann.store.standing())
    assert ann.targets[0].shown == ["blue", "red", "fox"], "a class that was typed stays on offer"
    assert Labeller(user="bob").store.stats()["waiting"] == 4


def test_an_old_token_answers_nothing(pets):
    ann = labeller(*((n, said()) for n in range(3)))
    token = ann.keyboard.token
    for _ in range(3): ann.keyboard._receive(None, {"press": "Enter", "token": token}, [])
    for wrong in ({}, {"press": "Enter"}, {"press": "Enter", "token": "x"}, {"press": None, "token": token + 1}):
        ann.keyboard._receive(None, wrong, [])
    assert len(ann.store.history()) == 1


@pytest.mark.parametrize("what", ["pick-0-8", "pick-9-0", "pick-x-y", "pick", "tile-99", "__init__", "name", "begin",
                                  "-", "0", "new", "first", "order"])
def test_strange_messages_change_nothing(pets, what):
    ann = labeller((1, said()), (2, said()))
    ann._press(what, "\x00" * 200)
    assert not len(ann.store.history()) and ann.question and ann.user == "ann"


def test_a_web_page_gets_no_folder_of_the_server(pets, monkeypatch):
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5")
    monkeypatch.setenv("QUERY_STRING", "token=t&user=J%C3%BCrgen")
    page = labeller(user=None)
    assert page.user == "Jürgen" and page.folder is None
    page._press("folder", str(pets))
    assert "cannot be added from here" in page.status.value and not page.store.stats()["images"]
    monkeypatch.setenv("QUERY_STRING", "user=a/b")
    page = labeller(user=None)
    assert "path" in page.status.value and page.parts["start"].layout.display is None and not page.questions
    page._press("name", " Eve ")
    assert page.user == "Eve" and page.questions


def test_a_folder_is_added(pets):
    photos = pets / "photos"
    photos.mkdir()
    for n in range(3): (photos / f"{n}.jpg").write_bytes(picture("red", n))
    ann = labeller()
    for path, word in (("", "Give the path"), ("nowhere", "no such"), (str(photos), "Added: 3 new, 0 known"),
                       (str(photos), "Added: 0 new, 3 known")):
        ann._press("folder", path)
        assert word in ann.status.value
    assert ann.question and ann.left == 3


def test_a_full_disk_moves_nothing_on(pets, monkeypatch):
    ann = labeller(*((n, said()) for n in range(3)))
    shown = ann.question
    def full(*_, **__): raise UserError("the disk is full; this was not saved")
    with monkeypatch.context() as patch:
        patch.setattr(ann.store, "answer", full)
        ann._press("Enter")
        assert ann.question is shown and ann.status.value == "the disk is full; this was not saved"
        assert ann.status.bad and ann.done == 0
        def full_for_photos(*_): raise OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(ann.store, "add", full_for_photos)
        ann._photo("a.jpg", picture("red", 9), 1, 1)
        assert "a.jpg was not added" in ann.status.value
    ann._press("Enter")
    assert ann.question is not shown and len(ann.store.history()) == 1


def test_a_photo_that_is_gone_is_told_and_passed_over(pets):
    ann = Labeller(user="ann")
    ids = [ann.store.add(picture("red", n), f"{n}.jpg", "camera", said(0.5 + n / 10))[0] for n in range(3)]
    (ann.store.folder / "images" / ids[0][:2] / ids[0]).unlink()
    seen = []
    ann._press("hello")
    while ann.question:
        seen.append(ann.question.item.name)
        if "0.jpg cannot be shown" in ann.status.value: seen.append("told")
        ann._press("Enter")
    assert sorted(set(seen) - {"told"}) == ["1.jpg", "2.jpg"]
    assert "told" in seen or "0.jpg cannot be shown" in ann.status.value


def test_people_answer_without_a_model_that_fails(pets, monkeypatch):
    def fails(*_): raise UserError("model.json is damaged")
    monkeypatch.setattr("nbs_lib.labelling.questions.Production.predict", fails)
    ann = labeller((1, None), (2, said()))
    assert "has no prediction: model.json is damaged" in ann.status.value and ann.status.bad
    for _ in range(2): ann._press("1")
    assert len(ann.store.standing()) == 2


def test_several_targets_side_by_side(pets, monkeypatch):
    size = {"size": {"big": 0.7, "small": 0.3}}
    from nbs_lib.data.dataset import Dataset
    monkeypatch.setattr(Dataset, "targets", property(lambda _: {"colour": ["blue", "red"], "size": ["big", "small"]}))
    monkeypatch.setattr("nbs_lib.labelling.questions._Examples.of", lambda *_: {})
    ann = labeller(*((n, said(**size)) for n in range(4)))
    assert [t.name for t in ann.targets] == ["colour", "size"] and ann.right.description.startswith("Right")
    ann._press("Enter")
    ann._press("1")
    assert ann.active == 1 and ann.right.description.startswith("Save")
    assert len(ann.store.history()) == 1, "marked, not said"
    assert [b.description[:3] for b in ann.targets[0].buttons[:2]] == ["blu", "red"]
    assert ann.targets[1].buttons[1].description == "2   small", "the keys are for the active target"
    ann._press("2")
    ann._press("Enter")
    ann._press("ArrowLeft")
    assert ann.active == 1
    ann._press("ArrowRight")
    ann._press("pick-1-1")
    ann._press("Enter")
    ann._press("?")
    assert ann.store.history()["labels"].tolist() == [
        {"colour": "red", "size": "big"}, {"colour": "blue", "size": "small"}, {"colour": "red", "size": "small"}, {}]
    assert list(ann.store.history()["verdict"]) == ["confirmed", "corrected", "corrected", "unknown"]


def test_many_classes_are_found_by_typing(pets, monkeypatch):
    birds = [f"Finch {n}" for n in range(500)] + ["Barn Owl", "Owl"]
    from nbs_lib.data.dataset import Dataset
    monkeypatch.setattr(Dataset, "targets", property(lambda _: {"colour": birds}))
    monkeypatch.setattr("nbs_lib.labelling.questions._Examples.of", lambda *_: {})
    owl = {"model": "colours-model:v0", "targets": {"colour": {"Finch 7": 0.6, "Barn Owl": 0.4}}}
    ann = labeller(*((n, owl) for n in range(3)))
    assert ann.targets[0].shown[:3] == ["Finch 7", "Barn Owl", "Finch 0"] and ann.filter.layout.display is None
    ann.filter.value = "OWL"
    assert ann.targets[0].shown == ["Owl", "Barn Owl"]
    ann._press("first", "owl")
    assert ann.status.value.endswith("is Owl") and ann.filter.value == "" and len(ann.targets[0].shown) == 9
    ann._press("first", "pigeon")
    assert "No class matches" in ann.status.value
    ann._press("2")
    assert ann.status.value.endswith("is Barn Owl")


def test_the_grid(pets):
    ann = labeller(*((n, said(0.5 + n / 100)) for n in range(30)), (99, None))
    ann._press("switch")
    doubts = [q.doubt for q in ann.grid.questions]
    assert len(doubts) == 24 and doubts == sorted(doubts, reverse=True)
    first = ann.grid.questions[0].item.name
    for tile in ("tile-0", "tile-5", "tile-5"): ann._press(tile)
    ann._press("3")
    assert ann.right.description.startswith("All 23 are right") and not len(ann.store.history())
    ann._press("Enter")
    assert ann.done == 23 and len(ann.grid.questions) == 6 and set(ann.store.history()["verdict"]) == {"confirmed"}
    ann._press("Backspace")
    assert ann.done == 0 and len(ann.grid.questions) == 24
    for _ in range(2): ann._press("Enter")
    asked = {ann.question.item.name} | {q.item.name for q in ann.questions._front}
    assert not ann.many and asked == {first, "99.jpg"}, "what was struck out is asked at the end, one at a time"
    ann._press("2")
    ann._press("2")
    assert len(ann.store.standing()) == 31 and ann.question is None


def test_half_a_page_saved_is_half_a_page(pets, monkeypatch):
    ann = labeller(*((n, said()) for n in range(10)))
    ann._press("switch")
    answer, count = ann.store.answer, []
    def four(*args, **words):
        count.append(1)
        if len(count) > 4: raise UserError("the disk is full")
        return answer(*args, **words)
    monkeypatch.setattr(ann.store, "answer", four)
    ann._press("Enter")
    assert ann.status.value == "the disk is full" and ann.done == 4 and len(ann.grid.questions) == 6
    count.clear()
    ann._press("Backspace")
    assert ann.done == 0 and len(ann.grid.questions) == 10 and not len(ann.store.standing())


def test_orders(pets):
    ann, bob = labeller((1, said()), (2, said()), (3, said())), labeller(user="bob")
    assert bob.question is None, "ann has them"
    for label in "122": ann._press(label)
    ann.order.value = "unknown"
    assert ann.question is None
    for row in ann.store.standing().itertuples(): ann.store.answer(row.id, "bob", "corrected", {"colour": "blue"})
    ann.order.value = "review"
    assert "ann says red" in ann.caption.value and "bob says blue" in ann.caption.value and ann.left == 2
    ann._press("1")
    assert ann.left == 1 and ann.store.history()["review"].tolist()[-1]
    ann.order.value = "doubt"
    bob._press("next")
    assert bob.question is None and ann.question is None
    bob.order.value = "review"
    assert bob.question, "what was given back by a change of order is there for others"
    old = ann.store.history()["id"][0]
    ann.store.suspects([(old, {"given": {"colour": "red"}, "suggested": {"colour": "blue"}, "score": 0.02})])
    ann.order.value = "suspects"
    assert "the dataset says red, should it be blue?" in ann.caption.value
    assert ann.right.description.startswith("Right: blue")
    ann._press("Enter")
    assert ann.status.value.endswith("is blue") and ann.question is None


def test_two_pages_of_one_person_and_many_threads(pets):
    photos = [(n, said(0.5 + n / 100)) for n in range(40)]
    one, two = labeller(*photos), labeller(user="bob")
    while one.question or two.question:
        for page in (one, two): page._press("Enter")
        for page in (one, two):
            if not page.question: page._press("next")
    standing = one.store.standing()
    assert len(standing) == 40 and (standing["status"] == "agreed").all()
    assert one.done + two.done == 40 and min(one.done, two.done) > 5


def test_examples_of_the_classes(pets):
    ann = labeller((1, said()))
    assert set(ann.question.examples) == {("colour", "red"), ("colour", "blue")}
    assert all(e.startswith(b"\xff\xd8") for e in ann.question.examples.values())
    assert all(s.value in ann.question.examples.values() for s in ann.targets[0].strips[:2])


def test_a_photo_in_pieces(pets):
    files = []
    keyboard = Keyboard(lambda *_: None, lambda *file: files.append(file), max_upload_mb=3)
    data = os.urandom(2_500_000)
    pieces = [data[i:i + 2**20] for i in range(0, len(data), 2**20)]
    for n, piece in enumerate(pieces):
        message = {"file": "a.jpg", "size": len(data), "start": n * 2**20, "n": 1, "of": 1}
        keyboard._receive(None, message, [memoryview(piece)])
    assert files == [("a.jpg", data, 1, 1)]
    keyboard._receive(None, {"file": "lies.jpg", "size": 10, "start": 0, "n": 1, "of": 1}, [bytes(4_000_000)])
    assert files[-1] == ("lies.jpg", None, 1, 1)
    keyboard._receive(None, {"file": "empty.jpg", "size": 0, "start": 0, "n": 1, "of": 1}, [b""])
    assert files[-1] == ("empty.jpg", b"", 1, 1)


def test_the_notebook_reports_headlessly(pets):
    ann = labeller((1, said()), (2, said()))
    ann._press("1")
    ann.questions.release()
    done = subprocess.run([BIN / "loopbook", "run", "feedback", "--json"], capture_output=True, text=True, timeout=200,
                          cwd=pets)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (Path(json.loads(done.stdout)["folder"]) / "feedback.html").read_text()
    assert "What has been said so far" in report and "blue 1" in report and ann.status.value.split()[1] in report
    assert len(ann.store.queue("bob", 9)) == 1


@pytest.mark.parametrize(("words", "env", "message"), [
    (["--host", "0.0.0.0", "--no-token"], {}, "would let in the whole network"),
    (["--host", "192.0.2.1"], {}, "--port"), (["--recipe", "nothing"], {}, "recipe 'nothing'"),
    ([], {"LOOPBOOK_LABEL_TOKEN": "a token&"}, "letters, digits")])
def test_label_refuses_in_one_line(pets, words, env, message):
    done = subprocess.run([BIN / "loopbook", "label", "--port", "0", *words], capture_output=True, text=True,
                          timeout=60, env=os.environ | env)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
