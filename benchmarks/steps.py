"""What a training step of ResNet-18 takes, eager, compiled, in float32, with a fused optimizer or with the first stages
kept, and what an evaluated image takes in smaller and larger batches.

    python benchmarks/steps.py                          # four minutes on two cores with bf16, nine without
    python benchmarks/steps.py --device cuda --size 224 --batch 128

Weights and images are random: neither changes what a step takes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.allocator import keep_freed_memory
from pipeline.finetuning.freezing import early_parameters, freeze, hold_still
from pipeline.models.backbones import create_backbone
from pipeline.precision import computing, full_float32, pick_precision

STEPS, ROUNDS = 8, 3
EVALUATION_BATCHES, EVALUATED = (16, 32, 64, 128), 256

Step = Callable[[], object]
Name = TypeVar("Name")


def images_of(device: str, size: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)


def training(
    images: Tensor, precision: str, *, compiled: bool = False, fused: bool = False, kept: bool | float = False
) -> Step:
    """A training step that can be repeated.

    Args:
        images: of every step, float ``(N, 3, H, W)``, on the device that computes.
        precision: as the trainer names it.
        compiled: the network, by ``torch.compile``.
        fused: the optimizer.
        kept: share of the weights in the first stages that stay as they are, as ``freeze_early`` takes it.
    """
    device = images.device.type
    network = create_backbone("resnet18", 10).to(device, memory_format=torch.channels_last).train()
    freeze(network, early_parameters(network, kept))
    hold_still(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=fused)
    predict = torch.compile(network) if compiled else network
    targets = torch.randint(10, (len(images),), device=device)

    def step() -> None:
        with computing(precision, device):
            logits = predict(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def evaluation(images: Tensor) -> Step:
    """Answers to images, in float32, as whatever is tested."""
    device = images.device.type
    network = create_backbone("resnet18", 10).to(device, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def step() -> None:
        with full_float32():
            network(images)

    return step


def timed(step: Step, device: str, count: int) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=160, help="side of the images; default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="images a step; default: %(default)s")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    device = arguments.device
    precision, why = pick_precision(device)
    print(f"{device}, {torch.get_num_threads()} threads, {precision} ({why})")
    print(f"batches of {arguments.batch} images of {arguments.size} px, medians of {ROUNDS} rounds of {STEPS} steps")
    images = images_of(device, arguments.size, arguments.batch)
    steps = {
        "eager": training(images, precision),
        "eager, in float32": training(images, "32-true"),
        "eager, fused AdamW": training(images, precision, fused=True),
        "compiled, fused AdamW": training(images, precision, compiled=True, fused=True),
        "eager, stem and one stage as they were": training(images, precision, kept=True),
        "eager, stem and two stages as they were": training(images, precision, kept=0.07),
    }
    print(table(steps, device))
    size = round(1.2 * arguments.size)
    print(f"\nevaluated in float32, images of {size} px, medians of {ROUNDS} rounds of {EVALUATED} images")
    evaluations = {count: evaluation(images_of(device, size, count)) for count in EVALUATION_BATCHES}
    for evaluate in evaluations.values():
        evaluate()
    print(evaluation_table(evaluations, device))


def evaluation_table(evaluations: dict[int, Step], device: str) -> str:
    """In Markdown: what an image takes in batches of so many."""
    medians = by_turns(evaluations, device, lambda count: EVALUATED // count)
    cells = [f"{1000 * seconds / count:.1f}" for count, seconds in medians.items()]
    header = " | ".join(f"{count} at once" for count in medians)
    return f"| | {header} |\n|---|{'---:|' * len(medians)}\n| ms an image | {' | '.join(cells)} |"


def table(steps: dict[str, Step], device: str) -> str:
    """In Markdown: what each takes, and how much of what the first one does."""
    first = {name: timed(step, device, 3) * 3 for name, step in steps.items()}
    medians = by_turns(steps, device, lambda _: STEPS)
    usual = next(iter(medians.values()))
    lines = ["| | ms a step | of the first | first three steps, s |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {1000 * m:.0f} | {m / usual:.2f} | {first[name]:.1f} |" for name, m in medians.items()]
    return "\n".join(lines)


def by_turns(steps: dict[Name, Step], device: str, count: Callable[[Name], int]) -> dict[Name, float]:
    """Median seconds of each step, taken in turn, so that whatever else the machine does meets all of them."""
    taken: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            taken[name].append(timed(step, device, count(name)))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
