"""Versions of a registered model: finding them by alias, and what they say of their test."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError, near_matches
from pipeline.registry.bundle import BUNDLE, DESCRIPTION
from pipeline.registry.tested import TESTED, Tested
from pipeline.tracking.store import pointing_mlflow_at

if TYPE_CHECKING:
    from mlflow import MlflowClient

#: Aliases: what was registered last and proven, what is in use, and what was in use before.
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous-champion"
#: The tag of a version that has repeated its test, with the digest of that.
PROVEN = "proven_on"
#: The tag of a version that was taken back, with the time.
ROLLED_BACK = "rolled_back"


class IncomparableError(Exception):
    """What a version lacks to be compared with others."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        number: counted from 1.
        run_id: of the run that it belongs to.
        proven_on: digest of the test that it repeated when it was registered; None: it did not.
        rolled_back: when it was taken back; None: it was not.
    """

    number: int
    run_id: str | None
    proven_on: str | None
    rolled_back: str | None


def aliases(client: "MlflowClient", name: str) -> dict[str, int]:
    """The version that each alias of a registered model points to.

    Raises:
        UserError: there is no such model; those that there are, are named.
    """
    from mlflow.exceptions import RESOURCE_DOES_NOT_EXIST, ErrorCode, MlflowException

    try:
        return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        known = sorted(model.name for model in client.search_registered_models())
        raise UserError(
            f"--name: expected a registered model, found none of '{name}'; {near_matches(name, known)}there are: "
            f"{', '.join(known) or 'none'}."
        ) from error


def read_version(client: "MlflowClient", name: str, number: int) -> Version:
    """Look a version up."""
    found = client.get_model_version(name, str(number))
    return Version(number, found.run_id, found.tags.get(PROVEN), found.tags.get(ROLLED_BACK))


def fetch_tested(name: str, version: Version, tracking_uri: str) -> Tested:
    """The test that a version carries.

    Raises:
        IncomparableError: it carries none, or not the one that it was proven on.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    address = f"models:/{name}/{version.number}"
    if version.proven_on is None:
        raise IncomparableError(f"{address} was never proven; register its run anew with `python -m pipeline register`")
    try:
        with tempfile.TemporaryDirectory() as scratch, pointing_mlflow_at(tracking_uri):
            description, file = (
                Path(mlflow.artifacts.download_artifacts(f"{address}/artifacts/{BUNDLE}/{part}", dst_path=scratch))
                for part in (DESCRIPTION, TESTED)
            )
            content = json.loads(description.read_text(encoding="utf-8"))
            tested = Tested.read(file, content["classes"], content["multi_label"])
    except (MlflowException, OSError) as error:
        raise IncomparableError(f"{address} does not carry its test; register its run anew") from error
    if tested.digest != version.proven_on:
        raise IncomparableError(f"the test in {address} is not the one that it was proven on; register its run anew")
    return tested
