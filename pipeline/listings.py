"""Subcommands that tell what there is, without data and without training."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

from pipeline.errors import UserError
from pipeline.models.backbones import TIMM, create_backbone, default_preprocessing
from pipeline.models.sources import TORCHVISION, find_source, torchvision_weights
from pipeline.models.summary import count_parameters, family_table, on_meta
from pipeline.models.weights import Lineage


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")


def run_listing(arguments: Sequence[str]) -> None:
    """Run one of :data:`~pipeline.settings.LISTINGS`.

    Args:
        arguments: its name and its arguments.

    Raises:
        UserError: an argument or a backbone is unknown.
    """
    listings: dict[str, Callable[[Sequence[str]], None]] = {"backbones": _backbones, "weights": _weights}
    listings[arguments[0]](arguments[1:])


def _backbones(arguments: Sequence[str]) -> None:
    description = "The residual networks that model.backbone takes; timm/<model> is any classifier of timm beside them."
    _Parser("python -m pipeline backbones", description=description).parse_args(arguments)
    print(family_table())


def _weights(arguments: Sequence[str]) -> None:
    parser = _Parser("python -m pipeline weights", description="Published weights that fit a backbone.")
    parser.add_argument("--backbone", required=True, help="as in model.backbone: resnet50, timm/convnext_tiny, ...")
    backbone = parser.parse_args(arguments).backbone
    default_preprocessing(backbone)  # refuses an unknown name
    rows = list(published_weights(backbone))
    if not rows:
        print(f"No published weights are known for {backbone}; a file works: model.weights: path/to/file.safetensors")
        return
    width = max(len(row.address) for row in rows)
    print(f"{'model.weights':<{width}}  {'input':>6}  {'parameters':>11}  {'here':<4}  licence")
    for row in rows:
        here = "yes" if row.cached else "no"
        licence = Lineage(licence=row.licence).licence_in_words
        print(f"{row.address:<{width}}  {row.size:>3} px  {row.parameters / 1e6:>9.1f} M  {here:<4}  {licence}")


@dataclass(frozen=True)
class Published:
    """Weights that someone has published.

    Attributes:
        address: for ``model.weights``.
        size: height and width of the images, in pixels.
        parameters: of the whole network, with the head it was trained with.
        cached: whether they are on this machine.
        licence: None where none is stated.
    """

    address: str
    size: int
    parameters: int
    cached: bool
    licence: str | None


def published_weights(backbone: str) -> Iterator[Published]:
    """Weights under timm's tags and torchvision's names for an architecture, from the packages; needs no network."""
    import timm

    model = backbone.removeprefix(TIMM)

    @cache
    def parameters(num_classes: int) -> int:
        return count_parameters(on_meta(lambda: create_backbone(TIMM + model, num_classes)))

    if timm.is_model(model):
        for tag in timm.list_models(f"{model}.*", pretrained=True):
            record = timm.get_pretrained_cfg(tag)
            yield _published(TIMM + tag, parameters(record.num_classes))
    if not backbone.startswith(TIMM):
        for name, (architecture, weights) in torchvision_weights().items():
            if architecture == backbone:
                yield _published(TORCHVISION + name, weights.meta["num_params"])


def _published(address: str, parameters: int) -> Published:
    source = find_source(address)
    facts = source.facts()
    assert facts.preprocessing is not None
    return Published(address, facts.preprocessing["size"], parameters, source.cached(), facts.licence)
