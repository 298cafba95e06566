"""What tests of the registry share: trials that pass, and adapters that are good enough for a fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # pytest reads this before Django is set up
    from inference.models import Adapter, ServedModel


@pytest.fixture
def passing_trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No child is started: every file passes."""
    from inference.catalog import adapters, registry
    from inference.vetting.trial import Trial
    from tests.inference.gguf_files import PassingTrial

    monkeypatch.setattr(Trial, "run", PassingTrial.run)
    monkeypatch.setattr(Trial, "run_adapter", PassingTrial.run_adapter)
    monkeypatch.setattr(Trial, "calls", 0, raising=False)
    yield
    registry.forget()
    adapters.forget()


@pytest.fixture
def make(model: ServedModel, tmp_path: Path) -> Callable[..., Adapter]:
    """An adapter whose file is good enough for a fake engine, granted to these customers."""
    from inference.catalog import adapter_rows, granting
    from inference.models import Adapter

    def make_adapter(name: str, *customers: Any, **options: Any) -> Adapter:
        path = tmp_path / f"{name}.gguf"
        path.write_text(name)
        values = {"base_model": model, "digest": name.ljust(64, "0"), "size_bytes": 4, "rank": 8, **options}
        row = Adapter.objects.create(name=name, path=str(path), **values)
        for customer in customers:
            granting.grant(row, customer.tenant)
        adapter_rows.changed()
        return row

    return make_adapter
