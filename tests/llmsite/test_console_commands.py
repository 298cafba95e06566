"""Whatever the console does, a command does too: every action of a page has one, or says here why not."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.test import RequestFactory
from django.urls import get_resolver

from llmsite import commandline

COMMANDS = commandline.house_commands()
pytestmark = [pytest.mark.integration, pytest.mark.django_db]
NOT_ON_A_TERMINAL = {
    "auth.group add": "groups of Django's permissions are made by hand in the console alone; roles are `person role`",
    "auth.group change": "as above",
    "auth.group delete": "as above",
    "auth.user delete": "accounts are locked, so that what they did keeps a name",
    "inference.modelimport change": "sends the bytes of a browser; a file on the machine is `register_model PATH`",
    "console-playground": "a page to try things out: a terminal asks the API with curl, as the page writes it",
    "console-playground-run": "as above",
    "console-model": "memory is in `models --json`; what a template makes of messages says POST /apply-template",
}
COMMAND_OF = {
    "accounts.plan add": "plan make team",
    "accounts.plan change": "plan change team --weight 200",
    "accounts.plan delete": "plan remove team",
    "accounts.tenant add": "create_tenant Dora --plan free",
    "accounts.tenant change": "tenant change Dora --plan free",
    "accounts.tenant suspend": "tenant suspend Dora",
    "accounts.tenant activate": "tenant activate Dora",
    "accounts.tenant accounts.membership": "member add dora --tenant Dora --role owner",
    "accounts.membership add": "member add dora --tenant Dora --role owner",
    "accounts.membership change": "member change dora --tenant Dora --role viewer",
    "accounts.membership delete": "member remove dora --tenant Dora",
    "accounts.staffrole add": "person role olga operator",
    "accounts.staffrole change": "person role olga auditor",
    "accounts.staffrole delete": "person role olga none",
    "auth.user add": "person add olga --email olga@example.org",
    "auth.user change": "person lock olga",
    "accounts.apikey add": "create_key Dora --name laptop",
    "accounts.apikey change": "key change 4fT9q2LmX0aB --name laptop",
    "accounts.apikey revoke": "revoke_key 4fT9q2LmX0aB",
    "accounts.apikey revoke_this": "revoke_key 4fT9q2LmX0aB",
    "accounts.apikey rotate_now": "rotate_key 4fT9q2LmX0aB",
    "accounts.apikey rotate_this": "rotate_key 4fT9q2LmX0aB",
    "accounts.apikey rotate_with_overlap": "rotate_key 4fT9q2LmX0aB --overlap 1d",
    "accounts.quotaraise add": "quota_raise --tenant Dora --monthly-tokens 5",
    "accounts.quotaraise change": "quota_raise --approve 3",
    "accounts.quotaraise approve": "quota_raise --approve 3",
    "accounts.quotaraise refuse": "quota_raise --refuse 3",
    "accounts.quotaperiod correct": "adjust --tenant Dora --tokens -5 --reason counted-twice",
    "accounts.quotaperiod csv": "usage --tenant Dora",
    "accounts.statement csv": "statement --tenant Dora --csv -",
    "accounts.limitrule add": "limit_rule --tenant Dora --limit monthly_tokens --value 5",
    "accounts.limitrule change": "limit_rule --remove 7",
    "accounts.limitrule delete": "limit_rule --remove 7",
    "accounts.price add": "set_price --model small --input 1 --output 2",
    "accounts.price change": "set_price --remove 7",
    "accounts.price delete": "set_price --remove 7",
    "inference.servedmodel add": "register_model /models/small.gguf",
    "inference.servedmodel change": "sync_models --file models.yaml",
    "inference.servedmodel delete": "models remove small",
    "inference.servedmodel load_now": "load_model small",
    "inference.servedmodel unload_now": "unload_model small",
    "inference.servedmodel pin": "pin_model small",
    "inference.servedmodel unpin": "pin_model small --off",
    "inference.servedmodel make_default": "models default small",
    "inference.servedmodel load_eagerly": "models eager small",
    "inference.servedmodel load_on_request": "models lazy small",
    "inference.servedmodel switch_off": "models switch-off small",
    "inference.modelvariant activate": "activate_variant small q8_0",
    "inference.modelvariant serve_own_file": "activate_variant small --revert",
    "inference.modelvariant delete": "activate_variant small q8_0 --remove",
    "inference.modelimport add": "fetch_model owner/repository:small.gguf",
    "inference.modelimport cancel": "imports cancel 12",
    "inference.modelimport cancel_this": "imports cancel 12",
    "inference.modelimport state": "imports list 12",
    "inference.servedmodel optimize": "optimize_model small",
    "inference.optimization add": "optimize_model small --background",
    "inference.optimization state": "optimizations list 7",
    "inference.optimization cancel": "optimizations cancel 7",
    "inference.optimization cancel_this": "optimizations cancel 7",
    "inference.optimization activate_this": "activate_variant small q8_0",
    "inference.adapter add": "register_adapter /adapters/poet.gguf --model small",
    "inference.adapter change": "apply_config site.yaml",
    "inference.adapter delete": "adapters remove small:poet",
    "inference.adapter switch_on": "adapters switch-on small:poet",
    "inference.adapter switch_off": "adapters switch-off small:poet",
    "inference.adapter inference.adaptergrant": "grant_adapter small:poet Dora",
    "inference.adapteralias add": "alias set small:support support-v1",
    "inference.adapteralias change": "alias canary small:support support-v2 --share 10",
    "inference.adapteralias delete": "alias remove small:support",
    "inference.adapteralias promote": "alias promote small:support",
    "inference.adapteralias end_trial": "alias end-canary small:support",
    "inference.adapteralias roll_back": "alias roll-back small:support",
    "inference.batch cancel": "batches cancel batch_0123",
    "inference.batch cancel_this": "batches cancel batch_0123",
    "console-board": "top",
    "console-live-requests": "cancel",
    "console-cancel-request": "cancel 0b1f6a52",
    "console-request": "explain 0b1f6a52",
    "console-replay": "replay 0b1f6a52",
    "console-slots": "slots",
    "console-erase-slot": "slots erase --tenant Dora --number 1",
    "console-forget-state": "slots forget --tenant Dora",
    "console-settings": "doctor",
    "console-model-order": "load_model small",
    "console-correction": "adjust --tenant Dora --tokens -5 --reason counted-twice",
}
LISTED_BY = {
    "accounts.plan": "plan",
    "accounts.tenant": "tenant",
    "accounts.membership": "member",
    "accounts.staffrole": "person",
    "auth.user": "person",
    "accounts.apikey": "key",
    "accounts.limitrule": "limit_rule",
    "accounts.price": "set_price",
    "accounts.quotaraise": "quota_raise",
    "accounts.quotaperiod": "usage",
    "accounts.dayusage": "statement --tenant Dora",
    "accounts.statement": "statement --tenant Dora",
    "accounts.refusedrequest": "refusals",
    "accounts.auditentry": "audit_log",
    "accounts.reservation": "explain 0b1f6a52",
    "accounts.ledgerentry": "explain 0b1f6a52",
    "inference.receipt": "explain 0b1f6a52",
    "inference.servedmodel": "models",
    "inference.modelvariant": "activate_variant small",
    "inference.modelimport": "imports",
    "inference.optimization": "optimizations",
    "inference.adapter": "adapters",
    "inference.adapteralias": "alias",
    "inference.defaultvector": "export_config",
    "inference.batch": "batches",
}
NOT_LISTED = {
    "auth.group": "as its actions",
    "accounts.quotaalert": "mailed, and in the metrics; the numbers are `usage`'s",
    "inference.storedfile": "the tenant's, by GET /v1/files; how many there are of what age is `purge_files`' matter",
}
STOCK = ("changelist", "add", "history", "delete", "change", "autocomplete", "password_change")
BUTTONS = ("actions_submit_line", "actions_detail", "actions_list", "actions_row")


def actions_of_lists() -> Iterator[str]:
    """`app.model what`, as a superuser has them: rows, inlines, actions, buttons, addresses of pages."""
    request = RequestFactory().get("/")
    request.user = User(username="root", is_superuser=True, is_staff=True)
    for model, page in admin.site._registry.items():
        label = model._meta.label_lower
        for verb in ("add", "change", "delete"):
            if getattr(page, f"has_{verb}_permission")(request):
                yield f"{label} {verb}"
        names = [*page.get_actions(request), *(name for kind in BUTTONS for name in getattr(page, kind, ()))]
        yield from (f"{label} {name}" for name in names if name != "delete_selected")
        yield from (f"{label} {each.model._meta.label_lower}" for each in page.inlines)
        prefix = f"{model._meta.app_label}_{model._meta.model_name}_"
        own = {(each.name or "").removeprefix(prefix) for each in page.get_urls() if each.name}
        yield from (f"{label} {name}" for name in sorted(own.difference(STOCK)))


def pages() -> Iterator[str]:
    names = (getattr(each, "name", None) or "" for each in get_resolver().url_patterns)
    return (name for name in names if name.startswith("console-"))


def test_each_action_of_the_console_has_a_command_or_a_reason() -> None:
    assert {*actions_of_lists(), *pages()} == {*COMMAND_OF, *NOT_ON_A_TERMINAL}
    assert not COMMAND_OF.keys() & NOT_ON_A_TERMINAL.keys()


def test_each_list_of_the_console_has_a_command_or_a_reason() -> None:
    assert {model._meta.label_lower for model in admin.site._registry} == {*LISTED_BY, *NOT_LISTED}
    assert not LISTED_BY.keys() & NOT_LISTED.keys()


@pytest.mark.parametrize("line", sorted({*COMMAND_OF.values(), *LISTED_BY.values()}))
def test_the_command_understands_what_stands_for_it(line: str) -> None:
    name, *words = shlex.split(line)
    COMMANDS[name].create_parser("manage.py", name).parse_args(words)
