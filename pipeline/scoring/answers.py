"""The columns of answers, wherever they are computed."""

import pyarrow as pa


def answer_schema(multi_label: bool) -> pa.Schema:
    """What is said of an image: its answer, or ``error``, why it could not be read; then all else is null.

    ``label_id`` is int64, ``score`` and each of ``probabilities`` float64 in [0, 1], in the order of the model's
    classes; ``familiarity`` is float64 in (0, 1], null where the model says nothing of it.

    Args:
        multi_label: whether an image may have several classes.
    """
    probabilities = pa.list_(pa.float64())
    if multi_label:
        named = {"labels": pa.list_(pa.string()), "probabilities": probabilities}
    else:
        named = {"label": pa.string(), "label_id": pa.int64(), "score": pa.float64(), "probabilities": probabilities}
    return pa.schema({**named, "familiarity": pa.float64(), "error": pa.string()})
