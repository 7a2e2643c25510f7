"""What fits into a given time: which resolution, and how many epochs of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.planning.duration import in_words
from pipeline.planning.facts import Facts
from pipeline.planning.timing import Pace

#: Share of the budget that is planned with; the rest is for what was not foreseen.
_PLANNED = 0.93
# Seconds for what does not grow with the images: opening the tracked run, and closing it.
_OPENING, _CLOSING = 4.0, 3.0
# More epochs than this many times the usual number bring nothing.
_MOST_TIMES = 3
# Below this share of the usual epochs, fewer pixels are the better saving.
_LEAST_SHARE = 1 / 3


@dataclass(frozen=True)
class Fitted:
    """What was found to fit.

    Attributes:
        train_size: side of the images that are trained on, in pixels.
        epochs: passes over the training images; 0: the head is solved, and nothing trained.
        seconds: of the whole run.
    """

    train_size: int
    epochs: int
    seconds: float


@dataclass(frozen=True)
class Budget:
    """A time for a whole run.

    Attributes:
        seconds: from the start of the program to its end.
        spent: of them, before training begins.
        pace: what an image takes.
        facts: how many images there are.
        views: of an image that evaluation averages.
    """

    seconds: float
    spent: float
    pace: Pace
    facts: Facts
    views: int

    def expected(self, train_size: int, image_size: int, epochs: int, solved: bool) -> float:
        """Seconds that a run will have taken at its end.

        Args:
            train_size: side of the images that are trained on, in pixels.
            image_size: side of those that are evaluated.
            epochs: passes over the training images.
            solved: whether all training images pass the network once before.
        """
        facts, looked_at = self.facts, self.pace.at(image_size).evaluated
        each = (
            facts.images * self.pace.at(train_size).trained + facts.validated * self.views * looked_at
        ) / facts.devices
        trying = (facts.images + facts.validated + facts.tested) * self.pace.reading / 2 / self.pace.readers
        once = (
            facts.images * looked_at * solved
            + (facts.validated + facts.tested) * self.views * looked_at / facts.devices
        )
        return self.spent + _OPENING + trying + once + epochs * each + _CLOSING

    def fit(
        self, sizes: Sequence[tuple[int, int]], usual: int, usual_size: int, solved: bool, epochs: int | None = None
    ) -> Fitted:
        """The most that fits: pixels up to the most there are while the usual number of epochs does, then epochs.

        Args:
            sizes: of images that are trained on, and that are evaluated, to choose from.
            usual: epochs without a budget.
            usual_size: of images that are trained on without a budget.
            solved: whether the head is solved before.
            epochs: that a person has set; none: as many as fit.

        Raises:
            UserError: not even a solved head does, or not as many epochs as are set.
        """
        allowed = _PLANNED * self.seconds
        for train_size, image_size in sorted(sizes, reverse=True):
            start = self.expected(train_size, image_size, 0, solved)
            each = self.expected(train_size, image_size, 1, solved) - start
            if epochs is not None:
                most = least = epochs
            else:
                most = _MOST_TIMES * usual
                least = usual if train_size > usual_size else max(1, round(usual * _LEAST_SHARE))
            fitting = min(most, int((allowed - start) // each))
            if fitting >= least:
                return Fitted(train_size, fitting, start + fitting * each)
        shortest = None
        for train_size, image_size in sorted(sizes, reverse=True):
            shortest = self.expected(train_size, image_size, epochs or 0, solved)
            if solved and epochs is None and shortest <= allowed:
                return Fitted(train_size, 0, shortest)
        assert shortest is not None
        raise UserError(
            f"--budget: expected at least {in_words(shortest / _PLANNED)} for these images on this machine (of which "
            f"{in_words(self.spent)} have passed before training), found {in_words(self.seconds)}; allow more time or "
            "leave the budget out."
        )
