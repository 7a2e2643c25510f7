"""Loading weights strictly: what fits, what is adapted, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import UserError, near_matches
from pipeline.models.backbones import create_backbone, default_preprocessing, features, head_name
from pipeline.models.weights import adapt_input_channels, load_pretrained, preprocessing_record
from pipeline.task import ClassificationTask
from tests.states import SMALL, assert_loaded, assert_refused, assert_same, randomised, save, snapshot

pytestmark = pytest.mark.usefixtures("no_network")


# Loading a file


def test_all_but_the_head_comes_from_the_file(tmp_path):
    state = randomised(create_backbone("resnet18", 1000))
    address = save(state, tmp_path / "weights.safetensors")
    network = create_backbone("resnet18", 3)
    head = snapshot(network.fc)

    report = load_pretrained(network, address)

    assert_loaded(network, state)
    assert_same(snapshot(network.fc), head)
    assert report.loaded == len(state) - 2 == 120
    assert (sorted(report.skipped), report.adapted, report.unwrapped) == (["fc.bias", "fc.weight"], (), ())
    assert (report.lineage.address, report.lineage.origin, report.lineage.licence) == (address, address, None)
    assert str(report) == "120 tensors loaded; skipped fc.bias, fc.weight; head 'fc' starts fresh"


def test_the_head_stays_fresh_even_where_its_shape_fits(tmp_path):
    network = create_backbone(SMALL, 5)
    state = randomised(network)
    head = snapshot(network.fc)
    load_pretrained(network, save(state, tmp_path / "same_classes.safetensors"))
    assert_same(snapshot(network.fc), head)
    assert_loaded(network, state)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(tmp_path, kind):
    network = create_backbone(SMALL, 3)
    half = {key: value.to(kind) if value.is_floating_point() else value for key, value in randomised(network).items()}
    save_file(half, tmp_path / "half.safetensors")
    load_pretrained(network, str(tmp_path / "half.safetensors"))
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == torch.float32
            if not key.startswith("fc."):
                assert torch.equal(value, half[key].float())


def test_a_file_without_batch_counters_and_without_a_head_loads(tmp_path):
    network = create_backbone(SMALL, 3)
    state = {
        key: value
        for key, value in randomised(network).items()
        if not key.endswith("num_batches_tracked") and not key.startswith("fc.")
    }
    report = load_pretrained(network, save(state, tmp_path / "old.pth"))
    assert (report.loaded, report.skipped) == (len(state), ())
    assert str(report) == f"{len(state)} tensors loaded; head 'fc' starts fresh"
    loaded = network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    network = create_backbone(SMALL, 3)
    save(randomised(network), tmp_path / "weights.safetensors")
    assert load_pretrained(network, "~/weights.safetensors").loaded > 0


# Files that do not fit


def test_another_architecture_is_named_by_its_keys(tmp_path):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create_backbone("resnet50", 10).state_dict().items()}
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "r50.pth")
    message = assert_refused(create_backbone("resnet18", 3), str(tmp_path / "r50.pth"), "r50.pth")
    assert "unexpected: layer1.0.conv3.weight" in message
    assert "layer1.0.conv1.weight (64, 64, 1, 1) instead of (64, 64, 3, 3)" in message
    assert "Set model.backbone" in message


def test_a_missing_an_unexpected_and_a_misshapen_key_are_each_an_error(tmp_path):
    network = create_backbone(SMALL, 3)
    norm = next(key for key in network.state_dict() if key.endswith("bn1.running_mean"))
    convolution = next(key for key in network.state_dict() if key.endswith("conv2.weight"))
    path = tmp_path / "weights.pth"

    state = randomised(network)
    del state[norm]
    assert_refused(network, save(state, path), f"1 missing: {norm}.")

    assert_refused(network, save({**randomised(network), "ema.decay": torch.zeros(1)}, path), "1 unexpected: ema.decay")

    state = randomised(network)
    state[convolution] = state[convolution][:-1]
    assert_refused(network, save(state, path), "1 of another shape: ", f"{convolution} (", "instead of")


def test_a_key_that_only_starts_like_the_head_is_not_skipped(tmp_path):
    network = create_backbone(SMALL, 3)
    state = {**randomised(network), "fc_extra.weight": torch.zeros(1)}
    assert_refused(network, save(state, tmp_path / "weights.pth"), "fc_extra.weight")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_refused(tmp_path, suffix, value):
    network = create_backbone(SMALL, 3)
    state = randomised(network)
    state["bn1.running_var"][3] = value
    assert_refused(network, save(state, tmp_path / f"weights{suffix}"), "found 1 not finite: bn1.running_var.")
    # What is in the head does not matter: it is left out.
    state = randomised(network)
    state["fc.weight"][0, 0] = value
    assert load_pretrained(network, save(state, tmp_path / f"weights{suffix}")).loaded == len(state) - 2


def test_a_value_too_large_for_the_network_is_not_finite_in_it(tmp_path):
    network = create_backbone(SMALL, 3)
    state = {**randomised(network), "bn1.bias": torch.full_like(network.bn1.bias, 1e300, dtype=torch.float64)}
    assert_refused(network, save(state, tmp_path / "weights.pth"), "1 not finite: bn1.bias.")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensor: tensor.to(torch.int8), "torch.int8"),
        (lambda tensor: tensor.bool(), "torch.bool"),
        (lambda tensor: tensor.to(torch.complex64), "torch.complex64"),
        (lambda tensor: tensor.to_sparse(), "torch.float32 torch.sparse_coo"),
        (lambda tensor: tensor.to("meta"), "torch.float32 without values"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "torch.qint8"),
    ],
    ids=["integer", "truth", "complex", "sparse", "meta", "quantised"],
)
@pytest.mark.parametrize("name", ["conv1.0.weight", "bn1.running_mean"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch announces the end of some of these kinds
def test_tensors_of_another_kind_are_refused(tmp_path, change, found, name):
    network = create_backbone(SMALL, 3)
    state = randomised(network)
    address = save({**state, name: change(state[name])}, tmp_path / "weights.pth")
    assert_refused(network, address, f"found 1 of another kind: {name} {found} instead of torch.float32.")


# The first convolution


@pytest.mark.parametrize("before", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 10])
def test_the_sum_over_input_channels_is_kept(before, channels):
    weight = torch.randn(8, before, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adapted = adapt_input_channels(weight, channels)
    assert adapted.shape == (8, channels, 5, 5)
    assert (adapted.sum(1) - weight.sum(1)).abs().max() < 1e-12
    assert adapted.flatten(2).norm(dim=2).min() > 0, "an input that no filter looks at"
    if channels == before:
        assert torch.equal(adapted, weight)


def test_filters_serve_further_channels_in_turn():
    red, green, blue = weight = torch.tensor([1.0, 2.0, 4.0])

    def adapted(channels: int) -> list[float]:
        return adapt_input_channels(weight.view(1, 3, 1, 1), channels).flatten().tolist()

    assert adapted(2) == [red + blue, green]
    assert adapted(6) == [red / 2, green / 2, blue / 2, red / 2, green / 2, blue / 2]
    assert adapted(5) == [red / 2, green / 2, blue, red / 2, green / 2]


def awake(name: str, size: int, in_channels: int = 3) -> nn.Module:
    """A network in evaluation whose features tell images apart.

    Parameters that start as zeros, and would hide what lies before them, have values; statistics are those of images.
    """
    torch.manual_seed(0)
    network = create_backbone(name, 5, in_channels=in_channels).requires_grad_(False)
    for parameter in network.parameters():
        if parameter.std() < 1e-3:
            parameter.normal_(mean=0.3, std=0.1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()(torch.randn(4, in_channels, size, size) * torch.tensor([0.5, 1, 1.5, 2]).view(4, 1, 1, 1))
    return network.eval()


def grey(size: int) -> Tensor:
    images = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(1))
    images[1] = 2 * images[1] + 1
    return images


def assert_same_features(found: Tensor, expected: Tensor) -> None:
    """Up to 1e-5, of features of a size, and with a difference between images, at which this says something."""
    scale = expected.abs().max().item()
    assert scale > 0.1
    assert (expected[0] - expected[1]).abs().max() > 0.01 * scale
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, scale)


FIRST = [
    ("resnet18", 64, "conv1"),
    ("resnet50d", 64, "conv1.0"),
    ("resnet20", 32, "conv1"),
    ("timm/test_convnext", 160, "stem.0"),
    ("timm/test_efficientnet", 160, "conv_stem"),
    ("timm/test_vit", 160, "patch_embed.proj"),
]


@pytest.mark.parametrize(("name", "size", "first"), FIRST)
def test_one_channel_makes_the_features_of_its_copies_on_three(tmp_path, name, size, first):
    three = awake(name, size)
    network = create_backbone(name, 3, in_channels=1).eval()
    report = load_pretrained(network, save(three.state_dict(), tmp_path / "three.safetensors"))
    assert report.adapted == (f"adapted {first}.weight from 3 to 1 input channels",)
    assert report.adapted[0] in str(report)
    images = grey(size)
    with torch.inference_mode():
        assert_same_features(features(network, images), features(three, images.expand(-1, 3, -1, -1)))


def test_weights_for_one_channel_make_the_same_features_from_three_copies(tmp_path):
    one = awake("resnet18", 64, in_channels=1)
    network = create_backbone("resnet18", 3).eval()
    report = load_pretrained(network, save(one.state_dict(), tmp_path / "one.pth"))
    assert report.adapted == ("adapted conv1.weight from 1 to 3 input channels",)
    images = grey(64)
    with torch.inference_mode():
        assert_same_features(features(network, images.expand(-1, 3, -1, -1)), features(one, images))


def test_half_precision_is_added_up_in_full(tmp_path):
    state = {key: value.half() for key, value in randomised(create_backbone(SMALL, 3)).items() if "num_b" not in key}
    state["conv1.0.weight"].fill_(40_000)  # three of them are more than half precision can hold
    network = create_backbone(SMALL, 3, in_channels=1)
    load_pretrained(network, save(state, tmp_path / "half.safetensors"))
    weight = state["conv1.0.weight"].float().sum(1, keepdim=True)
    assert torch.equal(network.conv1[0].weight, weight)
    assert weight.max() > torch.finfo(torch.float16).max


def test_grey_images_pass_a_task_as_their_copies_pass_the_network_of_the_weights(tmp_path):
    three = awake("resnet18", 64)
    address = save(three.state_dict(), tmp_path / "three.safetensors")
    record = {"mean": [0.5], "std": [0.25]}
    task = ClassificationTask(classes=["a", "b"], preprocessing=record, backbone="resnet18", weights=address).eval()
    assert task.load_report.adapted == ("adapted conv1.weight from 3 to 1 input channels",)
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    images[1] //= 3
    nn.init.normal_(task.network.fc.weight)  # a fresh head is small
    with torch.inference_mode():
        maps = features(three, ((images / 255 - 0.5) / 0.25).expand(-1, 3, -1, -1))
        assert_same_features(task(images), F.linear(maps, task.network.fc.weight, task.network.fc.bias))


@pytest.mark.parametrize(
    "shape",
    [(16, 1, 5, 5), (16, 3, 5, 5), (8, 1, 3, 3), (16, 3, 3), (16, 1, 3, 3, 1)],
    ids=["kernel and channels", "kernel", "filters and channels", "flat", "volume"],
)
def test_any_other_difference_in_the_first_convolution_is_refused(tmp_path, shape):
    network = create_backbone("resnet20", 3)
    address = save({**randomised(network), "conv1.weight": torch.rand(shape)}, tmp_path / "weights.safetensors")
    assert_refused(network, address, f"found 1 of another shape: conv1.weight {shape} instead of (16, 3, 3, 3).")


def test_other_convolutions_are_not_adapted(tmp_path):
    network, name = create_backbone("resnet20", 3), "layer1.0.conv1.weight"
    address = save({**randomised(network), name: torch.rand(16, 8, 3, 3)}, tmp_path / "weights.safetensors")
    assert_refused(network, address, f"found 1 of another shape: {name} (16, 8, 3, 3) instead of (16, 16, 3, 3).")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of sparse tensors
@pytest.mark.parametrize("change", [lambda tensor: tensor.to(torch.int8), lambda tensor: tensor.to_sparse()])
def test_a_first_convolution_of_another_kind_is_not_adapted(tmp_path, change):
    network = create_backbone("resnet20", 3, in_channels=1)
    state = {**randomised(network), "conv1.weight": change(torch.ones(16, 3, 3, 3))}
    assert_refused(network, save(state, tmp_path / "weights.pth"), "of another kind: conv1.weight torch.")


# Names


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("resnet81", ("model.backbone", "'resnet81'", "did you mean resnet18", "resnet152")),
        ("convnext_tiny", ("model.backbone", "'convnext_tiny'", "timm/<model>")),
        ("timm/convnext_tinny", ("model.backbone", "'timm/convnext_tinny'", "did you mean convnext_tiny")),
        ("timm/", ("model.backbone", "'timm/'")),
    ],
)
def test_an_unknown_backbone_is_an_error_with_near_matches(name, texts):
    for make in (lambda: create_backbone(name, 2), lambda: default_preprocessing(name)):
        with pytest.raises(UserError) as caught:
            make()
        for text in texts:
            assert text in str(caught.value)


@pytest.mark.parametrize(
    ("tag", "texts"),
    [
        ("timm/resnet18.a1_in1", ("'timm/resnet18.a1_in1'", "its tags are", "resnet18.a1_in1k", "resnet18.tv_in1k")),
        ("timm/resnet81.a1_in1k", ("'timm/resnet81.a1_in1k'", "did you mean resnet18.a1_in1k")),
    ],
)
def test_an_unknown_tag_is_an_error_with_near_matches(tag, texts):
    message = assert_refused(create_backbone(SMALL, 2), tag, "model.weights", *texts)
    with pytest.raises(UserError) as caught:
        preprocessing_record("resnet18", tag)
    assert str(caught.value) == message


def test_near_matches_are_silent_where_nothing_is_near():
    assert near_matches("xyz", ["resnet18", "resnet34"]) == ""
    assert near_matches("resnet81", ["resnet18", "vgg"]) == "did you mean resnet18? "


def test_a_network_with_two_classifiers_is_refused():
    with pytest.raises(UserError, match=r"found 2 \(head, head_dist\)"):
        create_backbone("timm/deit_tiny_distilled_patch16_224", 2)


def test_the_head_is_found_by_name():
    assert head_name(create_backbone("resnet18", 2)) == "fc"
    for name in ("timm/test_resnet", "timm/tf_efficientnet_lite0", "timm/test_vit", "timm/test_convnext"):
        network = create_backbone(name, 2)
        assert network.get_submodule(head_name(network)) is network.get_classifier()
        assert network.get_classifier().out_features == 2


def test_a_network_without_a_classifier_is_refused():
    network = nn.Linear(2, 2)
    network.pretrained_cfg = {}
    with pytest.raises(UserError, match="one classifier, found none"):
        head_name(network)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "timm/tf_efficientnet_lite0", "timm/test_vit"])
def test_a_fresh_head_starts_small(name):
    torch.manual_seed(0)
    network = create_backbone(name, 40)
    head = network.get_submodule(head_name(network))
    assert isinstance(head, nn.Linear)
    assert head.weight.shape[0] == 40
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (head.bias == 0).all()
