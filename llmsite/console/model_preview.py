"""The console's page of one model before it is loaded: the memory it would need, and what its template makes of texts.

The estimate is memory_of's, for other numbers of slots and context too, beside what each worker has room for.
A conversation is rendered in a tokenizer child with the model's template, or with one that is only being tried
(inference/chat); nothing is generated or charged. Operators load, unload and pin from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis
from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods, require_POST
from pydantic import ValidationError

from accounts.pages import console
from accounts.trail.refusals import Refusal
from inference.api.llamacpp.template_schemas import ApplyTemplateBody
from inference.catalog import model_rows, registry
from inference.catalog.model_memory import memory_of
from inference.catalog.served import snapshot
from inference.chat.prompt import MAX_TEMPLATE_BYTES, ChatTemplate
from inference.models import ServedModel
from inference.tokenizers import pool
from inference.transport import model_orders
from inference.transport.queue import ticket_queue
from inference.vetting.inspection import RegistrationError
from llmsite.console.reach import may_inspect, may_run

MAX_BODY_CHARACTERS = 64 << 10
MOST_SHOWN = 64 << 10
"""Characters of a rendered conversation."""
SAMPLE = """{"messages": [
  {"role": "system", "content": "You are a helpful assistant."},
  {"role": "user", "content": "What is the best thing about the sea?"},
  {"role": "assistant", "content": "Its horizon."},
  {"role": "user", "content": "Why?"}
]}"""
PARTS = (
    ("Weights", "weights_bytes"),
    ("Key-value cache", "kv_bytes"),
    ("Computing", "compute_bytes"),
    ("States of slots", "states_bytes"),
)


class MemoryForm(forms.Form):
    """Numbers to try; nothing is saved."""

    n_ctx = forms.IntegerField(min_value=8, max_value=1 << 24, label="Context of one slot")
    n_slots = forms.IntegerField(min_value=1, max_value=1024, label="Slots")
    n_lanes = forms.IntegerField(min_value=1, max_value=64, label="Lanes")
    kv_type = forms.ChoiceField(choices=ServedModel.KVType.choices, label="Type of the key-value cache")


class TemplateForm(forms.Form):
    """A conversation, and a template in the place of the model's."""

    body = forms.CharField(
        max_length=MAX_BODY_CHARACTERS,
        strip=False,
        label="Messages (and tools) as requests have them",
        widget=forms.Textarea(attrs={"rows": 8, "spellcheck": "false"}),
    )
    template = forms.CharField(
        required=False,
        strip=False,
        max_length=MAX_TEMPLATE_BYTES,
        label="Another template to try (empty: the model's own)",
        widget=forms.Textarea(attrs={"rows": 3, "spellcheck": "false"}),
    )


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker has for models. verdict: whether this one fits."""

    worker: str
    budget: str
    used: str
    verdict: str


@require_http_methods(["GET", "POST"])
def page(request: HttpRequest, model_id: int) -> HttpResponse:
    """GET with numbers estimates, POST renders."""
    if not may_inspect(request.user):
        raise PermissionDenied
    row = _row(model_id)
    wanted = TemplateForm(request.POST or None, initial={"body": SAMPLE})
    rendered = None
    if request.method == "POST" and wanted.is_valid():
        try:
            rendered = _rendered(row, wanted.cleaned_data["body"], wanted.cleaned_data["template"])
        except (Refusal, RegistrationError) as refusal:
            wanted.add_error(None, refusal.message)
        except ValidationError as error:
            wanted.add_error("body", _first(error))
    sizes, problem = _sizes(request, row)
    need = memory_of(row, row.active_variant)
    context = {
        **admin.site.each_context(request),
        "title": f"Memory and template of {row.name}",
        "row": row,
        "page_of_model": console.change_page("inference_servedmodel", row.pk),
        "sizes": sizes,
        "total": console.size(need.total_bytes),
        "parts": [(title, console.size(getattr(need, name))) for title, name in PARTS],
        "rooms": [] if problem else _rooms(row, need.total_bytes),
        "problem": problem,
        "wanted": wanted,
        "rendered": rendered,
        "may_run": may_run(request.user),
    }
    return render(request, "console/model_preview.html", context)


def _row(model_id: int) -> ServedModel:
    return get_object_or_404(
        registry.with_active_variants(ServedModel.objects.select_related("draft_model")), pk=model_id
    )


# Memory


def _sizes(request: HttpRequest, row: ServedModel) -> tuple[MemoryForm, str]:
    """The form, and why workers cannot be shown; the row has the form's numbers afterwards, where they are good."""
    own = {name: getattr(row, name) for name in MemoryForm.base_fields}
    form = MemoryForm({**own, **{name: request.GET[name] for name in own if name in request.GET}})
    if form.is_valid():
        for name, value in form.cleaned_data.items():
            setattr(row, name, value)
    try:
        ticket_queue().client.ping()
    except redis.RedisError:
        return form, "Redis does not answer: what workers have room for is unknown."
    return form, ""


