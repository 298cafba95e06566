"""The operator's pages: every one renders, registering shows what is wrong, receipts are read-only, never counted."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from django.contrib.admin import site
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from accounts.models import APIKey, Plan, Tenant
from accounts.pages import long_lists
from inference.admin.live_states import live_state, states_or_reason
from inference.catalog import model_rows, registry
from inference.catalog.served import snapshot
from inference.models import Receipt, ServedModel
from inference.transport import model_orders, queue
from inference.vetting.trial import Trial
from inference.worker.hosted import HostedModel, State
from tests.inference import gguf_files
from tests.inference.gguf_files import FailingTrial, PassingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
LIST, ADD = reverse("admin:inference_servedmodel_changelist"), reverse("admin:inference_servedmodel_add")
RECEIPTS = reverse("admin:inference_receipt_changelist")


@pytest.fixture(autouse=True)
def _passing_trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Trial, "run", PassingTrial.run)
    monkeypatch.setattr(Trial, "calls", 0, raising=False)
    registry.forget()
    yield
    registry.forget()


@pytest.fixture
def operator(db: None, client: Client) -> Client:
    client.force_login(User.objects.create_superuser("operator", password="a long password for tests"))
    return client


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    return model_rows.register(gguf_files.write(tmp_path), "tiny", n_slots=4)


def change_page(row: ServedModel) -> str:
    return reverse("admin:inference_servedmodel_change", args=[row.pk])


def form(**values: Any) -> dict[str, Any]:
    """What a browser sends from the add page."""
    fields = {
        "name": "tiny",
        "path": "",
        "aliases": "",
        "notes": "",
        "visibility": "shared",
        "n_ctx": 2048,
        "n_slots": 8,
        "n_lanes": 1,
        "n_threads": "",
        "n_gpu_layers": 0,
        "kv_type": "f16",
        "draft_kind": "none",
        "draft_n_min": 0,
        "draft_n_max": 16,
        "draft_p_min": 0,
        "draft_policy": "adaptive",
        "pool": "default",
        "load_mode": "eager",
        "keep_alive_seconds": "",
        "capabilities": "{}",
        "embedding_pooling": "auto",
    }
    return {**fields, **values}


def text_of(response: Any) -> str:
    return str(response.content, "utf-8")


def make_receipts(count: int, **values: Any) -> list[Receipt]:
    plan, _ = Plan.objects.get_or_create(name="plan")
    tenant, _ = Tenant.objects.get_or_create(name="Alice's", defaults={"plan": plan})
    key, _ = APIKey.objects.get_or_create(
        public_id="abcdefghijkl", defaults={"tenant": tenant, "name": "main", "secret_hash": "0" * 64, "pepper_id": "1"}
    )
    given = {
        "tenant": tenant,
        "key": key,
        "model": "tiny",
        "model_digest": "0" * 64,
        "route": "/v1/generate",
        "status": "completed",
        "finish_reason": "eos",
        **values,
    }
    before = Receipt.objects.count()
    return Receipt.objects.bulk_create(
        Receipt(
            request_id=f"request-{before + number}",
            created_at=NOW - timedelta(seconds=number),
            finished_at=NOW,
            **given,
        )
        for number in range(count)
    )


# Served models


def test_every_page_of_the_models_renders(operator: Client, model: ServedModel) -> None:
    for url in (LIST, ADD, change_page(model), reverse("admin:inference_servedmodel_delete", args=[model.pk])):
        assert operator.get(url).status_code == 200, url
    page = text_of(operator.get(change_page(model)))
    for shown in ("key-value cache", "Trained context", "4,096", "{{ messages[0].content }}", model.digest):
        assert shown in page


def test_a_model_that_guesses_must_have_the_same_vocabulary(operator: Client, tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.tokens": (9, (8, ["<s>", "</s>", "a", "c"]))}
    for name, changes in (("small", {"general.name": (8, "small")}), ("other", tokens)):
        path = gguf_files.write(tmp_path, f"{name}.gguf", changes=changes)
        assert operator.post(ADD, form(name=name, path=str(path))).status_code == 302
    small, other = ServedModel.objects.order_by("-name")
    fields = {"path": str(gguf_files.write(tmp_path)), "draft_kind": "model"}
    for draft, sentence in (("", "Choose the model that guesses"), (other.pk, "cannot guess for this model")):
        page = text_of(operator.post(ADD, form(**fields, draft_model=draft)))
        assert sentence in page
    assert operator.post(ADD, form(**fields, draft_model=small.pk)).status_code == 302
    assert ServedModel.objects.get(name="tiny").draft_model == small


def test_a_model_is_registered_by_its_path(operator: Client, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path)
    response = operator.post(ADD, form(path=str(path), aliases="chat"))
    assert response.status_code == 302, text_of(response)
    row = ServedModel.objects.get()
    assert (row.name, row.aliases, row.is_default, row.path) == ("tiny", ["chat"], True, str(path))
    assert (len(row.digest), row.metadata["title"]) == (64, "Tiny")
    default = registry.default()
    assert default is not None
    assert default.name == "tiny"
    assert LogEntry.objects.count() == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"path": "/nowhere/model.gguf"}, "There is no file"),
        ({"path": "TEXT"}, "This is not a GGUF file"),
        ({"path": "GOOD", "n_ctx": 100_000}, "trained for 4096"),
        ({"path": "GOOD", "aliases": "a chat"}, "Use 1 to 100 letters"),
        ({"path": "GOOD", "aliases": "chat, tiny"}, "A name is there twice"),
        ({"path": "GOOD", "name": "two words"}, "Use 1 to 100 letters"),
        ({"path": "GOOD", "n_slots": 0}, "greater than or equal to 1"),
        ({"path": "GOOD", "n_lanes": 17}, "less than or equal to 16"),
    ],
)
def test_what_is_wrong_is_shown_on_the_form(
    operator: Client, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    (tmp_path / "text.gguf").write_text("only text, and long enough to be read as a header")
    places = {"TEXT": str(tmp_path / "text.gguf"), "GOOD": str(gguf_files.write(tmp_path))}
    response = operator.post(ADD, form(**{**values, "path": places.get(values["path"], values["path"])}))
    assert response.status_code == 200
    assert said in text_of(response)
    assert not ServedModel.objects.exists()


def test_a_crash_of_the_trial_is_an_error_of_the_path(
    operator: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "run", FailingTrial.run)
    path = gguf_files.write(tmp_path, changes={"general.name": (8, "crash")})
    assert "SIGSEGV" in text_of(operator.post(ADD, form(path=str(path))))
    assert not ServedModel.objects.exists()


def test_a_changed_option_does_not_inspect_the_file_again(operator: Client, model: ServedModel) -> None:
    calls = Trial.calls  # type: ignore[attr-defined]
    assert operator.post(change_page(model), form(path=model.path, n_slots=2)).status_code == 302
    model.refresh_from_db()
    assert (model.n_slots, Trial.calls) == (2, calls)  # type: ignore[attr-defined]
    assert registry.every()[0].n_slots == 2


def test_a_replaced_file_is_inspected_when_asked(operator: Client, model: ServedModel) -> None:
    Path(model.path).write_bytes(gguf_files.build({"general.name": (8, "Replaced")}))
    assert operator.post(change_page(model), form(path=model.path, inspect_again="on")).status_code == 302
    model.refresh_from_db()
    assert model.metadata["title"] == "Replaced"


def test_grants_take_effect_at_once(operator: Client, model: ServedModel) -> None:
    make_receipts(1)
    alice = Tenant.objects.get()
    assert [served.name for served in registry.visible(_Tenant(alice.pk))] == ["tiny"]
    data = form(path=model.path, visibility="granted", granted_tenants=[alice.pk])
    assert operator.post(change_page(model), data).status_code == 302
    assert [served.name for served in registry.visible(_Tenant(alice.pk))] == ["tiny"]
    assert registry.visible(_Tenant(alice.pk + 1)) == []


class _Tenant:
    allowed_models = allowed_adapters = None

    def __init__(self, tenant_id: int) -> None:
        self.tenant_id = tenant_id


def act(operator: Client, action: str, *rows: ServedModel) -> str:
    data = {"action": action, "_selected_action": [row.pk for row in rows], "previewed": "yes"}
    return text_of(operator.post(LIST, data, follow=True))


def test_actions_choose_the_default_and_when_models_load(operator: Client, model: ServedModel, tmp_path: Path) -> None:
    other = model_rows.register(gguf_files.write(tmp_path, "other.gguf"), "other")
    assert "Choose exactly one model" in act(operator, "make_default", model, other)
    assert "other is the default model now" in act(operator, "make_default", other)
    assert ServedModel.objects.get(is_default=True) == other
    for action, mode in (("switch_off", "off"), ("load_on_request", "lazy"), ("load_eagerly", "eager")):
        assert "2 changed" in act(operator, action, model, other)
        assert set(ServedModel.objects.values_list("load_mode", flat=True)) == {mode}


@pytest.mark.usefixtures("valkey")
def test_before_several_models_are_switched_off_the_page_says_what_they_do(
    operator: Client, model: ServedModel, tmp_path: Path
) -> None:
    other = model_rows.register(gguf_files.write(tmp_path, "other.gguf"), "other", n_slots=2)
    report = {"id": model.pk, "state": "ready", "error": "", "slots": 4, "busy": 3}
    queue.ticket_queue().beat("worker-1", model.pool, 4, {"models": [report]})
    data = {"action": "switch_off", "_selected_action": [model.pk, other.pk]}
    page = operator.post(LIST, data).content.decode()
    assert "loaded on worker-1, 3 of 4 slots busy" in page and "no worker holds it" in page
    assert not ServedModel.objects.filter(load_mode="off").exists()
    operator.post(LIST, {**data, "previewed": "yes"})
    assert ServedModel.objects.filter(load_mode="off").count() == 2


def test_actions_load_unload_and_pin(operator: Client, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No worker of pool" in act(operator, "load_now", model)
    assert f"{model.name} is not loaded." in act(operator, "unload_now", model)
    sent: list[str] = []
    monkeypatch.setattr(model_orders, "load", lambda served: sent.append(served.name) or len(sent) == 1)
    monkeypatch.setattr(model_orders, "unload", lambda served: 1)
    assert f"{model.name} is being loaded." in act(operator, "load_now", model)
    assert f"{model.name} is loaded already." in act(operator, "load_now", model)
    assert f"{model.name} is unloaded as soon as it is idle." in act(operator, "unload_now", model)
    assert "1 changed: once loaded, they stay." in act(operator, "pin", model)
    assert ServedModel.objects.get(pk=model.pk).is_pinned
    assert "1 changed: they may be unloaded." in act(operator, "unpin", model)

    def away(_: Any) -> Any:
        raise redis.ConnectionError("refused")

    monkeypatch.setattr(model_orders, "load", away)
    monkeypatch.setattr(model_orders, "unload", away)
    for action in ("load_now", "unload_now"):
        assert "Redis does not answer: no worker can be told." in act(operator, action, model)


def test_deleting_the_default_promotes_another(operator: Client, model: ServedModel, tmp_path: Path) -> None:
    model_rows.register(gguf_files.write(tmp_path, "other.gguf"), "other")
    url = reverse("admin:inference_servedmodel_delete", args=[model.pk])
    assert operator.post(url, {"post": "yes"}).status_code == 302
    assert ServedModel.objects.get().is_default
    data = {"action": "delete_selected", "_selected_action": [ServedModel.objects.get().pk], "post": "yes"}
    operator.post(LIST, data)
    assert not ServedModel.objects.exists()


def heartbeat(model: ServedModel, **values: Any) -> None:
    hosted = HostedModel(snapshot(model), load=_never_loaded, sink=lambda _events: None)
    queue.ticket_queue().beat("worker-1", "default", 4, {"models": [{**hosted.report(), **values}]})


def _never_loaded(*_args: object, **_options: object) -> Any:
    raise AssertionError("the test loads no model")


@pytest.mark.parametrize(
    ("values", "listed", "said"),
    [
        ({"state": State.READY, "busy": 3}, "loaded, 3 of 4 slots busy", "loaded on worker-1, 3 of 4 slots busy"),
        ({"state": State.FAILED, "error": "out of memory"}, "failed", "failed on worker-1: out of memory"),
        ({}, "unloaded on worker-1", "unloaded on worker-1"),
        (
            {"state": State.LOADING, "progress": 0.4, "load_seconds": 3.2},
            "loading",
            "loading 40% on worker-1, some 3 s in all",
        ),
        ({"is_waiting": True}, "waiting for memory on worker-1", "waiting for memory on worker-1"),
    ],
)
@pytest.mark.usefixtures("valkey")
def test_the_state_in_the_workers_is_shown(
    operator: Client, model: ServedModel, values: dict[str, Any], listed: str, said: str
) -> None:
    heartbeat(model, **values)
    assert listed in text_of(operator.get(LIST))
    assert said in text_of(operator.get(change_page(model)))


@pytest.mark.usefixtures("valkey")
def test_a_model_without_a_worker_says_so(operator: Client, model: ServedModel) -> None:
    assert "no worker holds it" in text_of(operator.get(LIST))
    model_rows.set_load_mode([model.pk], "off")
    states, reason = states_or_reason()
    model.refresh_from_db()
    assert (live_state(model, states), reason) == ("off", None)


def test_the_pages_open_while_redis_is_away(
    operator: Client, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise redis.ConnectionError("refused")

    monkeypatch.setattr(queue, "ticket_queue", away)
    assert "Redis does not answer" in text_of(operator.get(LIST))
    assert "Redis does not answer" in text_of(operator.get(change_page(model)))


# Receipts


def test_the_receipts_render_and_are_read_only(operator: Client) -> None:
    receipt = make_receipts(3)[0]
    page = text_of(operator.get(RECEIPTS))
    assert "request-0" in page
    assert "Alice&#x27;s" in page
    url = reverse("admin:inference_receipt_change", args=[receipt.pk])
    assert operator.get(url).status_code == 200
    assert operator.post(url, {"status": "failed"}).status_code == 403
    assert operator.get(reverse("admin:inference_receipt_add")).status_code == 403
    assert operator.post(reverse("admin:inference_receipt_delete", args=[receipt.pk])).status_code == 403
    assert Receipt.objects.filter(status="completed").count() == 3


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("?q=request-1", {"request-1"}),
        ("?q=request", set()),
        ("?status__exact=failed", {"request-2"}),
        ("?model=other", {"request-3"}),
    ],
)
def test_receipts_are_found_by_exact_id_status_and_model(operator: Client, query: str, found: set[str]) -> None:
    make_receipts(2)
    make_receipts(1, status="failed")
    make_receipts(1, model="other")
    ServedModel.objects.create(name="other", path="/other.gguf")
    page = text_of(operator.get(RECEIPTS + query))
    assert {name for name in (f"request-{number}" for number in range(4)) if f"/{name}/" in page} == found


def test_receipts_are_found_by_tenant(operator: Client) -> None:
    make_receipts(2)
    charlie = Tenant.objects.create(name="Charlie's", plan=Plan.objects.get())
    alice = Tenant.objects.get(name="Alice's")
    assert "/request-0/" in text_of(operator.get(f"{RECEIPTS}?tenant__id__exact={alice.pk}"))
    assert "/request-0/" not in text_of(operator.get(f"{RECEIPTS}?tenant__id__exact={charlie.pk}"))


def test_a_longer_list_costs_no_more_queries_and_counts_no_further(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_lists, "MOST_COUNTED", 100)
    costs = []
    for _ in range(2):
        make_receipts(120)
        with CaptureQueriesContext(connection) as queries:
            assert operator.get(RECEIPTS).status_code == 200
        costs.append(len(queries))
        counts = [query["sql"] for query in queries if "COUNT(" in query["sql"] and "receipt" in query["sql"]]
        assert counts
        assert all("LIMIT 100" in sql for sql in counts)
    assert costs[0] == costs[1]
    assert "/request-0/" in text_of(operator.get(RECEIPTS))


# The whole site


@pytest.mark.parametrize(
    "row", sorted(site._registry, key=lambda row: row._meta.label), ids=lambda row: row._meta.label
)
def test_every_list_and_every_add_page_of_the_site_opens(operator: Client, model: ServedModel, row: Any) -> None:
    make_receipts(2)
    name = f"admin:{row._meta.app_label}_{row._meta.model_name}"
    assert operator.get(reverse(f"{name}_changelist")).status_code == 200
    may_add = site._registry[row].has_add_permission(_request_of(operator))
    assert operator.get(reverse(f"{name}_add")).status_code == (200 if may_add else 403)
    for found in row._default_manager.all()[:1]:
        assert operator.get(reverse(f"{name}_change", args=[found.pk])).status_code == 200


def _request_of(client: Client) -> Any:
    request = client.get(reverse("admin:index")).wsgi_request
    request.user = User.objects.get(username="operator")
    return request


# Who may


def test_only_staff_with_the_permission_see_the_pages(client: Client, model: ServedModel) -> None:
    for url in (LIST, RECEIPTS):
        assert client.get(url).status_code == 302
    client.force_login(User.objects.create_user("staff", is_staff=True))
    for url in (LIST, ADD, RECEIPTS, change_page(model)):
        assert client.get(url).status_code == 403
    viewer = User.objects.create_user("viewer", is_staff=True)
    viewer.user_permissions.add(Permission.objects.get(codename="view_servedmodel"))
    client.force_login(viewer)
    assert client.get(LIST).status_code == 200
    assert client.get(change_page(model)).status_code == 200
    act(client, "switch_off", model)
    model.refresh_from_db()
    assert model.load_mode == "eager"


# Chat templates


def posted(row: ServedModel, **values: Any) -> dict[str, Any]:
    return form(name=row.name, path=row.path, n_ctx=row.n_ctx, n_slots=row.n_slots, **values)


def test_the_page_of_a_model_shows_what_its_template_can_do(operator: Client, model: ServedModel) -> None:
    page = text_of(operator.get(change_page(model)))
    assert "cannot be used: It leaves out what was said" in page
    own = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}"
    model.chat_template, model.chat_facts = own, model_rows.check_template(own)
    model.save()
    page = text_of(operator.get(change_page(model)))
    assert "system messages, tools (SHA-256 " in page
    assert model.chat_facts["digest"][:12] in page


def test_an_operator_puts_a_template_in_place_of_the_files(operator: Client, model: ServedModel) -> None:
    own = "{% for m in messages %}\n{{ m.content }}\n{% endfor %}"
    response = operator.post(change_page(model), posted(model, chat_template=own.replace("\n", "\r\n")))
    assert response.status_code == 302, response.content
    model.refresh_from_db()
    assert (model.chat_template, model.chat_facts["has_system"]) == (own, True)
    assert operator.post(change_page(model), posted(model, chat_template="")).status_code == 302
    model.refresh_from_db()
    assert (model.chat_template, model.chat_facts) == ("", {})


def test_a_template_that_is_no_good_is_an_error_of_its_field(operator: Client, model: ServedModel) -> None:
    response = operator.post(change_page(model), posted(model, chat_template="{{ messages"))
    assert response.status_code == 200
    assert "The template is no good: Line 1" in text_of(response)
    model.refresh_from_db()
    assert model.chat_template == ""
