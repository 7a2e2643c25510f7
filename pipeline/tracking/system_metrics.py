"""How busy the machine is while a run trains: processor, memory and GPUs."""

import threading

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pipeline.tracking.logger import MLflowLogger

_EVERY = 10.0  # seconds


class SystemMetrics(Callback):
    """Tracks ``system/...`` every ten seconds and at the end of the training, under MLflow's own names.

    Args:
        logger: of the run.
        every: seconds between samples.
    """

    def __init__(self, logger: MLflowLogger, every: float = _EVERY) -> None:
        self.logger = logger
        self.every = every
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._samples = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            psutil.cpu_percent()  # the first answer says nothing: each is about the time since the one before
            self._stopped.clear()
            self._thread = threading.Thread(target=self._sample_regularly, name="system metrics", daemon=True)
            self._thread.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
            self._sample()

    def _sample_regularly(self) -> None:
        while not self._stopped.wait(self.every):
            self._sample()

    def _sample(self) -> None:
        self.logger.log_metrics(measure(), self._samples)
        self._samples += 1


def measure() -> dict[str, float]:
    """Use of processor, memory and GPUs now; percentages and megabytes."""
    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    for index in range(torch.cuda.device_count()):
        metrics |= _measure_gpu(index)
    return metrics


def _measure_gpu(index: int) -> dict[str, float]:
    import pynvml

    try:
        used = torch.cuda.device_memory_used(index)
        total = torch.cuda.get_device_properties(index).total_memory
        return {
            f"system/gpu_{index}_utilization_percentage": float(torch.cuda.utilization(index)),
            f"system/gpu_{index}_memory_usage_megabytes": used / 1e6,
            f"system/gpu_{index}_memory_usage_percentage": 100 * used / total,
        }
    except (pynvml.NVMLError, RuntimeError):  # slices of a GPU and some drivers do not tell
        return {}
