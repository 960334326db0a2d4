"""The store keeps every word: several people at once, killed processes, full disks, clicks that arrive twice."""
import hashlib
import io
import random
import resource
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nbs_lib import feedback_store
from nbs_lib.answers import check_label, check_user, verdict_of
from nbs_lib.feedback_store import Store
from nbs_lib.images import BadImage
from nbs_lib.settings import UserError, load_settings

ROOT = Path(__file__).resolve().parent.parent


def png(n: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (size, size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def said(p: float, model: str = "pets-model:v3") -> dict: return {"model": model, "targets": {"animal": {"cat": p, "dog": 1 - p}}}


@pytest.fixture
def store(home): return Store("faces", load_settings(home))


@pytest.fixture
def clock(monkeypatch):
    "The store's time, which stands still until it is set."
    now = SimpleNamespace(now=1_800_000_000.0)
    monkeypatch.setattr(feedback_store, "time", SimpleNamespace(time=lambda: now.now))
    return now


def fill(store: Store, n: int) -> list[str]:
    "`n` images, the first one the most doubtful."
    return [store.add(png(i), f"{i}.png", "camera", said(0.5 + i / (2 * n)))[0] for i in range(n)]


def statuses(store: Store) -> dict: return dict(zip(store.standing()["id"], store.standing()["status"], strict=True))


# ---- what is said

@pytest.mark.parametrize(("text", "words"), [
    ("", "empty"), ("  ", "empty"), ("a/b", "path"), ("a\\b", "path"), ("..", "path"), ("a\nb", "control"), ("a\x00b", "control"), ("\x1b[31mred", "control"),
    ("a\u202eb", "invisible"), ("a\u200bb", "invisible"), ("x" * 101, "101 characters")])
def test_bad_labels_and_users(store, text, words):
    [id] = fill(store, 1)
    for call in (lambda: check_label(text), lambda: store.answer(id, "ann", "corrected", {"animal": text}), lambda: store.answer(id, "ann", "corrected", {text: "cat"})):
        with pytest.raises(UserError, match=words) as error: call()
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    for call in (lambda: check_user(text), lambda: store.answer(id, text, "unknown"), lambda: store.queue(text, 1), lambda: store.add(png(1), "a", text)):
        with pytest.raises(UserError): call()
    assert len(store.history()) == 0 and store.stats()["images"] == 1


def test_a_label_of_any_script_is_kept_as_it_is(store):
    [id] = fill(store, 1)
    store.answer(id, " Jürgen ", "new", {"animal": " Köter, 犬 <b>\"'%_;-- "})
    assert store.standing()["labels"][0] == {"animal": "Köter, 犬 <b>\"'%_;--"} and store.standing()["users"][0] == ["Jürgen"]


def test_the_verdict_follows_from_the_label():
    classes = {"beard": ["yes", "no"], "hair": ["black"]}
    model = {"targets": {"beard": {"yes": 0.9, "no": 0.1}, "hair": {"black": 1.0}}}
    assert [verdict_of(labels, model, classes) for labels in ({"beard": "yes"}, {"beard": "yes", "hair": "black"}, {"beard": "no", "hair": "black"}, {"hair": "red"})] == \
        ["confirmed", "confirmed", "corrected", "new"]
    assert verdict_of({"beard": "yes"}, None, classes) == "corrected" and verdict_of({"beard": "yes"}, None, {"beard": []}) == "new"


def test_history_has_a_row_for_each_word_with_what_the_user_saw(store):
    [id] = fill(store, 1)
    store.answer(id, "ann", "confirmed")
    store.predict(id, said(0.2, "pets-model:v4"))
    store.answer(id, "ann", "confirmed", {"animal": "dog"})
    store.answer(id, "ann", "corrected", {"animal": "cat"}, said(0.1, "pets-model:v5"))
    history = store.history()
    assert history["model"].tolist() == ["pets-model:v3", "pets-model:v4", "pets-model:v5"] and history["labels"].tolist() == [{"animal": c} for c in ("cat", "dog", "cat")]
    assert history["prediction"][0]["targets"]["animal"]["cat"] == 0.5 and history["seq"].tolist() == [1, 2, 3] and not history["review"].any()
    assert statuses(store) == {id: "agreed"} and store.standing()["model"][0] == "pets-model:v5"


def test_history_cannot_be_changed(store):
    [id] = fill(store, 1)
    store.answer(id, "ann", "confirmed")
    with sqlite3.connect(store.file) as db:
        for change in ("update history set user = 'bob'", "delete from history"):
            with pytest.raises(sqlite3.DatabaseError): db.execute(change)
    assert store.history()["user"].tolist() == ["ann"]


def test_an_answer_needs_an_image_a_verdict_and_a_class(store):
    [id] = fill(store, 1)
    with pytest.raises(KeyError): store.answer("0" * 64, "ann", "unknown")
    with pytest.raises(ValueError, match="maybe"): store.answer(id, "ann", "maybe")
    with pytest.raises(UserError, match="0.png"): store.answer(id, "ann", "corrected")
    blank = store.add(png(9), "blank.png", "camera")[0]
    with pytest.raises(UserError, match="blank.png"): store.answer(blank, "ann", "confirmed")
    with pytest.raises(KeyError): store.image("../../settings.ini")
    assert len(store.history()) == 0


def test_a_click_that_arrives_twice(store):
    first, second = fill(store, 2)
    seq = store.answer(first, "ann", "confirmed", key="click")
    assert store.answer(first, "ann", "confirmed", key="click") == seq == Store("faces", store.settings).answer(first, "ann", "confirmed", key="click")
    store.undo("ann")
    assert store.answer(first, "ann", "confirmed", key="click") == seq and store.standing().empty   # late, and still the same click
    with pytest.raises(ValueError, match="click"): store.answer(second, "ann", "confirmed", key="click")
    assert store.history()["verdict"].tolist() == ["confirmed", "undone"]


# ---- what stands

def test_people_differ_until_a_reviewer_decides(store):
    [id] = fill(store, 1)
    def words(*rows):
        for user, label in rows: store.answer(id, user, "corrected", {"animal": label}, review=user == "expert")
        stands = store.standing().iloc[0]
        return stands["status"], stands["labels"], stands["users"]
    assert words(("ann", "dog"), ("bob", "dog")) == ("agreed", {"animal": "dog"}, ["ann", "bob"])
    assert words(("ann", "cat")) == ("disputed", {}, ["bob", "ann"])
    assert [q.said for q in store.queue("ann", 9, "review")] == [{"bob": {"animal": "dog"}, "ann": {"animal": "cat"}}]
    assert words(("expert", "cat")) == ("agreed", {"animal": "cat"}, ["expert"]) and store.queue("ann", 9, "review") == []
    assert words(("bob", "dog")) == ("disputed", {}, ["expert", "bob"])               # said after the review
    assert words(("bob", "cat")) == ("agreed", {"animal": "cat"}, ["expert", "bob"])


def test_targets_are_judged_one_by_one(store):
    [id] = fill(store, 1)
    store.answer(id, "ann", "corrected", {"beard": "yes", "hair": "black"})
    store.answer(id, "bob", "corrected", {"hair": "red"})
    assert (statuses(store)[id], store.standing()["labels"][0]) == ("disputed", {"beard": "yes"})
    store.answer(id, "expert", "corrected", {"hair": "red"}, review=True)
    stands = store.standing().iloc[0]
    assert (stands["status"], stands["labels"], stands["users"]) == ("agreed", {"beard": "yes", "hair": "red"}, ["ann", "expert"])


def test_unknown_is_parked_for_an_expert(store):
    first, second = fill(store, 2)
    for id in (first, second): store.answer(id, "ann", "unknown")
    assert set(statuses(store).values()) == {"unknown"} and store.queue("bob", 9) == [] and store.left() == 0
    assert {q.id for q in store.queue("expert", 9, "unknown")} == {first, second}
    store.answer(first, "expert", "corrected", {"animal": "dog"})
    store.answer(second, "expert", "unknown", review=True)
    assert statuses(store) == {first: "agreed", second: "unknown"} and store.queue("expert", 9, "unknown") == []
    assert [q.id for q in store.queue("another expert", 9, "unknown")] == [second]
    store.answer(first, "expert", "unknown")                                          # takes back the class
    assert statuses(store)[first] == "unknown"


# ---- undo

def test_undo_of_any_depth(store):
    ids = fill(store, 5)
    for id in ids: store.answer(id, "ann", "confirmed")
    store.answer(ids[0], "bob", "corrected", {"animal": "dog"})
    assert [store.undo("ann") for _ in range(6)] == [*reversed(ids), None]
    assert statuses(store) == {ids[0]: "agreed"} and store.standing()["users"][0] == ["bob"] and len(store.history()) == 11
    assert [q.id for q in store.queue("ann", 9)] == ids[1:] and store.queue("bob", 9) == []   # they came back to ann
    store.answer(ids[4], "ann", "unknown")
    assert store.undo("ann") == ids[4] and store.undo("ann") is None and store.undo("nobody") is None


def test_undo_brings_the_word_before_it_back(store):
    [id] = fill(store, 1)
    store.answer(id, "ann", "confirmed")
    store.answer(id, "ann", "corrected", {"animal": "dog"})
    store.undo("ann")
    assert store.standing()["labels"][0] == {"animal": "cat"}
    store.answer(id, "bob", "corrected", {"animal": "dog"})
    store.answer(id, "expert", "corrected", {"animal": "dog"}, review=True)
    store.undo("expert")
    assert statuses(store) == {id: "disputed"} and store.left("review") == 1


# ---- queues and leases

def test_nobody_gets_what_another_holds(store, clock):
    fill(store, 10)
    ann, bob = ({q.id for q in store.queue(user, 4)} for user in ("ann", "bob"))
    assert len(ann) == len(bob) == 4 and not ann & bob
    assert {q.id for q in store.queue("ann", 4)} == ann and len(store.queue("carl", 9)) == 2 and store.queue("dora", 1) == []
    store.release("bob", list(bob)[:1])
    assert [q.id for q in store.queue("dora", 9)] == list(bob)[:1]
    store.release("ann", bob)                                                         # not hers to give
    assert store.queue("emil", 9) == []
    store.release("ann")
    assert {q.id for q in store.queue("emil", 9)} == ann


def test_a_lease_lasts_ten_minutes_from_the_last_look(store, clock):
    [id] = fill(store, 1)
    assert store.queue("ann", 1)
    clock.now += 599
    assert store.queue("bob", 1) == [] and store.queue("ann", 1)                      # she looks again
    clock.now += 599
    assert store.queue("bob", 1) == []
    clock.now += 2
    assert [q.id for q in store.queue("bob", 1)] == [id] and store.queue("ann", 1) == []
    store.answer(id, "ann", "confirmed")                                              # too late for the lease, and still kept
    assert statuses(store) == {id: "agreed"} and store.queue("carl", 1) == []


def test_the_lease_is_a_setting(home, monkeypatch, clock):
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__LEASE_MINUTES", "1")
    store = Store("faces")
    fill(store, 1)
    store.queue("ann", 1)
    clock.now += 61
    assert store.queue("bob", 1)


def test_most_doubtful_first_and_some_at_random(home, monkeypatch):
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__RANDOM_SHARE", "0")
    store = Store("faces")
    ids = fill(store, 20)
    unseen = store.add(png(99), "unseen.png", "camera")[0]
    assert [q.id for q in store.queue("ann", 21)] == [unseen, *ids]                   # what the model has not seen is all doubt
    store.release("ann")
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__RANDOM_SHARE", "0.1")
    store, drawn = Store("faces"), 0
    random.seed(0)
    for _ in range(100):
        queue = [q.id for q in store.queue("ann", 5)]
        assert len(set(queue)) == 5
        drawn += len(set(queue) - {unseen, *ids[:4]})
        store.release("ann")
    assert 20 < drawn < 60                                                            # of 500: 50, less those that would have come anyway


def test_newest_first_and_a_new_prediction_changes_the_doubt(home, monkeypatch):
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__RANDOM_SHARE", "0")
    store = Store("faces")
    ids = fill(store, 4)
    assert [q.id for q in store.queue("ann", 2, "newest")] == [ids[3], ids[2]]
    store.release("ann")
    store.predict(ids[3], said(0.5))
    store.predict(ids[0], said(0.99))
    assert [q.id for q in store.queue("ann", 4)] == [ids[3], ids[1], ids[2], ids[0]]
    assert store.item(ids[0]).prediction == said(0.99)


def test_suspects_get_a_second_look_once(store):
    ids = fill(store, 3)
    store.answer(ids[2], "ann", "confirmed")
    rows = [(ids[2], {"given": "cat", "suggested": "dog", "score": 0.01}), (ids[0], {"given": "cat", "suggested": "dog", "score": 0.2})]
    store.suspects(rows)
    assert [q.id for q in store.queue("bob", 9)] == [ids[1]] and store.left("suspects") == 2
    assert [(q.id, q.suspect["score"]) for q in store.queue("ann", 9, "suspects")] == [(ids[2], 0.01), (ids[0], 0.2)]
    assert statuses(store) == {ids[2]: "agreed"}                                      # what was said before still stands
    store.answer(ids[2], "ann", "confirmed")
    store.suspects(rows)
    assert [q.id for q in store.queue("ann", 9, "suspects")] == [ids[0]]
    store.suspects([(ids[2], {"given": "dog", "suggested": "cat", "score": 0.3})])    # another label is another question
    assert store.left("suspects") == 2
    with pytest.raises(KeyError): store.suspects([("0" * 64, {"given": "cat", "suggested": "dog", "score": 0})])


# ---- images

def test_the_same_image_sent_twice_is_one_item(store):
    assert [store.add(png(1), name, user)[1] for name, user in (("a.png", "ann"), ("b.png", "bob"))] == [True, False]
    [id] = fill(store, 2)[1:]
    assert store.stats()["images"] == 2 and store.image(id) == png(1) and store.item(id).name == "a.png"
    assert {p.name for p in store.folder.rglob("*") if p.is_file() and len(p.name) == 64} == {hashlib.sha256(png(n)).hexdigest() for n in (0, 1)}


def test_what_is_no_image_or_too_large_is_not_let_in(home, monkeypatch):
    monkeypatch.setenv("LOOPBOOK_FEEDBACK__MAX_UPLOAD_MB", "0.001")
    monkeypatch.setenv("LOOPBOOK_DATA__MAX_MEGAPIXELS", "0.0001")
    store = Store("faces")
    for data in (b"", b"text", png(0)[:60]):
        with pytest.raises(BadImage): store.add(data, "a.png", "ann")
    bomb = io.BytesIO()
    Image.new("1", (11, 11)).save(bomb, "PNG")
    with pytest.raises(BadImage, match="megapixels"): store.add(bomb.getvalue(), "bomb.png", "ann")
    with pytest.raises(UserError, match="max_upload_mb"): store.add(png(0, 64), "large.png", "ann")
    assert store.stats()["images"] == 0 and not list(store.folder.glob(".staging-*")) and not (store.folder / "images").exists()


def test_names_of_files_are_shown_without_control_characters(store):
    id, _ = store.add(png(0), "\x1b[31m" + "x" * 300 + "\n.png", "ann")
    assert store.item(id).name.isprintable() and len(store.item(id).name) <= 200


def test_an_image_that_somebody_deleted_is_told_and_can_be_sent_again(store):
    [id] = fill(store, 1)
    store._path(id).unlink()
    with pytest.raises(UserError, match="No such file"): store.image(id)
    assert store.add(png(0), "again.png", "ann") == (id, False) and store.image(id) == png(0)


# ---- the file

def test_a_store_of_a_newer_version_is_left_alone(store):
    fill(store, 1)
    with sqlite3.connect(store.file) as db: db.execute("pragma user_version = 99")
    before = store.file.read_bytes()
    with pytest.raises(UserError, match="newer Loopbook .format 99.*update"): Store("faces", store.settings)
    assert store.file.read_bytes() == before


def test_a_file_that_is_no_store(home):
    folder = home / "data" / "feedback" / "faces"
    folder.mkdir(parents=True)
    (folder / "feedback.sqlite").write_text("not a database at all, but long enough to have a header of one hundred bytes, which is looked at " * 3)
    with pytest.raises(UserError, match="not a database"): Store("faces")
    assert (folder / "feedback.sqlite").read_text().startswith("not a database")


def test_full_sync_and_write_ahead_log(store):
    db = store._db()
    assert db.execute("pragma journal_mode").fetchone()[0] == "wal" and db.execute("pragma synchronous").fetchone()[0] == 2


def test_stats_count_what_stands(store):
    ids = fill(store, 6)
    for id in ids[:3]: store.answer(id, "ann", "confirmed")
    store.answer(ids[2], "bob", "corrected", {"animal": "dog"})
    store.answer(ids[3], "bob", "unknown")
    store.answer(ids[4], "bob", "new", {"animal": "fox"})
    store.undo("bob")
    assert store.stats() == {"recipe": "faces", "images": 6, "waiting": 2, "answered": 4, "agreed": 2, "disputed": 1, "unknown": 1, "suspects": 0,
                             "verdicts": {"confirmed": 3, "corrected": 1, "new": 0, "unknown": 1}, "users": {"ann": 3, "bob": 2}, "targets": {"animal": {"cat": 2}}}


# ---- several at once

def test_threads_share_a_store(store):
    pictures, out = [png(n) for n in range(12)], []
    def work(user):
        for data in pictures: store.add(data, "a.png", user)
        while queue := store.queue(user, 3):
            for q in queue: out.append((store.answer(q.id, user, "corrected", {"animal": "cat"}, key=f"{user} {q.id}"), q.id))
    with ThreadPoolExecutor(6) as pool: list(pool.map(work, [f"user {n}" for n in range(6)]))
    assert len(out) == 12 and len({id for _, id in out}) == 12 and sorted(store.history()["seq"]) == sorted(seq for seq, _ in out)


LABELLER = """
import sys
from nbs_lib.feedback_store import Store
store, user = Store("faces"), sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
while queue := store.queue(user, 2):
    for q in queue:
        store.answer(q.id, user, "corrected", {"animal": "dog"}, key=f"{user} {q.id}")
        print(q.id, flush=True)
"""


@pytest.mark.faults
def test_processes_share_a_store_and_one_is_killed(store):
    ids = fill(store, 150)
    labellers = [subprocess.Popen([sys.executable, "-c", LABELLER, f"user {n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for n in range(4)]
    for p in labellers: assert p.stdout.readline() == "ready\n"
    def go(p): p.stdin.write("go\n"); p.stdin.flush()
    go(labellers[0])
    saved = [labellers[0].stdout.readline().strip() for _ in range(5)]
    for p in labellers[1:]: go(p)
    labellers[0].kill()
    saved += labellers[0].stdout.read().split("\n")[:-1]
    outputs = [p.communicate()[0].split() for p in labellers[1:]]
    assert all(p.returncode == 0 for p in labellers[1:])
    history = store.history()
    assert history["id"].is_unique                                                    # nobody labelled what another had
    for user, shown in [("user 0", saved), *((f"user {n}", o) for n, o in enumerate(outputs, 1))]:
        assert set(shown) <= set(history.loc[history["user"] == user, "id"])          # what was shown as saved is saved
    held = {q.id for q in store.queue("user 0", 9)}                                   # what the killed one had before it is still theirs
    assert held | set(history["id"]) == set(ids) and len(held) <= 2
    assert store._rows("pragma integrity_check")[0] == {"integrity_check": "ok"}


KILLED = """
import os, signal, sys
from nbs_lib import feedback_store
from nbs_lib.feedback_store import Sent, Store
from tests.test_feedback_store import png, said

pictures = [png(n) for n in range(4)]

def act():
    store = Store("faces")
    id, _ = store.add(pictures[1], "new.png", "ann", said(0.9))
    store.queue("ann", 1)
    store.answer(id, "ann", "confirmed", key="click")
    with store.staging() as place:
        store.admit(place, [Sent(store.stage(place, pictures[n]), f"{n}.png", "ann", {"animal": "dog"}) for n in (1, 2, 3)], imported=True)

def check():
    store = Store("faces")
    assert store._rows("pragma integrity_check")[0] == {"integrity_check": "ok"}
    history, items = store._rows("select id from history"), store._rows("select id, queue from images")
    for item in items: assert store.image(item["id"]) in pictures                        # every row has its whole image
    assert len(items) in (0, 1, 3) and len(history) in (0, 1, 4), (len(items), len(history))
    assert (len(items) == 3) == (len(history) == 4)                                     # an import is all or nothing
    for item in items: assert (item["queue"] == "waiting") == ({"id": item["id"]} not in history)
    act()
    keys = [r["key"] for r in store._rows("select key from history")]
    assert len(keys) == 4 and keys.count("click") == 1 and store.stats()["images"] == 3

def forked(work):
    pid = os.fork()
    if pid == 0:
        try: work()
        except BaseException: import traceback; traceback.print_exc(); os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

TOUCHING = {"execute", "executemany", "executescript", "replace", "fsync", "mkdir", "write", "flush", "open", "close", "unlink", "rmdir"}

def until(step):
    left = step
    def trace(frame, event, function):
        nonlocal left
        if event == "c_call" and function.__name__ in TOUCHING:
            left -= 1
            if left == 0: os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(trace)
    act()

step, place = 0, os.environ["LOOPBOOK_HOME"]
while True:
    step += 1
    os.environ["LOOPBOOK_HOME"] = f"{place}/{step}"
    os.mkdir(os.environ["LOOPBOOK_HOME"])
    ended = forked(lambda: until(step))
    if ended == 0: break
    assert os.WIFSIGNALED(ended), step
    assert forked(check) == 0, step
print(step)
"""


@pytest.mark.faults
def test_killed_between_any_two_steps(home):
    "Each home sees one kill, before the next call that touches a file or the database; what is there is whole, and doing it again ends where it should."
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 80


# ---- the disk is full

@contextmanager
def tmpfs(path: Path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True).returncode: pytest.skip("no right to mount a small disk")
    try: yield
    finally: subprocess.run(["umount", "-l", path], check=True)


@contextmanager
def fullness(path: Path):
    "Within, nothing on the small disk `path` can grow."
    with open(path / "ballast", "wb", buffering=0) as ballast:
        for block in (65536, 4096):
            try:
                while ballast.write(bytes(block)) == block: pass
            except OSError: pass
    yield
    (path / "ballast").unlink()


@contextmanager
def limit(bytes: int):
    "Within, no file of this process can grow beyond so many bytes."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def answer_until_it_fails(store: Store, id: str) -> int:
    for n in range(3000):
        try: store.answer(id, "ann", "corrected", {"animal": f"class {n} " + "x" * 80})
        except UserError as error:
            assert str(store.folder) in str(error) and "\n" not in str(error)
            return n
    raise AssertionError("the disk was not full")


@pytest.mark.faults
def test_a_full_disk(home):
    with tmpfs(home):
        store = Store("faces", load_settings(home))
        ids = fill(store, 3)
        with fullness(home):
            saved = answer_until_it_fails(store, ids[0])
            with pytest.raises(UserError, match="the disk is full; this was not saved, all before it is; free some space"): store.answer(ids[1], "ann", "confirmed")
            with pytest.raises(UserError, match="disk is full"): store.add(png(50, 40), "large.png", "ann")
            assert len(store.history()) == saved and store.stats()["images"] == 3 and store.image(ids[2]) == png(2)
            assert {p.name for p in (store.folder / "images").rglob("*") if p.is_file()} == set(ids) and not list(store.folder.glob(".staging-*"))
        store.answer(ids[1], "ann", "confirmed")
        new, _ = store.add(png(50, 40), "large.png", "ann")
        assert len(store.history()) == saved + 1 and store.image(new) == png(50, 40)
        assert store._rows("pragma integrity_check")[0] == {"integrity_check": "ok"}
        for db in store._connections.values(): db.close()


@pytest.mark.faults
def test_a_write_that_fails(store):
    "The same where no small disk can be mounted: writes beyond a limit fail."
    ids = fill(store, 3)
    size = max(p.stat().st_size for p in store.folder.iterdir() if p.is_file())
    with limit(size + 100_000):
        saved = answer_until_it_fails(store, ids[0])
        assert len(store.history()) == saved
    with limit(2000), pytest.raises(UserError, match="disk is full"): store.add(png(50, 40), "large.png", "ann")
    assert store.stats()["images"] == 3 and not list(store.folder.glob(".staging-*"))
    store.answer(ids[1], "ann", "confirmed")
    assert len(store.history()) == saved + 1 and store._rows("pragma integrity_check")[0] == {"integrity_check": "ok"}


@pytest.mark.faults
def test_a_failing_commit_takes_its_images_along(store, monkeypatch):
    "What was moved in before the transaction failed is gone, and an image that was there before is not."
    [id] = fill(store, 1)
    def fail(folder): raise OSError(28, "No space left on device")
    monkeypatch.setattr(feedback_store, "_sync", fail)
    with pytest.raises(UserError, match="disk is full"): store.add(png(7), "a.png", "ann")
    assert [p.name for p in (store.folder / "images").rglob("*") if p.is_file()] == [id] and store.stats()["images"] == 1
