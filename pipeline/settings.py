"""What the command line takes; settings that would be ignored, or fail only after hours, are refused at once.

Imports nothing heavy: the command line looks here before anything else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

#: What the command line can do with data and a model.
SUBCOMMANDS = ("fit", "validate", "test", "predict")
#: What it can do without training, or by calling itself.
UNTRAINED = ("audit", "plan", "find", "convert", "crossvalidate", "register", "promote", "sync")
#: What it can tell without either.
LISTINGS = ("backbones", "weights")

#: Settings that follow from others, with the reason; set by hand they would be ignored.
FOLLOWING = {
    "model.classes": "the classes come from the training data",
    "model.preprocessing": "the preprocessing comes from the backbone and its weights",
    "data.classes": "the classes come from the training data",
    "data.preprocessing": "the preprocessing comes from the backbone and its weights",
    "data.seed": "order and augmentation follow seed_everything; the split has data.split_seed",
    "data.multi_label": "it follows from the data (data.separator)",
    "data.imbalance": "it follows the setting imbalance, beside data and model",
    "model.seed": "it follows seed_everything",
    "model.multi_label": "it follows from the data (data.separator)",
    "model.imbalance": "it follows the setting imbalance, beside data and model",
    "model.class_shares": "it follows from the training data",
}

#: Precisions that networks are trained in, by the names that Lightning has for them.
_PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")

#: Settings of the trainer that leave out images which results are reported for, with the values that do not.
_WHOLE_DATA = {
    "fast_dev_run": (False, 0, None),
    "overfit_batches": (0, 0.0, None),
    "limit_val_batches": (1.0, None),
    "limit_test_batches": (1.0, None),
    "limit_predict_batches": (1.0, None),
}


def refuse_following(args: Sequence[str], files: Mapping[str, Any]) -> None:
    """Refuse settings that follow from others.

    Args:
        args: the command line.
        files: content of the configuration files, by name.

    Raises:
        UserError: one of :data:`FOLLOWING` is set; the message says where.
    """
    for key, reason in FOLLOWING.items():
        section, name = key.split(".")
        flags = (f"--{section}.{name}", f"--{section}.init_args.{name}")
        places = [arg for arg in args if arg.split("=")[0] in flags]
        for file, content in files.items():
            inside = content.get(section) if isinstance(content, dict) else None
            if isinstance(inside, dict):
                given = (inside.get(name), (inside.get("init_args") or {}).get(name))
                # A null, as `--print_config` writes it, sets nothing.
                if any(value is not None for value in given):
                    places.append(file)
        if places:
            raise UserError(f"{key}: expected no value, found one in {', '.join(places)}; remove it: {reason}.")


def check_settings(settings: Any) -> None:
    """Refuse values that the parser takes and nothing can be done with.

    Args:
        settings: the configuration of a subcommand.

    Raises:
        UserError: names the setting.
    """
    trainer = settings.trainer
    if settings.patience is not None and settings.patience < 1:
        raise UserError(f"patience: expected at least 1 epoch, found {settings.patience}.")
    if trainer.max_epochs is not None and trainer.max_epochs < 1:
        raise UserError(
            f"trainer.max_epochs: expected at least 1 (the learning rate falls to zero at the last), found "
            f"{trainer.max_epochs}; set a number, or leave it out."
        )
    if (together := trainer.accumulate_grad_batches) < 1:
        raise UserError(f"trainer.accumulate_grad_batches: expected at least 1, found {together}; leave it out.")
    if trainer.precision is not None and str(trainer.precision) not in _PRECISIONS:
        raise UserError(
            f"trainer.precision: expected 32-true, bf16-mixed or 16-mixed (weights are kept in 32 bits), found "
            f"{trainer.precision}; set one of these, or leave it out."
        )
    for name, harmless in _WHOLE_DATA.items():
        if trainer[name] not in harmless:
            raise UserError(
                f"trainer.{name}: expected no value, found {trainer[name]}; remove it: results are of whole splits. "
                "For a quick trial use a small folder and trainer.max_epochs 1."
            )
    if settings.registered_model_name is not None:
        require_model_name("registered_model_name", settings.registered_model_name)
    if settings.output is not None and not Path(settings.output).expanduser().resolve().parent.is_dir():
        raise UserError(f"--output: expected a file in an existing folder, found '{settings.output}'; make the folder.")


def says_what_to_choose_by(settings: Any) -> bool:
    """Whether a person has said, by a metric or a patience, which epoch of ``fit`` to hand over.

    Args:
        settings: the configuration of ``fit``.
    """
    return settings.monitor != "auto" or settings.patience is not None


def require_model_name(setting: str, name: str) -> None:
    """Refuse a name that the registry does not take.

    Args:
        setting: what it was given as.
        name: of a registered model.

    Raises:
        UserError: see above.
    """
    if not name.strip() or set("/:") & set(name):
        raise UserError(f"{setting}: expected a name without '/' and ':', found '{name}'.")
