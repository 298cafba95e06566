"""Auditors read all, change nothing and see no secret: every address of the console and of the API, every action.

Addresses come from the URL table and actions from the registry, so what is added is walked as well. That nothing
changed is read off every row of every table and off Redis, not off a status: at the end, and whenever something wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.apps import apps
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.db import connection
from django.db.models import Model
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver, reverse

from accounts.identity import issuing, known_keys
from accounts.models import APIKey
from inference.imports.models import ModelImport
from inference.models import AdapterAlias
from inference.tuning.models import Optimization
from tests.accounts.test_roles import NOW, House, _root, admin_of, page, registered
from tests.accounts.test_roles import house as house

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
PARAMETER = re.compile(r"<(?:\w+:)?(\w+)>|\(\?P<(\w+)>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
OWN = ("admin:logout", "admin:password_change")
"""What everybody may do with their own session and password."""
FORM = "application/x-www-form-urlencoded"
CANARY = "canary-of-a-secret"
SECRET = re.compile("secret|password|pepper")
"""In the name of a field."""


@pytest.fixture
def everything(house: House, settings: Any) -> dict[str, Model]:
    """A row of every kind that the console shows; secrets in the settings that may hold some."""
    changed = {
        "email_url": f"smtp://user:{CANARY}@mail.example.org",
        "fetch_tokens": [f"huggingface.co={CANARY}"],
        "secret_key_fallbacks": [f"{CANARY}-of-the-year-before-that-is-long-enough"],
    }
    settings.CONFIG = type(settings.CONFIG).model_validate({**settings.CONFIG.model_dump(), **changed})
    model: Any = house.common["inference.servedmodel"]
    adapter: Any = house.alices["inference.adapter"]
    made: dict[str, Model] = {
        "inference.modelimport": ModelImport.objects.create(
            kind="model", name="coming", state=ModelImport.State.RECEIVING, asked_by="olga", created_at=NOW
        ),
        "inference.optimization": Optimization.objects.create(
            base_model=model, name="small", folder="/models", host="other", asked_by="olga", created_at=NOW
        ),
        "inference.adapteralias": AdapterAlias.objects.create(name="other", base_model=model, target=adapter),
    }
    Session.objects.create(session_key=f"{CANARY}-session", session_data="x", expire_date=NOW + timedelta(days=1))
    rows = {**house.common, **house.alices, **made}
    assert set(registered()) <= {label for label, row in rows.items() if row is not None}
    return rows


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What llama.cpp says of the processor is slow to ask."""
    monkeypatch.setattr("llmsite.doctor.look_at_llama", lambda: iter(()))


# What there is


def patterns(found: Any = None, prefix: str = "", space: str = "") -> Iterator[tuple[str, str, URLPattern]]:
    """(address with its parameters, name, pattern) of the whole URL table."""
    for each in (found or get_resolver()).url_patterns:
        route = prefix + str(each.pattern).removeprefix("^")
        if isinstance(each, URLResolver):
            yield from patterns(each, route, f"{each.namespace}:" if each.namespace else space)
        else:
            yield route.removesuffix("$").removesuffix("\\Z"), f"{space}{each.name}", each


def address(route: str, pattern: URLPattern, everything: dict[str, Model]) -> str:
    """With the number of the row that is meant in the place of each parameter."""
    rows = getattr(getattr(pattern.callback, "cls", None), "queryset", None)
    label = ".".join(route.split("/")[1:3]) if rows is None else rows.model._meta.label_lower
    row = everything.get(label)
    number = row.pk if row is not None else 1
    known = {
        "object_id": number,
        "id": number,
        "pk": number,
        "import_id": everything["inference.modelimport"].pk,
        "model_id": everything["inference.servedmodel"].pk,
        "period_id": everything["accounts.quotaperiod"].pk,
        "request_id": "request-of-alice",
        "content_type_id": 1,
        "app_label": "accounts",
        "url": "nothing",
    }
    return "/" + PARAMETER.sub(lambda found: str(known[found[1] or found[2]]), route)


def console(everything: dict[str, Model]) -> list[tuple[str, str]]:
    """(name, address) of every page."""
    return [(name, address(route, it, everything)) for route, name, it in patterns() if route.startswith("admin/")]


def operators_api(everything: dict[str, Model]) -> list[str]:
    found = [(route, it) for route, _, it in patterns() if route.startswith(("v1/admin", "v1/organization"))]
    return sorted({address(route, it, everything) for route, it in found if "format" not in route})


