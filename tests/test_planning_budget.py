"""What fits into a budget, and what of a machine it is counted with."""

from dataclasses import replace

import pytest

from pipeline.errors import UserError
from pipeline.planning.budget import LINEAR, Budget, Fitted, distances
from pipeline.planning.duration import in_words, seconds_of
from pipeline.planning.facts import Facts, count_devices, first_device
from pipeline.planning.timing import Pace
from tests.planned import FACTS

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


def test_what_tells_strange_images_counts_where_there_will_be_such() -> None:
    def expected(validated: int, epochs: int = 0, left: bool = True) -> float:
        held_out = replace(FACTS, images=2_000, validated=validated, tested=400 - validated)
        facts = replace(held_out, described_by_head=left)
        budget = replace(budget_of(100, facts), views=1)
        return budget.expected(160, 160, epochs, 1)

    embedding = PACE.with_reading(PACE.embedding)
    # 500 images that were trained on, but for what a head on several stages has left of them, and those held out pass
    # once more.
    assert expected(100, left=False) - expected(100) == pytest.approx(500 * embedding)
    assert expected(100) - expected(20) == pytest.approx(80 * embedding)
    # Where none are, those that were trained on are held out from each other, and heads are solved once more.
    assert expected(0, left=False) - expected(0) == pytest.approx(500 * embedding)
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


def test_heads_that_judge_training_images_are_solved_where_none_validate() -> None:
    def seconds(validated: int, head: float, judging: float) -> float:
        budget = replace(budget_of(600, replace(FACTS, images=1_000, validated=validated)), head=head, judging=judging)
        return budget.expected(160, 192, epochs=0, solving=1)

    assert seconds(0, *LINEAR) - seconds(0, 0, 0) == pytest.approx(sum(LINEAR))
    assert seconds(0, *distances(1_000)) - seconds(0, 0, 0) == pytest.approx(distances(1_000)[0])
    assert distances(100)[0] < distances(1_000)[0] < distances(2_000)[0] == distances(1_000_000)[0]
    assert seconds(200, *LINEAR) - seconds(200, 0, 0) == pytest.approx(LINEAR[0])
