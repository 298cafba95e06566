"""Every page of the console × every role × whose row it is: as the table says; rows of other tenants are not there."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import Group, Permission, User
from django.db.models import Model
from django.test import Client, RequestFactory
from django.urls import URLPattern, URLResolver, get_resolver, reverse

from accounts.identity import issuing, roles
from accounts.ledger import quotas
from accounts.models import (
    APIKey,
    DayUsage,
    LimitRule,
    Membership,
    Plan,
    Price,
    QuotaAlert,
    QuotaPeriod,
    QuotaRaise,
    RefusedRequest,
    StaffRole,
    Statement,
    Tenant,
)
from accounts.trail import audit_log
from inference.batches.models import Batch, StoredFile
from inference.models import Adapter, AdapterGrant, DefaultVector, ModelVariant, Receipt, ServedModel
from tests.accounts.quota_cast import reserved, settle_order
from tests.conftest import Cast, Customer

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

NOW = datetime.now(UTC)
HOSTILE = "<script>alert('x')</script>"
PEOPLE = ("superuser", "operator", "auditor", "owner", "member", "viewer", "charlie", "staff", "nobody")


@functools.cache
def hashed_password() -> str:
    """Of everybody; to hash it is slow."""
    return make_password("a long password for tests")


@dataclass
class House:
    """Alice's and Bob's rows of every kind, nobody's rows, people of all roles; tenant roles are Alice's."""

    cast: Cast
    alices: dict[str, Model]
    bobs: dict[str, Model]
    common: dict[str, Model]
    people: dict[str, User] = field(default_factory=dict)

    def client(self, person: str) -> Client:
        client = Client(raise_request_exception=False)
        if person != "anonymous":
            client.force_login(self.people[person])
        return client


def rows_of(who: Customer, model: ServedModel, name: str) -> dict[str, Model]:
    request_id = f"request-of-{name}"
    granted = reserved(who)
    quotas.settle(settle_order(granted))
    period = QuotaPeriod.objects.filter(tenant=who.tenant, key=None).get()
    adapter = Adapter.objects.create(name=f"{name}-adapter", base_model=model, path=f"/secret/{name}", digest="a" * 64)
    file = StoredFile.objects.create(
        id=f"file-{name}",
        tenant=who.tenant,
        key=who.key,
        purpose="batch",
        filename=f"{name}-{HOSTILE}"[:50],
        size_bytes=1,
        created_at=NOW,
        expires_at=NOW + timedelta(days=1),
    )
    user = User.objects.create(username=f"{name}-person", password=hashed_password())
    from accounts.models import LedgerEntry, Reservation

    found: dict[str, Model] = {
        "accounts.tenant": who.tenant,
        "accounts.apikey": who.key,
        "accounts.membership": Membership.objects.create(tenant=who.tenant, user=user, role="member"),
        "accounts.quotaperiod": period,
        "accounts.reservation": Reservation.objects.filter(tenant_period=period).first(),  # type: ignore[dict-item]
        "accounts.ledgerentry": LedgerEntry.objects.filter(tenant_period=period).first(),  # type: ignore[dict-item]
        "accounts.dayusage": DayUsage.objects.filter(tenant=who.tenant).first(),  # type: ignore[dict-item]
        "accounts.statement": Statement.objects.create(
            tenant=who.tenant,
            month=NOW.date().replace(day=1),
            currency="USD",
            requests=1,
            used_tokens=1,
            cost_nanos=1,
            created_at=NOW,
        ),
        "accounts.quotaalert": QuotaAlert.objects.create(
            period=period, counts="tokens", percent=50, used=1, quota=2, created_at=NOW
        ),
        "accounts.refusedrequest": RefusedRequest.objects.create(
            request_id=request_id,
            tenant=who.tenant,
            key=who.key,
            code="quota_exceeded",
            message=f"{name} {HOSTILE}",
            created_at=NOW,
        ),
        "accounts.limitrule": LimitRule.objects.create(tenant=who.tenant, limit="max_output", value=5, reason=HOSTILE),
        "accounts.quotaraise": QuotaRaise.objects.create(tenant=who.tenant, monthly_tokens=5, reason=HOSTILE),
        "auth.user": user,
        "inference.adapter": adapter,
        "inference.adaptergrant": AdapterGrant.objects.create(
            tenant=who.tenant, adapter=adapter, base_model=model, position=0
        ),
        "inference.defaultvector": DefaultVector.objects.create(
            tenant=who.tenant, base_model=model, scales=[[adapter.pk, 1.0]]
        ),
        "inference.receipt": Receipt.objects.create(
            request_id=request_id,
            tenant=who.tenant,
            key=who.key,
            model="small",
            status="completed",
            finish_reason="stop",
            created_at=NOW,
            finished_at=NOW,
        ),
        "inference.storedfile": file,
        "inference.batch": Batch.objects.create(
            id=f"batch-{name}",
            tenant=who.tenant,
            key=who.key,
            endpoint="/v1/chat/completions",
            status="in_progress",
            metadata={"note": HOSTILE},
            created_at=NOW,
            expires_at=NOW + timedelta(days=1),
        ),
    }
    return found


@pytest.fixture
def house(cast: Cast) -> Iterator[House]:
    """Names are hostile where the database lets them be: R25 is walked with the same rows."""
    model = ServedModel.objects.create(
        name="small", path="/models/small.gguf", digest="m" * 64, size_bytes=1, notes=HOSTILE
    )
    for who in (cast.alice, cast.bob):
        Tenant.objects.filter(pk=who.tenant.pk).update(name=f"{who.tenant.name} {HOSTILE}")
        APIKey.objects.filter(pk=who.key.pk).update(name=f"key of {who.tenant.name} {HOSTILE}")
        who.tenant.refresh_from_db()
        who.key.refresh_from_db()
    alices, bobs = rows_of(cast.alice, model, "alice"), rows_of(cast.bob, model, "bob")
    variant = ModelVariant.objects.create(
        base_model=model, name="q4", path="/models/q4.gguf", digest="v" * 64, source_digest="m" * 64, size_bytes=1
    )
    house = House(cast, alices, bobs, {"inference.servedmodel": model, "inference.modelvariant": variant})
    for name in PEOPLE:
        house.people[name] = User.objects.create(
            username=name, password=hashed_password(), is_staff=name in ("superuser", "staff")
        )
    house.people["superuser"].is_superuser = True
    house.people["superuser"].save()
    for name in ("operator", "auditor"):
        StaffRole.objects.create(user=house.people[name], role=name)
    for name in roles.TENANT_ROLES:
        Membership.objects.create(tenant=cast.alice.tenant, user=house.people[name], role=name)
    Membership.objects.create(tenant=cast.charlie.tenant, user=house.people["charlie"], role="owner")
    house.common |= {
        "accounts.plan": Plan.objects.get(),
        "accounts.price": Price.objects.create(input_per_million=Decimal(1), output_per_million=Decimal(1)),
        "accounts.staffrole": StaffRole.objects.first(),  # type: ignore[dict-item]
        "accounts.auditentry": audit_log.AuditEntry.objects.first(),  # type: ignore[dict-item]
        "auth.group": Group.objects.create(name="group"),
    }
    yield house


def registered() -> list[str]:
    return sorted(model._meta.label_lower for model in admin.site._registry)


def page(label: str, name: str, *args: Any) -> str:
    return reverse(f"admin:{label.replace('.', '_')}_{name}", args=args)


def admin_of(label: str) -> Any:
    return next(each for model, each in admin.site._registry.items() if model._meta.label_lower == label)


# The table


def test_every_registered_model_is_in_the_table() -> None:
    assert set(registered()) <= set(roles.BY_MODEL)


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "roles.md").read_text()
    for cells in roles.as_rows():
        assert f"| `{cells[0]}` | {' | '.join(cells[1:])} |" in text


def test_auditors_only_read_and_tenants_never_write_what_is_everybodys() -> None:
    for row in roles.TABLE:
        assert row.verbs(roles.AUDITOR) == roles.READ
        assert roles.VERBS[0] in row.operator or not row.operator
        assert row.member <= row.owner and (not row.viewer or row.viewer == roles.READ)


# The matrix


def expected(house: House, person: str, label: str, verb: str, whose: str) -> bool:
    """From the table alone, and what pages forbid to everyone (a ledger is never written)."""
    row, user = roles.BY_MODEL[label], house.people[person]
    if person == "superuser":
        return True
    if person in (roles.OPERATOR, roles.AUDITOR):
        return verb in row.verbs(person)
    if person in roles.TENANT_ROLES:
        return whose == "alice" and verb in row.verbs(person)
    assert user.username in ("charlie", "staff", "nobody")
    return False


@pytest.mark.parametrize("person", PEOPLE)
def test_every_page_of_every_model_is_as_the_table_says(house: House, person: str) -> None:
    client, wrong = house.client(person), []
    closed = (302,) if person == "nobody" else (403, 404)
    for label in registered():
        guard = admin_of(label)
        lists = any(expected(house, person, label, "view", whose) for whose in ("alice", "bob", "nobody"))
        lists = lists or (person == "charlie" and "view" in roles.BY_MODEL[label].owner)
        adds = expected(house, person, label, "add", "alice") or (person == "charlie" and label == "accounts.apikey")
        asked = [
            ("list", client.get(page(label, "changelist")), lists),
            ("add", client.get(page(label, "add")), adds and guard.has_add_permission(_root(house))),
        ]
        for whose, rows in (("alice", house.alices), ("bob", house.bobs), ("nobody", house.common)):
            if (row := rows.get(label)) is None:
                continue
            can = {verb: expected(house, person, label, verb, whose) for verb in roles.VERBS}
            deletes = can["delete"] and guard.has_delete_permission(_root(house))
            asked += [
                (f"{whose}'s row", client.get(page(label, "change", row.pk)), can["view"]),
                (f"history of {whose}'s", client.get(page(label, "history", row.pk)), can["view"]),
                (f"delete {whose}'s", client.get(page(label, "delete", row.pk)), deletes),
            ]
            if not can["change"]:
                changed = client.post(page(label, "change", row.pk), {"name": "taken over", "_save": "1"})
                asked.append((f"post to {whose}'s", changed, False))
            if not can["delete"]:
                gone = client.post(page(label, "delete", row.pk), {"post": "yes"})
                asked.append((f"delete {whose}'s, posted", gone, False))
            if lists and not can["view"]:
                assert client.get(page(label, "change", row.pk)).status_code == 404, f"{label} of {whose} is not there"
        wrong += [
            f"{label}, {what}: {answer.status_code}, allowed: {allowed}"
            for what, answer, allowed in asked
            if answer.status_code not in ((200,) if allowed else closed)
        ]
    assert not wrong, "\n".join(wrong)
    assert not Tenant.objects.filter(name="taken over").exists()


HOUSE, RUNS = ("superuser", "operator", "auditor"), ("superuser", "operator")
ALICES = (*HOUSE, *roles.TENANT_ROLES)
SCREENS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "console-board": (PEOPLE, ()),
    "console-playground": (PEOPLE, ()),
    "console-live-requests": ((*ALICES, "charlie"), ()),
    "console-request": (ALICES, ()),
    "console-slots": (HOUSE, ()),
    "console-settings": (HOUSE, ()),
    "console-model": (HOUSE, HOUSE),
    "console-correction": (RUNS, RUNS),
    "console-playground-run": ((), ()),
    "console-cancel-request": ((), RUNS),
    "console-replay": ((), RUNS),
    "console-erase-slot": ((), RUNS),
    "console-forget-state": ((), RUNS),
    "console-model-order": ((), RUNS),
}
"""Pages that are no lists of rows: who may see them, and who may post to them, of Alice's things."""


