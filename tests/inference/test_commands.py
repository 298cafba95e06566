"""register_model, sync_models and models: what they print, as text and as JSON, and how they fail."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command, load_command_class
from rich.console import Console

from accounts.models import Plan, Tenant
from inference.catalog import registry
from inference.management.listing import hashing
from inference.models import ServedModel
from inference.vetting.trial import Trial
from tests.inference import gguf_files
from tests.inference.gguf_files import PassingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
COMMANDS = ("register_model", "sync_models", "models", "load_model", "unload_model", "pin_model")


@pytest.fixture(autouse=True)
def _passing_trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Trial, "run", PassingTrial.run)
    monkeypatch.setattr(Trial, "calls", 0, raising=False)
    registry.forget()
    yield
    registry.forget()


def call(name: str, *arguments: str, **options: Any) -> str:
    output = io.StringIO()
    call_command(name, *arguments, stdout=output, stderr=output, **options)
    return output.getvalue()


def call_json(name: str, *arguments: str) -> Any:
    return json.loads(call(name, *arguments, "--json"))


def fail_json(name: str, *arguments: str) -> Any:
    """What a failing command says on standard output with --json."""
    output = io.StringIO()
    with pytest.raises(CommandError):
        call_command(name, *arguments, "--json", stdout=output)
    return json.loads(output.getvalue())["error"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_the_command_understands(name: str) -> None:
    command = load_command_class("inference", name)
    parser = command.create_parser("manage.py", name)
    assert "examples:" in parser.format_help()
    for example in command.examples:  # type: ignore[attr-defined]
        words = example.replace('"Alice\'s"', "Alices").split()
        assert words[0] == name
        parser.parse_args(words[1:])


def test_register_model_serves_a_file_under_its_stem(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path, "small.gguf")
    text = call("register_model", str(path), "--n-slots", "2")
    assert text.startswith(
        "small: F16, 384 parameters, 2 slots of 2048 tokens, about 269 MB in the worker, the default."
    )
    assert ServedModel.objects.get().name == "small"


def test_register_model_takes_every_option(tmp_path: Path) -> None:
    Tenant.objects.create(name="Alice's", plan=Plan.objects.create(name="plan"))
    path = gguf_files.write(tmp_path)
    row = call_json(
        "register_model",
        str(path),
        *("--name", "chat", "--alias", "a", "--alias", "b", "--grant", "Alice's", "--pool", "gpu", "--n-ctx", "512"),
        *("--n-slots", "3", "--n-threads", "2", "--n-gpu-layers", "-1", "--kv-type", "q8_0", "--load-mode", "lazy"),
        *("--keep-alive-seconds", "60", "--notes", "for tests", "--default", "--force"),
    )
    expected = {
        "name": "chat",
        "aliases": ["a", "b"],
        "default": True,
        "pool": "gpu",
        "visibility": "granted",
        "n_ctx": 512,
        "n_slots": 3,
        "n_lanes": 1,
        "n_threads": 2,
        "n_gpu_layers": -1,
        "kv_type": "q8_0",
        "load_mode": "lazy",
        "keep_alive_seconds": 60,
    }
    assert {name: row[name] for name in expected} == expected
    assert [tenant.name for tenant in ServedModel.objects.get().granted_tenants.all()] == ["Alice's"]


def test_register_model_says_why_it_refuses(tmp_path: Path) -> None:
    assert fail_json("register_model", str(tmp_path / "none.gguf"))["code"] == "gguf_missing"
    (tmp_path / "text.gguf").write_text("this is no model at all, only text")
    assert fail_json("register_model", str(tmp_path / "text.gguf"))["code"] == "gguf_not_gguf"
    path = str(gguf_files.write(tmp_path))
    error = fail_json("register_model", path, "--n-ctx", "100000")
    assert (error["code"], list(error["fields"])) == ("invalid", ["n_ctx"])
    assert fail_json("register_model", path, "--grant", "Nobody's")["code"] == "tenant_not_found"
    with pytest.raises(CommandError, match="There is no file"):
        call("register_model", str(tmp_path / "none.gguf"))
    assert not ServedModel.objects.exists()


def test_models_lists_what_is_registered(tmp_path: Path) -> None:
    assert "No model is registered" in call("models")
    call("register_model", str(gguf_files.write(tmp_path)), "--name", "tiny")
    text = call("models")
    assert "tiny (default)" in text
    assert "8 × 2048" in text
    [row] = call_json("models")["models"]
    assert (row["name"], row["trained_context"], row["quantization"]) == ("tiny", 4096, "F16")


def test_sync_models_says_what_it_does(tmp_path: Path) -> None:
    gguf_files.write(tmp_path)
    path = tmp_path / "models.yaml"
    path.write_text("models: [{id: tiny, dtype: float16}]")
    dry = call("sync_models", "--file", str(path), "--dry-run")
    assert "warning: models.0.dtype" in dry
    assert "created      tiny" in dry
    assert "Nothing was changed" in dry
    assert call_json("sync_models", "--file", str(path))["changes"] == [
        {"name": "tiny", "action": "created", "details": {}}
    ]
    path.write_text("models: [{id: tiny, n_slots: 2}]")
    text = call("sync_models", "--file", str(path), "--prune")
    assert text.splitlines() == ["updated      tiny  n_slots: 8 → 2", "default      tiny"]


def test_sync_models_lists_every_problem(tmp_path: Path) -> None:
    missing = fail_json("sync_models", "--file", str(tmp_path / "none.yaml"))
    assert missing["code"] == "models_yaml_missing"
    path = tmp_path / "models.yaml"
    path.write_text("models: [{id: a, n_ctx: 1}, {id: b, n_slots: 0}]")
    error = fail_json("sync_models", "--file", str(path))
    assert (error["code"], len(error["problems"])) == ("models_yaml_invalid", 2)
    with pytest.raises(CommandError) as caught:
        call("sync_models", "--file", str(path))
    assert str(caught.value).count("\n") == 1


def test_a_terminal_sees_how_far_hashing_is() -> None:
    terminal = io.StringIO()
    with hashing(Console(file=terminal, force_terminal=True, width=100), hidden=False) as progress:
        progress(50, 100)
        progress(100, 100)
    assert "loading it on trial" in terminal.getvalue()
    silent = io.StringIO()
    with hashing(Console(file=silent, force_terminal=True), hidden=True) as progress:
        progress(50, 100)
    assert silent.getvalue() == ""


def test_register_model_takes_a_chat_template_from_a_file(tmp_path: Path) -> None:
    path, template = gguf_files.write(tmp_path), tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    call("register_model", str(path), "--chat-template", str(template))
    assert ServedModel.objects.get().chat_template == template.read_text()
    call("register_model", str(path), "--chat-template", "")
    assert ServedModel.objects.get().chat_template == ""
    missing = fail_json("register_model", str(path), "--chat-template", str(tmp_path / "none"))
    assert missing["code"] == "chat_template_unreadable"
    template.write_text("{{ messages")
    broken = fail_json("register_model", str(path), "--chat-template", str(template))
    assert (broken["code"], list(broken["fields"])) == ("chat_template_invalid", ["chat_template"])


def test_a_model_is_loaded_and_pinned_by_name_or_the_command_says_why_not(tmp_path: Path, valkey: Any) -> None:
    call("register_model", str(gguf_files.write(tmp_path)), "--name", "chat", "--alias", "a")
    assert fail_json("load_model", "none")["code"] == "model_not_found"
    assert fail_json("load_model", "a")["code"] == "llm_unavailable"
    assert call("unload_model", "a") == "chat is not loaded.\n"
    assert call("pin_model", "a") == "chat stays in memory once it is loaded.\n"
    assert ServedModel.objects.get().is_pinned
    assert call_json("pin_model", "chat", "--off") == {"model": "chat", "pinned": False, "changed": True}
