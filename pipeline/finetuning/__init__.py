"""How a network is trained: strategies, parameter groups and schedules."""

from pipeline.finetuning.probe_then_finetune import ProbeThenFineTune
from pipeline.finetuning.strategies import FullFineTuning, LinearProbe, Strategy

__all__ = ["FullFineTuning", "LinearProbe", "ProbeThenFineTune", "Strategy"]