def screen(house: House, name: str) -> str:
    arguments: dict[str, Any] = {
        "console-request": ("request-of-alice",),
        "console-replay": ("request-of-alice",),
        "console-model": (house.common["inference.servedmodel"].pk,),
        "console-model-order": (house.common["inference.servedmodel"].pk,),
        "console-correction": (house.alices["accounts.quotaperiod"].pk,),
    }
    return reverse(name, args=arguments.get(name, ()))


def test_every_page_beside_the_lists_is_in_the_walk() -> None:
    names = {each.name for each in get_resolver().url_patterns if isinstance(each, URLPattern) and each.name}
    assert {name for name in names if name.startswith("console-")} == set(SCREENS)


@pytest.mark.parametrize("person", PEOPLE)
def test_every_page_beside_the_lists_is_for_whom_it_is_meant(
    house: House, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What llama.cpp says of the processor is the same for all of them, and slow to ask."""
    monkeypatch.setattr("llmsite.doctor.look_at_llama", lambda: iter(()))
    client, wrong = house.client(person), []
    posted = {"tenant": house.cast.alice.tenant.pk, "model": house.common["inference.servedmodel"].pk, "number": "0"}
    for name, (see, post) in SCREENS.items():
        for method, allowed in (("GET", person in see and person != "nobody"), ("POST", person in post)):
            ask = client.get if method == "GET" else client.post
            answer = ask(screen(house, name), posted if method == "POST" else None)
            open_to = (200, 302) if person != "nobody" else (200,)
            is_open = answer.status_code in open_to
            closed = answer.status_code in (302, 403, 404, 405)
            if is_open != allowed or not (is_open or closed):
                wrong.append(f"{method} {name}: {answer.status_code}, allowed: {allowed}")
            assert answer.status_code != 200 or HOSTILE not in answer.content.decode(), name
    assert not wrong, "\n".join(wrong)


def _root(house: House) -> Any:
    request = RequestFactory().get("/admin/")
    request.user = house.people["superuser"]
    return request


@pytest.mark.parametrize("person", [*roles.TENANT_ROLES, "charlie"])
def test_no_page_says_anything_of_other_tenants(house: House, person: str) -> None:
    """Lists, rows, searches, filters by others' numbers, autocompletes, histories and the dashboard."""
    client, bob = house.client(person), house.cast.bob
    strangers = ["Bob&#x27;s", "Bob's", bob.key.public_id, "bob-"] + (
        ["Alice&#x27;s", "alice-"] if person == "charlie" else []
    )
    pages = [reverse("admin:index"), reverse("admin:search") + "?s=bob&extended=1"]
    pages += [screen(house, name) for name in SCREENS] + [reverse("console-request", args=["request-of-bob"])]
    for label in registered():
        found = page(label, "changelist")
        pages += [
            found,
            f"{found}?q=bob",
            f"{found}?tenant__id__exact={bob.tenant.pk}",
            f"{found}?key__id__exact={bob.key.pk}",
        ]
        pages += [
            page(label, name, row.pk) for name in ("change", "history") for row in [house.alices.get(label)] if row
        ]
    for model, field_name in (
        ("membership", "tenant"),
        ("apikey", "tenant"),
        ("limitrule", "key"),
        ("membership", "user"),
    ):
        query = f"?app_label=accounts&model_name={model}&field_name={field_name}&term="
        pages.append(reverse("admin:autocomplete") + query)
    for address in pages:
        answer = client.get(address, follow=True)
        text = answer.content.decode()
        assert answer.status_code in (200, 400, 403, 404, 405), f"{address}: {answer.status_code}"
        told = [word for word in strangers if word in text.replace("?q=bob", "").replace("bob&amp;", "")]
        assert not told, f"{address} says {told}"


@pytest.mark.parametrize("person", PEOPLE)
def test_actions_change_only_rows_that_the_role_may_change(house: House, person: str) -> None:
    client, label = house.client(person), "accounts.apikey"
    keys = {"alice": house.cast.alice.key, "bob": house.cast.bob.key}
    for name in ("revoke", "delete_selected"):
        chosen = [key.pk for key in keys.values()]
        client.post(page(label, "changelist"), {"action": name, "_selected_action": chosen, "previewed": "yes"})
    for whose, key in keys.items():
        key.refresh_from_db()
        assert (key.revoked_at is not None) == expected(house, person, label, "change", whose), whose
    for name in ("suspend", "delete_selected"):
        chosen = [house.cast.alice.tenant.pk, house.cast.bob.tenant.pk]
        data = {"action": name, "_selected_action": chosen, "previewed": "yes"}
        client.post(page("accounts.tenant", "changelist"), data)
    suspended = Tenant.objects.filter(status="suspended").count()
    assert suspended == (2 if person in ("superuser", "operator") else 0)


def test_nobody_without_a_session_sees_a_page(house: House) -> None:
    client = house.client("anonymous")
    for label in registered():
        for address in (page(label, "changelist"), page(label, "add")):
            answer = client.get(address)
            assert answer.status_code == 302 and "/login/" in answer["Location"]


# What is granted never exceeds what one has


def key_form(tenant: Tenant, **more: Any) -> dict[str, Any]:
    from tests.accounts.test_admin import limits

    return {"tenant": tenant.pk, "name": "new", "scopes": ["generate"], **limits(**more.pop("limits", {})), **more}


@pytest.mark.parametrize(
    ("person", "allowed"), [("owner", True), ("member", True), ("viewer", False), ("charlie", False)]
)
def test_a_key_is_issued_by_owners_and_members_in_their_tenant_alone(house: House, person: str, allowed: bool) -> None:
    before = APIKey.objects.count()
    client, add = house.client(person), page("accounts.apikey", "add")
    client.post(add, key_form(house.cast.bob.tenant))
    assert APIKey.objects.count() == before, "not for Bob"
    client.post(add, key_form(house.cast.alice.tenant))
    assert APIKey.objects.count() - before == allowed


@pytest.mark.parametrize(
    "beyond",
    [
        {"scopes": ["operator"]},
        {"scopes": ["generate", "operator"]},
        {"limits": {"monthly_tokens": "10000001"}},
        {"allowed_models": '["small", "secret"]'},
        {"allowed_models": '[{"name": "small"}]'},
        {"allowed_adapters": "[" * 5000},
    ],
)
def test_a_key_has_no_more_than_its_tenant(house: House, beyond: dict[str, Any]) -> None:
    before = APIKey.objects.count()
    Tenant.objects.filter(pk=house.cast.alice.tenant.pk).update(allowed_models=["small"])
    answer = house.client("owner").post(page("accounts.apikey", "add"), key_form(house.cast.alice.tenant, **beyond))
    assert answer.status_code == 200 and APIKey.objects.count() == before
    within = key_form(house.cast.alice.tenant, limits={"monthly_tokens": "10000000"}, allowed_models='["small"]')
    house.client("owner").post(page("accounts.apikey", "add"), within)
    assert APIKey.objects.count() == before + 1


def test_an_operator_key_of_ones_own_tenant_is_not_there(house: House) -> None:
    key, _ = issuing.issue(house.cast.alice.tenant, "of the house", ["operator"])
    client = house.client("owner")
    assert client.get(page("accounts.apikey", "change", key.pk)).status_code == 404
    client.post(page("accounts.apikey", "changelist"), {"action": "rotate_now", "_selected_action": [key.pk]})
    assert not key.successors.exists()


def test_an_owner_is_an_owner_of_one_tenant_only(house: House) -> None:
    """Owner in Alice's and viewer in Bob's: Bob's keys are seen, and not revoked."""
    Membership.objects.create(tenant=house.cast.bob.tenant, user=house.people["owner"], role="viewer")
    client, keys = house.client("owner"), [house.cast.alice.key, house.cast.bob.key]
    assert client.get(page("accounts.apikey", "change", keys[1].pk)).status_code == 200
    data = {"action": "revoke", "_selected_action": [key.pk for key in keys], "previewed": "yes"}
    client.post(page("accounts.apikey", "changelist"), data)
    client.post(page("accounts.apikey", "change", keys[1].pk), {"name": "x", "scopes": ["usage"], "_save": "1"})
    client.post(page("accounts.apikey", "add"), key_form(house.cast.bob.tenant))
    for key in keys:
        key.refresh_from_db()
    assert [key.revoked_at is not None for key in keys] == [True, False] and keys[1].name != "x"
    assert house.cast.bob.tenant.api_keys.count() == 1


def test_an_auditor_who_owns_a_tenant_changes_that_tenant_alone(house: House) -> None:
    """They see every tenant's keys, and those of operators; what they do is what an owner of Alice's does."""
    auditor, client = house.people["auditor"], house.client("auditor")
    Membership.objects.create(tenant=house.cast.alice.tenant, user=auditor, role="owner")
    keys, listed = [house.cast.bob.key, house.cast.operator.key], page("accounts.apikey", "changelist")
    for key in keys:
        for action in ("revoke", "rotate_now"):
            answer = client.post(listed, {"action": action, "_selected_action": [key.pk], "previewed": "yes"})
            assert not re.search(r"llms_[0-9A-Za-z]{12}_[0-9A-Za-z]{38}", answer.content.decode())
        key.refresh_from_db()
        assert key.revoked_at is None and not key.successors.exists()
    strangers = [house.bobs["accounts.membership"].pk]
    data = {"action": "delete_selected", "_selected_action": strangers, "post": "yes"}
    client.post(page("accounts.membership", "changelist"), data)
    assert Membership.objects.filter(pk__in=strangers).exists()
    for form in (key_form(house.cast.bob.tenant), key_form(house.cast.alice.tenant, scopes=["operator"])):
        before = APIKey.objects.count()
        client.post(page("accounts.apikey", "add"), form)
        assert APIKey.objects.count() == before
    client.post(page("accounts.apikey", "add"), key_form(house.cast.alice.tenant))
    assert house.cast.alice.tenant.api_keys.count() == 2
    own = house.cast.alice.key
    client.post(listed, {"action": "revoke", "_selected_action": [own.pk, keys[0].pk], "previewed": "yes"})
    own.refresh_from_db()
    keys[0].refresh_from_db()
    assert own.revoked_at is not None and keys[0].revoked_at is None


def test_an_owner_makes_nobody_more_than_an_owner_and_moves_nobody_to_bob(house: House) -> None:
    row = house.alices["accounts.membership"]
    client = house.client("owner")
    client.post(page("accounts.membership", "change", row.pk), {"role": "viewer", "tenant": house.cast.bob.tenant.pk})
    row.refresh_from_db()
    assert (row.role, row.tenant_id) == ("viewer", house.cast.alice.tenant.pk)  # type: ignore[attr-defined]
    assert client.post(page("accounts.staffrole", "add"), {"user": 1, "role": "operator"}).status_code == 403


@pytest.mark.parametrize("target", ["superuser", "auditor", "staff"])
def test_an_operator_does_not_become_more_by_another_persons_account(house: House, target: str) -> None:
    """Nor by one's own: flags and groups are not in the form."""
    client, victim = house.client("operator"), house.people[target]
    assert client.get(page("auth.user", "change", victim.pk)).status_code == 404
    new = {"password1": "another long password", "password2": "another long password"}
    assert client.post(f"/admin/auth/user/{victim.pk}/password/", new).status_code in (403, 404)
    victim.refresh_from_db()
    assert victim.check_password("a long password for tests")
    mine = house.people["viewer"]
    client.post(
        page("auth.user", "change", mine.pk),
        {
            "username": "viewer",
            "is_superuser": "on",
            "is_staff": "on",
            "is_active": "on",
            "date_joined_0": "2026-01-01",
            "date_joined_1": "00:00:00",
        },
    )
    mine.refresh_from_db()
    assert not mine.is_superuser and not mine.is_staff


def test_staff_with_djangos_permission_sets_no_password_of_those_who_may_more(house: House) -> None:
    """They see the accounts, as the permission says; a superuser's password would be all that a superuser may."""
    staff, client = house.people["staff"], house.client("staff")
    staff.user_permissions.add(*Permission.objects.filter(codename__in=("view_user", "change_user", "delete_user")))
    new = {"password1": "another long password", "password2": "another long password"}
    for target, may in (("superuser", False), ("operator", False), ("auditor", False), ("viewer", True)):
        person = house.people[target]
        assert client.get(page("auth.user", "change", person.pk)).status_code == 200
        client.post(f"/admin/auth/user/{person.pk}/password/", new)
        person.refresh_from_db()
        assert person.check_password("another long password") == may, target
        assert (client.get(page("auth.user", "delete", person.pk)).status_code == 200) == may, target


def test_no_page_shows_a_secret_and_no_filter_asks_for_one(house: House) -> None:
    key = house.cast.alice.key
    for person in ("auditor", "operator", "owner"):
        client = house.client(person)
        for label in registered():
            for rows in (house.alices, house.common):
                if (row := rows.get(label)) is not None:
                    text = client.get(page(label, "change", row.pk)).content.decode()
                    assert key.secret_hash not in text and "pbkdf2" not in text, f"{person} {label}"
        answer = client.get(page("accounts.apikey", "changelist") + f"?secret_hash__startswith={key.secret_hash[:2]}")
        assert answer.status_code in (302, 400)
        answer = client.get(page("accounts.membership", "changelist") + "?user__password__startswith=pbkdf2")
        assert answer.status_code in (302, 400)


# The API


def operator_routes() -> Iterator[str]:
    """Every route behind /v1/admin and /v1/organization."""

    def walk(patterns: list[Any], prefix: str) -> Iterator[str]:
        for each in patterns:
            route = prefix + str(each.pattern)
            if isinstance(each, URLResolver):
                yield from walk(each.url_patterns, route)
            elif isinstance(each, URLPattern):
                yield route

    for route in walk(get_resolver().url_patterns, "/"):
        if route.startswith(("/v1/admin", "/v1/organization")) and "format" not in route:
            anchored = route.replace("/^", "/").removesuffix("$").removesuffix("\\Z")
            yield re.sub(r"\(\?P<\w+>[^()]*\)", "1", anchored)


@pytest.mark.django_db(transaction=True)  # threads that read the key anew see what is committed alone
@pytest.mark.parametrize("scopes", [["generate"], ["usage"], ["generate", "usage"], ["operator"], None])
def test_every_operator_route_wants_the_operators_scope(house: House, client: Client, scopes: list[str] | None) -> None:
    headers = {}
    if scopes is not None:
        headers["X-API-Key"] = issuing.issue(house.cast.alice.tenant, "walk", scopes)[1]
    routes = sorted(set(operator_routes()))
    assert len(routes) > 40 and not any("(" in route for route in routes)
    client.raise_request_exception = False
    for route in routes:
        for method in ("GET", "POST", "PATCH", "DELETE"):
            answer = client.generic(method, route, "{}", content_type="application/json", headers=headers)
            status = answer.status_code
            if scopes is None:
                assert status in (401, 405), f"{method} {route}: {status}"
            elif scopes == ["operator"]:
                # nothing loads a model here: there is no worker
                assert status not in (401, 403, 500), f"{method} {route}: {status}"
            else:
                assert status in (403, 405), f"{method} {route}: {status}"


# What lists say


def test_the_list_of_users_says_what_each_may_do(house: House) -> None:
    Membership.objects.create(tenant=house.cast.bob.tenant, user=house.people["owner"], role="viewer")
    text = house.client("superuser").get(page("auth.user", "changelist")).content.decode()
    for words in ("Superuser", "Operator", "Auditor", "Owner of Alice", "Viewer of Bob"):
        assert words in text, words


def test_an_empty_list_says_whether_something_is_left_out(house: House) -> None:
    client, listed = house.client("superuser"), page("accounts.price", "changelist")
    assert "Show all" not in client.get(listed).content.decode()
    sought = client.get(listed, {"q": "no such model"}).content.decode()
    assert "None of the prices is as the search and the filters want it." in sought and "Show all" in sought
    Price.objects.all().delete()
    empty = client.get(listed).content.decode()
    assert "Nothing is here yet" in empty and "Add price" in empty and "filters want it" not in empty


@pytest.mark.parametrize("number", ["99", "x", "0"])
def test_a_page_of_the_search_that_is_not_there_is_not_found(house: House, number: str) -> None:
    assert house.client("superuser").get(reverse("admin:search"), {"s": "key", "page": number}).status_code == 404


def test_amounts_have_their_currency_and_large_numbers_are_grouped(house: House) -> None:
    DayUsage.objects.update(used_tokens=1_234_567, requests=7_654)
    text = house.client("superuser").get(page("accounts.dayusage", "changelist")).content.decode()
    assert "1,234,567" in text and "7,654" in text and " USD" in text
