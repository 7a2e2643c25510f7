"""Facts of a data set, a network and a machine that plans are made of."""

from pipeline.planning.facts import Facts

#: Some images of six classes, a pretrained network, a processor.
FACTS = Facts(
    images=1_500,
    validated=300,
    draws_val=True,
    tested=400,
    classes=6,
    fewest=100,
    most=400,
    multi_label=False,
    short_side=384,
    weights_size=224,
    fixed_size=False,
    pretrained=True,
    linear_head=True,
    head_stages=3,
    described_by_head=True,
    trained_here=False,
    depthwise=False,
    step_scale=0.02,
    device="cpu",
    devices=1,
    first_device="cpu",
    accumulated=1,
)
