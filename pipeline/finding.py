"""``python -m pipeline find``: a learning rate or a batch size by trial, with Lightning's tuner.

Neither is needed: the plan chooses both without a trial. This is for whoever wants to see how the loss takes larger
steps, or how much the device's memory holds. One device tries, wherever several would train.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.tuner import Tuner
from matplotlib.figure import Figure

from pipeline.errors import UserError
from pipeline.exits import SUCCESS
from pipeline.parsing import BESIDE_FIT, Parser
from pipeline.planning.facts import named_devices
from pipeline.planning.plan import Plan
from pipeline.progress import say
from pipeline.untrained import UntrainedCLI

# Of rates that are tried: below, nothing moves; above, everything breaks.
_LEAST_RATE, _LARGEST_RATE = 1e-7, 1.0
_UNSETTLED = 10  # steps whose running mean of the loss is too low
_FEWEST_STEPS = 30
_SHOWN = 12  # rates
_EPOCHS = 10_000  # more than a trial has: the steps end it, however few images there are
_PICTURES = (".png", ".svg", ".pdf")
_FIRST_BATCH = 8
_STEPS_A_BATCH_SIZE = 3


class FindCLI(UntrainedCLI):
    """The settings of ``fit`` with a trainer that keeps nothing."""

    plans = True
    trains = True

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        # What is found must hold for the images with which the training ends.
        self.settings.data.init_args.reduced_epochs = 0

    def make_plan(self) -> Plan:
        # Batches are tried on one device, and what is chosen for them must fit them.
        trainer = self.settings.trainer
        trainer.devices, trainer.num_nodes, trainer.strategy = one_device(trainer.devices), 1, "auto"
        return super().make_plan()

    def instantiate_trainer(self, **_: Any) -> Trainer:
        keeps_nothing = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return self.make_trainer(callbacks=[self.strategy], max_epochs=_EPOCHS, **keeps_nothing)


def one_device(given: Any) -> Any:
    """A trainer's setting for one of the devices that another means: the first that is named, or any.

    Args:
        given: ``trainer.devices``.
    """
    return named_devices(given)[:1] or 1


def run_find(arguments: Sequence[str], terminal: bool, started: float) -> int:
    """Try rates or batch sizes, and print what was found; weights, statistics and files stay as they are.

    Args:
        arguments: of this command; those it does not know are settings of ``fit``.
        terminal: whether a person is looking.
        started: ``time.perf_counter()`` when the program started.

    Returns:
        The exit code.

    Raises:
        UserError: an argument is wrong, or the trial says nothing.
        DataError: the data is not as described.
    """
    parser = Parser("find", "Find a learning rate or a batch size by trial; fit does without.", BESIDE_FIT)
    parser.add_argument("what", choices=["learning_rate", "batch_size"], help="what is tried")
    parser.add_argument("--steps", type=int, default=100, help="learning_rate: of the trial; default: %(default)s")
    parser.add_argument("--to", metavar="FILE", help="learning_rate: a picture of the loss by rate, PNG or SVG")
    parser.add_argument("--most", type=int, default=1024, help="batch_size: the largest tried; default: %(default)s")
    own, others = parser.parse_known_args(arguments)
    if own.steps < _FEWEST_STEPS:
        raise UserError(f"--steps: expected at least {_FEWEST_STEPS}, found {own.steps}.")
    if own.most < _FIRST_BATCH:
        raise UserError(f"--most: expected at least {_FIRST_BATCH}, found {own.most}.")
    if own.to is not None and not Path(own.to).expanduser().resolve().parent.is_dir():
        raise UserError(f"--to: expected a file in an existing folder, found '{own.to}'; make the folder.")
    if own.to is not None and Path(own.to).suffix.lower() not in _PICTURES:
        raise UserError(f"--to: expected a name that ends in {' or '.join(_PICTURES)}, found '{own.to}'.")
    if own.what == "learning_rate":
        _find_rate(own.steps, own.to, others, terminal, started)
    else:
        _find_batch_size(own.most, others, terminal, started)
    return SUCCESS


def _find_rate(steps: int, picture: str | None, others: Sequence[str], terminal: bool, started: float) -> None:
    cli = FindCLI(["fit", *others], terminal, started)
    if not cli.strategy.takes_steps:
        raise UserError(
            f"learning_rate: expected a strategy that takes steps, found {type(cli.strategy).__name__}, which solves "
            "the head; set finetuning to another one."
        )
    found = Tuner(cli.trainer).lr_find(
        cli.model,
        datamodule=cli.datamodule,
        min_lr=_LEAST_RATE,
        max_lr=_LARGEST_RATE,
        num_training=steps,
        update_attr=False,
    )
    assert found is not None
    rates, losses = (np.array(found.results[name])[_UNSETTLED:] for name in ("lr", "loss"))
    rates, losses = rates[np.isfinite(losses)], losses[np.isfinite(losses)]
    if len(losses) < 2:
        raise UserError("learning_rate: expected losses to suggest a rate by, found too few; raise --steps.")
    for row in np.unique(np.linspace(0, len(losses) - 1, _SHOWN).astype(int)):
        say(f"  rate {rates[row]:.1e}  loss {losses[row]:.4f}")
    # By the logarithm of the rate: the tuner's own suggestion goes by the rate itself, among which the smallest lie so
    # closely together that noise between them is the steepest fall.
    # And no farther than to the least loss: at larger rates it explodes, and falls again from there.
    falling = slice(max(2, int(np.argmin(losses)) + 1))
    steepest = int(np.argmin(np.gradient(losses[falling], np.log(rates[falling]))))
    say(f"with one device, one rate for all layers and a fresh head, the loss falls steepest at {rates[steepest]:.1e}")
    say(f"the plan chooses {cli.model.hparams['learning_rate']:.1e} for the backbone")
    if picture is not None:
        _draw(rates, losses, steepest, Path(picture).expanduser())
        say(f"picture in {picture}")
    say(f"to train so   --model.learning_rate={rates[steepest]:.1e}")


def _draw(rates: np.ndarray, losses: np.ndarray, suggested: int, file: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(rates, losses)
    axes.plot(rates[suggested], losses[suggested], "o", label=f"falls steepest: {rates[suggested]:.1e}")
    axes.set(xlabel="learning rate", ylabel="loss of the training (running mean)")
    axes.legend()
    figure.savefig(file)


def _find_batch_size(most: int, others: Sequence[str], terminal: bool, started: float) -> None:
    cli = FindCLI(["fit", *others], terminal, started)
    images = len(cli.datamodule.table.rows("train"))
    most = min(most, images)
    found = Tuner(cli.trainer).scale_batch_size(
        cli.model,
        datamodule=cli.datamodule,
        steps_per_trial=_STEPS_A_BATCH_SIZE,
        init_val=min(_FIRST_BATCH, images),
        max_val=most + 1,  # which the tuner does not try
    )
    assert found is not None  # but in a run that is for trying the program alone
    limit = "memory"
    if found > most:  # the tuner doubled what it had tried before it looked at the limit
        found //= 2
        limit = f"there are {images:,}" if most == images else "more were not tried"
    say(f"batches of {found} images fit ({limit})")
    say(f"to train so   --data.batch_size={found}")
