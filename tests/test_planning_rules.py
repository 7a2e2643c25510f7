"""What a plan chooses, from facts alone."""

from dataclasses import replace

import pytest

from pipeline.planning import rules
from pipeline.planning.facts import Facts
from tests.planned import FACTS


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


def test_a_thousand_images_on_a_processor_are_told_by_their_distances() -> None:
    def chosen(trains: bool = False, **facts: object) -> str:
        return name_of(rules.strategy(replace(FACTS, **facts), 6, trains))

    assert [chosen(images=count, validated=0) for count in (999, 1_000, 2_000, 2_001)] == [
        "FullFineTuning",
        "KernelProbe",
        "KernelProbe",
        "FullFineTuning",
    ]
    # Those that are held out would train, too, unless they were given as such.
    assert chosen(images=1_801, validated=200) == "FullFineTuning"
    assert chosen(images=1_801, validated=200, draws_val=False) == "KernelProbe"
    for other in (
        {"device": "cuda"},
        {"pretrained": False},
        {"linear_head": False},
        {"head_stages": 1},
        {"multi_label": True},
        {"trained_here": True},
        {"classes": 16},
        {"trains": True},
    ):
        assert chosen(**other) == "FullFineTuning"
    assert name_of(rules.strategy(FACTS, 6, trains=False, steers=True)) == "FullFineTuning"
    # What passes but once may have as many pixels as the weights know.
    assert rules.train_size(FACTS, "KernelProbe").value == 224
    assert rules.train_size(replace(FACTS, short_side=90), "KernelProbe").value == 160
    assert rules.train_size(replace(FACTS, short_side=192), "KernelProbe")[:2] == (
        192,
        "the images have no more pixels",
    )
    # Its training images calibrate it.
    assert rules.val_fraction(FACTS, "KernelProbe").value == 0
    assert rules.val_fraction(FACTS, "LinearProbe").value == rules.val_fraction(FACTS).value == 0.1


def test_a_solved_head_sees_all_the_stages_that_it_can() -> None:
    assert rules.head_stages(FACTS, solved=True).value == 3
    assert rules.head_stages(replace(FACTS, head_stages=1), solved=True).value == 1
    assert rules.head_stages(FACTS, solved=False).value == 1


def test_the_first_stages_are_trained_by_many_images_and_from_scratch() -> None:
    def frozen(**facts: object) -> bool | float:
        chosen = rules.strategy(replace(FACTS, **facts), 20, trains=False).value
        return chosen.get("init_args", {}).get("freeze_early", False)

    assert frozen(images=5_000) is True
    assert frozen(images=1_000_000) is False
    assert frozen(images=5_000, pretrained=False) is False
    assert frozen(images=120) == 0.07
    assert frozen(images=120, pretrained=False) is False


def test_pretrained_networks_see_images_as_large_as_their_weights_know_them() -> None:
    assert rules.train_size(FACTS, "FullFineTuning").value == 160
    assert rules.train_size(replace(FACTS, device="cuda"), "FullFineTuning").value == 224
    assert rules.train_size(replace(FACTS, fixed_size=True), "FullFineTuning").value == 224
    assert rules.train_size(replace(FACTS, weights_size=32), "FullFineTuning").value == 32  # networks for CIFAR
    enlarged = {
        short_side: rules.train_size(replace(FACTS, short_side=short_side), "FullFineTuning")
        for short_side in (8, 90, 140)
    }
    assert {short_side: size.value for short_side, size in enlarged.items()} == {8: 128, 90: 128, 140: 160}
    assert all(f"of {short_side} px are enlarged" in size.reason for short_side, size in enlarged.items())
    assert rules.train_size(replace(FACTS, short_side=8, device="cuda"), "FullFineTuning").value == 224
    assert rules.train_size(replace(FACTS, short_side=8, weights_size=32), "FullFineTuning").value == 32


def test_a_head_alone_is_shown_small_images_at_the_usual_size() -> None:
    small = replace(FACTS, short_side=90)
    assert rules.train_size(small, "LinearProbe").value == 160
    assert rules.train_size(replace(small, weights_size=32), "LinearProbe").value == 32
    assert rules.train_size(FACTS, "LinearProbe").value == 160


def test_from_scratch_images_are_not_enlarged_beyond_their_own_pixels() -> None:
    fresh = replace(FACTS, pretrained=False)
    assert rules.train_size(fresh, "FullFineTuning").value == 224
    assert rules.train_size(replace(fresh, short_side=90), "FullFineTuning").value == 96
    assert rules.train_size(replace(fresh, short_side=8), "FullFineTuning").value == 32


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
    assert rules.batch_norm(replace(FACTS, depthwise=True), 32).value == "stored"
    for depthwise in (True, False):
        assert rules.batch_norm(replace(FACTS, pretrained=False, depthwise=depthwise), 8).value == "batch"


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
        rules.train_size(facts, "FullFineTuning"),
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
