"""``python -m pipeline promote``: who becomes the champion, who does not and why, and how it is taken back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

from pipeline.cli import main
from pipeline.registry import promote
from pipeline.registry.versions import CHALLENGER, CHAMPION, PREVIOUS
from pipeline.tracking.fresh import lay_out
from tests.promotions import NAME, add_both, add_version, aliases, answers, exam


class Store:
    """A fresh store, and commands that use it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.uri = f"sqlite:///{home / 'mlflow.db'}"
        self.client = MlflowClient(self.uri, self.uri)

    def add(self, *arguments: Any, **settings: Any) -> int:
        return add_version(self.client, self.home / "scratch", *arguments, **settings)

    def promote(self, *arguments: str, **rules: Any) -> int:
        if rules:
            (self.home / "rules.yaml").write_text(yaml.safe_dump(rules))
            arguments = (*arguments, f"--rules={self.home / 'rules.yaml'}")
        return main(["promote", f"--name={NAME}", f"--tracking_uri={self.uri}", *arguments])

    @property
    def audits(self) -> list[dict[str, Any]]:
        """What the audit runs say, oldest first."""
        experiment = self.client.get_experiment_by_name("promotions")
        if experiment is None:
            return []
        runs = self.client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
        return [
            json.loads(Path(self.client.download_artifacts(run.info.run_id, "promotion.json")).read_text())
            for run in runs
        ]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "mlflow.db")
    return Store(tmp_path)


# Who becomes the champion


