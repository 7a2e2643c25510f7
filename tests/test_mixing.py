"""Mixup and CutMix against torchvision's, decided by seed, epoch and batch alone."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.mixing import Mixture, mix
from pipeline.objective import Objective
from pipeline.task import ClassificationTask
from tests.images import RECORD
from tests.support import fast, write_images

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")

KINDS: list[Literal["mixup", "cutmix"]] = ["mixup", "cutmix"]


def pictures(count: int = 3, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def soft_labels(mixture: Mixture, labels: Tensor) -> Tensor:
    return mixture.share * labels + (1 - mixture.share) * labels[mixture.partner]


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Which pixels of one image differ, bool (H, W)."""
    return (before != after).any(dim=0)


# What it computes


@pytest.mark.parametrize("number", range(4))
def test_mixup_is_torchvision_s(number: int) -> None:
    images, labels = pictures(), torch.arange(3)
    mixture = mix(images, "mixup", 1.0, (0, 0, number))
    reference = v2.MixUp(num_classes=3)
    params = {"labels": labels, "batch_size": 3, "lam": mixture.share}
    torch.testing.assert_close(mixture.images, reference.transform(images, params))
    torch.testing.assert_close(soft_labels(mixture, torch.eye(3)), reference.transform(labels, params))


@pytest.mark.parametrize("number", range(4))
def test_cutmix_is_torchvision_s(number: int) -> None:
    images, labels = pictures(), torch.arange(3)
    mixture = mix(images, "cutmix", 1.0, (0, 0, number))
    rows, columns = torch.nonzero(changed(images[0], mixture.images[0]), as_tuple=True)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    reference = v2.CutMix(num_classes=3)
    params = {"labels": labels, "batch_size": 3, "box": box, "lam_adjusted": mixture.share}
    assert torch.equal(mixture.images, reference.transform(images, params))
    torch.testing.assert_close(soft_labels(mixture, torch.eye(3)), reference.transform(labels, params))


def test_the_share_of_cutmix_is_that_of_the_pixels_exactly() -> None:
    images = pictures(2, 31, 17)
    shares = []
    for batch in range(200):
        mixture = mix(images, "cutmix", 1.0, (3, 0, batch))
        theirs = changed(images[0], mixture.images[0])
        assert mixture.share == pytest.approx(1 - theirs.float().mean().item(), abs=1e-6)
        assert torch.equal(mixture.images[0][:, theirs], images[1][:, theirs])
        assert torch.equal(theirs, changed(images[1], mixture.images[1]))
        shares.append(mixture.share)
    assert min(shares) < 0.2
    assert max(shares) > 0.9


def test_a_rectangle_has_the_proportions_of_the_image_and_lies_anywhere() -> None:
    images = pictures(2, 30, 60)
    middles = []
    for batch in range(400):
        mixture = mix(images, "cutmix", 1.0, (5, 0, batch))
        theirs = changed(images[0], mixture.images[0])
        rows, columns = torch.nonzero(theirs, as_tuple=True)
        if len(rows) == 0:
            continue
        top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
        assert theirs[top:bottom, left:right].all()
        if top > 0 and left > 0 and bottom < 30 and right < 60:  # not cut off by the border
            assert right - left == pytest.approx(2 * (bottom - top), abs=2)
            middles.append(((top + bottom) / 60, (left + right) / 120))
    assert np.std(middles, axis=0).min() > 0.1
    assert abs(np.corrcoef(np.transpose(middles))[0, 1]) < 0.3
    np.testing.assert_allclose(np.mean(middles, axis=0), 0.5, atol=0.1)


@pytest.mark.parametrize(
    ("kind", "alpha", "effective"), [("mixup", None, 0.2), ("cutmix", None, 1.0), ("mixup", 4.0, 4.0)]
)
def test_shares_follow_the_beta_distribution_of_the_papers(kind: Any, alpha: float | None, effective: float) -> None:
    images = torch.zeros(2, 1, 300, 300)
    shares = [mix(images, kind, alpha, (0, 1, batch)).share for batch in range(600)]
    if kind == "cutmix":
        # A rectangle of side s, about a middle anywhere, has s - s^2 / 4 of each side inside; s^2 is uniform.
        assert np.mean(shares) == pytest.approx(1 - (1 / 2 - 1 / 5 + 1 / 48), abs=0.02)
        return
    expected = np.random.default_rng(1).beta(effective, effective, 200_000)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.std(shares) == pytest.approx(np.std(expected), abs=0.03)


def test_either_takes_each_about_half_of_the_time() -> None:
    images = pictures(2)
    kinds = []
    for batch in range(200):
        mixture = mix(images, "either", None, (0, 0, batch))
        untouched = (mixture.images[0] == images[0]) | (mixture.images[0] == images[1])
        kinds.append(bool(untouched.all()))
    assert 0.35 < np.mean(kinds) < 0.65


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_image_has_another_one_for_a_partner(kind: Literal["mixup", "cutmix"], count: int) -> None:
    partner = mix(pictures(count), kind, 1.0, (0, 0, 0)).partner.tolist()
    assert sorted(partner) == list(range(count))
    assert all(own != other for own, other in enumerate(partner))


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_alone_stays_as_it_is(kind: Literal["mixup", "cutmix"]) -> None:
    image = pictures(1)
    torch.testing.assert_close(mix(image, kind, 1.0, (0, 0, 0)).images, image)


# What it leaves alone


