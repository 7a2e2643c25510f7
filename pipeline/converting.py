"""``python -m pipeline convert``: any data source into chunks that can be streamed."""

from collections.abc import Sequence
from dataclasses import replace

from datamodules.checking import name_unreadable, unreadable_images
from datamodules.conversion import convert
from datamodules.errors import DataError
from pipeline.parsing import BESIDE_FIT, Parser
from pipeline.progress import Meter, say
from pipeline.untrained import UntrainedCLI


def run_convert(arguments: Sequence[str], terminal: bool, started: float) -> int:
    """Try every image, then write all of them with their splits.

    The splits of ``fit`` with the same settings are written, and later taken as given.

    Args:
        arguments: of this command; those it does not know are settings of ``fit``.
        terminal: whether a person is looking.
        started: ``time.perf_counter()`` when the program started.

    Returns:
        The exit code.

    Raises:
        UserError: an argument is wrong.
        DataError: an image cannot be read, or the address cannot be written.
    """
    parser = Parser("convert", "Put the data into chunks for streaming.", BESIDE_FIT)
    parser.add_argument("--to", required=True, metavar="ADDRESS", help="an empty folder, or s3://bucket/folder")
    parser.add_argument("--chunk_megabytes", type=int, default=64, help="size of a chunk; default: 64")
    own, others = parser.parse_known_args(arguments)
    # The network is not needed, nor its weights, which may be out of reach.
    data = UntrainedCLI(
        ["fit", *others, "--model.weights=null", "--model.backbone=resnet18"], terminal, started
    ).datamodule
    listing, meter = data.table.listing, Meter(terminal)
    reasons = unreadable_images(data.everything(), lambda done, total: meter("trying", done, total))
    if reasons and data.unreadable == "error":
        described = [f"{listing.storage.describe(row)} ({why})" for row, why in reasons.items()]
        raise DataError(name_unreadable(described, len(listing.paths)))
    listing = replace(listing, given=list(data.table.splits)).without(set(reasons))
    convert(listing, own.to, own.chunk_megabytes, progress=lambda done, total: meter("writing", done, total))
    left_out = f", {len(reasons):,} unreadable ones left out" if reasons else ""
    say(f"{len(listing.paths):,} images in {own.to}{left_out}")
    say(f"next: python -m pipeline fit --data StreamingDataModule --data.root {own.to} --config <the same settings>")
    return 0
