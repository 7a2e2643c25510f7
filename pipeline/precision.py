"""Which numbers training computes with."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["32-true", "bf16-mixed"]

_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def computing(precision: str, device: str) -> AbstractContextManager[object]:
    """The context in which a network computes in a mixed precision of the trainer; none for the others.

    Args:
        precision: as the trainer names it.
        device: ``cpu``, ``cuda`` ...
    """
    dtype = _HALF.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype, cache_enabled=False)


def full_float32() -> AbstractContextManager[None]:
    """Convolutions on GPUs without TF32, which keeps 10 of float32's 23 bits and is on by default."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )


def pick_precision(accelerator: str) -> tuple[Precision, str]:
    """bf16 mixed precision where the processor computes it, float32 elsewhere.

    Args:
        accelerator: as the trainer names it: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps`` ...

    Returns:
        The trainer's precision, and the reason.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU computes bf16"
        return "32-true", "the GPU does not compute bf16"
    if accelerator in ("auto", "cpu"):
        # AVX512-BF16 or AMX; a processor that only emulates bf16 would be slower with it. Torch releases that
        # cannot tell train in float32.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        units = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)]
        if units:
            return "bf16-mixed", f"the processor has {units[0]}"
        return "32-true", "the processor has no bf16 unit that torch can see"
    return "32-true", f"untested on '{accelerator}' in lower precision"
