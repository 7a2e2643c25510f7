"""What the task learns with: normalisation, precision, parameter groups, schedule, monitor."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.finetuning.optimization import cosine_with_warmup, parameter_groups
from pipeline.models.backbones import IMAGENET_PREPROCESSING
from pipeline.monitor import choose_monitor
from pipeline.precision import pick_precision
from pipeline.task import ClassificationTask
from tests.support import fast, pretrained

RECORD = {**IMAGENET_PREPROCESSING, "size": 64}


def make(**settings: object) -> ClassificationTask:
    torch.manual_seed(0)
    return ClassificationTask(classes=["a", "b", "c"], preprocessing=RECORD, **settings)  # type: ignore[arg-type]


def test_images_are_scaled_and_normalised_as_the_record_says() -> None:
    task = make().eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(RECORD[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    expected = task.network((images.float() / 255 - mean) / std)
    torch.testing.assert_close(task(images), expected, rtol=1e-5, atol=1e-5)


def test_normalisation_follows_the_record_and_not_a_constant() -> None:
    images = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    seen: list[torch.Tensor] = []
    task = ClassificationTask(classes=["a", "b"], preprocessing={"mean": [0.5] * 3, "std": [0.25] * 3})
    task.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task(images)
    torch.testing.assert_close(seen[0], torch.full((1, 3, 64, 64), 2.0))


def test_evaluation_is_float32_inside_autocast() -> None:
    task = make().eval()
    batch = {
        "image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        "target": torch.tensor([0, 1]),
        "index": torch.tensor([0, 1]),
    }
    with torch.inference_mode():
        plain = task.test_step(batch, 0)["probabilities"]
        with torch.autocast("cpu", torch.bfloat16):
            assert task(batch["image"]).dtype == torch.bfloat16  # what training would compute
            under_autocast = task.test_step(batch, 0)["probabilities"]
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_the_validation_loss_is_the_mean_log_loss_and_finite() -> None:
    task = make().eval()
    batch = {
        "image": torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8),
        "target": torch.tensor([0, 2, 1]),
        "index": torch.arange(3),
    }
    with torch.inference_mode():
        task.validation_step(batch, 0)
        torch.testing.assert_close(task.val_loss.compute(), F.cross_entropy(task(batch["image"]), batch["target"]))
        task.network.fc.bias.copy_(torch.tensor([1000.0, 0, 0]))  # certain, and wrong
        task.validation_step(batch, 0)
    assert torch.isfinite(task.val_loss.compute())


def test_weights_are_channels_last() -> None:
    assert make().network.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_every_parameter_is_in_one_group_and_norms_and_biases_do_not_decay() -> None:
    task = make()
    groups = parameter_groups(task.network, "fc", 1e-4, 1e-3, 0.05)
    assert {group["name"] for group in groups} == {"backbone", "backbone.no_decay", "head", "head.no_decay"}
    owners = {parameter: group for group in groups for parameter in group["params"]}
    assert len(owners) == sum(len(group["params"]) for group in groups) == len(list(task.network.parameters()))
    for module_name, module in task.network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            group = owners[parameter]
            assert group["lr"] == (1e-3 if module_name == "fc" else 1e-4)
            plain = isinstance(module, nn.BatchNorm2d) or name == "bias"
            assert group["weight_decay"] == (0.0 if plain else 0.05)


def test_frozen_parameters_are_left_out_of_the_groups() -> None:
    task = make()
    task.network.layer1.requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(task.network, "fc", 1e-4, 1e-3, 0.05) for p in group["params"]}
    assert not any(id(parameter) in grouped for parameter in task.network.layer1.parameters())


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [cosine_with_warmup(step, total_steps=100, warmup_steps=10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0)


def test_rates_under_auto_depend_on_where_training_starts() -> None:
    assert (make().hparams["learning_rate"], make().hparams["head_learning_rate"]) == (1e-3, 1e-3)
    given = make(learning_rate=3e-5, head_learning_rate=7e-5)
    assert (given.hparams["learning_rate"], given.hparams["head_learning_rate"]) == (3e-5, 7e-5)


def test_gradients_are_clipped_in_mixed_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = ["--trainer.gradient_clip_val=0.5", "--trainer.precision=bf16-mixed", "--trainer.logger=false"]
    arguments = [*fast(tmp_path / "images"), *pretrained(tmp_path, per_class=12), "--finetuning=FullFineTuning"]
    norms = []

    def steps(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    hook = register_optimizer_step_post_hook(steps)
    try:
        assert main(["fit", *arguments, "--trainer.max_epochs=1", *told]) == 0
    finally:
        hook.remove()
    assert max(norms) <= 0.5 * 1.001
    assert min(norms) > 0.49


def test_a_hub_out_of_reach_is_an_error_or_a_start_from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("pipeline.models.sources.cached_in_hub", lambda *_: None)
    with pytest.raises(UserError, match="Three ways on"):
        make(weights="timm/resnet18.a1_in1k")
    task = make(weights="timm/resnet18.a1_in1k", weights_fallback="scratch")
    assert task.load_report is None
    assert "HF_HUB_OFFLINE" in str(task.fallback_reason)
    assert task.hparams["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("counts", "expected"),
    [({"a": 10, "b": 10}, "val/accuracy"), ({"a": 14, "b": 10}, "val/accuracy"), ({"a": 15, "b": 10}, "val/macro_f1")],
)
def test_the_monitor_is_macro_f1_where_classes_are_uneven(counts: dict[str, int], expected: str) -> None:
    assert choose_monitor("auto", counts, False)[0] == expected
    assert choose_monitor("val/loss", counts, False) == ("val/loss", "as set")


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"avx2": True}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_bf16_is_picked_where_the_processor_computes_it(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: units, raising=False)
    assert pick_precision("cpu")[0] == expected
