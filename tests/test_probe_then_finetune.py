"""The head is solved on features of the untouched network, and everything is trained from there."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file

from datamodules import ImageFolderDataModule
from datamodules.split_images import SplitImages
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.finetuning import ProbeThenFineTune, solving
from pipeline.finetuning.probe import fit_probe
from pipeline.models import backbones
from pipeline.models.backbones import create_backbone, features
from pipeline.models.weights import preprocessing_record
from pipeline.task import ClassificationTask
from tests.support import fast, write_images


class FirstHead(Callback):
    """Keeps the head that the first step finds, and the network around it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.state = {name: tensor.clone() for name, tensor in pl_module.network.state_dict().items()}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_file(create_backbone("resnet20", 10).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


class Setting:
    """Images, weights and a place for features."""

    def __init__(self, folder: Path, weights: Path) -> None:
        write_images(folder / "images", per_class=10)
        self.images, self.weights, self.features = folder / "images", weights, folder / "features"

    def fit(self, strategy: Any = None, imbalance: str = "none", **settings: Any) -> tuple[FirstHead, Any, Any]:
        record = preprocessing_record("resnet20", str(self.weights))
        data = ImageFolderDataModule(str(self.images), preprocessing=record, batch_size=8, num_workers=0)
        torch.manual_seed(0)
        task = ClassificationTask(
            data.classes,
            data.preprocessing.to_dict(),
            "resnet20",
            str(self.weights),
            imbalance=imbalance,
            class_shares=data.class_shares,
        )
        first = FirstHead()
        strategy = strategy or ProbeThenFineTune(str(self.features))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[strategy, first],
            enable_checkpointing=False,
            **quiet,
            num_sanity_val_steps=0,
        )
        trainer.fit(task, data, **settings)
        return first, task, data


@pytest.fixture
def setting(tmp_path: Path, weights: Path) -> Setting:
    return Setting(tmp_path, weights)


def test_the_first_step_finds_the_solved_head_and_the_loaded_weights(setting: Setting) -> None:
    first, task, data = setting.fit()
    network = create_backbone("resnet20", 3)
    loaded = {
        name: value for name, value in first.state.items() if not name.startswith("linear.") and "running" not in name
    }
    network.load_state_dict({**first.state})
    torch.manual_seed(1)
    fresh = create_backbone("resnet20", 10).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in loaded.items())
    augmented, variance = data.dataset("train"), first.state["bn1.running_var"]
    images = torch.stack([augmented[(0, index, 0)]["image"] for index in range(len(augmented))])
    with torch.inference_mode():
        found = network.conv1(task.normalise(images)).var((0, 2, 3))
    assert (found / variance).log().abs().max() < 0.3  # 256 augmented images, some of them many times
    assert (fresh["bn1.running_var"] / variance).log().abs().max() > 1
    plain = data.plain("train")
    images = torch.stack([plain[(0, index, 0)]["image"] for index in range(len(plain))])
    with torch.inference_mode():
        found = features(network.eval(), task.normalise(images))
    expected = fit_probe(found, torch.from_numpy(plain.targets), 3)
    torch.testing.assert_close(first.state["linear.weight"], expected.weight, atol=1e-2, rtol=1e-2)
    right = (found @ first.state["linear.weight"].T + first.state["linear.bias"]).argmax(1).numpy() == plain.targets
    assert right.mean() > 0.9  # which a random head would not reach
    assert not torch.equal(task.network.linear.weight, first.state["linear.weight"])
    stage = "layer2.0.conv1.weight"
    assert not torch.equal(task.network.get_parameter(stage), first.state[stage])