def test_a_better_challenger_becomes_the_champion_and_a_run_says_why(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    add_both(store.client, store.home / "scratch")
    assert store.promote() == 0
    assert aliases(store.client) == {CHAMPION: 2, PREVIOUS: 1, CHALLENGER: 2}
    out = capsys.readouterr().out
    assert "version 2 is now models:/cells@champion" in out
    assert "10 images won, 0 lost, p = 0.00195" in out
    (audit,) = store.audits
    assert (audit["decision"], audit["challenger"], audit["champion"]) == ("promoted", 2, 1)
    assert audit["challenger_test_digest"] == audit["champion_test_digest"]
    assert audit["differences"]["accuracy"]["value"] == pytest.approx(0.05)
    assert 0 < audit["differences"]["accuracy"]["low"] < 0.05 < audit["differences"]["accuracy"]["high"]
    assert audit["mcnemar"] == {"won": 10, "lost": 0, "p": pytest.approx(2 / 2**10)}
    assert audit["rules"]["metric"] == "accuracy"
    assert audit["who"]
    assert audit["begun"] <= audit["decided"]
    assert {"rules_digest", "challenger_run", "champion_run"} <= audit.keys()
    experiment = store.client.get_experiment_by_name("promotions").experiment_id
    (run,) = store.client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.data.tags["decision"] == "promoted"
    assert run.data.metrics["difference/accuracy"] == pytest.approx(0.05)
    assert [model.name for model in store.client.search_registered_models()] == [NAME], "the lock is left behind"


def test_the_first_challenger_needs_no_champion(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.add(exam(answers(range(10))), CHALLENGER)
    assert store.promote() == 0
    assert aliases(store.client) == {CHAMPION: 1, CHALLENGER: 1}
    assert "there is no champion yet" in capsys.readouterr().out


def test_a_trial_changes_and_writes_nothing(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    add_both(store.client, store.home / "scratch")
    assert store.promote("--dry-run") == 0
    assert aliases(store.client) == {CHAMPION: 1, CHALLENGER: 2}
    assert store.audits == []
    assert "version 2 would become models:/cells@champion" in capsys.readouterr().out


# Who does not


def refused(store: Store, capsys: pytest.CaptureFixture[str], **rules: Any) -> str:
    """Why the challenger is refused; what is there stays as it is, and a run says so."""
    before = aliases(store.client)
    assert store.promote(**rules) == 4
    assert aliases(store.client) == before
    assert store.audits[-1]["decision"] == "refused"
    reason = store.audits[-1]["reason"]
    assert reason in capsys.readouterr().err
    return reason


@pytest.mark.parametrize(
    ("champion", "challenger", "rules", "words"),
    [
        (range(20), range(30), {}, "min_difference: accuracy better by -0.0500"),
        (range(20), range(30), {"min_difference": -1, "max_loss": 1}, "0 images won, 10 lost, p = 0.00195"),
        (range(20), range(20, 40), {}, "max_loss: at worst -0.0"),
        (range(20), range(15), {"min_difference": 0.1}, "at least +0.1 asked for"),
        (range(20), range(15), {"max_ece": 0.01}, "max_ece: 0.0250, at most 0.01 allowed"),
        (range(40), range(0, 40, 2), {"class_floors": {"a": 0.9}}, "class_floors: a: recall 0.8000 of 100 images"),
        (range(40), range(0, 40, 2), {"class_floors": 0.9}, "class_floors: a: recall 0.8000 of 100 images"),
        (range(40), range(20), {"metric": "macro_f1", "min_difference": 0.2}, "min_difference: macro_f1 better by"),
    ],
)
def test_a_challenger_that_breaks_a_rule_is_refused(
    store: Store,
    capsys: pytest.CaptureFixture[str],
    champion: range,
    challenger: range,
    rules: dict[str, Any],
    words: str,
) -> None:
    store.add(exam(answers(champion)), CHAMPION)
    store.add(exam(answers(challenger)), CHALLENGER)
    assert words in refused(store, capsys, **rules)


def test_a_part_of_the_test_has_a_floor_of_its_own(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"site": ["north"] * 50 + ["south"] * 145 + ["west"] * 5}
    store.add(exam(answers(range(10)), metadata=metadata), CHALLENGER)
    reason = refused(store, capsys, slice_floors={"site": 0.9})
    assert "slice_floors.site: north: accuracy 0.8000 of 50 images, at least 0.9 asked for" in reason
    assert "south" not in reason
    assert store.promote(slice_floors={"site": {"south": 0.9}}) == 0
    assert store.promote("--dry-run", slice_floors={"site": 0.9}) == 4  # it is the champion already


def test_a_class_of_few_images_is_not_judged(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.add(exam(answers([0, 2], count=20)), CHALLENGER)
    assert store.promote("--dry-run", class_floors=0.9, least_images=10) == 4
    assert store.promote("--dry-run", class_floors=0.9, least_images=11) == 0
    assert "a: 10 images, fewer than 11: not judged" in capsys.readouterr().out


def test_a_test_on_other_images_cannot_be_compared(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.add(exam(answers(range(30))), CHAMPION)
    store.add(exam(answers(range(20)), images="other"), CHALLENGER)
    assert "it cannot be compared: it was tested on other images (200, digest" in refused(store, capsys)


def test_other_classes_cannot_be_compared(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    test = exam(answers(range(30)))
    store.add(replace(test, classes=["a", "c"]), CHAMPION)
    store.add(test, CHALLENGER)
    assert "its classes are a, b, the champion's a, c" in refused(store, capsys)


def test_a_version_that_was_never_proven_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.add(exam(answers(range(20))), CHALLENGER, proven=False)
    assert "models:/cells/1 was never proven" in refused(store, capsys)


def test_a_version_without_a_test_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    client = store.client
    client.create_registered_model(NAME)
    client.create_model_version(NAME, str(store.home / "nothing"))
    client.set_model_version_tag(NAME, "1", "proven_on", "0")
    client.set_registered_model_alias(NAME, CHALLENGER, "1")
    assert "models:/cells/1 does not carry its test" in refused(store, capsys)


def test_a_stale_challenger_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.add(exam(answers(range(20))), CHALLENGER)
    store.add(exam(answers(range(30))), CHAMPION)
    assert "it is stale: the champion, version 2, was registered after it" in refused(store, capsys)
    store.client.set_registered_model_alias(NAME, CHALLENGER, "2")
    assert "it is stale: it is the champion already" in refused(store, capsys)


def test_a_champion_that_changed_meanwhile_is_not_overwritten(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_both(store.client, store.home / "scratch")
    third = store.add(exam(answers(range(5))))
    real = promote.compare

    def slowly(*arguments: Any) -> Any:
        store.client.set_registered_model_alias(NAME, CHAMPION, str(third))
        return real(*arguments)

    monkeypatch.setattr(promote, "compare", slowly)
    assert store.promote() == 4
    assert aliases(store.client) == {CHAMPION: 3, CHALLENGER: 2}
    assert "the champion has become version 3 meanwhile" in capsys.readouterr().err


# The way back


def test_a_rollback_brings_the_previous_champion_back_and_bars_the_other(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    add_both(store.client, store.home / "scratch")
    assert store.promote() == 0
    assert store.promote("--rollback", "--dry-run") == 0
    assert aliases(store.client)[CHAMPION] == 2
    assert store.promote("--rollback") == 0
    assert aliases(store.client) == {CHAMPION: 1, CHALLENGER: 2}
    assert [audit["decision"] for audit in store.audits] == ["promoted", "rolled back"]
    assert "it was rolled back at" in refused(store, capsys)
    assert store.promote("--rollback") == 2
    assert "--rollback: expected 'cells' to have a champion and another previous-champion" in capsys.readouterr().err


def test_a_failure_on_the_way_is_written_down(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_both(store.client, store.home / "scratch")
    real = MlflowClient.set_registered_model_alias

    def fails(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == CHAMPION:
            raise OSError("the store is gone")
        real(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", fails)
    assert store.promote() == 1
    assert aliases(store.client)[CHAMPION] == 1
    assert store.audits[-1]["decision"] == "failed"
    assert "the store is gone" in store.audits[-1]["reason"]
    assert [model.name for model in store.client.search_registered_models()] == [NAME]


# Wrong calls


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"metrik": "accuracy"}, "found 'metrik'; did you mean metric?"),
        ({"metric": "beauty"}, "metric: expected one of accuracy, macro_f1, log_loss"),
        ({"metric": ["accuracy"]}, "metric: expected one of accuracy, macro_f1, log_loss"),
        ({"class_floors": {1: 0.5}}, "class_floors: expected a, b, found '1'"),
        ({"metric": "mean_average_precision"}, "metric: expected accuracy, macro_f1, log_loss for this model"),
        ({"confidence": 95}, "confidence: expected a number between 0 and 1, found 95"),
        ({"max_loss": -0.1}, "max_loss: expected 0 or more, found -0.1"),
        ({"max_ece": "small"}, "max_ece: expected a number from 0 to 1, or null, found 'small'"),
        ({"class_floors": {"c": 0.5}}, "class_floors: expected a, b, found 'c'"),
        ({"slice_floors": {"site": 0.5}}, "expected a column of the test (it has none), found 'site'"),
        ({"least_images": 0}, "least_images: expected a whole number above 0, found 0"),
    ],
)
def test_a_wrong_rule_is_named(
    store: Store, capsys: pytest.CaptureFixture[str], rules: dict[str, Any], words: str
) -> None:
    store.add(exam(answers(range(20))), CHALLENGER)
    assert store.promote(**rules) == 2
    assert words in capsys.readouterr().err
    assert store.audits == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lock_timeout=0"], "--lock_timeout: expected seconds above 0"),
        (["--rules=nowhere.yaml"], "--rules: expected a file of text that can be read, found 'nowhere.yaml'"),
        (["--rules=broken.yaml"], "broken.yaml: expected rules in YAML, found something else"),
        (["--rollback", "--rules=x"], "--rollback: expected no --rules beside it"),
        ([], "--name: expected a registered model, found none of 'cells'"),
    ],
)
def test_a_wrong_call_is_one_clear_error(
    store: Store, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("broken.yaml").write_text("metric: [")
    assert store.promote(*arguments) == 2
    assert words in capsys.readouterr().err


def test_a_model_without_a_challenger_is_named(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.add(exam(answers(range(20))))
    assert store.promote() == 2
    assert "expected a version with the alias challenger, found none of 'cells'" in capsys.readouterr().err


def test_promoting_leaves_no_address_behind(store: Store) -> None:
    add_both(store.client, store.home / "scratch")
    before = mlflow.get_tracking_uri()
    assert store.promote() == 0
    assert mlflow.get_tracking_uri() == before
