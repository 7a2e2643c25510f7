"""Going through the open settings in order, each chosen from the facts and what was chosen before."""

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from torch import Tensor

from datamodules import DataError, ImageDataModule
from datamodules.transforms import turns
from pipeline.errors import UserError
from pipeline.finetuning.features import task_features
from pipeline.finetuning.freezing import early_parameters
from pipeline.finetuning.head_alone import judges_training_images
from pipeline.finetuning.solving import held_out_together
from pipeline.home import cache_home
from pipeline.models.backbones import feature_widths
from pipeline.planning import rules
from pipeline.planning.budget import LINEAR, Budget, Fitted, distances
from pipeline.planning.facts import Facts
from pipeline.planning.orientation import TURNS, Recognised, try_turns
from pipeline.planning.plan import OPEN, Choice, Plan
from pipeline.planning.rules import Ruled
from pipeline.planning.timing import Stopwatch
from pipeline.precision import computing
from pipeline.settings import says_what_to_choose_by
from pipeline.task import ClassificationTask

TRAIN_SIZE, IMAGE_SIZE, CROP = (f"data.init_args.{name}" for name in ("train_size", "image_size", "crop_fraction"))
TRANSFORMS = "data.init_args.train_transforms"
ORIENTATION = "data.init_args.orientation"
VAL_FRACTION = "data.init_args.val_fraction"
BATCH_SIZE, VIEWS = "data.init_args.batch_size", "model.test_time_augmentation"
EPOCHS = "trainer.max_epochs"
STATISTICS = "model.batch_norm"
RATE, HEAD_RATE = "model.learning_rate", "model.head_learning_rate"
_TURNED = 400  # images that are tried in other orientations
_TURNED_SIZE = 128  # and their side: how a thing is turned shows in fewer pixels than what it is
_VIEWS = {"none": 1, "flip": 2, "flips": 4}  # of an image in evaluation
#: Settings of nothing but the training: whoever gives them another value than these wants the backbone to be trained.
_OF_TRAINING = {
    EPOCHS: None,
    "trainer.max_steps": -1,
    RATE: None,
    HEAD_RATE: None,
    "model.weight_decay": 0.05,
    "model.layer_decay": 1.0,
    "model.warmup_fraction": 0.1,
    STATISTICS: None,
    "model.dropout": 0.0,
    "model.mixing": "none",
    TRANSFORMS: "standard",
    "data.init_args.smallest_crop": None,
    "data.init_args.reduced_epochs": None,
    "patience": None,
}
_SIZES = (96, 128, 160, 192, 224)  # tried where there is a budget


@dataclass(frozen=True)
class Workbench:
    """What a plan is tried on: a datamodule and a task that nobody trains.

    Attributes:
        data: in no stage.
        task: with its weights loaded.
        precision: of the training, as the trainer names it.
        seed: of the run.
    """

    data: ImageDataModule
    task: ClassificationTask
    precision: str
    seed: int


