"""State dicts written under other names, translated by explicit rules.

* Prefixes of modules that wrapped the network while it was trained.
* The projections of kuangliu/pytorch-cifar and akamaster/pytorch_resnet_cifar10, ``shortcut``, here ``downsample``.
* The EfficientNets of lukemelas/EfficientNet-PyTorch and its descendants, to timm's names.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# A block that first expands channels by a 1x1 convolution (figure 3d of MobileNetV2, https://arxiv.org/abs/1801.04381).
_INVERTED_RESIDUAL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first stage does not expand, and timm numbers its normalisations from the depthwise convolution on.
_DEPTHWISE_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
# torch's data parallelism and compiler, and the usual names of a network inside a training module.
_WRAPPERS = ("module.", "_orig_mod.", "network.", "model.", "backbone.")
_SHORTCUT_KEY = re.compile(r"(layer\d+\.\d+)\.shortcut\.(.+)")
_BLOCK_KEY = re.compile(r"_blocks\.(\d+)\.(_\w+)\.(.+)")
_OTHER_KEY = re.compile(r"(_\w+)\.(.+)")


def unwrap(state: Mapping[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The same tensors without the prefixes of wrapping modules.

    A prefix goes only where every name of the file begins with it and the network's own do not.

    Returns:
        The tensors, and the prefix that was removed, such as ``module.``; empty where there was none.
    """
    names = list(network.state_dict())
    removed = ""
    while prefix := next((p for p in _WRAPPERS if state and all(name.startswith(p) for name in state)), None):
        if all(name.startswith(prefix) for name in names):
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        removed += prefix
    return dict(state), removed


def rename_foreign_keys(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The same tensors under the backbone's names, where the file's scheme is one we know; else unchanged.

    Args:
        state: tensors by name, as read.
        backbone: the network they are meant for; timm's EfficientNets group blocks in stages, and the sizes of
            these stages translate the file's running block number.
    """
    state = {_SHORTCUT_KEY.sub(r"\1.downsample.\2", key): value for key, value in state.items()}
    if "_conv_stem.weight" not in state:
        return state
    stages = getattr(backbone, "blocks", None)
    if not isinstance(stages, nn.Sequential):
        return state  # another architecture: the comparison of keys will say so
    places = [f"{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]  # type: ignore[arg-type]
    return {_timm_name(key, state, places): value for key, value in state.items()}


def _timm_name(key: str, state: Mapping[str, Tensor], places: list[str]) -> str:
    if match := _BLOCK_KEY.fullmatch(key):
        number, part, rest = int(match[1]), match[2], match[3]
        expands = f"_blocks.{number}._expand_conv.weight" in state
        table = _INVERTED_RESIDUAL if expands else _DEPTHWISE_SEPARABLE
        if number < len(places) and part in table:
            return f"blocks.{places[number]}.{table[part]}.{rest}"
    elif (match := _OTHER_KEY.fullmatch(key)) and match[1] in _STEM_AND_HEAD:
        return f"{_STEM_AND_HEAD[match[1]]}.{match[2]}"
    return key
