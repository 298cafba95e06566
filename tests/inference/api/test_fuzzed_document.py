"""The OpenAPI document against the site: schemathesis asks for all in it, rightly and wrongly, with both kinds of key.

Whatever it asks, no answer is 5xx and none has a status that the document does not name. Two thirds of the questions
name things that exist (the key's own file, batch, response, request; the model) in a body that is right but for two
fields, or nothing behind the first check would be asked. LLMSITE_FUZZ_QUESTIONS: of each operation and either kind.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from drf_spectacular.generators import SchemaGenerator
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import status_code_conformance

from tests.conftest import Customer
from tests.in_process import MODEL, N_CTX, InProcessSite

pytestmark = [pytest.mark.api, pytest.mark.slow]
NUM_QUESTIONS = int(os.environ.get("LLMSITE_FUZZ_QUESTIONS", "4"))
CHECKS = [not_a_server_error, status_code_conformance]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
OPERATORS = ("/v1/admin/", "/v1/organization/")
SHORT = {"prompt": "a b", "max_tokens": 4}
NATIVE = {"prompt": "a b", "max_new_tokens": 4}
TALK = {"messages": [{"role": "user", "content": "a b"}], "max_tokens": 4}
RESPONSE = {"input": "a b", "max_output_tokens": 4}
GOOD: dict[str, dict[str, Any]] = {
    "/apply-template": TALK,
    "/chat/completions": TALK,
    "/chat/completions/input_tokens": TALK,
    "/completion": SHORT,
    "/completions": SHORT,
    "/detokenize": {"tokens": [1, 2]},
    "/embedding": {"content": "a b"},
    "/embeddings": {"content": "a b"},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 4},
    "/responses": RESPONSE,
    "/responses/input_tokens": RESPONSE,
    "/tokenize": {"content": "a b"},
    "/v1/admission": NATIVE,
    "/v1/batches": {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": ""},
    "/v1/chat/completions": TALK,
    "/v1/chat/completions/input_tokens": TALK,
    "/v1/completions": SHORT,
    "/v1/embeddings": {"input": ["a b", "c"]},
    "/v1/generate": NATIVE,
    "/v1/generate/batch": {"prompts": ["a", "b"], "max_new_tokens": 4},
    "/v1/messages": TALK,
    "/v1/messages/count_tokens": TALK,
    "/v1/responses": RESPONSE,
    "/v1/responses/input_tokens": RESPONSE,
}
"""A body that is right, by path."""


@pytest.fixture(scope="module")
def operations() -> list[Any]:
    document = SchemaGenerator().get_schema(request=None, public=True)  # type: ignore[no-untyped-call]
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(document, default=str)))
    found = [each.ok() for each in schema.get_all_operations()]
    return sorted(found, key=lambda each: each.method == "delete")  # last


def test_whatever_a_tenant_asks_the_answer_is_documented_and_no_error_of_the_server(
    site: InProcessSite, operations: list[Any]
) -> None:
    fuzz = Fuzz(site, site.cast.alice)
    for operation in operations:
        fuzz.ask(operation, 1 if operation.path.startswith(OPERATORS) else NUM_QUESTIONS)
    fuzz.judge(min_answered=50)
    assert all(fuzz.statuses[each.label] <= {403, 404, 405} for each in operations if each.path.startswith(OPERATORS))


def test_whatever_an_operator_asks_the_answer_is_documented_and_no_error_of_the_server(
    site: InProcessSite, operations: list[Any]
) -> None:
    from accounts.identity import issuing

    tenant = site.cast.operator.tenant
    fuzz = Fuzz(site, Customer(tenant, *issuing.issue(tenant, "all", ["operator", "generate", "usage"], {}, None)))
    for operation in operations:
        fuzz.ask(operation, NUM_QUESTIONS if operation.path.startswith(OPERATORS) else 1)
    fuzz.judge(min_answered=80)


class Fuzz:
    """What one key was answered: `statuses` by operation, `wrong` by operation and status."""

    def __init__(self, site: InProcessSite, customer: Customer) -> None:
        self.site = site
        self.customer = customer
        site.tokenizers.fill = dict.fromkeys(site.tokenizers.fill, 1)  # else to fill in is not implemented
        enable_embeddings(site)
        self.things = make_things(site, customer)
        self.rows = make_rows(site)
        self.session = requests.Session()
        self.num_asked = 0
        self.statuses: dict[str, set[int]] = {}
        self.wrong: dict[str, str] = {}

    def ask(self, operation: Any, num_questions: int) -> None:
        for mode in MODES:
            self._ask(operation, mode, num_questions)

    def judge(self, min_answered: int) -> None:
        self.session.close()
        print(f"{self.num_asked} questions to {len(self.statuses)} operations")
        assert not self.wrong, "\n\n".join(f"{label}: {text}" for label, text in self.wrong.items())
        answered = {label for label, seen in self.statuses.items() if any(status < 400 for status in seen)}
        assert len(answered) >= min_answered, sorted(set(self.statuses) - answered)

    def _ask(self, operation: Any, mode: GenerationMode, num_questions: int) -> None:
        @hypothesis.seed(20)
        @hypothesis.settings(
            max_examples=num_questions,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(mode), picked=st.integers(0, 95))
        def question(case: Any, picked: int) -> None:
            if picked % 3 < 2:
                make_good(case, picked)
                self._name_real_things(case)
            self._send(case)

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # without a field nothing can be wrong
            question()

    def _send(self, case: Any) -> None:
        for name in [name for name in case.headers or {} if name.lower() in {"authorization", "x-api-key"}]:
            del case.headers[name]
        response = case.call(
            base_url=self.site.base_url, session=self.session, headers=self.customer.headers, timeout=30
        )
        self.num_asked += 1
        label = case.operation.label
        self.statuses.setdefault(label, set()).add(response.status_code)
        try:
            case.validate_response(response, checks=CHECKS)
        except (Failure, FailureGroup) as failure:
            self.wrong.setdefault(f"{label} {response.status_code}", str(failure)[:1500])

    def _name_real_things(self, case: Any) -> None:
        of_operators = case.path.removeprefix("/v1/admin/").split("/")[0]
        things = {**self.things, "id": self.rows.get(of_operators)}
        if of_operators == "models":
            things["model"] = "spare"
        for part in (case.path_parameters, case.query, case.body):
            if isinstance(part, dict):
                part.update({name: things[name] for name in part.keys() & things.keys()})


def make_good(case: Any, picked: int) -> None:
    """Of what was made up, two fields stay."""
    good = GOOD.get(case.path)
    if good is None or not isinstance(case.body, dict):
        return
    names = sorted(case.body)
    kept = {names[place % len(names)] for place in (picked, picked // 7)} if names else set()
    case.body = {**good, "model": MODEL, **{name: case.body[name] for name in kept}}


def enable_embeddings(site: InProcessSite) -> None:
    from inference.catalog import registry
    from inference.models import ServedModel

    ServedModel.objects.filter(name=MODEL).update(capabilities={"embeddings": True})
    registry.forget()
    site.stop_worker()
    site.start_worker()


def make_things(site: InProcessSite, customer: Customer) -> dict[str, Any]:
    """By the names that parameters and fields of bodies have: what this key has made."""
    from accounts.identity import known_keys
    from accounts.models import Tenant

    Tenant.objects.filter(pk=customer.tenant.pk).update(response_days=1)  # else nothing is stored
    known_keys.CACHE.forget()
    client = site.client(customer)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": MODEL, "prompt": "a"}}
    file = client.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", json.dumps(line).encode())}
    ).json()["id"]
    batch = client.post(
        "/v1/batches", json={"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    ).json()["id"]
    response = client.post("/v1/responses", json={"model": MODEL, "input": "a b", "max_output_tokens": 4}).json()["id"]
    assert client.get(f"/v1/responses/{response}").status_code == 200
    return {
        "model": MODEL,
        "file_id": file,
        "input_file_id": file,
        "batch_id": batch,
        "response_id": response,
        "previous_response_id": response,
        "request_id": client.generate(background=True).headers["x-request-id"],
        "month": f"{datetime.now(UTC):%Y-%m}",
        "id_slot": "0",
        "tenant": site.cast.charlie.tenant.pk,
    }


def make_rows(site: InProcessSite) -> dict[str, Any]:
    """By the names that lists of operators have: a row of each kind that nobody needs."""
    from accounts.identity import issuing
    from accounts.models import Plan, QuotaPeriod
    from inference.batches.models import Batch
    from inference.models import ServedModel

    charlie = site.cast.charlie.tenant
    model = ServedModel.objects.create(name="spare", digest="f" * 64, path="/models/spare.gguf", n_ctx=N_CTX, n_slots=1)
    period = QuotaPeriod.objects.first()
    batch = Batch.objects.first()
    assert period is not None and batch is not None
    return {
        "plans": Plan.objects.create(name="spare").pk,
        "tenants": charlie.pk,
        "keys": issuing.issue(charlie, "spare", ["generate"], {}, None)[0].pk,
        "models": model.pk,
        "quotas": period.pk,
        "batches": batch.pk,
    }
