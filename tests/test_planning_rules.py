"""What a plan chooses, from facts alone: the rules, what fits into a budget, and who wins."""

import inspect
from dataclasses import replace

import pytest
import yaml
from jsonargparse import Namespace

from datamodules import ImageDataModule
from pipeline.errors import UserError
from pipeline.planning import planner, rules
from pipeline.planning.budget import Budget, Fitted
from pipeline.planning.duration import in_words, seconds_of
from pipeline.planning.facts import Facts, count_devices, first_device
from pipeline.planning.plan import Choice, Plan
from pipeline.planning.timing import Pace
from pipeline.task import ClassificationTask

FACTS = Facts(
    images=1_500,
    validated=300,
    draws_val=True,
    tested=400,
    classes=6,
    fewest=100,
    most=400,
    multi_label=False,
    short_side=384,
    weights_size=224,
    fixed_size=False,
    pretrained=True,
    linear_head=True,
    head_stages=3,
    step_scale=0.02,
    device="cpu",
    devices=1,
    first_device="cpu",
    accumulated=1,
)


def name_of(ruled: rules.Ruled) -> str:
    return rules.name_of(ruled.value)


def test_a_head_is_solved_first_where_that_can_be_done_and_pays() -> None:
    few = replace(FACTS, images=150)
    assert name_of(rules.strategy(few, 5, trains=True)) == "ProbeThenFineTune"
    assert name_of(rules.strategy(few, 20, trains=True)) == "FullFineTuning"  # a fresh head has time
    for other in ({"pretrained": False}, {"linear_head": False}, {"images": 1_000_000}):
        assert name_of(rules.strategy(replace(few, **other), 5, trains=True)) == "FullFineTuning"


def test_few_images_are_left_to_a_head_that_sees_several_stages() -> None:
    few = replace(FACTS, images=80)
    assert name_of(rules.strategy(few, 24, trains=False)) == "LinearProbe"
    assert name_of(rules.strategy(few, 24, trains=True)) == "ProbeThenFineTune"
    assert name_of(rules.strategy(replace(few, head_stages=1), 24, trains=False)) == "ProbeThenFineTune"
    assert name_of(rules.strategy(replace(few, images=120), 24, trains=False)) == "FullFineTuning"
    for other in ({"pretrained": False}, {"linear_head": False}):
        assert name_of(rules.strategy(replace(few, **other), 24, trains=False)) == "FullFineTuning"


def test_a_solved_head_sees_all_the_stages_that_it_can() -> None:
    assert rules.head_stages(FACTS, solved=True).value == 3
    assert rules.head_stages(replace(FACTS, head_stages=1), solved=True).value == 1
    assert rules.head_stages(FACTS, solved=False).value == 1


def test_the_first_stages_are_trained_by_many_images_and_from_scratch() -> None:
    def frozen(**facts: object) -> bool | float:
        chosen = rules.strategy(replace(FACTS, **facts), 20, trains=False).value
        return chosen.get("init_args", {}).get("freeze_early", False)

    assert frozen(images=2_000) is True
    assert frozen(images=1_000_000) is False
    assert frozen(images=2_000, pretrained=False) is False
    assert frozen(images=120) == 0.07
    assert frozen(images=120, pretrained=False) is False


def test_pretrained_networks_see_images_as_large_as_their_weights_know_them() -> None:
    assert rules.train_size(FACTS, trains=True).value == 160
    assert rules.train_size(replace(FACTS, device="cuda"), trains=True).value == 224
    assert rules.train_size(replace(FACTS, fixed_size=True), trains=True).value == 224
    assert rules.train_size(replace(FACTS, weights_size=32), trains=True).value == 32  # networks for CIFAR
    enlarged = {
        short_side: rules.train_size(replace(FACTS, short_side=short_side), trains=True) for short_side in (8, 90, 140)
    }
    assert {short_side: size.value for short_side, size in enlarged.items()} == {8: 128, 90: 128, 140: 160}
    assert all(f"of {short_side} px are enlarged" in size.reason for short_side, size in enlarged.items())
    assert rules.train_size(replace(FACTS, short_side=8, device="cuda"), trains=True).value == 224
    assert rules.train_size(replace(FACTS, short_side=8, weights_size=32), trains=True).value == 32


