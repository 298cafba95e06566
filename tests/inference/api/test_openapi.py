"""The OpenAPI document and the URL table: every path is in it, every view says who may use it and takes its door."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction
from django.urls import URLPattern, URLResolver, get_resolver
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.validation import validate_schema

from inference.api.async_view import AsyncAPIView
from inference.api.generation import ALL_OR_NOTHING, IDEMPOTENCY_KEY
from inference.api.operator.base import OperatorView
from tests.in_process import Client, InProcessSite

NOT_OF_THE_API = {"openapi.json", "docs/", "favicon.ico", ""}
CONSOLE = "admin/"


def patterns(found: Any = None, prefix: str = "") -> Iterator[tuple[str, URLPattern]]:
    for pattern in found or get_resolver().url_patterns:
        path = prefix + str(pattern.pattern).lstrip("^").rstrip("$").removesuffix("\\Z")
        if path.startswith(CONSOLE):
            continue
        if isinstance(pattern, URLResolver):
            yield from patterns(pattern.url_patterns, path)
        elif path not in NOT_OF_THE_API:
            yield path, pattern


@pytest.fixture(scope="module")
def document() -> Any:
    return SchemaGenerator().get_schema(request=None, public=True)  # type: ignore[no-untyped-call]


@pytest.mark.unit
def test_the_document_is_valid(document: Any) -> None:
    validate_schema(document)  # type: ignore[no-untyped-call]


@pytest.mark.unit
def test_every_path_of_the_url_table_is_in_the_document(document: Any) -> None:
    views = {getattr(pattern.callback, "cls", None) for _, pattern in patterns()}
    assert len(views) > 15
    documented = {path.split("{")[0].rstrip("/") for path in document["paths"]}
    for path, _ in patterns():
        start = "/" + path.split("(?P")[0].rstrip("/")
        assert start in documented, f"{path} is not in the document"


@pytest.mark.unit
def test_every_post_that_may_be_repeated_says_so(document: Any) -> None:
    generating = {
        path: operations["post"]
        for path, operations in document["paths"].items()
        if "post" in operations and ALL_OR_NOTHING.name in names_of(operations["post"])
    }
    assert len(generating) > 12
    missing = {path for path, operation in generating.items() if IDEMPOTENCY_KEY.name not in names_of(operation)}
    assert missing == {"/v1/admission"}


def names_of(operation: Any) -> set[str]:
    return {parameter["name"] for parameter in operation.get("parameters", ())}


@pytest.mark.unit
def test_every_view_names_who_may_use_it() -> None:
    for path, pattern in patterns():
        view = pattern.callback.cls  # type: ignore[union-attr]
        if issubclass(view, AsyncAPIView):
            assert view.route, path
            assert view.is_public or view.scopes or view.route == "/v1/me", f"{path} names no scope"
        else:
            assert issubclass(view, OperatorView), path


@pytest.mark.unit
def test_what_waits_for_models_comes_in_by_the_door_without_threads() -> None:
    for path, pattern in patterns():
        is_operators = path.startswith("v1/admin/") and not path.endswith("/content")  # that one reads for hours
        assert iscoroutinefunction(pattern.callback) is not is_operators, path


@pytest.mark.unit
def test_bodies_and_errors_are_documented(document: Any) -> None:
    operation = document["paths"]["/v1/generate"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    schema = document["components"]["schemas"][body]
    assert schema["properties"]["max_new_tokens"]["anyOf"][0]["maximum"] == 1 << 20
    assert set(operation["responses"]) >= {"200", "400", "401", "402", "403", "404", "413", "422", "429", "503", "504"}
    assert operation["security"] == [{"bearerKey": []}, {"headerKey": []}]
    assert (
        "security" not in document["paths"]["/healthz"]["get"] or {} in document["paths"]["/healthz"]["get"]["security"]
    )


@pytest.mark.unit
def test_every_number_and_string_of_a_body_is_bounded() -> None:
    from inference.api.anthropic.schemas import CountTokensBody, MessagesBody
    from inference.api.llamacpp.schemas import CompletionBody, DetokenizeBody, InfillBody, LoraVectorBody, TokenizeBody
    from inference.api.llamacpp.template_schemas import ApplyTemplateBody
    from inference.api.native.schemas import GenerateBatchBody, GenerateBody
    from inference.api.openai.schemas import ChatBody, CompletionsBody

    llama = (CompletionBody, InfillBody, TokenizeBody, DetokenizeBody, LoraVectorBody, ApplyTemplateBody)
    others = (GenerateBody, GenerateBatchBody, ChatBody, CompletionsBody, MessagesBody, CountTokensBody)
    for form in (*others, *llama):
        for path, schema in leaves(form.model_json_schema()):
            kind = schema.get("type")
            if kind in {"integer", "number"}:
                assert {"minimum", "exclusiveMinimum"} & schema.keys(), path
                assert {"maximum", "exclusiveMaximum"} & schema.keys(), path
            if kind == "string":
                assert {"maxLength", "enum", "const"} & schema.keys(), path
            if kind == "array":
                assert "maxItems" in schema, path


def leaves(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):  # else a property may have that name
            yield path, schema
        for name, part in schema.items():
            yield from leaves(part, f"{path}/{name}")
    elif isinstance(schema, list):
        for part in schema:
            yield from leaves(part, path)


@pytest.mark.api
def test_the_document_and_its_page_are_served_from_here(api: Client) -> None:
    document = api.get("/openapi.json")
    assert document.json()["openapi"].startswith("3.")
    page = api.get("/docs/")
    assert page.status_code == 200
    assert "https://" not in page.text.replace("https://www.w3.org", ""), "assets must not come from elsewhere"
    assert api.get("/", follow_redirects=False).headers["location"] == "/docs/"


@pytest.mark.api
def test_the_assets_of_the_page_are_there(site: InProcessSite) -> None:
    import re

    client = site.client()
    assets = re.findall(r'(?:src|href)="(/static/[^"]+)"', client.get("/docs/").text)
    assert assets
    for asset in assets:
        assert client.get(asset).status_code == 200, asset
