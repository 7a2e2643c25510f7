"""What every test can rely on."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_tracking_server_of_the_person() -> None:
    """Tests write to stores of their own, whatever the environment says."""
    patch = pytest.MonkeyPatch()
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        patch.delenv(name, raising=False)