class Planner:
    """Chooses what is open in the settings of ``fit``.

    Args:
        settings: the configuration of ``fit``; it is not changed.
        facts: on data, weights and machine.
        bench: to try things on.
        trains: whether the backbone is to be trained, however few images there are.
    """

    def __init__(self, settings: Any, facts: Facts, bench: Workbench, trains: bool) -> None:
        self.settings = settings
        self.facts = self._gathered = facts
        self.bench = bench
        self.trains = trains or any(self._given(name) != otherwise for name, otherwise in _OF_TRAINING.items())
        self.choices: dict[str, Choice] = {}

    def plan(self, seconds: float | None, started: float, precision: tuple[str, str]) -> Plan:
        """Choose everything that is open.

        Args:
            seconds: that the whole run may take; none: as long as it takes, and nothing is measured in time.
            started: ``time.perf_counter()`` when the program started.
            precision: of the training, and why.

        Raises:
            UserError: there is too little time, or features cannot be computed or kept.
        """
        told = says_what_to_choose_by(self.settings)
        if self.facts.draws_val and told:
            self._settle(VAL_FRACTION, rules.usual_val_fraction())
        elif self.facts.draws_val:
            self._hold_out()
        facts = self.facts
        passes = rules.epochs(facts)
        strategy = self._strategy(self._given(EPOCHS) or passes.value)
        size = rules.train_size(facts, rules.name_of(strategy.value))
        if (given := self._given(IMAGE_SIZE)) is not None:
            size = Ruled(given, "as image_size, which you set")
        expected = None
        if seconds is not None:
            strategy, fitted = self._fit(seconds, started, size, passes)
            size, passes = rules.in_time(fitted, seconds, size, passes)
            expected = fitted.seconds
        self._settle("trainer.precision", Ruled(*precision))
        chosen = rules.name_of(self._settle("finetuning", strategy))
        self._settle("model.head_stages", rules.head_stages(facts, chosen in rules.SOLVING))
        trained = self._settle(TRAIN_SIZE, size)
        self._settle(IMAGE_SIZE, rules.image_size(facts, trained))
        self._settle(CROP, rules.crop_fraction(facts))
        if chosen in rules.ALONE:
            if VAL_FRACTION in self.choices and not told:
                self._settle(VAL_FRACTION, rules.val_fraction(facts, self._judging(chosen)))
            if _argument(strategy.value, "turned"):
                self._settle(ORIENTATION, self._orientation)
            self._settle(EPOCHS, Ruled(1, "a formality: the head is solved before it, and nothing is trained"))
            for name in (BATCH_SIZE, VIEWS):  # nothing is chosen here, and evaluation follows who sets them
                if (given := self._given(name)) is not None:
                    self.choices[name] = Choice(name, given, by_user=True)
            return Plan(tuple(self.choices.values()), expected)
        batch_size = self._settle(BATCH_SIZE, rules.batch_size(facts))
        orientation = self._settle(ORIENTATION, self._orientation)
        epochs = self._settle(EPOCHS, passes)
        if chosen == "FullFineTuning" and facts.pretrained:
            reduced = rules.reduced_epochs(facts, trained, epochs, in_budget=seconds is not None)
            self._settle("data.init_args.reduced_epochs", reduced)
        # Whoever names another augmentation gets its own crops.
        if facts.pretrained and self.settings.get(TRANSFORMS) == "standard":
            self._settle("data.init_args.smallest_crop", rules.smallest_crop(epochs))
        rate = self._settle(RATE, rules.learning_rate(facts, batch_size))
        solved = chosen == "ProbeThenFineTune"
        self._settle(HEAD_RATE, rules.head_learning_rate(facts, rate, solved))
        self._settle(STATISTICS, rules.batch_norm(facts, batch_size))
        self._settle(VIEWS, rules.test_time_augmentation(facts, orientation))
        return Plan(tuple(self.choices.values()), expected)

    def _hold_out(self) -> None:
        """Decide whether images are held out for validation; what is not joins those that train."""
        held_out = self.facts
        self.facts = replace(held_out, images=held_out.taught, validated=0)
        without = rules.name_of(self._strategy(self._given(EPOCHS) or rules.epochs(self.facts).value).value)
        by_distances = self._judging(without) if without == "KernelProbe" else None
        if self._settle(VAL_FRACTION, rules.val_fraction(held_out, by_distances)) != 0:
            self.facts = held_out

    def _judging(self, strategy: str) -> str | None:
        """The strategy, where heads that it solves judge images that they have not seen."""
        return strategy if judges_training_images(self.bench.task) else None

    def _fit(self, seconds: float, started: float, size: Ruled, passes: Ruled) -> tuple[Ruled, Fitted]:
        """The strategy for what fits into the time, and what does, of what is not set."""
        bench, facts = self.bench, self.facts
        given = self._given(TRAIN_SIZE) or self._given(IMAGE_SIZE)
        if given is not None or facts.fixed_size:
            sizes = [given or size.value]
        else:
            largest = max(size.value, facts.weights_size) if facts.pretrained else size.value
            sizes = [tried for tried in {*_SIZES, size.value} if tried <= largest]
        both = [(tried, self._given(IMAGE_SIZE) or rules.image_size(facts, tried).value) for tried in sizes]
        precision = partial(computing, bench.precision, facts.device)
        strategy = self._strategy(passes.value)
        frozen = early_parameters(bench.task.network, _freeze_early(strategy.value))
        batch_size = self._given(BATCH_SIZE) or rules.batch_size(facts).value
        statistics = self._given(STATISTICS) or rules.batch_norm(facts, batch_size).value
        stopwatch = Stopwatch(
            bench.task,
            bench.data,
            size.value,
            batch_size,
            facts.first_device,
            facts.devices,
            precision,
            frozen,
            stored=statistics == "stored",
        )
        views = self._given(VIEWS)
        budget = Budget(
            seconds,
            lambda: time.perf_counter() - started,
            stopwatch.usual.at,
            stopwatch.training,
            facts,
            _VIEWS[views or "flip"],
            _VIEWS[views or "none"],
            self._seconds_of_turns(stopwatch, size.value) if self._tries_turns else 0.0,
            self.settings.registered_model_name is not None,
            *(distances(facts.images) if rules.name_of(strategy.value) == "KernelProbe" else LINEAR),
        )
        fit = partial(budget.fit, both, passes.value, given or size.value)
        if rules.name_of(strategy.value) == "KernelProbe" and self._given("finetuning") is None:
            with suppress(UserError):
                return strategy, fit(solving=1, epochs=0)
            # A linear head is solved sooner; images are held out for it, as they are without distances.
            strategy = rules.linear_head(seconds)
            budget = replace(budget, facts=self._gathered, head=LINEAR[0], judging=LINEAR[1])
            return strategy, budget.fit(both, passes.value, given or size.value, solving=1, epochs=0)
        if rules.name_of(strategy.value) in rules.ALONE:
            return strategy, fit(solving=self._solving(strategy), epochs=0)
        solvable = rules.name_of(rules.strategy(facts, 0, trains=True).value) == "ProbeThenFineTune"
        suffices = solvable and not self.trains and self._given("finetuning") is None
        train = partial(fit, suffices=suffices, epochs=self._given(EPOCHS))
        fitted = train(solving=0)
        if rules.name_of(self._strategy(fitted.epochs).value) == "ProbeThenFineTune":
            fitted = train(solving=1)
        strategy = self._strategy(fitted.epochs)
        if fitted.epochs and rules.name_of(strategy.value) in rules.ALONE:
            fitted = fit(solving=1, epochs=0)
        return (strategy if fitted.epochs else rules.head_alone(seconds)), fitted

    def _solving(self, strategy: Ruled) -> int:
        """Views of each training image that a head is solved on, at most."""
        if not _argument(strategy.value, "turned"):
            return 1
        return 1 + len(turns(self._given(ORIENTATION) or ("any" if self._tries_turns else "mirrored")))

    def _strategy(self, epochs: int) -> Ruled:
        """What is set, or what the rule says for so many epochs."""
        given = self._given("finetuning")
        if given is not None:
            return Ruled(given, "set by you")
        return rules.strategy(self.facts, epochs, self.trains, self._steers)

    @property
    def _steers(self) -> bool:
        """Whether a person has set what a head by distances has no use for, or was not measured with."""
        trainer = self.settings.trainer
        steps = trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val is not None
        narrow = self._given("model.head_stages") == 1
        return steps or narrow or self._given(ORIENTATION) is not None or says_what_to_choose_by(self.settings)

    def _given(self, setting: str) -> Any:
        """What a person has set; None where it is open."""
        given = self.settings.get(setting)
        if given in OPEN:
            return None
        return given.as_dict() if isinstance(given, Namespace) else given

    def _settle(self, setting: str, ruled: Ruled | Callable[[], Ruled]) -> Any:
        """The value that is set, or what the rule says."""
        given = self._given(setting)
        if given is not None:
            self.choices[setting] = Choice(setting, given, by_user=True)
            return given
        found = ruled() if callable(ruled) else ruled
        self.choices[setting] = Choice(setting, *found)
        return found.value

    @property
    def _tries_turns(self) -> bool:
        facts = self.facts
        is_open = self._given(ORIENTATION) is None
        return is_open and facts.pretrained and not facts.multi_label and facts.images <= rules.MANY

    def _seconds_of_turns(self, stopwatch: Stopwatch, size: int) -> float:
        pace = stopwatch.usual.at(self._turned_size(size))
        return min(_TURNED, self.facts.images) * (pace.with_reading(0.0) + (1 + len(TURNS)) * pace.embedding)

    def _turned_size(self, size: int) -> int:
        return size if self.facts.fixed_size else min(size, _TURNED_SIZE)

    def _orientation(self) -> Ruled:
        if not self._tries_turns:
            return Ruled("mirrored", "what is common for photographs; not tried here")
        folder = self._feature_folder()
        if not _is_writable(folder):
            return Ruled(
                "mirrored",
                f"what is common for photographs; not tried, because features cannot be kept in '{folder}'; set "
                "XDG_CACHE_HOME, or finetuning.features, to a folder that can be written to",
            )
        try:
            recognised = self._try_turns()
        except DataError:  # whether that is an error is settled later, with all such images named
            return Ruled("mirrored", "what is common for photographs; not tried, because there are unreadable images")
        if recognised is None:
            return Ruled("mirrored", "what is common for photographs; too few images to try it")
        return Ruled(recognised.orientation, recognised.in_words())

    def _feature_folder(self) -> Path:
        """Where the strategy will look for what is computed here."""
        named = (self._given("finetuning") or {}).get("init_args", {}).get("features")
        return cache_home("features") if named is None else Path(named).expanduser()

    def _try_turns(self) -> Recognised | None:
        bench = self.bench
        data, task = bench.data, bench.task
        size, crop = (self.choices[name].value for name in (IMAGE_SIZE, CROP))
        data.preprocessing = replace(data.preprocessing, size=self._turned_size(size), crop=crop)
        task.hparams["preprocessing"] = data.preprocessing.to_dict()
        task.to(self.facts.first_device)
        plain, folder = data.plain("train"), self._feature_folder()
        chosen = np.sort(np.random.default_rng(bench.seed).permutation(len(plain))[:_TURNED])
        images = data.images("train").at(chosen)
        digests = images.contents(folder / "contents.npy")

        @cache  # of the few images of this plan: each is read once, however often it is turned
        def read(rows: tuple[int, ...]) -> list[Tensor]:
            return list(data.plain_batches(plain, chosen[list(rows)].tolist()))

        features = {
            turn: task_features(
                task,
                lambda rows: read(tuple(rows)),
                digests,
                folder,
                partial(data.progress, "features"),
                bench.precision,
                partial(computing, bench.precision, self.facts.device),
                None if turn is None else TURNS[turn],
            )
            for turn in (None, *TURNS)
        }
        together = held_out_together(digests, images.groups)
        widths = feature_widths(task.network)
        return try_turns(features, plain.targets[chosen], self.facts.classes, together, bench.seed, widths)


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _freeze_early(strategy: dict[str, Any]) -> bool | float:
    """Which of the first stages a strategy leaves as they are."""
    return _argument(strategy, "freeze_early", usual=rules.name_of(strategy) == "ProbeThenFineTune")


def _argument(strategy: dict[str, Any], name: str, usual: bool = False) -> Any:
    return (strategy.get("init_args") or {}).get(name, usual)
