"""The examples in each notebook hold."""
import os

import pytest
from examples import examples_of
from test_project import NOTEBOOKS, ROOT


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_examples_in_a_notebook_hold(notebook, tmp_path):
    outside = {n: v for n, v in os.environ.items() if not n.startswith(("LOOPBOOK_", "WANDB_", "TRACKIO_"))}
    home, log = tmp_path / "home", tmp_path / "log.txt"
    home.mkdir()
    code = examples_of(notebook, ROOT, outside | {"LOOPBOOK_HOME": str(home)}, log, 900)
    said = log.read_text(errors="replace")
    assert code == 0 and "Success" in said, said[-6000:]
