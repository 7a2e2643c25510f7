"""A new local store is a copy of an empty one, and cannot be told from one that MLflow makes."""

import sqlite3
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from pipeline.tracking import fresh
from pipeline.tracking.fresh import lay_out
from pipeline.tracking.store import prepare_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "transfer-pipeline" / "stores"


def content(file: Path) -> dict[str, object]:
    """The columns of all tables, what is indexed, and the migration that they are from.

    Not the statements that made them: the migrations write constraints down in no certain order.
    """
    with sqlite3.connect(file) as store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {table: set(store.execute("SELECT * FROM pragma_table_info(?)", (table,))) for table in tables}
        indexed = {
            (table, index, *store.execute("SELECT name FROM pragma_index_info(?)", (index,)).fetchall())
            for table in tables
            for (index,) in store.execute("SELECT name FROM pragma_index_list(?) WHERE origin = 'c'", (table,))
        }
        version = store.execute("SELECT version_num FROM alembic_version").fetchall()
    return {"columns": columns, "indexed": indexed, "version": version}


def test_it_is_what_mlflow_makes(tmp_path: Path, cache: Path) -> None:
    theirs, ours = tmp_path / "theirs.db", tmp_path / "project" / "ours.db"
    MlflowClient(f"sqlite:///{theirs}").search_experiments()
    ours.parent.mkdir()
    prepare_store(f"sqlite:///{ours}")
    assert content(ours) == content(theirs)
    assert [file.name for file in ours.parent.iterdir()] == ["ours.db"]
    assert {file.suffix for file in cache.iterdir()} <= {".db", ".lock"}
    experiments = [MlflowClient(f"sqlite:///{file}").search_experiments() for file in (theirs, ours)]
    (default,), (of_ours,) = experiments
    assert (of_ours.experiment_id, of_ours.name) == (default.experiment_id, default.name) == ("0", "Default")
    assert of_ours.artifact_location == default.artifact_location


def test_migrations_are_repeated_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path / "one.db")
    assert (cache / f"mlflow-{mlflow.__version__}.db").is_file()

    def never(url: str) -> None:
        raise AssertionError(url)

    monkeypatch.setattr("mlflow.db.upgrade.callback", never)
    lay_out(tmp_path / "two.db")
    assert content(tmp_path / "two.db") == content(tmp_path / "one.db")


def test_what_is_there_is_left_as_it_is(tmp_path: Path, cache: Path) -> None:
    there = tmp_path / "notes.db"
    there.write_bytes(b"not a store")
    lay_out(there)
    assert there.read_bytes() == b"not a store"
    assert not cache.exists()


def test_a_store_that_comes_meanwhile_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, there = fresh._copy, tmp_path / "m.db"

    def slowly(source: Path, target: Path) -> None:
        copy(source, target)
        there.write_bytes(b"somebody's")

    monkeypatch.setattr(fresh, "_copy", slowly)
    lay_out(there)
    assert there.read_bytes() == b"somebody's"


@pytest.mark.parametrize(
    "failure", [OperationalError("BEGIN", None, OSError("disk full")), MlflowException("unknown revision")], ids=str
)
def test_what_fails_while_it_is_made_is_left_to_mlflow(
    failure: Exception, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str) -> None:
        raise failure

    monkeypatch.setattr("mlflow.db.upgrade.callback", fail)
    lay_out(tmp_path / "m.db")
    assert not (tmp_path / "m.db").exists()
    assert not list(cache.glob("*.db"))


@pytest.mark.parametrize("trouble", ["no room for it", "kept in pieces"])
def test_without_an_empty_store_mlflow_makes_one(trouble: str, tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    if trouble == "kept in pieces":
        cache.mkdir()
        (cache / f"mlflow-{mlflow.__version__}.db").write_bytes(b"half of a file, and no database")
    else:
        cache.write_text("a file where the folder should be")
    prepare_store(f"sqlite:///{tmp_path / 'm.db'}")
    assert content(tmp_path / "m.db")["version"]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
