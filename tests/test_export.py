"""Whatever the backbone, what is registered computes what was trained."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from datamodules.decode import decode
from pipeline.evaluation.familiarity import Familiarity
from pipeline.models.backbones import create_backbone, describe
from pipeline.models.files import read_facts
from pipeline.models.weights import Lineage, load_pretrained
from pipeline.registry.bundle import WEIGHTS, write_bundle
from pipeline.registry.inference import Bundle
from pipeline.task import ClassificationTask
from tests.images import RECORD, encoded, preprocessing, smooth
from tests.states import randomised

BACKBONES = {
    "resnet18d": 64,
    "seresnet18": 64,
    "resnet20": 32,
    "plain20": 32,
    "timm/test_convnext": 64,
    "timm/test_efficientnet": 64,
    "timm/test_vit": 160,
}


# Some seconds each: other tests register the plainest networks, and the rest differs in little.
SLOW = ("resnet20", "plain20", "resnet18d", "timm/test_efficientnet")


@pytest.mark.parametrize(
    ("backbone", "stages"),
    [
        *(pytest.param(name, 1, marks=pytest.mark.slow if name in SLOW else ()) for name in BACKBONES),
        ("resnet20", 3),
        ("timm/test_efficientnet", 3),
    ],
)
def test_the_bundle_computes_what_the_task_does(tmp_path, backbone, stages):
    record = {**RECORD, "size": BACKBONES[backbone]}
    torch.manual_seed(0)
    task = ClassificationTask(["a", "b", "c"], record, backbone, head_stages=stages)
    task.lineage = Lineage("models:/cells/3", "timm/origin", "mit")
    head = task.network.get_submodule(task.head)
    torch.nn.init.normal_(head.weight, std=0.2)  # a fresh head gives nearly the same probabilities to everything
    with torch.no_grad():
        kinds = [torch.rand(count, 3, record["size"], record["size"]) for count in (4, 25)]
        task.familiarity = Familiarity.measured(*(describe(task.network.eval(), images)[1] for images in kinds))
    write_bundle(tmp_path, task, {"note": "kept"})
    bundle = Bundle(tmp_path)
    side = record["size"]
    # Files of the network's own size would hide a wrong geometry.
    pictures = [smooth(side + 20, side + 31, phase) for phase in (0.0, 1.5, 3.0)]
    files = [encoded(Image.fromarray(picture), "PNG") for picture in pictures]
    fitted = np.stack([preprocessing(size=side).fit_to_size(decode(file)).transpose(2, 0, 1) for file in files])
    with torch.no_grad():
        expected = torch.softmax(task.eval()(torch.from_numpy(fitted)), dim=1).numpy()
        familiarity = task.answer(torch.from_numpy(fitted)).familiarity
    assert np.ptp(expected, axis=0).max() > 1e-3
    for count in (3, 1):
        found = bundle.predict(files[:count])
        np.testing.assert_allclose(found.probabilities, expected[:count], atol=1e-4)
        # Rounding may carry a distance past one of those that were held out.
        np.testing.assert_allclose(found.familiarity, familiarity[:count], atol=task.familiarity.step + 1e-6)


def test_the_weights_in_the_bundle_can_be_trained_further(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)  # the graph beside them is not read here
    task = ClassificationTask(["a", "b", "c"], RECORD, "resnet20")
    task.network.load_state_dict(randomised(task.network))
    task.lineage = Lineage("models:/cells/3", "timm/origin", "cc-by-nc-4.0")
    write_bundle(tmp_path, task, {})
    saved = load_file(tmp_path / WEIGHTS)
    state = task.network.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    facts = read_facts(tmp_path / WEIGHTS)
    assert (facts.backbone, facts.preprocessing) == ("resnet20", RECORD)
    assert (facts.licence, facts.source) == ("cc-by-nc-4.0", "timm/origin")
    report = load_pretrained(create_backbone("resnet20", 7), str(tmp_path / WEIGHTS))
    assert report.loaded == len(state) - 2
    assert report.lineage.origin == "timm/origin"