def test_the_same_images_are_not_looked_at_twice(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def strategy() -> ProbeThenFineTune:
        return ProbeThenFineTune(str(setting.features), measure=False)

    first, _, _ = setting.fit(strategy())

    def looks(*_: Any) -> None:
        raise AssertionError("features were computed")

    monkeypatch.setattr(backbones, "features", looks)
    again, _, _ = setting.fit(strategy())
    assert torch.equal(again.state["linear.weight"], first.state["linear.weight"])
    (setting.images / "red" / "000.png").write_bytes((setting.images / "blue" / "001.png").read_bytes())
    (setting.images / "red" / "new.png").write_bytes((setting.images / "red" / "002.png").read_bytes() + b"\0")
    with pytest.raises(AssertionError, match="features were computed"):
        setting.fit(strategy())


def test_measured_statistics_are_the_same_each_time(setting: Setting) -> None:
    setting.fit()
    (kept,) = setting.features.glob("*/*.features")
    setting.fit()
    assert list(setting.features.glob("*/*.features")) == [kept]


def test_shares_that_training_aims_at_are_in_the_head(setting: Setting) -> None:
    for number in range(4, 10):
        (setting.images / "red" / f"{number:03}.png").unlink()
    plain, task, _ = setting.fit()
    shares = torch.tensor(task.class_shares)
    for imbalance in ("logit_adjustment", "weighted_loss"):
        moved, _, _ = setting.fit(imbalance=imbalance)
        offset = moved.state["linear.bias"] - plain.state["linear.bias"]
        torch.testing.assert_close(offset - offset.mean(), -shares.log() + shares.log().mean(), atol=1e-4, rtol=1e-4)
        assert torch.equal(moved.state["linear.weight"], plain.state["linear.weight"])


def test_groups_and_copies_are_held_out_together_and_other_images_alone(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        seen.append(arguments[4])
        return fit_probe(*arguments, **settings)

    def belong_to(groups: list[str] | None) -> None:
        monkeypatch.setattr(SplitImages, "groups", property(lambda _: groups))

    monkeypatch.setattr(solving, "fit_probe", watched)
    _, _, data = setting.fit()
    count = len(data.plain("train"))
    groups = [" " if row % 3 else "p1" for row in range(count)]
    belong_to(groups)
    setting.fit()
    assert len(set(seen[0])) == len(seen[0]) == count
    assert len(seen[1]) == count
    assert seen[1].count(seen[1][0]) == groups.count("p1") > 1
    assert len(set(seen[1])) == groups.count(" ") + 1
    belong_to(None)
    reds = sorted((setting.images / "red").iterdir())
    for path in reds:
        path.write_bytes(reds[0].read_bytes())
    _, _, data = setting.fit()
    copies = sum(path.startswith("red") or "/red/" in path for path in data.images("train").paths)
    assert len(seen[2]) - len(set(seen[2])) == copies - 1 > 1
    # A file that is in two groups joins them.
    belong_to([str(row) for row in range(count)])
    setting.fit()
    assert len(set(seen[3])) == count  # ... but not all groups that there are
    belong_to([str(row % 2) for row in range(count)])
    setting.fit()
    assert len(set(seen[4])) == 1


def test_a_checkpoint_keeps_its_head(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    strategy = ["--finetuning=ProbeThenFineTune", f"--finetuning.features={setting.features}"]
    arguments = [*fast(setting.images), "--trainer.logger=false", *strategy]
    assert main(["fit", *arguments, f"--model.weights={setting.weights}", "--trainer.max_epochs=1"]) == 0
    assert "then 56 of 59 tensors above the first stages are trained" in capsys.readouterr().out
    (folder,) = Path("runs").iterdir()

    def looks(*_: Any) -> None:
        raise AssertionError("the head was solved again")

    monkeypatch.setattr(solving, "fit_probe", looks)
    assert main(["fit", *arguments, f"--ckpt_path={folder / 'last.ckpt'}", "--trainer.max_epochs=2"]) == 0
    # It did not see where training began, and chooses among its epochs.
    (second,) = set(Path("runs").iterdir()) - {folder}
    assert json.loads((second / "summary.json").read_text())["chosen"].startswith("best checkpoint by val/")


def test_a_run_that_began_from_a_checkpoint_can_be_interrupted(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chooses among its epochs then, too: where the training began it has never seen."""
    monkeypatch.chdir(tmp_path)
    strategy = ["--finetuning=ProbeThenFineTune", f"--finetuning.features={setting.features}"]
    arguments = ["fit", *fast(setting.images), "--trainer.logger=false", *strategy]
    assert main([*arguments, f"--model.weights={setting.weights}", "--trainer.max_epochs=1"]) == 0
    (folder,) = Path("runs").iterdir()
    arguments += [
        "--trainer.max_epochs=3",
        "--trainer.callbacks=tests.support.InterruptAt",
        "--trainer.callbacks.step=4",
    ]
    handler = signal.getsignal(signal.SIGINT)
    assert main([*arguments, f"--ckpt_path={folder}"]) == 130
    signal.signal(signal.SIGINT, handler)
    assert main([*arguments, "--ckpt_path=last"]) == 0
    (second,) = set(Path("runs").iterdir()) - {folder}
    assert json.loads((second / "summary.json").read_text())["chosen"].startswith(("best checkpoint", "last epoch"))


@pytest.mark.parametrize("told", ["--monitor=val/accuracy", "--patience=5"])
def test_who_says_how_to_choose_gets_an_epoch(
    told: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    strategy = ["--finetuning=ProbeThenFineTune", f"--finetuning.features={setting.features}"]
    arguments = ["fit", *fast(setting.images), "--trainer.logger=false", *strategy]
    assert main([*arguments, f"--model.weights={setting.weights}", "--trainer.max_epochs=1", told]) == 0
    (folder,) = Path("runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["chosen"] == "best checkpoint by val/accuracy"


def test_it_needs_a_linear_head_and_a_datamodule(setting: Setting) -> None:
    strategy = ProbeThenFineTune(str(setting.features))
    record = {"mean": [0.5] * 3, "std": [0.25] * 3}
    task = ClassificationTask(["a", "b"], record, "resnet20")
    task.network.linear = torch.nn.Sequential(task.network.linear)
    with pytest.raises(UserError, match="expected a network whose head is linear for ProbeThenFineTune, found Seq"):
        strategy.on_train_start(Trainer(accelerator="cpu", logger=False), task)
    task = ClassificationTask(["a", "b"], record, "resnet20")
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[strategy], enable_checkpointing=False)
    batch = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "target": torch.tensor([0, 1])}
    with pytest.raises(UserError, match="expected a datamodule for ProbeThenFineTune"):
        trainer.fit(task, torch.utils.data.DataLoader([batch], batch_size=None))
