"""docs/errors.md against the code: every code of the API with its status, every code of the registry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inference.api.errors import STATUS

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
REGISTRY_SOURCES = (
    "gguf/header.py",
    "vetting/inspection.py",
    "catalog/model_rows.py",
    "site_file/models_form.py",
    "site_file/models_yaml.py",
    "vetting/adapter_file.py",
    "catalog/adapter_rows.py",
    "catalog/granting.py",
    "catalog/aliases.py",
    "management/naming.py",
    "management/commands/alias.py",
    "management/commands/register_model.py",
    "imports/addresses.py",
    "imports/checking.py",
    "imports/connections.py",
    "imports/desk.py",
    "imports/fetching.py",
    "imports/importer.py",
    "imports/quarantine.py",
    "imports/tokens.py",
)


def test_the_table_has_every_code_with_its_status_and_no_other() -> None:
    documented = {code: int(status) for code, status in re.findall(r"^\| `(\w+)` \| (\d{3}) \| .+ \|$", PAGE, re.M)}
    assert documented == STATUS


def test_the_table_is_in_the_order_of_statuses() -> None:
    statuses = [int(status) for status in re.findall(r"^\| `\w+` \| (\d{3}) \|", PAGE, re.M)]
    assert statuses == sorted(statuses)


def test_the_second_table_has_every_code_of_the_registry_and_no_other() -> None:
    source = "".join((ROOT / "inference" / name).read_text(encoding="utf-8") for name in REGISTRY_SOURCES)
    raised = re.findall(r"(?:GGUFError|RegistrationError|ModelsYamlError|(?:self|command)\.fail)\(\s*\"(\w+)\"", source)
    documented = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", PAGE, re.M)
    assert sorted(documented) == sorted(set(raised))
