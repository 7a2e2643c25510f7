"""Imports run one way, and the command line answers at once."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        place = ROOT / folder
        yield from [place] if place.is_file() else sorted(place.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def reaches(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imported(path))


def test_datamodules_know_nothing_of_the_pipeline() -> None:
    assert [path.name for path in modules("datamodules") if reaches(path, "pipeline")] == []


def test_the_task_and_the_models_know_nothing_of_the_data() -> None:
    learning = modules("pipeline/task.py", "pipeline/models", "pipeline/finetuning", "pipeline/evaluation")
    assert [path.name for path in learning if reaches(path, "datamodules")] == []


def test_models_are_torch_alone_and_timm_has_two_doors() -> None:
    allowed = {"pipeline.models", "pipeline.errors", "torch", "torchvision", "timm", "safetensors", "huggingface_hub"}
    for path in modules("pipeline/models"):
        for name in imported(path):
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or any(name == a or name.startswith(f"{a}.") for a in allowed)
            assert known, f"{path.name} imports {name}"
    doors = {path.name for path in modules("pipeline") if reaches(path, "timm")}
    assert doors == {"backbones.py", "sources.py"}


def test_mlflow_is_spoken_to_in_tracking_and_registry_alone() -> None:
    speakers = {path.parent.name for path in modules("pipeline", "datamodules") if reaches(path, "mlflow")}
    assert speakers == {"tracking", "registry"}


@pytest.mark.parametrize("module", ["decode.py", "preprocessing.py"])
def test_what_a_registered_model_carries_needs_only_numpy_and_pillow(module: str) -> None:
    tops = {name.split(".")[0] for name in imported(ROOT / "datamodules" / module)}
    # The decoder does without these where they are not installed, or imports them for TIFF files of other kinds alone.
    optional = {"simplejpeg", "tifffile"} if module == "decode.py" else set()
    assert tops - sys.stdlib_module_names - optional == {"numpy", "PIL"}


def test_inference_needs_no_training_software() -> None:
    tops = {name.split(".")[0] for name in imported(ROOT / "pipeline/registry/inference.py")}
    assert tops - sys.stdlib_module_names == {"numpy", "onnxruntime"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.cli import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'lightning', 'mlflow', 'timm', 'albumentations'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "python -m pipeline fit --config configs/finetune.yaml" in done.stdout


def test_every_package_is_packed() -> None:
    """An editable installation finds them all; one that is packed has only those that are named."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    there = [
        file.parent.relative_to(ROOT)
        for top in ("pipeline", "datamodules")
        for file in (ROOT / top).rglob("__init__.py")
    ]
    assert sorted(named) == sorted(".".join(folder.parts) for folder in there)
