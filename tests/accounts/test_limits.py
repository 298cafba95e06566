"""Overrides: absent inherits, null is unlimited, 0 is none."""

from __future__ import annotations

import pytest
from django.core.exceptions import ValidationError

from accounts.limits.precedence import MAX_LIMIT, Limits
from accounts.models import validate_limits, validate_scopes
from tests.accounts.principals import on_plan

pytestmark = pytest.mark.unit


def test_overrides_replace_what_they_name() -> None:
    plan = Limits(requests_per_minute=120, monthly_tokens=1000)
    limits = plan.overridden({"requests_per_minute": None, "concurrent_requests": 0})
    assert limits == Limits(monthly_tokens=1000, concurrent_requests=0)


@pytest.mark.parametrize("overrides", [{"rpm": 1}, {"max_output": -1}, {"max_output": True}, {"max_output": 1.5}, []])
def test_a_wrong_override_is_named(overrides: object) -> None:
    with pytest.raises(ValueError):
        Limits().overridden(overrides)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        validate_limits(overrides)


def test_limits_are_bounded() -> None:
    with pytest.raises(ValueError, match="from 0 to"):
        Limits().overridden({"monthly_tokens": MAX_LIMIT + 1})


@pytest.mark.parametrize("scopes", [[], ["generate", "generate"], ["root"], "generate", [1], [["generate"]], None])
def test_scopes_are_a_list_of_known_words(scopes: object) -> None:
    with pytest.raises(ValidationError):
        validate_scopes(scopes)


def test_the_tighter_of_tenant_and_key_binds() -> None:
    tenant = {"max_output": 100, "max_context": 10}
    principal = on_plan(key={"max_output": 200, "queue_length": 0}, **tenant)
    assert principal.limit("max_output") == 100
    assert principal.limit("max_context") == 10
    assert principal.limit("queue_length") == 0
    assert principal.limit("monthly_tokens") is None