@pytest.mark.parametrize("kind", [*KINDS, "either"])
def test_the_key_alone_decides(kind: Any) -> None:
    images = pictures(8)
    first = mix(images, kind, None, (7, 2, 3))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again = mix(images, kind, None, (7, 2, 3))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.partner, again.partner)
    assert first.share == again.share
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    others = [mix(images, kind, None, key) for key in ((8, 2, 3), (7, 3, 3), (7, 2, 4))]
    assert len({first.share, *(other.share for other in others)}) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_keep_their_type_and_layout_and_the_batch_its_pixels(kind: Any, dtype: torch.dtype) -> None:
    images = pictures(4).to(dtype).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    for batch in range(8):
        mixture = mix(images, kind, 1.0, (0, 0, batch))
        assert torch.equal(images, before)
        assert mixture.images.dtype == dtype
        assert mixture.images.is_contiguous(memory_format=torch.channels_last)
        assert 0 <= mixture.share <= 1
        mixture.images.zero_()
        assert torch.equal(images, before)


# The task


def task(**settings: Any) -> ClassificationTask:
    torch.manual_seed(0)
    made = ClassificationTask(["a", "b", "c"], RECORD, "resnet20", **settings)
    made.setup("fit")
    return made.eval()  # norms on stored statistics: an image's logits do not depend on its neighbours


def batch(**more: Tensor) -> dict[str, Tensor]:
    return {"image": (pictures(4, 32, 32) * 255).to(torch.uint8), "index": torch.arange(4), **more}


WEIGHT = torch.tensor([0.5, 0.0, 3.0, 0.5])


@pytest.mark.parametrize("kind", KINDS)
def test_targets_and_weights_are_mixed_as_the_images_are(
    kind: Literal["mixup", "cutmix"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassificationTask, "current_epoch", 3)
    made, target = task(mixing=kind, mixing_alpha=1.0, seed=5), torch.tensor([0, 1, 2, 1])
    given = batch(target=target, weight=WEIGHT)
    before = given["image"].clone()
    mixture = mix(made.normalise(given["image"]), kind, 1.0, (5, 3, 6))
    logits = made.network(mixture.images)
    losses = torch.zeros(4)
    for target_of, share in ((torch.arange(4), mixture.share), (mixture.partner, 1 - mixture.share)):
        plain = F.cross_entropy(logits, target[target_of], reduction="none")
        losses += share * WEIGHT[target_of] * plain
    torch.testing.assert_close(made.training_step(given, 6), losses.mean())
    assert torch.equal(given["image"], before)


@pytest.mark.parametrize("kind", KINDS)
def test_without_weights_the_loss_is_that_of_soft_labels(kind: Literal["mixup", "cutmix"]) -> None:
    made, target = task(mixing=kind), torch.tensor([0, 1, 2, 1])
    given = batch(target=target)
    mixture = mix(made.normalise(given["image"]), kind, None, (0, 0, 2))
    expected = F.cross_entropy(made.network(mixture.images), soft_labels(mixture, F.one_hot(target, 3).float()))
    torch.testing.assert_close(made.training_step(given, 2), expected)


def test_several_classes_an_image_are_mixed_too() -> None:
    made, target = task(mixing="mixup", multi_label=True), torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]])
    given = batch(target=target)
    mixture = mix(made.normalise(given["image"]), "mixup", None, (0, 0, 2))
    expected = F.binary_cross_entropy_with_logits(made.network(mixture.images), soft_labels(mixture, target))
    torch.testing.assert_close(made.training_step(given, 2), expected)


def test_evaluation_mixes_nothing() -> None:
    plain, mixing = task(), task(mixing="either")
    with torch.inference_mode():
        given = batch(target=torch.tensor([0, 1, 2, 1]))
        first, second = (made.test_step(given, 0)["probabilities"] for made in (plain, mixing))
    assert torch.equal(first, second)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_a_strength_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=r"model\.mixing_alpha: expected a finite strength above 0, found"):
        task(mixing="mixup", mixing_alpha=alpha)


def test_an_objective_is_linear_in_the_target_so_that_losses_may_be_mixed() -> None:
    objective = Objective(True, "weighted_loss", [0.2, 0.5, 0.7])
    logits, first, second = torch.randn(5, 3), torch.ones(5, 3), torch.zeros(5, 3)
    mixed = 0.3 * objective(logits, first) + 0.7 * objective(logits, second)
    torch.testing.assert_close(objective(logits, 0.3 * first + 0.7 * second), mixed)


# Going on in the middle of an epoch


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=15)  # 3 steps of 8 an epoch
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path / "images"
    signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C once it has seen one


@pytest.mark.parametrize("setting", ["--model.mixing=either", "--imbalance=balanced_sampling", "--model.dropout=0.5"])
def test_a_run_that_goes_on_draws_what_it_would_have_drawn(images: Path, setting: str) -> None:
    arguments = ["fit", *fast(images), setting, "--trainer.logger=false"]
    arguments += ["--trainer.max_epochs=2", "--patience=50"]
    assert main(arguments) == 0
    (undisturbed,) = Path("runs").iterdir()
    interrupting = ["--trainer.callbacks=tests.support.InterruptAt", "--trainer.callbacks.step=3"]
    assert main([*arguments, *interrupting]) == 130
    assert main([*arguments, *interrupting, "--ckpt_path=last"]) == 0
    (interrupted,) = set(Path("runs").iterdir()) - {undisturbed}
    expected, found = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (undisturbed, interrupted)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
