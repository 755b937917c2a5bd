"""Fixtures that several tests of the repository use."""

import json
from typing import Any

import pytest
from support import ROOT, Rendered, render


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """Return two renderings of every template."""
    folder = tmp_path_factory.mktemp("rendered")
    return Rendered(folder / "secrets", render(folder), render(folder))


@pytest.fixture(scope="session")
def images() -> Any:
    """Return the images that `make test-host` got, by name."""
    return json.loads((ROOT / ".venv/images.json").read_text())
