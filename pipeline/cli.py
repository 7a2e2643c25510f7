"""``python -m pipeline``: subcommands, exit codes, and errors as one clear line.

Imports nothing heavy, so that ``--help`` and a mistyped subcommand answer at once; LightningCLI and torch are imported
when a subcommand runs.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from pipeline.allocator import keep_freed_memory
from pipeline.errors import UserError, in_one_line, near_matches
from pipeline.exits import FAILURE, INTERRUPTED, SUCCESS, TERMINATED, USAGE, Terminated, raising_terminated
from pipeline.garbage import collecting_nothing
from pipeline.settings import LISTINGS, SUBCOMMANDS, UNTRAINED

HELP = """usage: python -m pipeline <subcommand> [--config FILE] [--<setting> VALUE ...]

Fine-tune a pretrained ResNet on your own labelled images.

  fit            train, test the best checkpoint, track the run in MLflow, register the model
  validate       metrics of a checkpoint on the validation images
  test           metrics of a checkpoint on the test images
  predict        a CSV of predictions for a folder of images
  audit          what is wrong with the data: duplicates, leaks, unreadable files, wrong labels; --strict
  plan           what fit would choose, and why: sizes, epochs, rates; --budget 5m, --to plan.yaml
  find           a learning rate or a batch size by trial; fit needs neither
  register       a run's best checkpoint as the challenger in the model registry, once it has repeated its test there
  promote        the challenger to champion, if it is no worse by the rules; --dry-run, --rollback
  crossvalidate  fit once for each of --folds parts, and test on all images together
  convert        put the data into chunks for streaming, --to FOLDER or s3://...
  sync           send what the tracking server missed of a run, and end runs whose process is gone
  backbones      the residual networks: layers, parameters, multiply-adds
  weights        published weights of a backbone: licence, input size, parameters, whether they are here

  --config FILE     settings in YAML; see configs/
  --quiet           plain lines instead of a progress bar
  --traceback       where an error came from
  <subcommand> --help, --data.help, --print_config     every setting

example: python -m pipeline fit --config configs/finetune.yaml --data.root my_images
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: without the program's name; None: those of the process.

    Returns:
        The exit code: 0; 1 a failure of the program; 2 a mistake that the person can mend; 3 a strict audit found leaks
        or unreadable images; 4 a challenger was not promoted; 130 interrupted; 143 terminated.
    """
    started = time.perf_counter()
    arguments = list(sys.argv[1:] if args is None else args)
    wants_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return SUCCESS if arguments else USAGE
    keep_freed_memory()
    try:
        with raising_terminated():
            return _run(arguments, started)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("terminated" if terminated else "interrupted", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    except Exception as error:
        message = in_one_line(error) if isinstance(error, UserError) else _explain(error)
        if message is None or wants_traceback:
            traceback.print_exc()
        if message is None:
            return FAILURE
        print(f"error: {message}", file=sys.stderr)
        return USAGE


def _explain(error: Exception) -> str | None:
    from pipeline.messages import explain

    return explain(error)


def _run(arguments: list[str], started: float) -> int:
    if arguments[0] in LISTINGS:
        from pipeline.listings import run_listing

        run_listing(arguments)
        return SUCCESS
    if arguments[0] not in (*SUBCOMMANDS, *UNTRAINED):
        known = (*SUBCOMMANDS, *UNTRAINED, *LISTINGS)
        raise UserError(
            f"expected a subcommand ({', '.join(known)}) first, found '{arguments[0]}'; "
            f"{near_matches(arguments[0], known)}see python -m pipeline --help."
        )
    with collecting_nothing():
        from pipeline.transfer_cli import TransferCLI
        from pipeline.untrained import run_untrained

    _hush()  # after the import: Lightning sets its loggers up then
    if arguments[0] in UNTRAINED:
        return run_untrained(arguments, sys.stdout.isatty(), started)
    TransferCLI(arguments, terminal=sys.stdout.isatty(), started=started)
    return SUCCESS


def _hush() -> None:
    """Keep libraries from telling people what they cannot act on; each line has its reason."""
    # Devices found, the seed, tips for other products: what matters of it is in our own lines.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Creating and upgrading the tables of a new local store.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The run folder is made, with the configuration in it, before the first checkpoint.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Lightning 2.6.6 asks torch 2.15 in the old way; nothing a person could do about.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # Evaluation needs the network of a checkpoint, not what stopped or saved its training.
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
    # It is: the datamodule keeps the position, where Lightning does not look for it.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    # A run that goes on in a folder of its own starts its best checkpoint anew.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    # Saving transforms that were given in YAML writes their tuples as lists, which albumentations takes as well.
    warnings.filterwarnings("ignore", message=r"\s*Dump of a value that does not round-trip")
    # What is odd about an image is either read all the same, or a reason that we name with the file.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    # Few images are not held out for validation, and that is said where people look.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    # Our metrics are kept by epoch; small data sets have fewer steps in one than the logging interval.
    warnings.filterwarnings("ignore", message="The number of training batches")
