"""The plans that carry the roles' names, made when first asked for. Called by commands; operators change them."""

from __future__ import annotations

from accounts.models import Plan, Role

REQUESTS_PER_MINUTE: dict[str, int | None] = {Role.ADMIN: None, Role.STANDARD: 120, Role.FREE: 30}


def plan_named(name: str) -> tuple[Plan | None, bool]:
    """(the plan, whether it was made now); (None, False) for a name that is neither a plan's nor a role's."""
    if name in REQUESTS_PER_MINUTE:
        return Plan.objects.get_or_create(
            name=name, defaults={"role": name, "requests_per_minute": REQUESTS_PER_MINUTE[name]}
        )
    return Plan.objects.filter(name=name).first(), False
