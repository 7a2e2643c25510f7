"""What fits into a given time: which resolution, and how many epochs of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.finetuning.kernel_ridge import MOST_CENTRES
from pipeline.finishing import ASKED_OF_EPOCHS, ASKED_OF_FAMILIARITY, LEAST_HELD_OUT
from pipeline.planning.duration import in_words
from pipeline.planning.facts import Facts
from pipeline.planning.timing import Pace

#: Share of the budget that is planned with; the rest is for what was not foreseen.
_PLANNED = 0.93
#: Seconds for solving a linear head, and for those that judge its training images.
LINEAR = (3.0, 3.0)
# Seconds for solving one that answers by distances: of a few images, and how many more of as many as it can.
_OF_FEW, _OF_MOST = 3.0, 9.0
# Seconds for what does not grow with the images, either: opening the tracked run and the first processes that read, and
# at the end starting two evaluations and closing the run; where it is asked for, exporting the model, logging it, and
# starting the process that proves it.
_OPENING, _CLOSING, _REGISTERING = 5.0, 7.0, 15.0
# Networks that answer validation images before one of them is handed over.
_NETWORKS = 3
# More epochs than this many times the usual number bring nothing.
_MOST_TIMES = 3
# With less than this share of the usual epochs, or with fewer pixels than usual, a trained network is hardly better
# than a head that is solved on more pixels.
_LEAST_SHARE = 3 / 4


def distances(images: int) -> tuple[float, float]:
    """The seconds of :data:`LINEAR` for a head that answers by distances to so many images; it judges them itself.

    Example:
        >>> distances(1_000)
        (4.125, 0.0)
    """
    # Matrices are decomposed, which takes the cube of their size.
    return _OF_FEW + _OF_MOST * (min(images, MOST_CENTRES) / MOST_CENTRES) ** 3, 0.0


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
        elapsed: how many of them have passed.
        pace: what an image takes to be read and answered, by its size.
        training: seconds that the network takes to learn from one, by its size; to ask takes seconds itself.
        facts: how many images there are.
        views: of an image that evaluation averages where the network is trained.
        views_of_head: that it averages where a head is solved and nothing trained.
        preparing: seconds of trying how images may be turned, where they will be.
        registers: whether the model is registered, which repeats the test in a process of its own.
        head: seconds of solving a head, beside its features.
        judging: seconds of solving those that judge the training images, where none validate.
    """

    seconds: float
    elapsed: Callable[[], float]
    pace: Callable[[int], Pace]
    training: Callable[[int], float]
    facts: Facts
    views: int
    views_of_head: int = 1
    preparing: float = 0.0
    registers: bool = False
    head: float = LINEAR[0]
    judging: float = LINEAR[1]

    def expected(self, train_size: int, image_size: int, epochs: int, solving: int) -> float:
        """Seconds that a run will have taken at its end.

        Args:
            train_size: side of the images that are trained on, in pixels.
            image_size: side of those that are evaluated.
            epochs: passes over the training images.
            solving: views of each training image that a head is solved on before; without epochs at least one.
        """
        return self._expected(train_size, image_size, epochs, solving, self.training(train_size) if epochs else 0.0)

    def _expected(self, train_size: int, image_size: int, epochs: int, solving: int, training: float) -> float:
        """The same where the network takes so many seconds to learn from an image."""
        facts, large = self.facts, self.pace(image_size)
        evaluated = facts.validated + facts.tested
        embedded = large.with_reading(large.embedding)
        answering = large.answering * (self.views if epochs else self.views_of_head)
        tried = (facts.images + evaluated) * large.reading / 2 / large.threads  # whether they can be read
        seconds = self.elapsed() + _OPENING + tried + evaluated * large.on_all_devices(answering) + _CLOSING
        if facts.validated >= LEAST_HELD_OUT or not epochs:
            # A head that is solved on several stages may leave what describes the training images.
            described = (facts.images if epochs or not facts.described_by_head else 0, facts.validated)
            seconds += sum(min(ASKED_OF_FAMILIARITY, count) for count in described) * embedded
        if self.registers:
            seconds += _REGISTERING + facts.tested * large.with_reading(answering)
        solving = solving if epochs else max(1, solving)
        if solving:
            seconds += solving * facts.images * embedded + self.head
        if not epochs and not facts.validated:
            seconds += self.judging
        if epochs or solving > 1:  # images are turned
            seconds += self.preparing
        if not epochs:
            return seconds
        chosen = _NETWORKS * min(ASKED_OF_EPOCHS, facts.validated) * large.embedding
        trained = facts.images * self.pace(train_size).on_all_devices(training)
        return seconds + chosen + epochs * (trained + facts.validated * large.on_all_devices(large.embedding))

    def fit(
        self,
        sizes: Sequence[tuple[int, int]],
        usual: int,
        usual_size: int,
        *,
        solving: int,
        suffices: bool = False,
        epochs: int | None = None,
    ) -> Fitted:
        """The most that fits: pixels up to the most there are while the usual number of epochs does, then epochs.

        Args:
            sizes: of images that are trained on, and that are evaluated, to choose from.
            usual: epochs without a budget.
            usual_size: of images that are trained on without a budget.
            solving: views of each training image that a head is solved on before; 0: none is.
            suffices: whether it may be left at that, where too little training would fit.
            epochs: that a person has set; none: as many as fit.

        Raises:
            UserError: not even a solved head does, or one epoch, or not as many as are set.
        """
        largest_first = sorted(sizes, reverse=True)
        larger = [both for both in largest_first if both[0] > usual_size]
        others = largest_first[len(larger) :]
        most, enough = _MOST_TIMES * usual, max(1, round(usual * _LEAST_SHARE))
        if epochs is not None:  # sizes, and the least and the most epochs, in the order in which they are wanted
            wanted = [(largest_first, epochs, epochs)]
        else:
            wanted = [(larger, usual, most), (others[:1], enough, most)]
            wanted.append((largest_first, 0, 0) if suffices else (others, 1, most))
        for among, least, up_to in wanted:
            fitted = self._first(among, least, up_to, solving)
            if fitted is not None:
                return fitted
        shortest = self.expected(*largest_first[-1], wanted[-1][1], solving) / _PLANNED
        raise UserError(
            f"--budget: expected at least {in_words(shortest)} for these images on this machine (of which "
            f"{in_words(self.elapsed())} have passed before training), found {in_words(self.seconds)}; allow more time "
            "or leave the budget out."
        )

    def _first(self, sizes: Sequence[tuple[int, int]], least: int, most: int, solving: int) -> Fitted | None:
        """The first size at which at least so many epochs fit, and how many do."""
        allowed = _PLANNED * self.seconds
        for train_size, image_size in sizes:
            # To learn from an image takes longer than to look at it, and nobody need measure how much longer where even
            # that is too long.
            if self._expected(train_size, image_size, least, solving, self.pace(train_size).embedding) > allowed:
                continue
            shortest = self.expected(train_size, image_size, least, solving)
            if shortest > allowed:
                continue
            if least == most:
                return Fitted(train_size, least, shortest)
            each = self.expected(train_size, image_size, least + 1, solving) - shortest
            more = min(most - least, int((allowed - shortest) // each))
            return Fitted(train_size, least + more, shortest + more * each)
        return None
