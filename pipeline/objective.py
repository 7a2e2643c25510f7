"""What training minimises: cross-entropy of one class or of several, and what is done for rare classes."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError

#: What is done for rare classes; balanced sampling is the data's business.
Imbalance = Literal["none", "balanced_sampling", "weighted_loss", "logit_adjustment"]


class Objective(nn.Module):
    """The loss of each image.

    Cross-entropy of the softmax where an image has one class; where it may have several, binary cross-entropy of each
    class's sigmoid, averaged over the classes. For rare classes:

    - ``weighted_loss``: a class weighs by the inverse of its number of training images, 1 on average over the images;
      with several classes an image, presence weighs by absent over present. Raises the recall of rare classes and
      distorts probabilities.
    - ``logit_adjustment``: training adds the logarithm of a class's share to its logit, so that the network itself
      learns what tells classes apart with their shares taken out (Menon et al. 2021, https://arxiv.org/abs/2007.07314,
      equation 10): it answers as if classes were equally frequent.

    Args:
        multi_label: whether an image may have several classes.
        imbalance: see above; ``none`` and ``balanced_sampling`` change nothing here.
        class_counts: training images of each class; needed for the two above.
        images: training images in all; where one has several classes they are fewer than the counts' sum.
        label_smoothing: share of the target spread over all classes, in [0, 1).

    Example:
        >>> objective = Objective(False, "weighted_loss", class_counts=[30, 10])
        >>> [round(float(loss), 3) for loss in objective(torch.zeros(2, 2), torch.tensor([0, 1]))]
        [0.462, 1.386]
    """

    class_weights: Tensor
    adjustment: Tensor

    def __init__(
        self,
        multi_label: bool,
        imbalance: Imbalance = "none",
        class_counts: Sequence[int] | None = None,
        images: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.multi_label = multi_label
        self.label_smoothing = label_smoothing
        weights, adjustment = torch.ones(1), torch.zeros(1)
        if imbalance in ("weighted_loss", "logit_adjustment"):
            if class_counts is None:
                raise UserError(
                    f"imbalance: expected the number of training images of each class for {imbalance}, found none; "
                    "pass class_counts of the datamodule."
                )
            counts = torch.tensor(class_counts, dtype=torch.float32)
            total = float(counts.sum()) if images is None or not multi_label else float(images)
            absent = torch.clamp(total - counts, min=0.5)
            if imbalance == "weighted_loss":
                weights = absent / counts if multi_label else total / (len(counts) * counts)
            else:
                adjustment = torch.log(counts / absent) if multi_label else torch.log(counts / total)
        self.register_buffer("class_weights", weights, persistent=False)
        self.register_buffer("adjustment", adjustment, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each image, float ``(N,)``.

        Args:
            logits: float ``(N, number of classes)``.
            target: int64 ``(N,)``, or float ``(N, number of classes)`` of 0 and 1.
        """
        logits = logits + self.adjustment
        if self.multi_label:
            smooth = target * (1 - self.label_smoothing) + self.label_smoothing / 2
            losses = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=self.class_weights, reduction="none")
            return losses.mean(dim=1)
        losses = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing, reduction="none")
        return losses * self.class_weights.expand(logits.shape[1])[target]
