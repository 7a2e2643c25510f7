"""The first stages keep what they have learned: which those are, and that they do not move."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cli import main
from pipeline.finetuning.freezing import early_parameters
from pipeline.models.backbones import create_backbone
from pipeline.planning import planner
from tests.support import fast, pretrained


def stages(names: list[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in names})


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnext50_32x4d", "timm/resnet18"])
def test_of_a_residual_network_they_are_the_stem_and_the_first_stage(backbone: str) -> None:
    network = create_backbone(backbone, 3)
    assert stages(early_parameters(network)) == ["bn1", "conv1", "layer1"]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet152", "seresnet50", "wide_resnet50_2"])
def test_a_larger_share_is_two_stages(backbone: str) -> None:
    early = early_parameters(create_backbone(backbone, 3), 0.07)
    assert stages(early) == ["bn1", "conv1", "layer1", "layer2"]


def test_a_share_of_nothing_is_nothing() -> None:
    network = create_backbone("resnet20", 3)
    assert early_parameters(network, False) == early_parameters(network, 0.0) == []


@pytest.mark.parametrize("backbone", ["resnet20", "timm/tf_efficientnet_lite0", "timm/convnext_pico"])
def test_they_hold_little_of_what_can_be_learned_in_any_network(backbone: str) -> None:
    network = create_backbone(backbone, 3)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    early = early_parameters(network)
    assert early
    assert sum(sizes[name] for name in early) <= 0.02 * sum(sizes.values())


def test_a_first_layer_that_is_no_convolution_has_to_learn() -> None:
    network = create_backbone("resnet20", 3)
    network.first_convolution = network.head_name
    assert early_parameters(network) == []


def test_a_first_layer_for_other_channels_has_to_learn() -> None:
    assert early_parameters(create_backbone("resnet18", 3, in_channels=1)) == []


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    strategy = ["--finetuning=ProbeThenFineTune", f"--finetuning.features={tmp_path}/features"]
    quick = ["--trainer.max_epochs=2", "--trainer.logger=false"]
    return ["fit", *fast(tmp_path / "images"), *pretrained(tmp_path, per_class=12), *strategy, *quick]


def trained() -> dict[str, torch.Tensor]:
    (folder,) = Path("runs").iterdir()
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def test_they_do_not_move_and_all_else_does(arguments: list[str]) -> None:
    assert main(arguments) == 0
    brought, found = load_file("weights.safetensors"), trained()
    network = create_backbone("resnet20", 3)
    early = set(early_parameters(network))
    same = {name for name, _ in network.named_parameters() if torch.equal(brought[name], found[name])}
    assert same - {"linear.weight", "linear.bias"} == early


def test_they_move_where_that_is_asked(arguments: list[str]) -> None:
    assert main([*arguments, "--finetuning.freeze_early=false"]) == 0
    assert not torch.equal(load_file("weights.safetensors")["conv1.weight"], trained()["conv1.weight"])


@pytest.mark.parametrize(
    ("told", "count"), [([], 3), (["--finetuning.freeze_early=false"], 0), (["--finetuning=FullFineTuning"], 0)]
)
def test_a_budget_reckons_with_them(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, told: list[str], count: int
) -> None:
    seen: list[Any] = []
    real = planner.Stopwatch

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(given[-1])
        return real(*given, **named)

    monkeypatch.setattr(planner, "Stopwatch", watched)
    assert main(["plan", *arguments[1:], "--budget=20m", *told]) == 0
    assert len(seen[0]) == count


def test_as_many_of_them_as_are_asked_for_stay(arguments: list[str]) -> None:
    assert main([*arguments, "--finetuning.freeze_early=0.3"]) == 0
    brought, found = load_file("weights.safetensors"), trained()
    weights = [name for name, _ in create_backbone("resnet20", 3).named_parameters() if not name.startswith("linear")]
    same = [name for name in weights if torch.equal(brought[name], found[name])]
    assert stages(same) == ["bn1", "conv1", "layer1", "layer2"]


@pytest.mark.parametrize("share", ["1.0", "-0.1"])
def test_a_share_out_of_range_is_a_mistake(
    arguments: list[str], capsys: pytest.CaptureFixture[str], share: str
) -> None:
    assert main([*arguments, f"--finetuning.freeze_early={share}"]) == 2
    assert "finetuning.freeze_early: expected true, false or a share in [0, 1)" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["--finetuning.freeze_early=false", "--finetuning=FullFineTuning"])
def test_a_run_cannot_go_on_with_others_frozen(
    arguments: list[str], capsys: pytest.CaptureFixture[str], told: str
) -> None:
    assert main(arguments) == 0
    (folder,) = Path("runs").iterdir()
    assert main([*arguments, told, f"--ckpt_path={folder / 'last.ckpt'}", "--trainer.max_epochs=3"]) == 2
    assert "in which 3 tensors were frozen" in capsys.readouterr().err
