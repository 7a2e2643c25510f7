"""How a network is trained: strategies, parameter groups and schedules."""

from pipeline.finetuning.full_fine_tuning import FullFineTuning
from pipeline.finetuning.gradual_unfreezing import GradualUnfreezing
from pipeline.finetuning.kernel_probe import KernelProbe
from pipeline.finetuning.linear_probe import LinearProbe
from pipeline.finetuning.probe_then_finetune import ProbeThenFineTune
from pipeline.finetuning.strategy import Strategy

__all__ = [
    "FullFineTuning",
    "GradualUnfreezing",
    "KernelProbe",
    "LinearProbe",
    "ProbeThenFineTune",
    "Strategy",
]
