"""Turning exceptions into one line that says what was expected, what was found and what to do."""

import argparse
import inspect
import re
from collections.abc import Iterator

from datamodules import DataError, ImageDataModule
from pipeline.errors import UserError, in_one_line, near_matches
from pipeline.settings import FOLLOWING

_UNKNOWN_KEY = re.compile(
    r"does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)|Option '([^']+)' is not accepted"
)
_LINKED_KEY = re.compile(r'Linked "([^"]+)" must be given via|argument \S+ --> (\S+): invalid')
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_ABSTRACT_CLASS = re.compile(r"class, but (\S+ )?is abstract")
_CHOICES = re.compile(r"\[('[^\]]*')\], found (\S+)$")
# How the parser reports that a class did not accept its arguments.
_REFUSED_BY_A_CLASS = "Does not validate against any of the Union subtypes"
_KIND = "Expected a "
_MISSING = re.compile(r"the following arguments are required: ([\w.]+)")
_PARSER_KEY = re.compile(r'Parser key "([^"]+)"')
# Lines of the parser's report that name a way out nobody asked for, or repeat the input.
_BOILERPLATE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Parser key|Problem with given class"
)


def explain(error: BaseException) -> str | None:
    """One line for a mistake that a person can mend; None for a failure of the program.

    Args:
        error: what was raised; its causes are looked at too, because the parser wraps exceptions of ours.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, UserError | DataError):
            return in_one_line(cause)
    text = str(error)
    if isinstance(error, argparse.ArgumentError):
        return _explain_parser(text)
    if text.startswith(_REFUSED_BY_A_CLASS):
        return " ".join(line.strip() for line in str(causes[-1]).splitlines()[:3] if line.strip())
    if re.search("Connection (closed|reset) by peer", text):
        return "another process of this run has failed; its message stands above"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explain_parser(text: str) -> str:
    if match := _UNKNOWN_KEY.search(text):
        prefix = "".join(f"{part}." for part in _PARSER_KEY.findall(text))
        key = prefix + next(group for group in match.groups() if group)
        return f"{key}: expected a known setting, found none of this name; {_advice(key)}"
    if match := _LINKED_KEY.search(text):
        key = (match[1] or match[2]).replace(".init_args.", ".")
        reason = FOLLOWING.get(key, "it follows from other settings")
        return f"{key}: expected no value, found one; remove it: {reason}."
    keys = ".".join(_PARSER_KEY.findall(text))
    if match := _MISSING.search(text):
        key = f"{keys}.{match[1]}".strip(".")
        return f"{key}: expected a value, found none; give --{key} <value>, or set it in the configuration."
    match, abstract = _UNKNOWN_CLASS.search(text), _ABSTRACT_CLASS.search(text)
    if (match or abstract) and keys in _classes():
        known = _classes()[keys]
        found, hint = (
            (f"'{match[1]}'", near_matches(match[1], known)) if match else ("a base class that they share", "")
        )
        return (
            f"{keys}: expected {', '.join(known)} or the import path of such a class, found {found}; "
            f"{hint}set {keys} to a known name, before settings of its own."
        )
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    leaves = list(dict.fromkeys(line for line in lines if line and not _BOILERPLATE.search(line)))
    if not leaves:
        leaves = [_PARSER_KEY.sub("", text).strip(" :")]
    # What kind of value an alternative would have been is worth saying only where nothing says more.
    kinds = [leaf for leaf in leaves if leaf.startswith(_KIND)]
    telling = [leaf for leaf in leaves if not leaf.startswith(_KIND)]
    detail = "; ".join(telling) if telling else "expected " + " or ".join(kind.removeprefix(_KIND) for kind in kinds)
    detail = re.sub(r"<class '([\w.]+)'>", r"\1", detail.replace("typing.Literal", "")).replace(
        ". Got value: ", ", found "
    )
    given = re.findall(r"Given value: (.+)", text)
    found = f", found {given[0]}" if kinds and not telling and given and ", found " not in detail else ""
    detail = _in_words(f"{detail}{found}")
    return f"{keys}: {detail}" if keys else detail


def _in_words(detail: str) -> str:
    """Known values without brackets, and those that a wrong one comes near to."""
    if not (match := _CHOICES.search(detail)):
        return detail
    names = re.findall(r"'([^']+)'", match[1])
    close = near_matches(match[2], names).strip()
    return f"{detail[: match.start()]}{', '.join(names)}, found {match[2]}{f'; {close}' if close else ''}"


def _advice(key: str) -> str:
    if key.rpartition(".")[2] == "num_classes":
        return "remove it: the number of classes is that of the training data."
    return f"{near_matches(key, _settings())}see --help, or --data.help for those of the data."


def _classes() -> dict[str, list[str]]:
    """Names of classes that a setting takes."""
    import datamodules
    import pipeline.finetuning

    return {
        "data": [name for name in datamodules.__all__ if name.endswith("DataModule") and name != "ImageDataModule"],
        "finetuning": [name for name in pipeline.finetuning.__all__ if name != "Strategy"],
    }


def _settings() -> list[str]:
    from lightning.pytorch import Trainer

    import datamodules
    from pipeline.task import ClassificationTask
    from pipeline.tracking.logger import MLflowLogger

    owners = {
        "model": ClassificationTask,
        **{f"data {name}": getattr(datamodules, name) for name in _classes()["data"]},
        "data": ImageDataModule,
        "trainer": Trainer,
        "logger": MLflowLogger,
    }
    names = [
        f"{section.partition(' ')[0]}.{name}"
        for section, owner in owners.items()
        for name, parameter in inspect.signature(owner).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    inside = [f"data.init_args.{name.removeprefix('data.')}" for name in names if name.startswith("data.")]
    own = [
        "seed_everything",
        "finetuning",
        "monitor",
        "imbalance",
        "patience",
        "registered_model_name",
        "output",
        "quiet",
        "ckpt_path",
        "config",
    ]
    return [name for name in (*names, *inside, *own) if name.replace(".init_args.", ".") not in FOLLOWING]
