"""The examples of a notebook, run as `nbdev-test` runs them, in a process that is born with the heavy libraries loaded.

A server imports them once and is forked for each notebook: seventy imports of torch take longer than all examples.
"""
import atexit
import multiprocessing
import os
import sys
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["heavy"])


def run_examples(notebook: Path, root: Path, environment: dict[str, str], log: Path) -> None:
    "All that the new process does; its exit code is that of `nbdev-test`."
    with open(log, "wb") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(root)
    from nbdev.test import nbdev_test
    try: nbdev_test(str(notebook))
    finally:
        atexit._run_exitfuncs()                            # a forked process leaves without them
        for stream in (sys.stdout, sys.stderr): stream.flush()


def examples_of(
    notebook: Path,
    root: Path,                    # folder to run them in
    environment: dict[str, str],   # all variables, none is inherited
    log: Path,                     # file for all that is printed
    seconds: float,                # after which they are given up
) -> int | None:                   # exit code; None: not ended in time
    process = SERVER.Process(target=run_examples, args=(notebook, root, environment, log))
    process.start()
    try: process.join(seconds)
    finally:
        if late := process.is_alive(): process.kill()
    return None if late else process.exitcode
