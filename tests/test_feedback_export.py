"""The answers that stand, written as a table."""
import json

import pandas as pd
import pytest
from stores import limit, png, said

from nbs_lib.core.errors import UserError
from nbs_lib.core.settings import load_settings
from nbs_lib.feedback.exchange import export
from nbs_lib.feedback.store import Store


@pytest.fixture
def store(home): return Store("faces", load_settings(home))



@pytest.fixture
def answered(store):
    ids = [store.add(png(n), f"{n}, {n}.png", "camera", said(0.9) if n else None)[0] for n in range(4)]
    for user in ("ann", "bob"): store.answer(ids[1], user, "confirmed")
    store.answer(ids[2], "ann", "corrected", {"animal": 'a "fox", red', "status": "asleep"})
    store.answer(ids[0], "ann", "unknown")
    return ids


@pytest.mark.parametrize("suffix", ["csv", "parquet", "CSV"])
def test_export(store, answered, tmp_path, suffix):
    assert export(store, tmp_path / "new" / f"out.{suffix}") == 3
    read = pd.read_parquet if suffix == "parquet" else pd.read_csv
    table = read(tmp_path / "new" / f"out.{suffix}").set_index("name")
    columns = ["id", "status", "animal", "status (target)", "users", "verdicts", "said_at", "model", "prediction"]
    assert list(table.columns) == columns
    first = table.loc["1, 1.png", ["id", "status", "animal", "users", "verdicts", "model"]].tolist()
    assert first == [answered[1], "agreed", "cat", "ann, bob", "confirmed, confirmed", "pets-model:v3"]
    assert table.loc["2, 2.png", ["animal", "status (target)"]].tolist() == ['a "fox", red', "asleep"]
    assert json.loads(table.loc["1, 1.png", "prediction"])["animal"]["cat"] == 0.9
    assert table.loc["0, 0.png", "status"] == "unknown" and pd.isna(table.loc["0, 0.png", "animal"])
    assert pd.isna(table.loc["0, 0.png", "model"])


def test_export_of_nothing(store, tmp_path):
    for suffix, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        assert export(store, tmp_path / f"out.{suffix}") == 0 and len(read(tmp_path / f"out.{suffix}")) == 0


def test_an_export_that_fails_leaves_the_old_file(store, answered, tmp_path):
    (tmp_path / "out.csv").write_text("old")
    with limit(100), pytest.raises(UserError, match="out.csv: cannot be written"): export(store, tmp_path / "out.csv")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.csv"]
    assert (tmp_path / "out.csv").read_text() == "old"
    for path, words in (
        (tmp_path / "out.xlsx", r"\.csv or \.parquet"),
        (tmp_path / "out.csv" / "x.csv", "cannot be written"),
    ):
        with pytest.raises(UserError, match=words): export(store, path)
