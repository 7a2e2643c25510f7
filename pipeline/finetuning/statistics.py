"""Statistics of batch normalisations, measured anew on the images at hand."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pipeline.models.modes import evaluating


def normalisations(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Batch normalisations that keep statistics, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        # The one class that all of them share.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


def normalises_depthwise(network: nn.Module) -> bool:
    """Whether a network has both batch normalisations and depthwise convolutions, as MobileNet and EfficientNet do."""
    depthwise = (
        isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 for module in network.modules()
    )
    return bool(normalisations(network)) and any(depthwise)


def use_stored_statistics(network: nn.Module) -> None:
    """Put all batch normalisations into evaluation mode: they normalise by stored statistics, which do not move."""
    for norm in normalisations(network).values():
        norm.eval()


def measure_statistics(
    network: nn.Module, embed: Callable[[Tensor], object], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Means and variances of what reaches each batch normalisation, as training would see them.

    Pretrained weights bring the statistics of the photographs that they were trained on. Those of X-rays or solar cells
    are others, and a network that normalises by its own hands its head features of a more usual size (Li et al. 2017,
    "Revisiting batch normalization for practical domain adaptation", https://arxiv.org/abs/1603.04779).

    Each batch is normalised by its own statistics on its way up; what is measured is their mean over batches. The
    network is left as it was, and processes that train together need not all measure (that is why its normalisations
    are not put into training mode).

    Args:
        network: whose normalisations are measured.
        embed: passes images through the network.
        batches: of images ``(B, C, H, W)``, as ``embed`` takes them; the larger, the better each is measured.

    Returns:
        New values of the buffers, float32 ``(channels,)``, by their names in the network, for ``load_state_dict(...,
        strict=False)``; nothing where there are no batches.
    """
    norms = normalisations(network)
    kept = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}  # type: ignore[union-attr]
    sums: dict[str, Tensor] = {}

    def measure(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            images = inputs[0].float()
            found = torch.var_mean(images, dim=(0, *range(2, images.ndim)), correction=0)
            for kind, value in zip(("running_var", "running_mean"), found, strict=True):
                norm.get_buffer(kind).copy_(value)
                buffer = f"{name}.{kind}"
                sums[buffer] = sums[buffer] + value if buffer in sums else value

        return hook

    handles = [norm.register_forward_pre_hook(measure(name)) for name, norm in norms.items()]
    count = 0
    try:
        with evaluating(network), torch.no_grad():
            for images in batches:
                embed(images)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for name, (mean, variance) in kept.items():
            norms[name].running_mean.copy_(mean)  # type: ignore[union-attr]
            norms[name].running_var.copy_(variance)  # type: ignore[union-attr]
    return {name: total / count for name, total in sums.items()}
