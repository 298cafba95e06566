"""Which quotas need a second operator, with numbers alone."""

from __future__ import annotations

from typing import Any

import pytest

from accounts.limits import approval

pytestmark = pytest.mark.unit
THRESHOLD = 100


def set_threshold(settings: Any, tokens: int) -> None:
    settings.CONFIG = settings.CONFIG.model_copy(update={"quota_approval_tokens": tokens})


@pytest.mark.parametrize(
    ("wanted", "had", "is_refused"),
    [
        (THRESHOLD, 0, False),
        (THRESHOLD + 1, 0, True),
        (None, 0, True),
        (None, THRESHOLD + 1, True),
        (THRESHOLD + 2, THRESHOLD + 1, True),
        (THRESHOLD + 1, THRESHOLD + 1, False),
        (THRESHOLD + 1, THRESHOLD + 2, False),
        (THRESHOLD + 1, None, False),
        (None, None, False),
    ],
)
def test_only_a_raise_above_the_threshold_is_refused(
    settings: Any, wanted: int | None, had: int | None, is_refused: bool
) -> None:
    set_threshold(settings, THRESHOLD)
    if is_refused:
        with pytest.raises(approval.RaiseError, match="second operator"):
            approval.check(wanted, had)
    else:
        approval.check(wanted, had)


def test_without_a_threshold_nothing_is(settings: Any) -> None:
    set_threshold(settings, 0)
    approval.check(None, 0)
    assert not approval.is_above(None)
