"""What was chosen, why, and by whom; how it is shown, kept, and put in place of what was left open."""

import json
import textwrap
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml
from jsonargparse import Namespace

#: What stands for a value that is to be chosen.
OPEN = (None, "auto")
_WIDTH = 118
_USER = "set by you"


@dataclass(frozen=True)
class Choice:
    """One setting.

    Attributes:
        setting: its name, such as ``model.learning_rate``.
        value: of plain types.
        reason: in words; empty where a person set it.
        source: of the rule: a paper, or where this project measured it.
        by_user: whether a person set it.
    """

    setting: str
    value: Any
    reason: str = ""
    source: str = ""
    by_user: bool = False

    @property
    def shown(self) -> str:
        """The value in a few characters."""
        value = self.value["class_path"] if isinstance(self.value, dict) else self.value
        if isinstance(value, str):
            return value.rpartition(".")[2] if value.startswith("pipeline.") else value
        return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Plan:
    """All choices of a run, in the order in which they were made.

    Attributes:
        choices: no setting twice.
        seconds: what the run is expected to take; None where that was not asked.
    """

    choices: tuple[Choice, ...]
    seconds: float | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What was chosen here, by setting; what a person set is not in it."""
        return {choice.setting: choice.value for choice in self.choices if not choice.by_user}

    def value_of(self, setting: str, otherwise: Any) -> Any:
        """What was chosen or set; something else where it was not asked."""
        return next((choice.value for choice in self.choices if choice.setting == setting), otherwise)

    def apply(self, settings: Any) -> None:
        """Put what was chosen into a configuration of ``fit``."""
        for setting, value in self.values.items():
            if isinstance(value, dict):
                value = Namespace(class_path=value["class_path"], init_args=Namespace(value.get("init_args", {})))
            settings[setting] = value

    def written_into(self, config: str) -> str:
        """A configuration in YAML with what was chosen in it; no budget is left, because nothing is open any more."""
        tree = yaml.safe_load(config)
        for setting, value in self.values.items():
            _put(tree, setting, value)
        tree["budget"] = None
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    def taken_over(self, settings: Any) -> "Plan":
        """This plan of an earlier run for one that goes on: what is open now is as it was."""
        choices = []
        for choice in self.choices:
            given = settings.get(choice.setting)
            if given in OPEN:
                choices.append(replace(choice, reason="as in the run that it goes on from", source="", by_user=False))
            else:
                value = given.as_dict() if isinstance(given, Namespace) else given
                choices.append(Choice(choice.setting, value, by_user=True))
        return Plan(tuple(choices))

    def on_another_machine(self, precision: str, reason: str) -> "Plan":
        """This plan with the precision that suits this machine, unless a person has set one."""
        here = Choice("trainer.precision", precision, reason)
        choices = (here if choice.setting == here.setting and not choice.by_user else choice for choice in self.choices)
        return replace(self, choices=tuple(choices))

    def lines(self) -> list[str]:
        """A table for people: setting, value, reason and source."""
        names = [choice.setting.replace(".init_args.", ".") for choice in self.choices]
        name_width = max(map(len, names), default=0)
        value_width = max((len(choice.shown) for choice in self.choices), default=0)
        lines = []
        for name, choice in zip(names, self.choices, strict=True):
            start = f"  {name:<{name_width}}  {choice.shown:<{value_width}}  "
            told = _USER if choice.by_user else choice.reason + (f" [{choice.source}]" if choice.source else "")
            lines += textwrap.wrap(told, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
        return lines

    def to_yaml(self) -> str:
        """The choices as a configuration that makes them again, each with its reason as a comment."""
        lines = [
            "# Made by `python -m pipeline plan`. Give it to fit after your own configuration: --config <this file>"
        ]
        tree: dict[str, Any] = {}
        for setting, value in self.values.items():
            _put(tree, setting, value)
        tree["budget"] = None  # it is spent in these choices, and would be measured and divided once more
        reasons = {choice.setting.rpartition(".")[2]: choice.reason for choice in self.choices if not choice.by_user}
        for line in yaml.safe_dump(tree, sort_keys=False).splitlines():
            reason = reasons.get(line.strip().partition(":")[0])
            lines.append(f"{line} # {reason}" if reason else line)
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Everything, to be read by :meth:`from_json`."""
        content = {"choices": [asdict(choice) for choice in self.choices], "seconds": self.seconds}
        return json.dumps(content, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """What :meth:`to_json` wrote."""
        content = json.loads(text)
        return cls(tuple(Choice(**choice) for choice in content["choices"]), content["seconds"])


def _put(tree: dict[str, Any], setting: str, value: Any) -> None:
    *sections, name = setting.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value
