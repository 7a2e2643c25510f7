"""What a training step of ResNet-18 takes, eager and compiled, and with a fused optimizer: seconds, within one run.

    python benchmarks/steps.py                          # two minutes on two cores
    python benchmarks/steps.py --device cuda --size 224 --batch 128

Weights and images are random: neither changes what a step takes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from pipeline.allocator import keep_freed_memory
from pipeline.models.backbones import create_backbone
from pipeline.precision import computing, pick_precision

STEPS, ROUNDS = 8, 3


def step_of(device: str, size: int, batch: int, precision: str, compiled: bool, fused: bool) -> Callable[[], None]:
    """A training step that can be repeated."""
    network = create_backbone("resnet18", 10).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=fused)
    predict = torch.compile(network) if compiled else network
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (batch,), device=device)

    def step() -> None:
        with computing(precision, device):
            logits = predict(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], device: str, count: int) -> float:
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
    print(f"batches of {arguments.batch} images of {arguments.size} px")
    variants = {"eager": (False, False), "eager, fused AdamW": (False, True), "compiled, fused AdamW": (True, True)}
    steps, first, taken = {}, {}, {name: [] for name in variants}
    for name, (compiled, fused) in variants.items():
        steps[name] = step_of(device, arguments.size, arguments.batch, precision, compiled, fused)
        first[name] = timed(steps[name], device, 3) * 3
    for _ in range(ROUNDS):  # by turns, so that whatever else the machine does meets all of them
        for name, step in steps.items():
            taken[name].append(timed(step, device, STEPS))
    eager = statistics.median(taken["eager"])
    print("| | ms a step | of eager | first three steps, s |\n|---|---:|---:|---:|")
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"| {name} | {1000 * median:.0f} | {median / eager:.2f} | {first[name]:.1f} |")
    print(f"medians of {ROUNDS} rounds of {STEPS} steps")


if __name__ == "__main__":
    main()