def state_of_everything() -> dict[str, Any]:
    """Every row of every table; sessions are written when their pages are read."""
    models = [each for each in apps.get_models() if each is not Session and each._meta.managed]
    return {each._meta.label: sorted(map(repr, each._default_manager.values_list())) for each in models}


@contextmanager
def writing() -> Iterator[list[str]]:
    """The statements that may have changed a row; without any, nobody need compare every row of every table."""
    found: list[str] = []

    def note(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        if not sql.startswith(("SELECT", "SAVEPOINT", "RELEASE", "ROLLBACK")) and "django_session" not in sql:
            found.append(sql)
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(note):
        yield found


def state_of_redis(valkey: Any) -> dict[bytes, bytes]:
    """But for the counts of attempts to sign in, which are everybody's."""
    return {key: valkey.dump(key) for key in valkey.scan_iter(count=1000) if b":rl:" not in key}


def secrets_of(house: House) -> list[str]:
    """What nobody is ever shown."""
    hashes = [key.secret_hash for key in APIKey.objects.all()]
    passwords = [user.password for user in User.objects.all()]
    sessions = list(Session.objects.values_list("session_key", flat=True))
    peppers = [each.partition(":")[2] for each in django_settings.KEY_PEPPER.split(",")]
    keys = [customer.text for customer in (house.cast.alice, house.cast.bob, house.cast.operator)]
    found = [
        *hashes,
        *passwords,
        *sessions,
        *peppers,
        *keys,
        django_settings.SECRET_KEY,
        CANARY,
        "pbkdf2_",
        "data-token",
    ]
    assert all(found)
    return list(map(str, found))


def told(answer: Any, secrets: list[str]) -> list[str]:
    content = b"".join(answer.streaming_content) if answer.streaming else answer.content
    text = content.decode(errors="replace") + str(answer.headers)
    return [secret for secret in secrets if secret in text]


# The console

ACTING = {
    "admin:inference_optimization_activate_this",
    "admin:inference_optimization_cancel_this",
    "console-playground-run",
    "console-cancel-request",
    "console-replay",
    "console-erase-slot",
    "console-forget-state",
    "console-model-order",
    "console-correction",
    "admin:accounts_quotaperiod_correct",
    "admin:auth_user_password_change",
    "admin:inference_batch_cancel_this",
    "admin:inference_modelimport_cancel_this",
}
"""Pages that only act, beside those of Django that add and delete. Every other page must be open to an auditor."""
ELSEWHERE = {
    "admin:login": (302,),  # who is signed in
    "admin:autocomplete": (403,),  # without the field that it is for; below it has one
    "admin:view_on_site": (404,),  # no row has a page of its own beside the console
    "admin:None": (302, 404),  # addresses of before, and those that are none
}


def acts(name: str) -> bool:
    return name in ACTING or name.endswith(("_add", "_delete"))


def test_every_page_can_be_read_and_none_changes_anything(
    house: House, everything: dict[str, Model], valkey: Any
) -> None:
    client, secrets = house.client("auditor"), secrets_of(house)
    before, in_redis = state_of_everything(), state_of_redis(valkey)
    wrong, number, names = [], 0, set()
    for name, url in console(everything):
        if name in OWN:
            continue
        names.add(name)
        readable = (403, 405) if acts(name) else ELSEWHERE.get(name, (200,))
        for method in METHODS:
            with writing() as written:
                answer = client.generic(method, url, "name=taken+over&_save=1&post=yes&confirm=yes", FORM)
            number += 1
            if answer.status_code == 500 or told(answer, secrets):
                wrong.append(f"{method} {url}: {answer.status_code}, tells {told(answer, secrets)}")
            if method == "GET" and answer.status_code not in readable:
                wrong.append(f"{method} {name} {url}: {answer.status_code}, not {readable}")
            if method == "POST" and acts(name) and answer.status_code not in (403, 404, 405):
                wrong.append(f"{method} {name} {url}: {answer.status_code}, and it acts")
            if written and state_of_everything() != before:
                wrong.append(f"{method} {url} changed something")
                before = state_of_everything()
    assert not wrong, "\n".join(wrong)
    assert state_of_everything() == before and state_of_redis(valkey) == in_redis
    assert names >= ACTING and number > 7 * 150


def test_searches_and_choices_tell_no_secret(house: House, everything: dict[str, Model]) -> None:
    client, secrets, number = house.client("auditor"), secrets_of(house), 0
    asked = [reverse("admin:search") + f"?s={word}&extended=1" for word in ("alice", "key", "a")]
    for label in registered():
        asked += [f"{page(label, 'changelist')}?{query}" for query in ("q=a", "all=", "o=1.-2", "p=1", "_popup=1")]
        for field in admin_of(label).autocomplete_fields:
            application, model = label.split(".")
            query = f"?app_label={application}&model_name={model}&field_name={field}&term="
            asked.append(reverse("admin:autocomplete") + query)
    for url in asked:
        answer = client.get(url, follow=True)
        assert answer.status_code == 200 and not told(answer, secrets), f"{url}: {answer.status_code}"
        number += 1
    assert number > 100


def test_no_action_of_a_list_changes_anything(house: House, everything: dict[str, Model], valkey: Any) -> None:
    """All actions that a superuser has, as the form of the list sends them and as its preview does."""
    client, secrets, wrong, number = house.client("auditor"), secrets_of(house), [], 0
    before, in_redis = state_of_everything(), state_of_redis(valkey)
    request = _root(house)
    for label in registered():
        request.user = house.people["superuser"]
        names = {"delete_selected", *admin_of(label).get_actions(request)}
        request.user = house.people["auditor"]
        offered = admin_of(label).get_actions(request)
        wrong += [f"{name} of {label} is offered" for name, each in offered.items() if not only_reads(each[0])]
        for name in names:
            for more in ({}, {"previewed": "yes"}, {"post": "yes"}, {"previewed": "yes", "select_across": "1"}):
                data = {"action": name, "_selected_action": [everything[label].pk], "index": "0", **more}
                with writing() as written:
                    answer = client.post(page(label, "changelist"), data)
                number += 1
                is_changed = bool(written) and state_of_everything() != before
                if answer.status_code == 500 or told(answer, secrets) or is_changed:
                    wrong.append(f"{name} of {label}: {answer.status_code}")
                    before = state_of_everything()
    assert not wrong, "\n".join(wrong)
    assert state_of_everything() == before and state_of_redis(valkey) == in_redis
    assert number > 4 * 40


def only_reads(action: Any) -> bool:
    return tuple(getattr(action, "allowed_permissions", ())) == ("view",)


def test_no_filter_and_no_order_tells_a_secret_letter_by_letter(
    house: House,
    everything: dict[str, Model],
) -> None:
    """A row that a filter finds or does not find answers a question: none is answered about these fields."""
    client, number = house.client("auditor"), 0
    for label in registered():
        model = apps.get_model(label)
        own = [field.name for field in model._meta.get_fields() if SECRET.search(field.name)]
        behind = [
            f"{field.name}__{inner.name}"
            for field in model._meta.get_fields()
            if field.related_model
            for inner in field.related_model._meta.get_fields()
            if SECRET.search(inner.name)
        ]
        for field in own + behind:
            for lookup in (field, f"{field}__startswith", f"{field}__gt", f"{field}__regex"):
                answer = client.get(page(label, "changelist"), {lookup: "a"})
                assert answer.status_code in (302, 400), f"{label}?{lookup}: {answer.status_code}"
                number += 1
    assert number > 4 * 10


# The API


def test_a_session_of_the_console_is_worth_nothing_at_the_operators_api(
    house: House,
    everything: dict[str, Model],
) -> None:
    """An auditor has no key, and whoever is signed in is nobody there."""
    client, secrets = house.client("auditor"), secrets_of(house)
    client.get(reverse("admin:index"))
    before, wrong, number = state_of_everything(), [], 0
    for url in operators_api(everything):
        for method in METHODS:
            answer = client.generic(method, url, "{}", content_type="application/json")
            number += 1
            if answer.status_code not in (401, 405) or told(answer, secrets):
                wrong.append(f"{method} {url}: {answer.status_code}")
    assert not wrong, "\n".join(wrong)
    assert state_of_everything() == before
    assert number > 7 * 40


def test_no_answer_to_an_operator_has_a_secret_either(
    house: House,
    everything: dict[str, Model],
) -> None:
    """What an auditor is handed of the operator's reports."""
    client, secrets = Client(raise_request_exception=False), secrets_of(house)
    headers = {"X-API-Key": issuing.issue(house.cast.operator.tenant, "walk", ["operator"])[1]}
    known_keys.CACHE.forget()
    secrets += [APIKey.objects.latest("pk").secret_hash]
    read = 0
    for url in operators_api(everything):
        answer = client.get(url, headers=headers)
        read += answer.status_code == 200
        assert not told(answer, secrets), url
    assert read > 20
