"""The store of feedback with several people at once, killed processes and full disks."""
# ruff: noqa: F811  a fixture that is imported has the name of an argument
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from stores import fill, limit, png, store  # noqa: F401  a fixture

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings
from nbs_lib.feedback import store as store_module
from nbs_lib.feedback.store import Store

ROOT = Path(__file__).resolve().parent.parent


# ---- several at once

def test_threads_share_a_store(store):
    pictures, out = [png(n) for n in range(12)], []
    def work(user):
        for data in pictures: store.add(data, "a.png", user)
        while queue := store.queue(user, 3):
            for q in queue:
                out.append((store.answer(q.id, user, "corrected", {"animal": "cat"}, key=f"{user} {q.id}"), q.id))

    with ThreadPoolExecutor(6) as pool: list(pool.map(work, [f"user {n}" for n in range(6)]))
    assert len(out) == 12 and len({id for _, id in out}) == 12
    assert sorted(store.history()["seq"]) == sorted(seq for seq, _ in out)


LABELLER = """
import sys
from nbs_lib.feedback.store import Store
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
    labellers = [
        subprocess.Popen(
            [sys.executable, "-c", LABELLER, f"user {n}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for n in range(4)
    ]
    for p in labellers: assert p.stdout.readline() == "ready\n"
    def go(p): print("go", file=p.stdin, flush=True)
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
    held = {q.id for q in store.queue("user 0", 9)}  # what the killed one had before it is still theirs
    assert held | set(history["id"]) == set(ids) and len(held) <= 2
    assert store._rows("pragma integrity_check")[0] == {"integrity_check": "ok"}


KILLED = """
import os, signal, sys
from nbs_lib.feedback import store as store_module
from nbs_lib.feedback.store import Sent, Store
from tests.stores import png, said

pictures = [png(n) for n in range(4)]

def act():
    store = Store("faces")
    id, _ = store.add(pictures[1], "new.png", "ann", said(0.9))
    store.queue("ann", 1)
    store.answer(id, "ann", "confirmed", key="click")
    with store.staging() as place:
        sent = [Sent(store.stage(place, pictures[n]), f"{n}.png", "ann", {"animal": "dog"}) for n in (1, 2, 3)]
        store.admit(place, sent, imported=True)

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

TOUCHING = {"execute", "executemany", "executescript", "replace", "fsync", "mkdir", "write", "flush", "open", "close",
            "unlink", "rmdir"}

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
    """Each home sees one kill, before the next call that touches a file or the database; what is there is whole, and
    doing it again ends where it should."""
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 80


# ---- the disk is full

@contextmanager
def tmpfs(path: Path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
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
            with pytest.raises(
                UserError, match="the disk is full; this was not saved, all before it is; free some space"
            ):
                store.answer(ids[1], "ann", "confirmed")
            with pytest.raises(UserError, match="disk is full"): store.add(png(50, 40), "large.png", "ann")
            assert len(store.history()) == saved and store.stats()["images"] == 3 and store.image(ids[2]) == png(2)
            assert {p.name for p in (store.folder / "images").rglob("*") if p.is_file()} == set(ids)
            assert not list(store.folder.glob(".staging-*"))
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
    monkeypatch.setattr(store_module, "sync_folder", fail)
    with pytest.raises(UserError, match="disk is full"): store.add(png(7), "a.png", "ann")
    assert [p.name for p in (store.folder / "images").rglob("*") if p.is_file()] == [id]
    assert store.stats()["images"] == 1