def test_a_head_alone_is_shown_small_images_at_the_usual_size() -> None:
    small = replace(FACTS, short_side=90)
    assert rules.train_size(small, trains=False).value == 160
    assert rules.train_size(replace(small, weights_size=32), trains=False).value == 32
    assert rules.train_size(FACTS, trains=False).value == 160


def test_from_scratch_images_are_not_enlarged_beyond_their_own_pixels() -> None:
    fresh = replace(FACTS, pretrained=False)
    assert rules.train_size(fresh, trains=True).value == 224
    assert rules.train_size(replace(fresh, short_side=90), trains=True).value == 96
    assert rules.train_size(replace(fresh, short_side=8), trains=True).value == 32


def test_evaluation_sees_more_pixels_than_training() -> None:
    assert rules.image_size(FACTS, 160).value == 192
    assert rules.image_size(FACTS, 224).value == 256
    assert rules.image_size(replace(FACTS, fixed_size=True), 224).value == 224
    assert rules.image_size(replace(FACTS, pretrained=False), 96).value == 96


@pytest.mark.parametrize(("images", "batch"), [(6, 8), (40, 8), (102, 16), (200, 32), (1_000_000, 32)])
def test_few_images_come_in_small_batches(images: int, batch: int) -> None:
    assert rules.batch_size(replace(FACTS, images=images)).value == batch


def test_batches_that_are_accumulated_make_one_step() -> None:
    several = replace(FACTS, images=200, accumulated=4)
    assert rules.batch_size(several).value == rules.batch_size(replace(FACTS, images=200, devices=4)).value == 8
    assert rules.learning_rate(several, 8) == rules.learning_rate(replace(FACTS, images=200), 32)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"images": 102}, "so that 102 images make at least 6 steps an epoch"),
        ({"images": 48}, "so that 48 images make at least 6 steps an epoch"),
        (
            {"images": 47},
            "47 images make fewer than 6 steps an epoch even so, and smaller batches are too small to be measured",
        ),
        ({"images": 102, "accumulated": 3}, "102 images make fewer than 6 steps an epoch even so"),
    ],
)
def test_steps_are_promised_only_where_there_are_so_many(facts: dict[str, int], reason: str) -> None:
    assert rules.batch_size(replace(FACTS, **facts)).reason.startswith(reason)


def test_small_batches_keep_stored_statistics() -> None:
    assert rules.batch_norm(FACTS, 4).value == "stored"
    assert rules.batch_norm(FACTS, 8).value == "batch"
    assert rules.batch_norm(replace(FACTS, pretrained=False), 8).value == "batch"


