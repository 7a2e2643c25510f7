"""The loss against torch and scikit-learn, and what each way with rare classes does to a skewed problem."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

import datamodules.base
from datamodules.sampling import EpochSampler, class_balance
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.objective import Imbalance, Objective
from pipeline.task import ClassificationTask
from tests.images import RECORD, attach, folder_module, numbered
from tests.support import fast, write_images

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")

COUNTS = [60, 30, 10]
SHARES = [0.6, 0.3, 0.1]
TARGETS = np.repeat(np.arange(3), COUNTS)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(100, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def presence() -> Tensor:
    return (torch.rand(100, 3, generator=torch.Generator().manual_seed(1)) < torch.tensor(SHARES)).float()


# One class an image


@pytest.mark.parametrize("imbalance", ["none", "balanced_sampling"])
def test_without_weights_the_loss_is_torch_s_cross_entropy(logits: Tensor, imbalance: Imbalance) -> None:
    target = torch.from_numpy(TARGETS)
    found = Objective(False, imbalance, SHARES)(logits, target)
    torch.testing.assert_close(found, F.cross_entropy(logits, target, reduction="none"), rtol=0, atol=0)


def test_weights_are_scikit_learn_s_balanced_ones_and_1_on_average(logits: Tensor) -> None:
    target = torch.from_numpy(TARGETS)
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=TARGETS)
    expected = F.cross_entropy(logits, target, weight=torch.tensor(balanced, dtype=torch.float32), reduction="none")
    found = Objective(False, "weighted_loss", SHARES)(logits, target)
    torch.testing.assert_close(found, expected)
    # The mean over the images is what a learning rate is used to: torch's own weighted mean divides by the weights.
    flat = Objective(False, "weighted_loss", SHARES)(torch.zeros(100, 3), target)
    assert float(flat.mean()) == pytest.approx(np.log(3), rel=1e-6)


def test_logit_adjustment_is_equation_10_of_the_paper(logits: Tensor) -> None:
    target = torch.from_numpy(TARGETS)
    scores, shares = logits.double().numpy(), np.array(SHARES)
    # log(1 + sum over others of (share' / share) * exp(f' - f))
    own, own_share = scores[np.arange(100), TARGETS, None], shares[TARGETS, None]
    others = np.ones((100, 3), bool)
    others[np.arange(100), TARGETS] = False
    expected = np.log1p((shares / own_share * np.exp(scores - own) * others).sum(axis=1))
    found = Objective(False, "logit_adjustment", SHARES)(logits, target)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


# Several classes an image


@pytest.mark.parametrize("imbalance", ["none", "balanced_sampling"])
def test_without_weights_the_loss_is_the_mean_binary_cross_entropy(
    logits: Tensor, presence: Tensor, imbalance: Imbalance
) -> None:
    expected = F.binary_cross_entropy_with_logits(logits, presence, reduction="none").mean(dim=1)
    torch.testing.assert_close(Objective(True, imbalance, SHARES)(logits, presence), expected, rtol=0, atol=0)


def test_presence_weighs_by_absent_over_present(logits: Tensor, presence: Tensor) -> None:
    shares = presence.mean(dim=0)
    present = presence.sum(dim=0)
    found = Objective(True, "weighted_loss", shares.tolist())(logits, presence)
    expected = F.binary_cross_entropy_with_logits(logits, presence, pos_weight=(100 - present) / present)
    torch.testing.assert_close(found.mean(), expected)
    # Presence and absence weigh alike: what scikit-learn calls balanced, up to a factor of the class.
    for column in range(3):
        absent, there = compute_class_weight("balanced", classes=np.arange(2), y=presence[:, column].int().numpy())
        weights = Objective(True, "weighted_loss", shares.tolist()).class_weights
        assert float(weights[column]) == pytest.approx(there / absent, rel=1e-5)


def test_the_odds_of_a_class_are_taken_out_where_there_are_several(logits: Tensor, presence: Tensor) -> None:
    shares = presence.mean(dim=0)
    found = Objective(True, "logit_adjustment", shares.tolist())(logits, presence)
    expected = F.binary_cross_entropy_with_logits(logits + torch.logit(shares), presence, reduction="none").mean(dim=1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("imbalance", ["weighted_loss", "logit_adjustment"])
def test_a_class_of_every_image_stays_finite(imbalance: Imbalance) -> None:
    objective = Objective(True, imbalance, [1.0, 0.5])
    for logits in (torch.full((4, 2), -30.0), torch.full((4, 2), 30.0)):
        assert torch.isfinite(objective(logits, torch.ones(4, 2))).all()


@pytest.mark.parametrize("imbalance", ["weighted_loss", "logit_adjustment"])
def test_shares_that_are_not_known_are_asked_for(imbalance: Imbalance) -> None:
    with pytest.raises(UserError, match=f"for {imbalance}, found none; pass class_shares of the datamodule"):
        Objective(False, imbalance)


# The task


def batch(target: Tensor, **more: Tensor) -> dict[str, Tensor]:
    images = torch.randint(0, 256, (len(target), 3, 32, 32), generator=torch.Generator().manual_seed(2))
    return {"image": images.to(torch.uint8), "target": target, "index": torch.arange(len(target)), **more}


def task(imbalance: Imbalance = "none", **settings: Any) -> ClassificationTask:
    torch.manual_seed(0)
    made = ClassificationTask(["a", "b", "c"], RECORD, "resnet20", imbalance=imbalance, class_shares=SHARES, **settings)
    made.setup("fit")
    return made.eval()  # norms on stored statistics: an image's logits do not depend on its neighbours


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("imbalance", ["none", "weighted_loss", "logit_adjustment"])
def test_a_training_step_minimises_the_objective(imbalance: Imbalance, multi_label: bool) -> None:
    made = task(imbalance, multi_label=multi_label)
    target = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]]) if multi_label else torch.tensor([0, 1, 2, 1])
    given = batch(target)
    expected = Objective(multi_label, imbalance, SHARES)(made(given["image"]), target)
    torch.testing.assert_close(made.training_step(given, 0), expected.mean())


def test_images_weigh_as_the_data_says() -> None:
    made, target = task(), torch.tensor([0, 1, 2, 1])
    weight = torch.tensor([0.5, 0.0, 3.0, 0.5])
    given = batch(target, weight=weight)
    losses = F.cross_entropy(made(given["image"]), target, reduction="none")
    torch.testing.assert_close(made.training_step(given, 0), (losses * weight).mean())


@pytest.mark.parametrize("imbalance", ["balanced_sampling", "weighted_loss", "logit_adjustment"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_evaluation_leaves_probabilities_as_the_network_has_them(imbalance: Imbalance, multi_label: bool) -> None:
    plain, other = task(multi_label=multi_label), task(imbalance, multi_label=multi_label)
    other.load_state_dict(plain.state_dict())
    target = torch.ones(4, 3) if multi_label else torch.tensor([0, 1, 2, 1])
    with torch.inference_mode():
        first, second = (made.test_step(batch(target), 0)["probabilities"] for made in (plain, other))
    assert torch.equal(first, second)


# The data: one setting, one effect


@pytest.mark.parametrize("imbalance", ["none", "balanced_sampling", "weighted_loss", "logit_adjustment"])
def test_a_setting_acts_in_the_data_or_in_the_loss_and_never_in_both(image_folder, imbalance):
    module = attach(folder_module(image_folder({"cat": 16, "dog": 8}), imbalance=imbalance), TrainerFn.FITTING)
    objective = Objective(False, imbalance, module.class_shares)
    loss_is_plain = bool((objective.class_weights == 1).all() and (objective.adjustment == 0).all())
    order_is_plain = module.train_dataloader().sampler.chances is None
    acting = {"none": (True, True), "balanced_sampling": (True, False)}
    assert (loss_is_plain, order_is_plain) == acting.get(imbalance, (False, True))


def test_data_and_loss_know_the_same_values() -> None:
    assert get_args(datamodules.base.Imbalance) == get_args(Imbalance)


def test_shares_follow_the_training_images_alone(image_folder):
    counts = {"train/cat": 9, "train/dog": 3, "val/cat": 1, "val/dog": 5, "test/cat": 1, "test/dog": 5}
    assert folder_module(image_folder(counts)).class_shares == [0.75, 0.25]


# The command line


@pytest.mark.parametrize("imbalance", ["none", "balanced_sampling", "weighted_loss", "logit_adjustment"])
def test_one_setting_reaches_the_loss_and_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], imbalance: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=8)
    for path in sorted((tmp_path / "images" / "red").iterdir())[4:]:
        path.unlink()
    made: dict[str, list[Any]] = {"loss": [], "order": []}

    class SpiedObjective(Objective):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made["loss"].append(args)

    class SpiedSampler(EpochSampler):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            if settings["training"]:
                made["order"].append(settings["chances"])

    monkeypatch.setattr("pipeline.task.Objective", SpiedObjective)
    monkeypatch.setattr("datamodules.base.EpochSampler", SpiedSampler)
    arguments = [*fast(tmp_path / "images"), "--trainer.logger=false"]
    assert main(["fit", *arguments, "--trainer.max_epochs=1", f"--imbalance={imbalance}"]) == 0
    ((multi_label, passed, shares),) = made["loss"]
    assert (multi_label, passed) == (False, imbalance)
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.05)
    assert all((chances is not None) == (imbalance == "balanced_sampling") for chances in made["order"])
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["tags"]["imbalance"] == imbalance
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("imbalance ")]
    assert [line.split(":")[0] for line in told] == ([] if imbalance == "none" else [f"imbalance  {imbalance}"])


# What it is good for: two normal distributions, 1 standard deviation to the left and to the right, 95 to 5.
# Equally frequent they are best told apart at 0; as they are, half the logarithm of 19 (1.47) further right.

LINE = np.random.default_rng(0).normal(np.repeat([-1.0, 1.0], [9500, 500])).astype(np.float32)
SIDE = np.repeat([0, 1], [9500, 500])


def boundary(imbalance: Imbalance) -> float:
    """Where a linear model that was trained on the skewed line changes its mind."""
    order = np.arange(len(LINE))
    if imbalance == "balanced_sampling":
        chances = class_balance([(int(side),) for side in SIDE], 2)
        sampler = EpochSampler(numbered(len(LINE)), 1, 0, training=True, seed=0, chances=chances)
        order = np.array([index for _, index, _ in sampler])
    features, target = torch.from_numpy(LINE[order, None]), torch.from_numpy(SIDE[order])
    objective = Objective(False, imbalance, [0.95, 0.05])
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(model(features), target).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    (weight,), bias = (model.weight[1] - model.weight[0]).tolist(), float((model.bias[1] - model.bias[0]).detach())
    return -bias / weight


def test_without_help_the_rare_class_is_neglected() -> None:
    found = boundary("none")
    assert found == pytest.approx(np.log(19) / 2, abs=0.15)
    assert (LINE[SIDE == 1] > found).mean() < 0.4


@pytest.mark.parametrize("imbalance", ["balanced_sampling", "weighted_loss", "logit_adjustment"])
def test_each_way_finds_the_rare_class_as_if_classes_were_equally_frequent(imbalance: Imbalance) -> None:
    found = boundary(imbalance)
    assert found == pytest.approx(0, abs=0.15)
    assert (LINE[SIDE == 1] > found).mean() > 0.75
