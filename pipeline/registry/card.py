"""The model card: a page that tells people what a registered model is, and what it is not."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.comparison import recalls
from pipeline.evaluation.metrics import OUT_OF_FOLD, Estimate, estimate_metrics
from pipeline.evaluation.predictions import Predictions
from pipeline.registry.tested import Tested

#: Its file in the bundle.
CARD = "MODEL_CARD.md"
_IN_FOLDS = f"`{OUT_OF_FOLD}` are training images, each judged by a head that was solved without it."


def write_card(name: str, content: Mapping[str, Any], metrics: Mapping[str, Estimate], tested: Tested) -> str:
    """A model card in Markdown (Mitchell et al. 2019, "Model Cards for Model Reporting").

    Args:
        name: of the registered model.
        content: of ``bundle.json``.
        metrics: by full name, such as ``test/accuracy``.
        tested: the test.
    """
    record, weights, data = content["preprocessing"], content["weights"], content["data"]
    several = "any number of" if content["multi_label"] else "one of"
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Names {several} these classes in an image: {', '.join(content['classes'])}.",
            "",
            f"- network: `{content['backbone']}`, fine-tuned from `{weights['address']}`"
            + (f" (origin: `{weights['origin']}`)" if weights["origin"] != weights["address"] else ""),
            f"- licence of those weights: {weights['licence'] or 'not stated'}; it may bind this model, too",
            f"- input: encoded images, of which the centre is seen at {record['size']} x {record['size']} px, "
            f"{record['channels']} channels of {record['dtype']}",
            f"- probabilities: tempered with {content['calibration']['temperature']:.2f} (temperature scaling)",
            f"- run `{content['run_id']}`, code `{content['tags'].get('code_revision', 'unknown')}`",
            "",
            "## Data",
            "",
            f"- digest of all images and their split: `{data['digest']}`",
            f"- digest of the test: `{data['test_digest']}`, {data['test_images']:,} images, none of them trained on",
            "",
            *_table(("class", "test images", "found (recall)"), _recalls(tested)),
            "",
            "## Results",
            "",
            "With 95 % intervals, by the bootstrap" + (" over groups of images." if tested.groups else " over images."),
            *([_IN_FOLDS] if any(name.startswith(OUT_OF_FOLD) for name in metrics) else []),
            "",
            *_table(
                ("metric", "value", "interval", "images"),
                [(n, f"{e.value:.4f}", f"{e.low:.4f} to {e.high:.4f}", f"{e.n:,}") for n, e in metrics.items()],
            ),
            "",
            *_abstention(content["threshold"], tested),
            "## Limits",
            "",
            "- The numbers hold for images that come as the test images came, not for other cameras, places and times.",
            "- It names a class for any image, also for one that shows none of them"
            + (
                "; its familiarity is near 0 where an image is of another kind than those trained on, but not always "
                "for a new thing that looks as they do."
                if content["familiarity"]
                else ", unless a threshold is set."
            ),
            "- Intervals tell how the chance of drawing the test images counts, not that of training anew.",
            "- Where a class has few test images, its recall says little.",
            "",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _recalls(tested: Tested) -> list[tuple[str, str, str]]:
    return [
        (name, f"{count:,}", f"{share:.3f}" if count else "no images")
        for name, share, count in zip(tested.classes, *recalls(tested.predictions), strict=True)
    ]


def _abstention(threshold: float | None, tested: Tested) -> list[str]:
    if threshold is None:
        return []
    predictions = tested.predictions
    answered = np.flatnonzero(predictions.scores >= threshold)
    line = f"No label is given where the score is below {threshold:g}: of {len(answered) / len(tested.paths):.1%} of "
    line += "the test images there is one"
    if len(answered):
        kept = Predictions(predictions.targets[answered], predictions.probabilities[answered])
        groups = [tested.groups[row] for row in answered] if tested.groups else None
        right = estimate_metrics(kept, groups)["accuracy"]
        line += f", and {right.value:.4f} of these are right ({right.low:.4f} to {right.high:.4f}, {right.n:,} images)"
    return [f"{line}.", ""]
