"""What training minimises: cross-entropy of one class or of several, and what is done for rare classes."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError

#: What is done for rare classes; balanced sampling is the data's business.
Imbalance = Literal["none", "balanced_sampling", "weighted_loss", "logit_adjustment"]

# A class that every image has would weigh nothing, or have infinite odds.
_LEAST_ABSENT = 1e-4


class Objective(nn.Module):
    """The loss of each image.

    Cross-entropy of the softmax where an image has one class; where it may have several, binary cross-entropy of each
    class's sigmoid, averaged over the classes. For rare classes:

    - ``weighted_loss``: an image weighs by the inverse of its class's share, 1 on average over the training images;
      with several classes an image, presence weighs by absent over present. Raises the recall of rare classes and
      distorts probabilities.
    - ``logit_adjustment``: training adds the logarithm of a class's share to its logit (of several classes: of its
      odds), so that the network itself learns what tells classes apart with their shares taken out (Menon et al. 2021,
      https://arxiv.org/abs/2007.07314, equation 10): it answers as if classes were equally frequent.

    Args:
        multi_label: whether an image may have several classes.
        imbalance: see above; ``none`` and ``balanced_sampling`` change nothing here.
        class_shares: share of the training images that have each class, in (0, 1]; needed for the two above.

    Raises:
        UserError: the shares are needed and missing.

    Example:
        >>> objective = Objective(False, "weighted_loss", class_shares=[0.75, 0.25])
        >>> [round(float(loss), 3) for loss in objective(torch.zeros(2, 2), torch.tensor([0, 1]))]
        [0.462, 1.386]
    """

    class_weights: Tensor
    adjustment: Tensor

    def __init__(
        self, multi_label: bool, imbalance: Imbalance = "none", class_shares: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.multi_label = multi_label
        weights, adjustment = torch.ones(1), torch.zeros(1)
        if imbalance in ("weighted_loss", "logit_adjustment"):
            if class_shares is None:
                raise UserError(
                    f"imbalance: expected the share of the training images that have each class for {imbalance}, found "
                    "none; pass class_shares of the datamodule."
                )
            shares = torch.tensor(class_shares, dtype=torch.float32)
            odds = shares / (1 - shares).clamp_min(_LEAST_ABSENT)
            if imbalance == "weighted_loss":
                weights = 1 / odds if multi_label else 1 / (len(shares) * shares)
            else:
                adjustment = torch.log(odds if multi_label else shares)
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
            losses = F.binary_cross_entropy_with_logits(logits, target, pos_weight=self.class_weights, reduction="none")
            return losses.mean(dim=1)
        return F.cross_entropy(logits, target, reduction="none") * self.class_weights.expand(logits.shape[1])[target]
