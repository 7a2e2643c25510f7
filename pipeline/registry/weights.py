"""Fine-tuning what was registered: from a ``models:/`` address to a file of weights."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError, near_matches
from pipeline.registry.bundle import BUNDLE, WEIGHTS
from pipeline.tracking.store import pointing_mlflow_at, prepare_store, resolve_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ADDRESS = re.compile(r"models:/([^/@:]+)(?:@([^/@]+)|/(\d+))")


def registered_weights(address: str, tracking_uri: str | None, folder: Path) -> tuple[str, Path]:
    """Fetch the weights of a registered model.

    Args:
        address: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        tracking_uri: of the registry; None: where runs are tracked.
        folder: where the file is put.

    Returns:
        The address with the version in place of an alias, which may point elsewhere tomorrow, and the file.

    Raises:
        UserError: there is no such model, alias or version, or it was not registered by this project.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(
            f"model.weights: expected models:/<name>@<alias> or models:/<name>/<version>, found '{address}'."
        )
    name, alias, version = match.groups()
    uri = resolve_tracking_uri(tracking_uri)
    prepare_store(uri)
    client = mlflow.MlflowClient(uri, uri)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(
            f"model.weights: expected a registered model for '{address}' in {uri}, found none; "
            f"{_what_there_is(client, name)}"
        ) from error
    pinned = f"models:/{name}/{found.version}"
    try:
        with pointing_mlflow_at(uri):
            path = mlflow.artifacts.download_artifacts(f"{pinned}/artifacts/{BUNDLE}/{WEIGHTS}", dst_path=str(folder))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"model.weights: expected the weights of {pinned} in {uri}, found no {WEIGHTS} in it; use a version that "
            "this project registered."
        ) from error
    return pinned, Path(path)


def _what_there_is(client: "MlflowClient", name: str) -> str:
    models = {model.name: model for model in client.search_registered_models()}
    if name not in models:
        return f"{near_matches(name, models)}the registered models are: {', '.join(sorted(models)) or 'none'}."
    found = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
    versions = ", ".join(map(str, found))
    aliases = ", ".join(sorted(models[name].aliases)) or "none"
    return f"its versions are {versions or 'none'}, its aliases {aliases}."
