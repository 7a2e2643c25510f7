"""The rules: from what is known to what is chosen, each with its reason and where it was found.

A rule is a function of :class:`~pipeline.planning.facts.Facts` and of earlier choices, and gives a value, a reason, and
where the rule comes from, where it is not our own.
"""

from typing import Any, NamedTuple

from datamodules.division import VAL_FRACTION
from datamodules.transforms import reduced_size
from pipeline.finetuning.kernel_ridge import MOST_CENTRES
from pipeline.finetuning.optimization import MOST, RELATIVE_STEP, USUAL_BATCH, default_rates, growth
from pipeline.planning.budget import Fitted
from pipeline.planning.duration import in_words
from pipeline.planning.facts import Facts

#: Source of what this project has measured itself, with it and without it, from pretrained weights on.
MEASURED = "measured: docs/defaults.md"
#: So many training images can teach even the first stages something, and say themselves how they may be turned.
MANY = 20_000
#: Strategies that solve the head and train nothing, and all that solve it.
ALONE = ("LinearProbe", "KernelProbe")
SOLVING = (*ALONE, "ProbeThenFineTune")
#: From this many images in a batch on their own statistics are better than those of before.
LEAST_FOR_STATISTICS = 8

# So few leave two stages as they are, which have a sixteenth of a ResNet's weights together, and not one.
_FEW, _TWO_STAGES = 500, 0.07
_STRIDE = 32  # of the networks: other sizes are cut off at the border
_CPU_SIZE = 160
_CPU_ENLARGED = 128  # of smaller images; 160 px take a third longer, for a point on some sets and none on others
# What evaluation sees is larger than what is trained on, because random crops show things enlarged (Touvron et al.).
_ENLARGED = 1.2
_LEAST_EPOCHS, _MOST_EPOCHS = 3, 24
_OF_A_CLASS = 900  # passes of its images, beyond those of the least epochs
# Images that pass in all epochs together, from which on a fresh head does better than a solved one.
_FRESH_FROM = 2_000
# Images from which on distances to them tell what training would find; fewer leave gaps.
_LEAST_COMPARED, _LEAST_OF_A_CLASS = 1_000, 100
_SCRATCH_EPOCHS = 10
# With fewer epochs than this, each is needed at the size that training ends with.
_LEAST_TO_REDUCE = 12
# The smallest crop's share of the area: at most this, and no less than ImageNet's recipes go down to.
_LARGEST_SHARE, _SMALLEST_SHARE = 0.5, 0.08
_SHARE_OF_AN_EPOCH = 4.0
_LEAST_HELD_OUT = 40
_STEPS_AN_EPOCH = 6
_SMALLEST_BATCH, _LARGEST_BATCH = 8, 32


class Ruled(NamedTuple):
    """What a rule says."""

    value: Any
    reason: str
    source: str = ""


def _measured(facts: Facts) -> str:
    """The source of a rule that holds from scratch, too, where nothing was measured."""
    return MEASURED if facts.pretrained else ""


def val_fraction(facts: Facts, judges_itself: str | None = None) -> Ruled:
    """Share of the images that is held out to choose and to calibrate by.

    Args:
        facts: on the images.
        judges_itself: the strategy that solves the head, where training images are judged by heads that have not seen
            them if none are held out; none: they are not.
    """
    if judges_itself == "KernelProbe":
        return Ruled(
            0.0,
            "each training image is judged as if it had been left out, which calibrates by more of them, and all train",
            MEASURED,
        )
    held_out = round(VAL_FRACTION * (facts.images + facts.validated))
    if held_out < _LEAST_HELD_OUT:
        instead = "training images are judged in folds, each by a head that has not seen it"
        return Ruled(
            0.0,
            f"{held_out} images choose no better than a coin, and are worth more in training; "
            + (instead if judges_itself else "crossvalidate tests on all images in turn"),
            _measured(facts),
        )
    return Ruled(VAL_FRACTION, "enough to choose and to calibrate by", _measured(facts))


