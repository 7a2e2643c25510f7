"""Finding a registered model by its address, and loading it."""

import re
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, near_matches
from pipeline.tracking.store import asking, pointing_mlflow_at, require_there, resolve_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ADDRESS = re.compile(r"models:/([^/@:]+)(?:@([^/@]+)|/(\d+))")


def pin(address: str, tracking_uri: str | None, setting: str) -> tuple[str, str]:
    """Look an address up, once: an alias may point elsewhere a moment later.

    Args:
        address: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        tracking_uri: of the registry; None: where runs are tracked.
        setting: that has the address, for messages.

    Returns:
        The address with the version in place of an alias, and the absolute address of the registry.

    Raises:
        UserError: there is no such model, alias or version.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{setting}: expected models:/<name>@<alias> or models:/<name>/<version>, found '{address}'.")
    name, alias, version = match.groups()
    uri = resolve_tracking_uri(tracking_uri)
    require_there(uri)
    client = mlflow.MlflowClient(uri, uri)
    try:
        with asking(uri):
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(
            f"{setting}: expected a registered model for '{address}' in {uri}, found none; "
            f"{_what_there_is(client, name)}"
        ) from error
    return f"models:/{name}/{found.version}", uri


def load(pinned: str, tracking_uri: str) -> Any:
    """Load a registered classifier.

    Args:
        pinned: ``models:/<name>/<version>``.
        tracking_uri: absolute, of the registry.

    Returns:
        An :class:`~pipeline.registry.served.ImageClassifier`, of the code that was registered with the version.

    Raises:
        UserError: it cannot be loaded, or does not answer to images one by one.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        with pointing_mlflow_at(tracking_uri):
            model = mlflow.pyfunc.load_model(pinned).unwrap_python_model()
    except (MlflowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"expected {pinned} in {tracking_uri} to be a model that this project registered, found that it cannot be "
            f"loaded ({reason}); register its run anew with `python -m pipeline register`."
        ) from error
    if not hasattr(model, "predict_each"):
        raise UserError(
            f"expected {pinned} to say of each image whether it can be read, found a version registered without that; "
            "register its run anew with `python -m pipeline register`."
        )
    return model


def _what_there_is(client: "MlflowClient", name: str) -> str:
    models = {model.name: model for model in client.search_registered_models()}
    if name not in models:
        return f"{near_matches(name, models)}the registered models are: {', '.join(sorted(models)) or 'none'}."
    found = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
    versions = ", ".join(map(str, found))
    aliases = ", ".join(sorted(models[name].aliases)) or "none"
    return f"its versions are {versions or 'none'}, its aliases {aliases}."
