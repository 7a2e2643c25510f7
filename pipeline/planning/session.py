"""Where a plan comes from: made here, once, or by the process that started this one."""

import os
from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from datamodules import ImageDataModule
from pipeline.errors import UserError
from pipeline.planning.duration import seconds_of
from pipeline.planning.facts import gather_facts
from pipeline.planning.plan import Plan
from pipeline.planning.planner import Planner, Workbench
from pipeline.precision import pick_precision
from pipeline.task import ClassificationTask

# For the processes that Lightning starts beside the first one: what was measured there is measured once.
_HANDED_ON = "TRANSFER_PIPELINE_PLAN"


def plan_fit(
    settings: Any, data: ImageDataModule, task: ClassificationTask, started: float, trains: bool = False
) -> Plan:
    """Choose what is open in the settings of ``fit``.

    Args:
        settings: the configuration of ``fit``.
        data: made from it, in no stage.
        task: made from it, with its weights loaded; it is tried on, and not to be trained afterwards.
        started: ``time.perf_counter()`` when the program started.
        trains: whether the backbone is to be trained, however few images there are.

    Raises:
        UserError: the budget cannot be read or kept.
    """
    seconds = None if settings.budget is None else seconds_of(settings.budget)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and _HANDED_ON in os.environ:
        return Plan.from_json(os.environ[_HANDED_ON])
    weights_size = settings.data.init_args.preprocessing["size"]
    facts = gather_facts(data, task, weights_size, settings.trainer)
    precision, reason = pick_precision(str(settings.trainer.accelerator))
    bench = Workbench(data, task, str(settings.trainer.precision or precision), settings.seed_everything)
    plan = Planner(settings, facts, bench, trains).plan(seconds, started, (precision, reason))
    os.environ[_HANDED_ON] = plan.to_json()
    return plan


def require_one_process(trainer: Any) -> None:
    """Refuse a budget where others start processes beside this one, which would each measure for themselves.

    Args:
        trainer: its settings.

    Raises:
        UserError: they do, or there are several machines.
    """
    under_slurm = SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1
    if under_slurm or TorchElasticEnvironment.detect() or int(trainer.num_nodes) > 1:
        raise UserError(
            "--budget: expected one process that measures, found several that were started together; make a plan first "
            "(python -m pipeline plan --budget ... --to plan.yaml), and give them --config plan.yaml."
        )