def _rooms(row: ServedModel, need: int) -> list[Room]:
    return [
        Room(
            worker.worker_id,
            console.size(worker.info.get("budget_bytes", 0)),
            console.size(worker.info.get("used_bytes", 0)),
            _verdict(row, need, worker.info),
        )
        for worker in ticket_queue().workers()
        if worker.pool == row.pool
    ]


def _verdict(row: ServedModel, need: int, info: Mapping[str, Any]) -> str:
    """info: of a worker's heartbeat."""
    budget, used = info.get("budget_bytes", 0), info.get("used_bytes", 0)
    if need > budget:
        return "does not fit, ever"
    used -= sum(each["memory_bytes"] for each in info.get("models", ()) if _is_loaded(each, row))
    return "fits beside the others" if need <= budget - used else "fits once others are unloaded"


def _is_loaded(report: Mapping[str, Any], row: ServedModel) -> bool:
    return bool(report["id"] == row.pk and report["state"] in ("ready", "loading", "retiring"))


# The template


def _rendered(row: ServedModel, text: str, source: str) -> dict[str, Any]:
    """What the model would read. Raises Refusal, RegistrationError or pydantic's ValidationError."""
    body = ApplyTemplateBody.model_validate_json(text)
    prompt, served = body.chat_prompt(body.messages), snapshot(row, (), row.active_variant)
    if source.strip():
        source = source.replace("\r\n", "\n")
        template = ChatTemplate.of(source, model_rows.check_template(source))
    else:
        template = served.template_for(prompt)
    if template is None:
        raise Refusal("capability_not_supported", "This template cannot be used.")
    children = pool.tokenizer_pool()
    shown = children.render(served, template, prompt)
    return {
        "text": shown[:MOST_SHOWN],
        "is_cut": len(shown) > MOST_SHOWN,
        "tokens": len(children.chat(served, template, prompt)),
    }


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")


# What is done with it


@require_POST
def order(request: HttpRequest, model_id: int) -> HttpResponse:
    """action: load, unload, pin or unpin."""
    if not may_run(request.user):
        raise PermissionDenied
    row = _row(model_id)
    try:
        said = _carry_out(row, request.POST.get("action", ""))
    except Refusal as refusal:
        messages.error(request, refusal.message)
    except redis.RedisError:
        messages.error(request, "Redis does not answer: no worker can be told.")
    else:
        messages.success(request, f"{row.name} {said}.")
    return redirect("console-model", model_id=model_id)


def _carry_out(row: ServedModel, action: str) -> str:
    """What to say of it. Raises Refusal or redis.RedisError."""
    if action in ("pin", "unpin"):
        model_rows.pin([row.pk], action == "pin")
        return "stays in memory once it is loaded" if action == "pin" else "may be unloaded again"
    served = snapshot(row, (), row.active_variant)
    if action == "load":
        said = "is being loaded" if model_orders.load(served) else "is loaded already"
    elif action == "unload":
        said = "is unloaded as soon as it is idle" if model_orders.unload(served) else "is not loaded"
    else:
        raise Refusal("bad_request", "There is no such action.")
    return said
