"""Arguments of ``fit``, ``validate``, ``test`` and ``predict`` beside those of data, model and trainer; links."""

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.cli import LightningArgumentParser

from datamodules.base import Imbalance
from datamodules.preprocessing import Preprocessing
from pipeline.finetuning import Strategy
from pipeline.tracking.logger import MLflowLogger


def add_seed(parser: LightningArgumentParser) -> None:
    """The seed of a run. (Lightning's own also takes True, for a seed at random: a run that cannot be repeated.)"""
    parser.add_argument("--seed_everything", type=NonNegativeInt, default=0, help="seed of every random choice")


def add_arguments(parser: LightningArgumentParser) -> None:
    """Everything else, defaults, and links."""
    parser.add_argument(
        "--budget",
        type=str | None,
        default=None,
        help="fit: time for the whole run, such as 90s, 5m or 1h30m; none: as long as it takes",
    )
    parser.add_argument(
        "--monitor",
        type=str,
        default="auto",
        help="fit: validation metric that picks the best checkpoint and stops early: val/accuracy, val/macro_f1, "
        "val/loss or, where an image may have several classes, val/mean_average_precision; auto: accuracy where an "
        "image has one class and classes are even, macro-F1 otherwise, and without a patience an epoch before the last "
        "one is taken only if it is better by more than chance",
    )
    parser.add_argument(
        "--patience",
        type=int | None,
        default=None,
        help="fit: epochs without a better monitored metric before training stops; none: it never stops early, because "
        "the learning rate falls to zero at the last epoch, and an earlier one was not meant to be the end",
    )
    parser.add_argument(
        "--imbalance",
        type=Imbalance,
        default="none",
        help="fit: what is done for rare classes, one thing at a time: balanced_sampling draws every class equally "
        "often; weighted_loss lets rare classes weigh more; logit_adjustment takes the classes' shares out of what is "
        "learned",
    )
    parser.add_argument(
        "--registered_model_name",
        type=str | None,
        default=None,
        help="fit: register the tested model under this name, alias 'challenger'; none: do not register",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="validate, test, predict: CSV file for the predictions; predict: or a folder, filled with Parquet",
    )
    parser.add_argument("--quiet", action="store_true", help="plain lines instead of a progress bar")
    parser.add_class_arguments(MLflowLogger, "logger", skip={"folder"}, instantiate=False)
    parser.add_lightning_class_args(Strategy, "finetuning", subclass_mode=True, required=False)
    parser.set_defaults(
        {
            "data": {"class_path": "datamodules.ImageFolderDataModule"},
            "trainer.log_every_n_steps": 10,
            "trainer.num_sanity_val_steps": 0,  # the data is checked before, and the first epoch is soon over
        }
    )
    parser.link_arguments("seed_everything", "data.init_args.seed")
    parser.link_arguments("seed_everything", "model.seed", compute_fn=int)  # a plain type, for checkpoints
    parser.link_arguments("imbalance", "data.init_args.imbalance")
    parser.link_arguments("imbalance", "model.imbalance")
    parser.link_arguments("data.multi_label", "model.multi_label", apply_on="instantiate")
    parser.link_arguments("data.class_shares", "model.class_shares", apply_on="instantiate")
    parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")
    parser.link_arguments(
        "data.preprocessing",
        "model.preprocessing",
        compute_fn=Preprocessing.to_dict,
        apply_on="instantiate",
    )