def usual_val_fraction() -> Ruled:
    """The same where a person has named what to choose by."""
    return Ruled(VAL_FRACTION, "a metric or a patience that is named wants images held out")


def strategy(facts: Facts, epochs: int, trains: bool, steers: bool = False) -> Ruled:
    """How the network is trained.

    Args:
        facts: on images and network.
        epochs: passes over the training images.
        trains: whether the backbone is to be trained, however few images there are.
        steers: whether something is set that a head by distances has no use for.
    """
    if not facts.pretrained:
        return Ruled(strategy_of("FullFineTuning"), "there are no pretrained weights to build on")
    few = facts.images <= _FEW
    fresh = strategy_of("FullFineTuning", freeze_early=_TWO_STAGES if few else facts.images <= MANY)
    if not facts.linear_head:
        return Ruled(fresh, "the network's head is not linear in its features, and cannot be solved")
    if not trains and not steers and _tells_by_distances(facts):
        return Ruled(
            strategy_of("KernelProbe"),
            f"distances to {facts.images:,} images, as the network's last {facts.head_stages} stages see them, tell as "
            "much as training on a processor would find in many times as long",
            MEASURED,
        )
    if facts.images * epochs >= _FRESH_FROM:
        return Ruled(
            fresh,
            f"{facts.images * epochs:,} images pass in all: enough for a fresh head, which fits the training images "
            "less than a solved one before the features have moved"
            + (f"; what the first stages see, {facts.images} images do not change for the better" if few else ""),
            MEASURED,
        )
    if facts.head_stages > 1 and not trains:
        return Ruled(
            strategy_of("LinearProbe", turned=True),
            f"{facts.images * epochs:,} images would pass in all: too few to teach the network more than a head finds "
            f"in its last {facts.head_stages} stages",
            "Evci et al. 2022, arXiv:2201.03529",
        )
    return Ruled(
        strategy_of("ProbeThenFineTune"),
        "a head that fits before the first step spares the features",
        "Kumar et al. 2022, arXiv:2202.10054",
    )


def _tells_by_distances(facts: Facts) -> bool:
    # On a GPU epochs take seconds; a network that has learned the images says nothing true of how near others are.
    able = facts.pretrained and facts.linear_head and facts.head_stages > 1 and not facts.multi_label
    fitting = facts.device == "cpu" and not facts.trained_here
    enough = facts.images >= max(_LEAST_COMPARED, _LEAST_OF_A_CLASS * facts.classes)
    return able and fitting and enough and facts.taught <= MOST_CENTRES


def head_stages(facts: Facts, solved: bool) -> Ruled:
    """How many of the backbone's last stages the classifier sees."""
    if facts.head_stages == 1:
        return Ruled(1, "of this network a head can see no more than the last stage")
    if not solved:
        return Ruled(1, "a fresh head waits for the last stage to learn what it needs", _measured(facts))
    return Ruled(
        facts.head_stages,
        "a solved head takes from earlier stages what the last has dropped because it did not matter in pretraining",
        "Evci et al. 2022, arXiv:2201.03529",
    )


