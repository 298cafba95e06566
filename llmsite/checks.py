"""Mistakes of an operator as system checks with ids; `manage.py check` and `doctor` show them.

What would be dangerous stops the start already (llmsite/config.py). The same rules stand here for installations that
set Django's settings another way, beside what is only unwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core import checks

from llmsite.config import SHORTEST_SECRET, get_config


@checks.register(checks.Tags.security)
def check_exposure(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[checks.CheckMessage]:
    """E001 to E003: what must never be true beyond loopback."""
    config = get_config()
    if config.is_loopback:
        return []
    found: list[checks.CheckMessage] = []
    if settings.DEBUG:
        found.append(_error("DEBUG is on while HOST is not loopback.", "Set DEBUG=false.", "llmsite.E001"))
    if "*" in settings.ALLOWED_HOSTS:
        found.append(_error("ALLOWED_HOSTS is * while HOST is not loopback.", "Name the hosts.", "llmsite.E002"))
    if len(settings.SECRET_KEY) < SHORTEST_SECRET or not settings.KEY_PEPPER:
        hint = "Set both to 50 random characters (KEY_PEPPER with `1:` before them)."
        found.append(_error("SECRET_KEY or KEY_PEPPER is short or missing.", hint, "llmsite.E003"))
    return found


@checks.register()
def check_files(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[checks.CheckMessage]:
    """E004, E005: files and folders that the settings name."""
    config = get_config()
    found: list[checks.CheckMessage] = []
    if config.models_yaml and not config.models_yaml.is_file():
        hint = "Correct MODELS_YAML, or leave it empty."
        found.append(_error(f"MODELS_YAML names {config.models_yaml}, which is not there.", hint, "llmsite.E004"))
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder and not os.access(Path(folder), os.W_OK):
        hint = "Make the folder, or unset the variable."
        found.append(_error(f"PROMETHEUS_MULTIPROC_DIR={folder} cannot be written.", hint, "llmsite.E005"))
    return found


@checks.register(checks.Tags.security, deploy=True)
def check_deployment(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[checks.CheckMessage]:
    """W001 to W003: what is right on a desk and unwise in production."""
    config = get_config()
    found: list[checks.CheckMessage] = []
    if config.engine == "fake":
        hint = "Unset ENGINE: tenants would be charged for made-up text."
        found.append(checks.Warning("ENGINE is fake.", hint=hint, id="llmsite.W001"))
    if not config.is_loopback and not config.secure_cookies:
        hint = "Put a proxy with TLS in front, then set SECURE_COOKIES=true and TRUSTED_PROXIES."
        found.append(checks.Warning("The console's cookies travel in clear text.", hint=hint, id="llmsite.W002"))
    if config.redis_outage_policy == "open":
        hint = "Set REDIS_OUTAGE_POLICY=closed unless limits matter less to you than answers."
        found.append(checks.Warning("Limits are loose while Redis is away.", hint=hint, id="llmsite.W003"))
    return found


def _error(text: str, hint: str, check_id: str) -> checks.CheckMessage:
    return checks.Error(text, hint=hint, id=check_id)
