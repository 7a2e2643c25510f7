"""Probabilities that mean what they say: temperature scaling."""

import math
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from pipeline.evaluation.predictions import Predictions

#: Standard deviation of the logarithm of temperatures, before any image is seen: ``benchmarks/temperature.py``.
WIDTH = 0.3
# Temperatures beyond these are of something else than over- or underconfidence.
_BOUNDS = (0.1, 10.0)


def temper(probabilities: Tensor, temperature: Tensor | float, multi_label: bool) -> Tensor:
    """Divide what is in the softmax or in the sigmoids by a temperature: above 1, answers become less certain.

    The order of an image's classes stays, and so do labels.

    Args:
        probabilities: float ``(N, C)`` of the softmax, or where an image may have several classes of each sigmoid.
        temperature: above 0.
        multi_label: which of the two.

    Example:
        >>> temper(torch.tensor([[0.9, 0.1]]), 2.0, multi_label=False)
        tensor([[0.7500, 0.2500]])
    """
    tiny = torch.finfo(probabilities.dtype).tiny
    logarithms = probabilities.clamp_min(tiny).log()
    if multi_label:
        return torch.sigmoid((logarithms - (1 - probabilities).clamp_min(tiny).log()) / temperature)
    return torch.softmax(logarithms / temperature, dim=1)


def tempered(predictions: Predictions, temperature: float) -> Predictions:
    """Predictions as they are under a temperature."""
    probabilities = temper(torch.from_numpy(predictions.probabilities), temperature, predictions.multi_label)
    return replace(predictions, probabilities=probabilities.numpy())


def fit_temperature(predictions: Predictions, width: float = WIDTH) -> float:
    """The temperature under which labelled images are the least surprising.

    C. Guo et al., "On Calibration of Modern Neural Networks" (https://arxiv.org/abs/1706.04599, section 4.2), with one
    addition: the logarithm of the temperature has a normal prior around 0. A few images that are all answered rightly
    would otherwise ask for certainty; of many hundred, the prior hardly matters.

    Args:
        predictions: at temperature 1, of images that were not trained on.
        width: standard deviation of the prior; infinite: there is none.

    Returns:
        A temperature from 0.1 to 10.
    """

    def surprise(logarithm: float) -> float:
        losses = tempered(predictions, math.exp(logarithm)).losses
        return float(predictions.answers * losses.sum() + (logarithm / width) ** 2 / 2)

    bounds = np.log(_BOUNDS)
    return math.exp(minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x)
