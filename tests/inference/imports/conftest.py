"""Settings, a folder and a server of each test's own; files that pass their trial without llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.inference.imports.file_server import Shelf, serving


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def server(shelf: Shelf) -> Iterator[str]:
    with serving(shelf) as address:
        yield address


@pytest.fixture
def own_state(tmp_path: Path, server: str, settings: Any) -> Path:
    """The server may be fetched from, and is the hub."""
    changed = {
        "state_dir": tmp_path / "state",
        "fetch_hosts": [server.removeprefix("http://")],
        "fetch_private_networks": ["127.0.0.0/8"],
        "model_hub_url": server,
        "import_mb": 4,
        "quarantine_mb": 8,
    }
    settings.CONFIG = type(settings.CONFIG).model_validate({**settings.CONFIG.model_dump(), **changed})
    return Path(settings.CONFIG.state)


@pytest.fixture
def tiny(own_state: Path, db: None) -> Any:
    """A served model that adapters can be for."""
    from inference.catalog import model_rows
    from tests.inference import gguf_files
    from tests.inference.gguf_files import PassingTrial

    own_state.mkdir(parents=True, exist_ok=True)
    return model_rows.register(gguf_files.write(own_state), "tiny", trial=PassingTrial())
