"""Subcommands that tell what there is, without data and without training."""

from collections.abc import Callable, Sequence
from functools import cache, partial

from pipeline.models.backbones import create_backbone, default_preprocessing, head_name
from pipeline.models.sources import find_source, published_addresses
from pipeline.models.summary import count_parameters, family_table, on_meta
from pipeline.models.weights import Lineage
from pipeline.parsing import Parser


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
    Parser("backbones", description).parse_args(arguments)
    print(family_table())


def _weights(arguments: Sequence[str]) -> None:
    parser = Parser("weights", "Published weights that fit a backbone.")
    parser.add_argument("--backbone", required=True, help="as in model.backbone: resnet50, timm/convnext_tiny, ...")
    backbone = parser.parse_args(arguments).backbone
    default_preprocessing(backbone)  # refuses an unknown name
    addresses = published_addresses(backbone)
    if not addresses:
        print(f"No published weights are known for {backbone}; a file works: model.weights: path/to/file.safetensors")
        return
    width = max(map(len, addresses))
    print(f"{'model.weights':<{width}}  {'input':>6}  {'parameters':>11}  {'here':<4}  licence")
    for address in addresses:
        source = find_source(address)
        facts = source.facts()
        assert facts.preprocessing is not None
        size, millions = facts.preprocessing["size"], _parameters(backbone, facts.outputs) / 1e6
        here = "yes" if source.cached() else "no"
        licence = Lineage(licence=facts.licence).licence_in_words
        print(f"{address:<{width}}  {size:>3} px  {millions:>9.1f} M  {here:<4}  {licence}")


@cache
def _parameters(backbone: str, outputs: int | None) -> int:
    network = on_meta(partial(create_backbone, backbone, num_classes=1))
    head = network.get_submodule(head_name(network))
    body = count_parameters(network) - count_parameters(head)
    # Weights may have been published without a head; else it has a weight for each feature, and a bias, per output.
    return body + (outputs or 0) * count_parameters(head)