def train_size(facts: Facts, strategy: str) -> Ruled:
    """Side of the images that are trained on.

    Args:
        facts: on images, weights and machine.
        strategy: by which the network is trained.
    """
    if facts.fixed_size:
        return Ruled(facts.weights_size, "the network takes no other size")
    own = max(_STRIDE, -(-facts.short_side // _STRIDE) * _STRIDE)
    if not facts.pretrained:
        if own < facts.weights_size:
            return Ruled(own, f"the images have {facts.short_side} px, and enlarging them costs time alone")
        return Ruled(facts.weights_size, "what networks of this kind are usually trained with")
    trains = strategy not in ALONE  # so that images pass often
    size = facts.weights_size
    if facts.device == "cpu":
        usual = size if strategy == "KernelProbe" else _CPU_SIZE
        size = min(usual, size, max(own, _CPU_ENLARGED if trains else _CPU_SIZE))
    if facts.short_side < size:
        return Ruled(
            size,
            f"images of {facts.short_side} px are enlarged: the weights know things as large as they were trained with",
            "Corley et al. 2023, arXiv:2305.13456",
        )
    if size < facts.weights_size and size == own:
        return Ruled(size, "the images have no more pixels")
    if size < facts.weights_size:
        spent = "on more epochs than on more pixels" if trains else "on more images than on more pixels of each"
        return Ruled(size, f"on a processor the time is better spent {spent}", MEASURED)
    return Ruled(size, "what the weights were trained with")


def head_alone(seconds: float) -> Ruled:
    """The strategy where a budget is too small to train more."""
    return Ruled(
        strategy_of("LinearProbe"),
        f"{in_words(seconds)} are not enough to train the backbone: a head on more pixels does better",
        MEASURED,
    )


def linear_head(seconds: float) -> Ruled:
    """The strategy where a budget is too small for distances."""
    return Ruled(strategy_of("LinearProbe"), f"{in_words(seconds)} are not enough to solve a head by distances")


def in_time(fitted: Fitted, seconds: float, size: Ruled, passes: Ruled) -> tuple[Ruled, Ruled]:
    """Size of training images and epochs, where there is a budget."""
    within = f"what fits into {in_words(seconds)}, as measured on this machine"
    if fitted.train_size != size.value:
        size = Ruled(fitted.train_size, within)
    if fitted.epochs != passes.value:
        passes = Ruled(fitted.epochs, within)
    return size, passes


def image_size(facts: Facts, trained: int) -> Ruled:
    """Side of the images that are evaluated and served."""
    if facts.fixed_size or not facts.pretrained:
        return Ruled(trained, "as in training")
    size = round(trained * _ENLARGED / _STRIDE) * _STRIDE
    return Ruled(
        max(size, trained),
        "networks learn from random crops, which show things enlarged; whole images need more pixels than crops of "
        f"{trained} px to show them as large",
        "Touvron et al. 2019, arXiv:1906.06423",
    )


def crop_fraction(facts: Facts) -> Ruled:
    """Share of the short side that evaluation keeps."""
    return Ruled(1.0, "the subject may reach to the border", _measured(facts))


def batch_size(facts: Facts) -> Ruled:
    """Images in a batch, on each device."""

    def steps(size: int) -> int:
        return facts.images // (size * facts.batches)

    size = _LARGEST_BATCH
    while size > _SMALLEST_BATCH and steps(size) < _STEPS_AN_EPOCH:
        size //= 2
    if size == _LARGEST_BATCH:
        return Ruled(size, "enough for batch normalisation, small enough for many steps", _measured(facts))
    if steps(size) < _STEPS_AN_EPOCH:
        few = f"{facts.images:,} images make fewer than {_STEPS_AN_EPOCH} steps an epoch even so"
        return Ruled(size, f"{few}, and smaller batches are too small to be measured", _measured(facts))
    reason = f"so that {facts.images:,} images make at least {_STEPS_AN_EPOCH} steps an epoch"
    return Ruled(size, reason, _measured(facts))


def epochs(facts: Facts) -> Ruled:
    """Passes over the training images."""
    if not facts.pretrained:
        return Ruled(_SCRATCH_EPOCHS, "from scratch; more of them would help")
    of_a_class = max(1, round(facts.images / facts.classes))
    number = min(_MOST_EPOCHS, _LEAST_EPOCHS + round(_OF_A_CLASS / of_a_class))
    return Ruled(
        number,
        f"few images of a class need more passes: {_LEAST_EPOCHS} + {_OF_A_CLASS} / {of_a_class:,} images a class"
        + (f", at most {_MOST_EPOCHS}" if number == _MOST_EPOCHS else ""),
        MEASURED,
    )


def reduced_epochs(facts: Facts, train_size: int, epochs: int, in_budget: bool) -> Ruled:
    """First epochs that train on smaller images, where all of a pretrained network is trained from a fresh head."""
    smaller = reduced_size(train_size)
    if facts.fixed_size or smaller == train_size:
        return Ruled(0, f"images of {train_size} px stay as large as they are: nothing smaller is left for the network")
    if in_budget:
        return Ruled(0, "the epochs of a budget are counted in whole images")
    if facts.device != "cpu":
        return Ruled(0, "smaller images have been shown to pay on processors alone")
    if epochs < _LEAST_TO_REDUCE:
        return Ruled(0, f"{epochs} passes are too few to begin with smaller images", MEASURED)
    return Ruled(
        epochs // 2,
        f"what is learned first is learned from {smaller} px, too, with {(smaller / train_size) ** 2:.0%} of the work",
        "Tan and Le 2021, arXiv:2104.00298",
    )


def smallest_crop(epochs: int) -> Ruled:
    """Least share of an image's area that training crops to."""
    share = min(_LARGEST_SHARE, max(_SMALLEST_SHARE, _SHARE_OF_AN_EPOCH / epochs**1.5))
    reason = f"{epochs} passes: what is seen more often has to look different more often"
    return Ruled(round(share, 2), reason, MEASURED)


def learning_rate(facts: Facts, batch_size: int) -> Ruled:
    """Of the backbone."""
    together = batch_size * facts.batches
    rate, _ = default_rates(facts.step_scale, facts.pretrained, together, facts.images)
    if not facts.pretrained:
        return Ruled(rate, "from scratch there is nothing to keep")
    if rate == MOST:
        return Ruled(rate, "the most that norms and biases can stand; the weights' own size would allow more", MEASURED)
    return Ruled(
        rate,
        f"a step of Adam is about its rate: {RELATIVE_STEP * growth(facts.images):.2g} of the weights' own size, "
        f"{facts.step_scale:.2g}, for {facts.images:,} images, times the square root of {together}/{USUAL_BATCH} for "
        "the noise of a batch",
        "after Shazeer and Stern 2018, arXiv:1804.04235; Malladi et al. 2022, arXiv:2205.10287",
    )


def head_learning_rate(facts: Facts, backbone: float, solved: bool) -> Ruled:
    """Of the classifier."""
    if solved:
        return Ruled(backbone, "the solved head is where it should be, and moves with the features", MEASURED)
    if not facts.pretrained:
        return Ruled(backbone, "as the backbone, from scratch")
    return Ruled(10 * backbone, "a fresh head has everything to learn", MEASURED)


def batch_norm(facts: Facts, batch_size: int) -> Ruled:
    """By which statistics images are normalised in training."""
    if not facts.pretrained:
        return Ruled("batch", "from scratch there are no statistics to keep")
    if batch_size < LEAST_FOR_STATISTICS:
        reason = f"batches of {batch_size} are too small to be measured; what was measured before is better"
        return Ruled("stored", reason, "Wu and He 2018, arXiv:1803.08494, figure 1")
    if facts.depthwise:
        reason = "an EfficientNet-Lite0, which has depthwise convolutions, too, learned more by statistics that stay"
        return Ruled("stored", reason, MEASURED)
    return Ruled("batch", f"batches of {batch_size} are enough to be measured", MEASURED)


def test_time_augmentation(facts: Facts, orientation: str) -> Ruled:
    """Views of an image that are averaged in evaluation and in the registered model."""
    if not facts.pretrained:
        return Ruled("none", "as it is served, in one pass")
    if orientation == "upright":
        return Ruled("none", "images must not be turned")
    return Ruled("flip", "an image and its mirror image, which takes twice as long where it is served", MEASURED)


def strategy_of(name: str, **arguments: bool | float) -> dict[str, Any]:
    """A strategy of ours, as the settings name it."""
    named: dict[str, Any] = {"class_path": f"pipeline.finetuning.{name}"}
    return {**named, "init_args": arguments} if arguments else named


def name_of(strategy: dict[str, Any]) -> str:
    """The class of a strategy."""
    name: str = strategy["class_path"].rpartition(".")[2]
    return name
