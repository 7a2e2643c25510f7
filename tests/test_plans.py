"""Plans: how they are told, kept and taken over, and who wins."""

import inspect

import pytest
import yaml
from jsonargparse import Namespace

from datamodules import ImageDataModule
from pipeline.planning import planner
from pipeline.planning.plan import Choice, Plan
from pipeline.task import ClassificationTask

PLAN = Plan(
    (
        Choice("finetuning", {"class_path": "pipeline.finetuning.LinearProbe"}, "because", "someone 2020"),
        Choice("data.init_args.batch_size", 16, "so"),
        Choice("trainer.max_epochs", 7, by_user=True),
    ),
    seconds=42.0,
)


def test_on_another_machine_a_run_goes_on_in_the_precision_that_suits_it() -> None:
    chosen, told = (Choice("trainer.precision", "bf16-mixed", by_user=by_user) for by_user in (False, True))
    for choice, expected in ((chosen, "32-true"), (told, "bf16-mixed")):
        plan = Plan((*PLAN.choices, choice)).on_another_machine("32-true", "no bf16 unit")
        assert plan.value_of("trainer.precision", None) == expected
        assert plan.choices[:-1] == PLAN.choices


@pytest.mark.parametrize("setting", [name for name in planner._OF_TRAINING if name.startswith(("model.", "data."))])
def test_settings_of_training_have_the_defaults_that_they_are_compared_with(setting: str) -> None:
    owner, _, name = setting.replace("init_args.", "").partition(".")
    signature = inspect.signature({"model": ClassificationTask, "data": ImageDataModule}[owner])
    default = signature.parameters[name].default
    assert planner._OF_TRAINING[setting] == (None if default == "auto" else default)


def test_a_plan_is_read_as_it_was_written() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.value_of("data.init_args.batch_size", 0) == 16
    assert PLAN.value_of("model.weight_decay", 0) == 0


def test_lines_name_setting_value_reason_and_source() -> None:
    lines = "\n".join(PLAN.lines())
    for words in ("finetuning", "LinearProbe", "because [someone 2020]", "data.batch_size", "16", "set by you"):
        assert words in lines
    assert "init_args" not in lines


def test_the_configuration_holds_what_was_chosen_and_why() -> None:
    text = PLAN.to_yaml()
    assert yaml.safe_load(text) == {
        "finetuning": {"class_path": "pipeline.finetuning.LinearProbe"},
        "data": {"init_args": {"batch_size": 16}},
        "budget": None,
    }
    assert "batch_size: 16 # so" in text
    whole = yaml.safe_load(PLAN.written_into("trainer: {max_epochs: 7}\nbudget: 5m\n"))
    assert whole["trainer"] == {"max_epochs": 7}
    assert whole["data"] == {"init_args": {"batch_size": 16}}
    assert whole["budget"] is None


def test_a_run_that_goes_on_keeps_what_was_chosen_and_follows_what_is_set_now() -> None:
    settings = Namespace(
        finetuning=None,
        data=Namespace(init_args=Namespace(batch_size=4)),
        trainer=Namespace(max_epochs=None),
    )
    taken = PLAN.taken_over(settings)
    assert {choice.setting: (choice.value, choice.by_user) for choice in taken.choices} == {
        "finetuning": ({"class_path": "pipeline.finetuning.LinearProbe"}, False),
        "data.init_args.batch_size": (4, True),
        "trainer.max_epochs": (7, False),
    }
    taken.apply(settings)
    assert settings.finetuning.class_path == "pipeline.finetuning.LinearProbe"
    assert settings.data.init_args.batch_size == 4
    assert settings.trainer.max_epochs == 7


def test_settings_of_a_strategy_are_kept_by_a_run_that_goes_on() -> None:
    strategy = {"class_path": "pipeline.finetuning.ProbeThenFineTune", "init_args": {"interpolate": False}}
    settings = Namespace(finetuning=None)
    Plan((Choice("finetuning", strategy, by_user=True),)).taken_over(settings).apply(settings)
    assert settings.finetuning.as_dict() == strategy