def test_few_images_pass_more_often() -> None:
    epochs = [rules.epochs(replace(FACTS, images=images)).value for images in (4, 100, 1_500, 100_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] == 24
    assert epochs[-1] == 3


def test_many_classes_need_as_many_images_each_as_few_do() -> None:
    two, six, hundred = (rules.epochs(replace(FACTS, images=3_000, classes=classes)) for classes in (2, 6, 100))
    assert two.value < six.value < hundred.value == 24
    assert "at most 24" in hundred.reason
    assert (
        rules.epochs(replace(FACTS, images=300, classes=2)).value
        == rules.epochs(replace(FACTS, images=15_000, classes=100)).value
    )


def test_training_begins_with_smaller_images_where_that_pays() -> None:
    def reduced(epochs: int, size: int = 160, budget: bool = False, **facts: object) -> int:
        return rules.reduced_epochs(replace(FACTS, **facts), size, epochs, budget).value

    assert [reduced(epochs) for epochs in (1, 6, 11, 12, 13, 24)] == [0, 0, 0, 6, 6, 12]
    assert reduced(24, size=64) == reduced(24, budget=True) == 0
    assert reduced(24, device="cuda") == reduced(24, fixed_size=True) == 0


def test_what_passes_more_often_is_cropped_smaller() -> None:
    shares = [rules.smallest_crop(epochs).value for epochs in (1, 3, 4, 6, 12, 40)]
    assert shares == sorted(shares, reverse=True)
    assert shares[:3] == [0.5, 0.5, 0.5]
    assert shares[-2:] == [0.1, 0.08]


def test_few_images_are_all_trained_on() -> None:
    fractions = [rules.val_fraction(replace(FACTS, images=n, validated=n // 10)).value for n in (10, 300, 400, 10_000)]
    assert fractions == [0.0, 0.0, 0.1, 0.1]


def test_rates_follow_the_scale_of_the_weights() -> None:
    few = replace(FACTS, images=400)
    small, large = (rules.learning_rate(replace(few, step_scale=scale), 32).value for scale in (0.01, 0.02))
    assert large == pytest.approx(2 * small)
    assert rules.learning_rate(replace(few, step_scale=0.1), 32).value == 2e-4  # norms do not grow with the weights
    noisy, several = (rules.learning_rate(replace(few, devices=devices), 8).value for devices in (1, 4))
    usual = rules.learning_rate(few, 32).value
    assert noisy == pytest.approx(usual / 2, rel=0.05)
    assert several == usual
    rates = [rules.learning_rate(replace(few, images=images), 32).value for images in (100, 400, 1_125, 2_000, 10**6)]
    assert rates == pytest.approx([usual, usual, 1.5 * usual, 2 * usual, 2 * usual], rel=0.05)
    assert rules.head_learning_rate(FACTS, 1e-4, solved=True).value == 1e-4
    assert rules.head_learning_rate(FACTS, 1e-4, solved=False).value == pytest.approx(1e-3)


def every_rule(facts: Facts) -> list[rules.Ruled]:
    """What each of them says, in its different cases."""
    return [
        rules.val_fraction(facts),
        rules.strategy(facts, 4, trains=False),
        rules.head_stages(facts, solved=True),
        rules.head_stages(facts, solved=False),
        rules.train_size(facts, trains=True),
        rules.head_alone(60),
        rules.image_size(facts, 160),
        rules.crop_fraction(facts),
        rules.batch_size(facts),
        rules.epochs(facts),
        rules.smallest_crop(4),
        rules.reduced_epochs(facts, 160, 24, in_budget=False),
        rules.reduced_epochs(facts, 160, 4, in_budget=False),
        rules.learning_rate(facts, 8),
        rules.head_learning_rate(facts, 1e-4, solved=True),
        rules.head_learning_rate(facts, 1e-4, solved=False),
        rules.batch_norm(facts, 8),
        rules.test_time_augmentation(facts, "any"),
    ]


def test_every_rule_says_why() -> None:
    for facts in (FACTS, replace(FACTS, pretrained=False), replace(FACTS, images=30, short_side=40)):
        plain = [
            rules.reduced_epochs(facts, 160, 24, in_budget=True),
            rules.reduced_epochs(facts, 32, 24, in_budget=False),
        ]
        for ruled in [*every_rule(facts), *plain]:
            assert len(ruled.reason) > 8


def test_every_rule_for_pretrained_weights_says_where_it_comes_from() -> None:
    for facts in (FACTS, replace(FACTS, images=30, short_side=400)):
        for ruled in every_rule(facts):
            assert ruled.source, ruled.reason


def test_what_was_measured_with_pretrained_weights_is_not_said_to_hold_from_scratch() -> None:
    scratch = replace(FACTS, pretrained=False)
    for rule in (rules.val_fraction, rules.crop_fraction, rules.batch_size):
        assert (rule(FACTS).source, rule(scratch).source) == (rules.MEASURED, "")
    assert rules.head_stages(scratch, solved=False).source == ""


# Budgets

PACE = Pace(
    size=160,
    embedding=0.003,
    answering=0.004,
    reading=0.004,
    shares_cores=True,
    readers=2,
    devices=1,
    all_readers=2,
    threads=2,
)
SIZES = [(96, 128), (128, 160), (160, 192), (224, 256)]


def budget_of(seconds: float, facts: Facts = FACTS, preparing: float = 0.0, learning: float = 0.01) -> Budget:
    """Of which ten seconds have passed; an image of 160 px is learned from in so many."""
    return Budget(
        seconds, lambda: 10, PACE.at, lambda size: learning * (size / 160) ** 2, facts, 2, preparing=preparing
    )


def fitted(seconds: float, learning: float = 0.01) -> Fitted:
    budget = budget_of(seconds, learning=learning)
    return budget.fit(SIZES, usual=4, usual_size=160, solving=1, suffices=True)


def test_more_time_means_more_pixels_and_epochs_and_is_never_exceeded() -> None:
    chosen = [fitted(seconds) for seconds in (45, 60, 90, 120, 180, 300, 600, 1200)]
    work = [found.epochs * found.train_size**2 for found in chosen]
    assert work == sorted(work)
    assert work[0] < work[-1]
    for seconds, found in zip((45, 60, 90, 120, 180, 300, 600, 1200), chosen, strict=True):
        assert found.seconds <= seconds
    assert chosen[-1].train_size == 224
    assert chosen[-1].epochs <= 12  # beyond which more bring nothing


def test_too_little_time_to_train_still_solves_a_head() -> None:
    found = fitted(45, learning=0.5)
    assert found.epochs == 0
    with pytest.raises(UserError, match=r"--budget: expected at least \d+ s .*\(of which 10 s .*found 12 s"):
        fitted(12)


def test_where_even_looking_takes_too_long_nobody_measures_how_long_learning_does() -> None:
    def never(size: int) -> float:
        raise AssertionError(f"measured at {size} px")

    found = replace(budget_of(45), training=never).fit(SIZES, usual=4, usual_size=160, solving=1, suffices=True)
    assert found.epochs == 0


def test_a_head_on_more_pixels_is_preferred_to_hardly_any_training() -> None:
    # Three of the four usual epochs at the usual size, or none.
    chosen = [fitted(seconds) for seconds in range(45, 150, 5)]
    trained = [found for found in chosen if found.epochs]
    heads = [found for found in chosen if not found.epochs]
    assert {found.train_size for found in trained} <= {160, 224}
    assert min(found.epochs for found in trained) >= 3
    assert [found.train_size for found in heads] == sorted(found.train_size for found in heads)
    assert heads[-1].train_size == 224


def test_where_no_head_can_be_solved_there_are_fewer_epochs_and_pixels() -> None:
    def fitted(seconds: float) -> tuple[int, int]:
        found = budget_of(seconds).fit(SIZES, 4, 160, solving=0)
        return found.train_size, found.epochs

    assert fitted(50)[0] == 96
    assert fitted(120)[0] >= 160


def test_what_is_tried_before_training_counts_where_something_is_trained() -> None:
    budget, trying = (budget_of(100, preparing=seconds) for seconds in (0, 7))
    assert trying.expected(160, 192, 1, 1) == budget.expected(160, 192, 1, 1) + 7
    assert trying.expected(160, 192, 0, 1) == budget.expected(160, 192, 0, 1)


def test_a_head_on_turned_images_takes_a_pass_for_each_turn_and_trying_them() -> None:
    budget = budget_of(100, preparing=7)
    more = budget.expected(160, 192, 0, 8) - budget.expected(160, 192, 0, 1)
    large = PACE.at(192)
    assert more == pytest.approx(7 * FACTS.images * large.with_reading(large.embedding) + 7)


def test_registering_counts_and_repeats_the_test() -> None:
    few, many = (replace(FACTS, tested=tested) for tested in (10, 500))

    def more(facts: Facts) -> float:
        budget = budget_of(100, facts)
        return replace(budget, registers=True).expected(160, 160, 4, 0) - budget.expected(160, 160, 4, 0)

    assert more(few) > 5
    assert more(many) - more(few) == pytest.approx(490 * PACE.with_reading(2 * PACE.answering))


@pytest.mark.parametrize(("given", "devices"), [("0,", 1), ("0,1", 2), ("2", 2), (3, 3), ([1, 2], 2), ("auto", 1)])
def test_devices_are_counted_as_lightning_reads_them(given: object, devices: int) -> None:
    assert count_devices(given, "cpu") == devices


@pytest.mark.parametrize(
    ("given", "first"), [("1,", 1), ("2,1", 2), ([1], 1), ([3, 2], 3), ("2", 0), (3, 0), (-1, 0), ("auto", 0), ([4], 0)]
)
def test_what_is_tried_is_tried_on_the_device_that_is_named_first(
    given: object, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert first_device(given, "cuda") == f"cuda:{first}"
    assert first_device(given, "cpu") == "cpu"


def test_what_tells_strange_images_counts_where_there_will_be_such() -> None:
    def expected(validated: int, epochs: int = 0, head_stages: int = 3) -> float:
        facts = replace(FACTS, images=2_000, validated=validated, tested=400 - validated, head_stages=head_stages)
        budget = replace(budget_of(100, facts), views=1)
        return budget.expected(160, 160, epochs, 1)

    embedding = PACE.with_reading(PACE.embedding)
    # 500 images that were trained on, but for what a head on several stages has left of them, and those held out pass
    # once more.
    assert expected(100, head_stages=1) - expected(100) == pytest.approx(500 * embedding)
    assert expected(100) - expected(20) == pytest.approx(80 * embedding)
    # Where none are, those that were trained on are held out from each other, and heads are solved once more.
    assert expected(0, head_stages=1) - expected(0) == pytest.approx(500 * embedding)
    assert expected(1) + 2 < expected(0) < expected(1) + 4
    # A network that was trained has seen them.
    told = expected(20, epochs=1) - expected(19, epochs=1)
    assert told == pytest.approx(520 * embedding + embedding + 3 * PACE.embedding, rel=0.01)


def test_epochs_that_are_set_are_not_changed() -> None:
    budget = budget_of(200)
    sizes = {epochs: budget.fit(SIZES, 4, 160, solving=1, epochs=epochs) for epochs in (1, 4, 12)}
    assert {epochs: found.epochs for epochs, found in sizes.items()} == {1: 1, 4: 4, 12: 12}
    assert sizes[1].train_size > sizes[12].train_size
    with pytest.raises(UserError, match="--budget: expected at least"):
        budget.fit(SIZES, 4, 160, solving=1, epochs=100)


def test_where_a_gpu_computes_reading_hides_behind_it() -> None:
    shared, apart = PACE, replace(PACE, shares_cores=False)
    assert shared.with_reading(0.01) == pytest.approx(0.012)
    assert apart.with_reading(0.01) == pytest.approx(0.01)
    assert replace(apart, reading=0.1).with_reading(0.01) == pytest.approx(0.05)


def test_devices_share_what_is_computed_and_all_readers_what_is_read() -> None:
    four = replace(PACE, shares_cores=False, devices=4, all_readers=8)
    assert four.on_all_devices(0.1) == pytest.approx(0.025)
    assert four.on_all_devices(0.001) == pytest.approx(0.004 / 8)
    assert four.with_reading(0.001) == pytest.approx(0.004 / 2)  # one process alone

    def an_epoch(pace: Pace) -> float:
        budget = replace(budget_of(100, replace(FACTS, devices=pace.devices)), pace=pace.at)
        return budget.expected(160, 160, 2, 0) - budget.expected(160, 160, 1, 0)

    assert an_epoch(four) == pytest.approx(1_500 * 0.01 / 4 + 300 * 0.003 / 4)
    assert an_epoch(replace(four, reading=0.8)) == pytest.approx(1_800 * 0.1)


def test_processes_that_share_the_cores_are_no_faster_than_one() -> None:
    one, two = (budget_of(100, replace(FACTS, devices=devices)).expected(160, 192, 4, 1) for devices in (1, 2))
    assert one == two


def test_who_sets_few_readers_still_has_images_tried_on_all_cores() -> None:
    def expected(readers: int) -> float:
        return replace(budget_of(100), pace=replace(PACE, readers=readers).at).expected(160, 160, 2, 0)

    described, reading = 500 + 300, PACE.reading  # what one process reads
    assert expected(1) - expected(2) == pytest.approx(described * (reading - reading / 2))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("1h30m", 5400)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5 m", "-5m", "0s", "5min", "m5"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--budget: expected a time such as"):
        seconds_of(text)


def test_times_are_shown_in_two_figures() -> None:
    assert [in_words(seconds) for seconds in (1, 99, 100, 3600)] == ["1 s", "99 s", "1.7 min", "60.0 min"]


# Plans

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
