"""What the command line tells without data: networks, published weights, their licences and their records."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli import main
from pipeline.models.backbones import IMAGENET_PREPROCESSING, default_preprocessing
from pipeline.models.family import FAMILY
from pipeline.models.sources import is_non_commercial
from pipeline.models.weights import Lineage, preprocessing_record
from tests.states import CACHED_TAG, Caches, cached_repository

ROW = re.compile(r"(\S+) +(\d+) px +([\d.]+) M  (yes|no ) +(\S.*)")


@pytest.fixture(autouse=True)
def caches(no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Caches:
    return Caches.empty(tmp_path, monkeypatch)


def listed(backbone: str, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[int, float, bool, str]]:
    """Address to input size, million parameters, whether it is here, and licence."""
    assert main(["weights", "--backbone", backbone]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    header, *lines = printed.out.splitlines()
    assert header.split() == ["model.weights", "input", "parameters", "here", "licence"]
    rows = [ROW.fullmatch(line).groups() for line in lines]
    found = {name: (int(size), float(count), here == "yes", text) for name, size, count, here, text in rows}
    assert len(found) == len(lines)
    return found


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is printed for a mistake."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line.removeprefix("error: ")


def timm_tags(model: str) -> list[str]:
    return [tag for tag in timm.list_pretrained() if tag.partition(".")[0] == model]


# Weights


def test_all_published_weights_of_a_network_are_listed_with_size_and_licence(capsys):
    found = listed("resnet50", capsys)
    tags = timm_tags("resnet50")
    assert len(tags) > 10
    in_torchvision = {f"torchvision/ResNet50_Weights.IMAGENET1K_V{version}" for version in (1, 2)}
    assert set(found) == {f"timm/{tag}" for tag in tags} | in_torchvision
    for address, (size, millions, here, licence) in found.items():
        record = None if address in in_torchvision else timm.get_pretrained_cfg(address.removeprefix("timm/"))
        assert not here
        assert size == (224 if record is None else record.input_size[1])
        # Published as 25,557,032 parameters, 2,049,000 of them in a head for 1,000 classes.
        assert millions == (23.5 if record and record.num_classes == 0 else 25.6)
        stated = record.license if record else None
        assert licence.removesuffix(" (non-commercial)") == (stated or "not stated")
        assert licence.endswith("(non-commercial)") == (stated == "cc-by-nc-4.0")
    licences = {row[3] for row in found.values()}
    assert {"apache-2.0", "bsd-3-clause", "cc-by-nc-4.0 (non-commercial)", "not stated"} <= licences


def test_weights_in_a_cache_are_marked(caches, capsys):
    (cached_repository(caches.hub, "timm/resnet50.a2_in1k") / "model.safetensors").write_bytes(b"")
    (cached_repository(caches.hub, "timm/resnet50.b1k_in1k") / "pytorch_model.bin").write_bytes(b"")
    (cached_repository(caches.hub, "timm/resnet50.c1_in1k") / "config.json").write_bytes(b"")
    caches.torch.mkdir(parents=True)
    (caches.torch / "resnet50-11ad3fa6.pth").write_bytes(b"")
    here = {address for address, row in listed("resnet50", capsys).items() if row[2]}
    v2 = "torchvision/ResNet50_Weights.IMAGENET1K_V2"
    assert here == {"timm/resnet50.a2_in1k", "timm/resnet50.b1k_in1k", v2}


def test_parameters_are_counted_with_the_head_that_was_published(capsys):
    """ImageNet-21k has 21,843 classes, which nearly doubles a small network."""
    found = listed("timm/vit_tiny_patch16_224", capsys)
    assert set(found) == {f"timm/{tag}" for tag in timm_tags("vit_tiny_patch16_224")}
    for address, (_, millions, _, _) in found.items():
        with torch.device("meta"):
            network = timm.create_model(address.removeprefix("timm/"))
        assert millions == round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1)
    assert len({row[1] for row in found.values()}) == 2


def test_a_network_of_which_no_weights_are_known_says_what_works(capsys):
    assert main(["weights", "--backbone", "resnet20"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("No published weights are known for resnet20;")
    assert "model.weights: path/to/file.safetensors" in line


@pytest.mark.parametrize(
    ("backbone", "texts"),
    [
        ("resnet51", ("'resnet51'", "did you mean", "resnet50")),
        ("timm/vit_tiny_patch16_225", ("'timm/vit_tiny_patch16_225'", "did you mean vit_tiny_patch16_224")),
        ("vit_tiny_patch16_224", ("'vit_tiny_patch16_224'", "timm/<model>")),
    ],
)
def test_an_unknown_backbone_is_a_mistake_with_near_matches(backbone, texts, capsys):
    line = complaint(["weights", "--backbone", backbone], capsys)
    assert all(text in line for text in ("model.backbone", *texts))


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["weights"], ("required: --backbone", "python -m pipeline weights --help")),
        (["weights", "--backbone"], ("--backbone: expected one argument", "python -m pipeline weights --help")),
        (["weights", "--backbone", "resnet20", "--size", "2"], ("unrecognized arguments: --size 2",)),
        (["backbones", "resnet20"], ("unrecognized arguments: resnet20", "python -m pipeline backbones --help")),
        (["weight", "--backbone", "resnet20"], ("found 'weight'", "did you mean weights")),
    ],
)
def test_missing_and_unknown_arguments_are_mistakes_of_one_line(arguments, texts, capsys):
    line = complaint(arguments, capsys)
    assert all(text in line for text in texts)


@pytest.mark.parametrize("backbone", ["resnet18", "wide_resnet50_2"])
def test_weights_of_torchvision_are_listed_for_the_network_of_that_name(backbone, capsys):
    expected = {f"torchvision/{weights}" for weights in torchvision.models.get_model_weights(backbone)}
    assert {address for address in listed(backbone, capsys) if address.startswith("torchvision/")} == expected


# Backbones


@pytest.fixture(scope="module")
def printed() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["backbones"]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def table(printed: str) -> list[list[str]]:
    """Cells of the printed Markdown table."""
    lines = printed.splitlines()
    assert len({len(line) for line in lines}) == 1, "the columns do not stand under each other"
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_it_is_what_the_readme_shows(printed):
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    _, _, after = readme.partition("<!-- printed by: python -m pipeline backbones -->\n")
    assert after.startswith(printed)


def test_every_network_of_the_family_has_one_line(table):
    header, rule, *rows = table
    assert header == ["name", "layers", "parameters", "multiply-adds", "image", "classes"]
    assert all(re.fullmatch("-+:?", cell) for cell in rule)
    assert sorted(row[0] for row in rows) == sorted(f"`{name}`" for name in FAMILY)


@pytest.mark.parametrize(("name", "layers", "billions"), [("resnet18", "18", 1.814), ("resnet50", "50", 4.089)])
def test_numbers_of_the_table_are_those_of_torchvision(table, name, layers, billions):
    (row,) = [row for row in table if row[0] == f"`{name}`"]
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    assert (parameters, billions) == (published["num_params"], published["_ops"])
    assert row[1:] == [layers, f"{parameters:,}", f"{billions * 1000:,.0f} M", "224 px", "1,000"]


def test_numbers_of_a_small_network_are_those_of_an_independent_count(table):
    (row,) = [row for row in table if row[0] == "`resnet20_b`"]
    network = FAMILY["resnet20_b"](num_classes=10).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, 32, 32))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert row[1:] == ["20", f"{parameters:,}", f"{counter.get_total_flops() / 2e6:,.0f} M", "32 px", "10"]


# Licences


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("cc-by-nc-4.0", True),
        ("CC-BY-NC-SA-4.0", True),
        ("fair-noncommercial-research-license", True),
        ("apple-amlr", True),
        ("seer-license", True),
        ("Non-Commercial", True),
        ("non commercial use only", True),
        ("apache-2.0", False),
        ("mit", False),
        ("bsd-3-clause", False),
        ("cc-by-4.0", False),
        ("unknown", False),
        ("license-of-nccl", False),
        ("", False),
        (None, False),
    ],
)
def test_licences_that_exclude_commercial_use_are_known_by_name(licence, expected):
    assert is_non_commercial(licence) is expected


def test_every_licence_of_timm_that_says_so_is_known():
    names = {timm.get_pretrained_cfg(tag).license for tag in timm.list_pretrained()}
    assert {"cc-by-nc-4.0", "fair-noncommercial-research-license", "apple-amlr", "apache-2.0", None} <= names
    said = {name for name in names if name and ("-nc-" in name or "noncommercial" in name)}
    assert {name for name in names if is_non_commercial(name)} == said | {"apple-amlr", "seer-license"} & names


def test_a_lineage_in_words():
    assert str(Lineage()) == "scratch"
    assert str(Lineage("timm/x", "timm/x", "mit")) == "timm/x"
    assert str(Lineage("best.ckpt", "timm/x", "mit")) == "best.ckpt (from timm/x)"
    assert Lineage().licence_in_words == "not stated"
    assert Lineage(licence="mit").licence_in_words == "mit"
    assert Lineage(licence="cc-by-nc-4.0").licence_in_words == "cc-by-nc-4.0 (non-commercial)"


# Preprocessing that belongs to weights

PAPER = IMAGENET_PREPROCESSING


def test_own_networks_bring_the_record_of_the_paper():
    assert preprocessing_record("resnet50", None) == PAPER
    record = preprocessing_record("resnet18", None)
    assert (record["size"], record["crop"], record["interpolation"]) == (224, 0.875, "bilinear")
    record["size"] = 1
    assert preprocessing_record("resnet18", None)["size"] == 224, "a caller changed the record of the others"


@pytest.mark.parametrize(
    "tag",
    [
        "resnet18.a1_in1k",
        "resnet18.tv_in1k",
        "resnet50.a1h_in1k",
        "tf_efficientnet_lite0.in1k",
        "tf_efficientnet_b0.ns_jft_in1k",
        "vit_base_patch16_224.augreg_in21k",
        "convnext_tiny.fb_in22k_ft_in1k_384",
        "inception_v3.tv_in1k",
        "regnety_032.ra_in1k",
        "mobilenetv3_large_100.ra_in1k",
        "test_vit.r160_in1k",
    ],
)
def test_a_tag_brings_the_record_that_timm_has_for_it(tag):
    with torch.device("meta"):
        expected = timm.data.resolve_model_data_config(timm.create_model(tag))
    record = preprocessing_record("resnet18", f"timm/{tag}")
    assert (record["channels"], record["size"], record["size"]) == expected["input_size"]
    assert (record["mean"], record["std"]) == (list(expected["mean"]), list(expected["std"]))
    assert (record["crop"], record["interpolation"]) == (expected["crop_pct"], expected["interpolation"])
    assert len(record) == 6


def test_the_records_of_tags_differ():
    """Else the comparison above would hold of one record for all."""
    record = preprocessing_record("resnet18", CACHED_TAG)
    assert (record["crop"], record["interpolation"]) == (0.95, "bicubic")
    assert preprocessing_record("resnet18", "timm/resnet18.tv_in1k")["crop"] == 0.875
    assert preprocessing_record("timm/resnet18", "timm/resnet18.tv_in1k")["interpolation"] == "bilinear"


def test_a_timm_model_brings_its_own_record():
    expected = {**PAPER, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    assert (
        preprocessing_record("timm/tf_efficientnet_lite0", None)
        == expected
        == default_preprocessing("timm/tf_efficientnet_lite0")
    )


def test_a_border_that_we_cannot_make_is_left_out():
    assert timm.get_pretrained_cfg("volo_d5_512.sail_in1k").crop_pct > 1
    assert preprocessing_record("resnet18", "timm/volo_d5_512.sail_in1k")["crop"] == 1.0
