"""Who gets how much, with integers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.ledger.allotment import Balance, ChargeOrder, Held, ReserveOrder, decide
from accounts.limits.precedence import Limits
from accounts.trail.refusals import Refusal

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 21, tzinfo=UTC)
END = datetime(2026, 12, 1, tzinfo=UTC)


def balance(whose: str = "tenant", used: int = 0, reserved: int = 0, requests: int = 0, held: int = 0) -> Balance:
    return Balance(1, whose, END, used, reserved, requests, held)


def order(prompt: int = 10, output: int = 40, **more: Any) -> ReserveOrder:
    values: dict[str, Any] = {
        "request_id": "r",
        "tenant_id": 1,
        "key_id": 1,
        "anchor_day": 1,
        "tenant_limits": Limits(monthly_tokens=1000),
        "key_limits": Limits(),
        "now": NOW,
        "expires_at": NOW + timedelta(minutes=10),
    }
    return ReserveOrder(prompt_tokens=prompt, max_tokens=output, **{**values, **more})


def refused(answer: Held | Refusal) -> Refusal:
    assert isinstance(answer, Refusal)
    return answer


def test_what_fits_is_granted_whole() -> None:
    assert decide(order(), (balance(used=950), balance("key"))) == Held("r", 40, False, 50)


def test_less_room_clamps_the_output() -> None:
    assert decide(order(), (balance(used=970), balance("key"))) == Held("r", 20, True, 30)
    assert decide(order(), (balance(used=989), balance("key"))) == Held("r", 1, True, 11)


def test_the_prompt_and_one_token_must_fit() -> None:
    answer = refused(decide(order(), (balance(used=990), balance("key"))))
    assert answer.code == "quota_exhausted" and not answer.retryable
    assert answer.extra == {
        "limit": "monthly_tokens",
        "of": "tenant",
        "value": 1000,
        "used": 990,
        "reserved": 0,
        "needed": 11,
        "reset_at": "2026-12-01T00:00:00Z",
        "reset_in_seconds": 864000,
    }
    assert "990 are used" in answer.message


def test_all_or_nothing_is_not_clamped() -> None:
    assert refused(decide(order(all_or_nothing=True), (balance(used=970), balance("key")))).extra["needed"] == 50


def test_a_prompt_without_output_needs_no_token_more() -> None:
    assert decide(order(output=0), (balance(used=990), balance("key"))) == Held("r", 0, False, 10)


def test_what_running_requests_hold_may_come_back() -> None:
    answer = refused(decide(order(), (balance(used=500, reserved=495), balance("key"))))
    assert answer.code == "quota_reserved" and answer.retry_after == 1


def test_exhausted_is_said_before_reserved() -> None:
    limits = Limits(monthly_tokens=100)
    answer = refused(decide(order(key_limits=limits), (balance(reserved=1000), balance("key", used=100))))
    assert (answer.code, answer.extra["of"]) == ("quota_exhausted", "key")


def test_the_tighter_of_key_and_tenant_clamps() -> None:
    limits = Limits(monthly_tokens=100)
    assert decide(order(key_limits=limits), (balance(), balance("key", used=75))) == Held("r", 15, True, 25)


def test_requests_are_a_quota_too() -> None:
    limits = Limits(monthly_requests=3)
    assert refused(decide(order(key_limits=limits), (balance(), balance("key", requests=3)))).code == "quota_exhausted"
    answer = refused(decide(order(key_limits=limits), (balance(), balance("key", requests=2, held=1))))
    assert (answer.code, answer.extra["limit"]) == ("quota_reserved", "monthly_requests")
    assert isinstance(decide(order(key_limits=limits), (balance(), balance("key", requests=2))), Held)


def test_a_limit_of_zero_is_nothing_and_none_is_everything() -> None:
    assert refused(decide(order(tenant_limits=Limits(monthly_tokens=0)), (balance(), balance("key")))).code
    assert refused(decide(order(tenant_limits=Limits(monthly_requests=0)), (balance(), balance("key")))).code
    assert decide(order(10**9, 10**9, tenant_limits=Limits()), (balance(), balance("key"))) == Held(
        "r", 10**9, False, 2 * 10**9
    )


def test_a_charge_needs_requests_and_no_tokens() -> None:
    charge = ChargeOrder(
        request_id="c",
        tenant_id=1,
        key_id=1,
        anchor_day=1,
        tenant_limits=Limits(monthly_tokens=0, monthly_requests=1),
        key_limits=Limits(),
        now=NOW,
    )
    assert decide(charge, (balance(), balance("key"))) == Held("c", 0, False, 0)
    assert refused(decide(charge, (balance(requests=1), balance("key")))).code == "quota_exhausted"


numbers = st.integers(0, 300)
limits = st.none() | numbers


@given(numbers, numbers, limits, limits, numbers, numbers, numbers, numbers, st.booleans())
def test_no_grant_ever_passes_a_limit(
    prompt: int,
    output: int,
    tenant_limit: int | None,
    key_limit: int | None,
    a: int,
    b: int,
    c: int,
    d: int,
    whole: bool,
) -> None:
    tenant, key = balance(used=a, reserved=b), balance("key", used=c, reserved=d)
    asked = order(
        prompt,
        output,
        tenant_limits=Limits(monthly_tokens=tenant_limit),
        key_limits=Limits(monthly_tokens=key_limit),
        all_or_nothing=whole,
    )
    answer = decide(asked, (tenant, key))
    if isinstance(answer, Refusal):
        return
    assert answer.reserved_tokens == prompt + answer.max_tokens
    assert min(1, output) <= answer.max_tokens <= output
    assert answer.clamped == (answer.max_tokens < output) and not (whole and answer.clamped)
    for each, limit in ((tenant, tenant_limit), (key, key_limit)):
        assert limit is None or each.tokens + answer.reserved_tokens <= limit
