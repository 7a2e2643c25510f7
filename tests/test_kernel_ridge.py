"""Kernel ridge regression on features: against scikit-learn, and against leaving images out for real."""

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge as Reference
from torch import Tensor
from torch.nn import functional

from pipeline.finetuning import kernel_ridge
from pipeline.finetuning.kernel_ridge import KernelRidge, fit_kernel_ridge
from pipeline.finetuning.probe import fit_probe
from pipeline.models.kernel_head import KernelHead, kernel, match_head


def rings(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes that no line tells apart: within a circle, and around it; float32 ``(N, 2)``, int64 ``(N,)``."""
    rng = np.random.default_rng(seed)
    targets = torch.from_numpy(rng.integers(0, 2, count))
    angle, radius = rng.uniform(0, 2 * np.pi, count), targets.numpy() + rng.normal(1, 0.15, count)
    return torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)).float(), targets


def logits(head: KernelRidge, features: Tensor) -> Tensor:
    near = kernel((features - head.mean) / head.deviation, head.centres, head.width)
    return near @ head.weight.T + head.bias


def test_it_tells_apart_what_no_line_does() -> None:
    features, targets = rings(300)
    others, truth = rings(300, seed=1)
    head = fit_kernel_ridge(features, targets, 2)
    line = fit_probe(features, targets, 2)
    right = (logits(head, others).argmax(1) == truth).float().mean()
    assert right > 0.98
    assert ((others @ line.weight.T + line.bias).argmax(1) == truth).float().mean() < 0.7


@pytest.mark.parametrize("weighed", [False, True])
def test_it_answers_as_the_same_regression_in_scikit_learn(weighed: bool) -> None:
    features, targets = rings(120)
    weights = torch.from_numpy(np.random.default_rng(2).integers(1, 4, 120)).float() if weighed else None
    head = fit_kernel_ridge(features, targets, 2, weights)
    share = np.ones(120) if weights is None else weights.double().numpy()
    share = share / share.mean()
    known = ((features - head.mean) / head.deviation).numpy()
    truth = functional.one_hot(targets, 2).double().numpy()
    prior = share @ truth / share.sum()
    reference = Reference(alpha=head.penalty, kernel="rbf", gamma=head.width / 2).fit(known, truth - prior, share)
    expected = torch.from_numpy(reference.predict(known) + prior)
    scale = float(head.bias.sum())  # of shares, which add up to 1
    torch.testing.assert_close(logits(head, features).double() / scale, expected, atol=1e-4, rtol=0)


def test_what_is_said_of_left_out_images_is_what_is_said_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and groups are left out together, images of no weight taught nothing."""
    features, targets = rings(60)
    weights = torch.ones(60)
    weights[7] = 0
    together = [0, 0, 0, *range(1, 58)]
    monkeypatch.setattr(kernel_ridge, "WIDTHS", (0.5,))
    monkeypatch.setattr(kernel_ridge, "PENALTIES", (0.1,))
    head = fit_kernel_ridge(features, targets, 2, weights, together)
    scale = float(head.bias.sum())
    known, truth = ((features - head.mean) / head.deviation).double(), functional.one_hot(targets, 2).double()
    share = (weights / weights.mean()).double()
    prior = share @ truth / share.sum()
    for unit in (0, 1, 5, 30):
        out = torch.tensor([one == unit for one in together])
        kept = ~out & (share > 0)
        reference = Reference(alpha=0.1, kernel="rbf", gamma=0.25).fit(
            known[kept].numpy(), (truth - prior)[kept].numpy(), share[kept].numpy()
        )
        expected = scale * (torch.from_numpy(reference.predict(known[out].numpy())) + prior)
        torch.testing.assert_close(head.left_out[out].double(), expected, atol=1e-4, rtol=0)


def test_many_images_are_answered_by_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = rings(400)
    others, truth = rings(300, seed=1)
    whole = fit_kernel_ridge(features, targets, 2)
    monkeypatch.setattr(kernel_ridge, "MOST_CENTRES", 60)
    head = fit_kernel_ridge(features, targets, 2)
    assert (len(whole.centres), len(head.centres)) == (400, 60)
    assert (logits(head, others).argmax(1) == truth).float().mean() > 0.98
    # What is left out still follows from one solution: as good on images that it has seen as on others.
    right = (head.left_out.argmax(1) == targets).float().mean()
    assert right == pytest.approx(float((logits(head, others).argmax(1) == truth).float().mean()), abs=0.03)


def test_a_feature_that_never_changes_and_a_class_without_images_do_no_harm() -> None:
    features, targets = rings(80)
    constant = torch.cat([features, torch.full((80, 1), 5.0)], 1)
    head = fit_kernel_ridge(constant, targets, 3)
    found = logits(head, constant)
    assert found.isfinite().all()
    assert set(found.argmax(1).tolist()) == {0, 1}


def test_a_feature_that_wakes_up_only_later_does_not_drown_the_others() -> None:
    features, targets = rings(300)
    others, truth = rings(300, seed=1)
    rng = np.random.default_rng(0)
    quiet = torch.cat([features, torch.zeros(300, 1), torch.from_numpy(rng.normal(0, 1e-5, (300, 1))).float()], 1)
    awake = torch.cat([others, torch.full((300, 2), 0.05)], 1)
    head = fit_kernel_ridge(quiet, targets, 2)
    assert all(torch.isfinite(tensor).all() for tensor in head.state().values())
    assert (logits(head, awake).argmax(1) == truth).float().mean() > 0.98


def test_images_whose_class_is_in_their_unit_alone_do_not_say_how_good_it_is() -> None:
    features, targets = rings(200)
    others, truth = rings(300, seed=1)
    third = torch.cat([features, torch.full((20, 2), 6.0) + 0.1 * torch.randn(20, 2)])
    classes = torch.cat([targets, torch.full((20,), 2)])
    usual = fit_kernel_ridge(third, classes, 3)
    grouped = fit_kernel_ridge(third, classes, 3, together=[*range(200), *[-1] * 20])
    assert grouped.left_out[200:].isnan().all()
    assert grouped.left_out[:200].isfinite().all()
    scales = [float(head.bias.sum()) for head in (usual, grouped)]
    assert scales[1] == pytest.approx(scales[0], rel=0.3)
    # All in one unit: none can be judged, and the head is as good.
    alone = fit_kernel_ridge(features, targets, 2, together=[0] * 200)
    assert alone.left_out.isnan().all()
    torch.testing.assert_close(logits(alone, others), logits(fit_kernel_ridge(features, targets, 2), others))
    assert (logits(alone, others).argmax(1) == truth).float().mean() > 0.98


def test_the_head_of_a_network_answers_alike_and_in_float32() -> None:
    features, targets = rings(50)
    solved = fit_kernel_ridge(features, targets, 2)
    network = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2)})
    state = {f"fc.{name}": tensor for name, tensor in solved.state().items()}
    match_head(network, "fc", state)
    network.load_state_dict(state)
    head = network["fc"]
    assert isinstance(head, KernelHead)
    expected = logits(solved, features)
    torch.testing.assert_close(head(features), expected)
    with torch.autocast("cpu", torch.bfloat16):  # in which distances are off by more than they are
        torch.testing.assert_close(head(features), expected)
    match_head(network, "fc", state)  # has it already
    assert network["fc"] is head
