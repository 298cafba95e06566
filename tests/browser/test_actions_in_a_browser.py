"""Each action of the console, done by a person with a real browser and proved by what the API answers afterwards.

The site is in this process with a fake model. What needs the real one is in test_console_in_a_browser.py. Skipped where
there is no chromium.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.test import Client as Visitor
from django.utils import timezone
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import Select, WebDriverWait

from accounts.models import Membership, StaffRole
from inference.imports import quarantine
from tests.browser.chromium import find, sign_in
from tests.browser.test_console_in_a_browser import (
    KEY,
    browser,  # noqa: F401  a fixture
    choose,
    fill,
    save,
)
from tests.in_process import MODEL, OTHER_MODEL, Client, FakeSpeed, InProcessSite, wait_until
from tests.test_slots import FRANCE, act

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SOON = 30.0
"""Seconds within which a change is in force everywhere; one is enough where nothing else keeps the machine busy."""


@pytest.fixture
def fake_speed() -> FakeSpeed:
    return FakeSpeed(seconds_per_step=0.03)


class Console:
    """The pages of one site, and the API to ask afterwards."""

    def __init__(self, page: webdriver.Chrome, site: InProcessSite) -> None:
        self.page, self.site = page, site
        self.base = f"{site.base_url}/admin"
        self.operator = site.client(site.cast.operator)
        self.alice, self.bob = site.client(site.cast.alice), site.client(site.cast.bob)

    def enter(self, name: str, *, staff: str = "", superuser: bool = False, tenant: Any = None, role: str = "") -> User:
        """A person with a session of their own, as after the sign-in page."""
        person, _ = User.objects.get_or_create(username=name, defaults={"is_superuser": superuser})
        if staff:
            StaffRole.objects.get_or_create(user=person, defaults={"role": staff})
        if tenant is not None:
            Membership.objects.get_or_create(user=person, tenant=tenant, defaults={"role": role})
        visitor = Visitor()
        visitor.force_login(person)
        self.page.get(f"{self.site.base_url}/healthz")
        self.page.delete_all_cookies()
        cookie = settings.SESSION_COOKIE_NAME
        self.page.add_cookie({"name": cookie, "value": visitor.cookies[cookie].value})
        return person

    def open(self, path: str) -> None:
        self.page.get(f"{self.base}/{path}")

    def act(self, rows: str, action: str, *pks: Any) -> str:
        """Chooses rows of a list and runs an action; several rows are shown first, and it is said to go on. What the
        page says then."""
        self.open(f"{rows}/")
        for pk in pks:
            box = find(self.page, f"input.action-select[value='{pk}']")
            self.page.execute_script("arguments[0].click()", box)
        WebDriverWait(self.page, SOON).until(lambda page: find(page, "select[name=action]").is_displayed())
        Select(find(self.page, "select[name=action]")).select_by_value(action)
        self.press("#changelist-actions button[name=index]")
        if len(pks) > 1:
            self.press("#bulk-preview button")
        return self.said()

    def press(self, selector: str, *, asks: bool = False) -> None:
        """Presses a button that leads to another page."""
        button = find(self.page, selector)
        self.page.execute_script("setTimeout(() => arguments[0].click())", button)
        if asks:
            WebDriverWait(self.page, SOON).until(lambda page: page.switch_to.alert).accept()
        WebDriverWait(self.page, SOON).until(staleness_of(button))

    def said(self) -> str:
        return find(self.page, "body").text

    def soon(self, condition: Callable[[], object]) -> None:
        wait_until(condition, SOON)


@pytest.fixture
def console(browser: webdriver.Chrome, site: InProcessSite) -> Console:  # noqa: F811
    found = Console(browser, site)
    found.enter("olga", superuser=True)
    return found


def results(client: Client, path: str) -> list[dict[str, Any]]:
    answer = client.get(f"/v1/admin/{path}")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["results"]
    return found


# Customers


def test_tenants_are_shown_before_they_are_suspended_and_come_back(console: Console) -> None:
    cast = console.site.cast
    charlie = console.site.client(cast.charlie)
    tenants = [cast.alice.tenant.pk, cast.bob.tenant.pk]
    console.open("accounts/tenant/")
    for pk in tenants:
        box = find(console.page, f"input.action-select[value='{pk}']")
        console.page.execute_script("arguments[0].click()", box)
    Select(find(console.page, "select[name=action]")).select_by_value("suspend")
    console.press("#changelist-actions button[name=index]")
    shown = find(console.page, "#bulk-preview").text
    assert "Alice's" in shown and "Bob's" in shown and "Charlie's" not in shown and "2 tenants" in shown
    assert console.alice.generate().status_code == 200, "nothing is done yet"
    console.press("#bulk-preview button")
    assert "2 changed: suspended." in console.said()
    console.soon(lambda: console.alice.generate().status_code == console.bob.generate().status_code == 401)
    assert charlie.generate().status_code == 200
    assert "1 changed: active." in console.act("accounts/tenant", "activate", tenants[0])
    console.soon(lambda: console.alice.generate().status_code == 200)
    assert console.bob.generate().status_code == 401


def test_a_tenant_changes_its_plan_and_has_more_until_a_date(console: Console) -> None:
    tenant = console.site.cast.alice.tenant
    fill(console.page, f"{console.base}/accounts/plan/add/", name="small")
    number = find(console.page, "[name=monthly_tokens]")
    number.clear()
    number.send_keys("3")
    save(console.page)
    console.open(f"accounts/tenant/{tenant.pk}/change/")
    choose(console.page, "plan", "small")
    save(console.page)

    def standing() -> dict[str, Any]:
        found: dict[str, Any] = console.alice.get("/v1/me/usage").json()
        return found

    console.soon(lambda: standing()["plan"] == "small")
    assert standing()["periods"]["tenant"]["tokens"]["limit"] == 3
    assert console.alice.generate().json()["code"] == "quota_exhausted"

    console.open(f"accounts/tenant/{tenant.pk}/change/")
    find(console.page, "a[href*='/accounts/limitrule/add/']").click()
    tomorrow = timezone.now() + timedelta(days=1)
    for name, value in {"value": "5000", "reason": "a fair", "ends_at_0": f"{tomorrow:%Y-%m-%d}"}.items():
        field = find(console.page, f"[name={name}]")
        field.clear()
        field.send_keys(value)
    find(console.page, "[name=ends_at_1]").send_keys("00:00:00")
    save(console.page)
    console.soon(lambda: standing()["periods"]["tenant"]["tokens"]["limit"] == 5000)
    assert console.alice.generate().status_code == 200
    (rule,) = results(console.operator, "limit-rules")
    assert (rule["value"], rule["ends_at"][:10]) == (5000, f"{tomorrow:%Y-%m-%d}")


def test_keys_are_limited_rotated_and_revoked(console: Console) -> None:
    cast = console.site.cast
    console.open(f"accounts/apikey/{cast.alice.key.pk}/change/")
    Select(find(console.page, "[name=limit_max_output_0]")).select_by_value("number")
    find(console.page, "[name=limit_max_output_1]").send_keys("3")
    save(console.page)
    console.soon(lambda: console.alice.get("/v1/me").json()["limits"]["max_output"] == 3)

    console.open(f"accounts/apikey/{cast.alice.key.pk}/change/")
    console.press("button[name$=rotate_this]", asks=True)
    text = find(console.page, "#issued-key").text
    assert KEY.fullmatch(text)
    console.soon(lambda: console.alice.generate().status_code == 401)
    successor = Client(console.site.base_url, text)
    console.site.clients.append(successor)
    assert successor.get("/v1/me").json()["limits"]["max_output"] == 3, "its limits are the key's before"

    (pk,) = [row["id"] for row in results(console.operator, "keys") if text.split("_")[1] in str(row)]
    assert "2 revoked." in console.act("accounts/apikey", "revoke", pk, cast.bob.key.pk)
    console.soon(lambda: successor.generate().status_code == console.bob.generate().status_code == 401)


def test_a_quota_above_the_threshold_is_asked_for_by_one_and_approved_by_another(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings.CONFIG.model_copy(update={"quota_approval_tokens": 20_000_000})
    monkeypatch.setattr(settings, "CONFIG", config)

    def limit() -> int:
        return int(console.alice.get("/v1/me/usage").json()["periods"]["tenant"]["tokens"]["limit"])

    console.enter("one", staff="operator")
    fill(console.page, f"{console.base}/accounts/quotaraise/add/", monthly_tokens="50000000", reason="a book")
    choose(console.page, "tenant", "Alice's")
    save(console.page)
    (asked,) = results(console.operator, "quota-raises")
    console.act("accounts/quotaraise", "approve", asked["id"])
    assert results(console.operator, "quota-raises")[0]["state"] == "asked", "not by whoever asked"
    before = limit()
    console.enter("two", staff="operator")
    console.act("accounts/quotaraise", "approve", asked["id"])
    console.soon(lambda: limit() == 50_000_000 != before)


def test_a_price_is_charged_from_its_moment_on(console: Console) -> None:
    def cost() -> float:
        console.site.settle()
        (row,) = console.alice.get("/v1/me/usage").json()["window"]["rows"]
        return float(row["cost"])

    console.alice.generate()
    assert cost() == 0
    prices = {"model": MODEL, "input_per_million": "1000", "output_per_million": "2000"}
    fill(console.page, f"{console.base}/accounts/price/add/", **prices)
    save(console.page)
    assert console.alice.generate("Once upon a time", max_new_tokens=8, cache=False).status_code == 200
    assert cost() == pytest.approx((4 * 1000 + 8 * 2000) / 1e6)


def test_a_web_page_may_ask_once_the_tenant_lists_its_origin(console: Console) -> None:
    origin = "https://bakery.example.org"
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}

    def preflight() -> int:
        return console.alice.options("/v1/generate", headers=asked).status_code

    assert preflight() == 403
    fill(
        console.page,
        f"{console.base}/accounts/tenant/{console.site.cast.alice.tenant.pk}/change/",
        allowed_origins=origin,
    )
    save(console.page)
    console.soon(lambda: preflight() in (200, 204))
    assert console.alice.get("/v1/me", headers={"Origin": origin}).headers["access-control-allow-origin"] == origin


# Roles


def test_people_of_a_tenant_issue_keys_and_see_nobody_else(console: Console) -> None:
    """The person and the membership are made in the console, too."""
    cast, password = console.site.cast, "a long password for tests"
    fill(console.page, f"{console.base}/auth/user/add/", username="owen", password1=password, password2=password)
    save(console.page)
    console.open("accounts/membership/add/")
    choose(console.page, "tenant", "Alice's")
    choose(console.page, "user", "owen")
    Select(find(console.page, "[name=role]")).select_by_value("owner")
    save(console.page)
    sign_in(console.page, console.site.base_url, {"username": "owen", "password": password})
    console.open("accounts/tenant/")
    assert "Alice's" in console.said() and "Bob's" not in console.said()
    console.open(f"accounts/tenant/{cast.bob.tenant.pk}/change/")
    assert "Bob's" not in console.said()
    fill(console.page, f"{console.base}/accounts/apikey/add/", name="by its owner")
    choose(console.page, "tenant", "Alice's")
    save(console.page)
    client = Client(console.site.base_url, find(console.page, "#issued-key").text)
    console.site.clients.append(client)
    assert client.generate().status_code == 200
    assert client.get("/v1/me").json()["tenant"]["name"] == "Alice's"


def test_an_auditor_looks_and_changes_nothing(console: Console) -> None:
    User.objects.create_user("andrea")
    console.open("accounts/staffrole/add/")
    choose(console.page, "user", "andrea")
    Select(find(console.page, "[name=role]")).select_by_value("auditor")
    save(console.page)
    console.enter("andrea")
    tenant = console.site.cast.alice.tenant
    for path in ("accounts/tenant/", "accounts/apikey/", "inference/servedmodel/", "slots/", "requests/"):
        console.open(path)
        assert not console.page.find_elements(
            By.CSS_SELECTOR, "select[name=action], button.console-link, a[href$='/add/']"
        )
    console.open(f"accounts/tenant/{tenant.pk}/change/")
    assert "Alice's" in console.said() and not console.page.find_elements(By.NAME, "_save")
    assert console.operator.get(f"/v1/admin/tenants/{tenant.pk}").json()["status"] == "active"


# Models


def test_a_model_is_unloaded_loaded_pinned_and_made_the_default(console: Console) -> None:
    site = console.site
    row = site.models[MODEL]
    address = f"models/{row.pk}/"

    def state() -> str:
        site.host.beat()
        listed = console.alice.get("/v1/models").json()["data"]
        return str(next(each["status"]["value"] for each in listed if each["id"] == MODEL))

    for action, expected in (("unload", "unloaded"), ("load", "loaded")):
        console.open(address)
        console.press(f"button[name=action][value={action}]")
        console.soon(lambda expected=expected: state() == expected)  # type: ignore[misc]
    console.press("button[name=action][value=pin]")
    told = console.operator.get(f"/v1/admin/models/{row.pk}").json()
    assert told["is_pinned"] is True
    assert f"{OTHER_MODEL} is the default model now." in console.act(
        "inference/servedmodel", "make_default", site.models[OTHER_MODEL].pk
    )
    console.soon(lambda: console.alice.get("/v1/models").json()["default_model"] == OTHER_MODEL)
    assert console.alice.generate().json()["model"] == OTHER_MODEL
    console.act("inference/servedmodel", "switch_off", row.pk)
    console.soon(lambda: console.alice.generate(model=MODEL).status_code != 200)


def test_a_variant_is_served_and_its_models_own_file_again(console: Console, tmp_path: Path) -> None:
    from inference.catalog import model_rows, variants
    from tests.inference import gguf_files
    from tests.inference.gguf_files import PassingTrial

    base = model_rows.register(gguf_files.write(tmp_path), "tiny", trial=PassingTrial())
    row = variants.register(
        base, "quick", Path(base.path), n_threads=2, flash_attention=None, measured={"gain": 1.5}, trial=PassingTrial()
    )
    for action, is_active in (("activate", True), ("serve_own_file", False)):
        console.act("inference/modelvariant", action, row.pk)
        (told,) = results(console.operator, "variants")
        assert told["is_active"] is is_active


def make_adapter(site: InProcessSite, folder: Path, name: str, *customers: Any) -> Any:
    from inference.catalog import adapter_rows, granting
    from inference.models import Adapter

    path = folder / f"{name}.gguf"
    path.write_text(name)
    values = {"base_model": site.models[MODEL], "digest": name.ljust(64, "0"), "size_bytes": 4, "rank": 8}
    row = Adapter.objects.create(name=name, path=str(path), **values)
    for customer in customers:
        granting.grant(row, customer.tenant)
    adapter_rows.changed()
    return row


def test_an_alias_tries_a_version_out_promotes_it_and_goes_back(console: Console, tmp_path: Path) -> None:
    alice = console.site.cast.alice
    for name in ("v1", "v2"):
        make_adapter(console.site, tmp_path, name, alice)
    fill(console.page, f"{console.base}/inference/adapteralias/add/", name="style", share="25")
    choose(console.page, "base_model", MODEL)
    choose(console.page, "target", "v1", shown=f"{MODEL}:v1")
    choose(console.page, "canary", "v2", shown=f"{MODEL}:v2")
    save(console.page)

    def told() -> tuple[str, str | None, int]:
        (row,) = results(console.operator, "aliases")
        return row["target"], row["canary"], row["share"]

    assert told() == ("v1", "v2", 25)
    console.soon(lambda: console.alice.generate(model=f"{MODEL}:style").status_code == 200)
    pk = results(console.operator, "aliases")[0]["id"]
    console.act("inference/adapteralias", "promote", pk)
    assert told()[:2] == ("v2", None)
    console.act("inference/adapteralias", "roll_back", pk)
    assert told()[:2] == ("v1", None)


def test_a_trial_is_ended_and_the_version_before_answers_everybody(console: Console, tmp_path: Path) -> None:
    from inference.catalog import aliases

    alice = console.site.cast.alice
    first, second = (make_adapter(console.site, tmp_path, name, alice) for name in ("v1", "v2"))
    alias = aliases.point(console.site.models[MODEL], "style", first)
    aliases.try_out(alias, second, 100)

    def answered_by() -> str:
        request_id = console.alice.generate(model=f"{MODEL}:style", cache=False).headers["x-request-id"]
        receipt = console.alice.get(f"/v1/requests/{request_id}").json()
        return str(receipt["adapters"][0]["name"])

    console.soon(lambda: answered_by() == "v2")
    assert "answered by v1 now" in console.act("inference/adapteralias", "end_trial", alias.pk)
    (row,) = results(console.operator, "aliases")
    assert (row["target"], row["canary"], row["share"], row["previous"]) == ("v1", None, 0, None)
    console.soon(lambda: answered_by() == "v1")


def test_an_adapter_is_granted_and_switched_off(console: Console, tmp_path: Path) -> None:
    row = make_adapter(console.site, tmp_path, "style")

    def is_listed(client: Client) -> bool:
        return f"{MODEL}:style" in [each["id"] for each in client.get("/v1/models").json()["data"]]

    assert not is_listed(console.alice)
    console.open(f"inference/adapter/{row.pk}/change/")
    another = WebDriverWait(console.page, SOON).until(
        lambda page: page.find_element(By.PARTIAL_LINK_TEXT, "Add another")
    )
    console.page.execute_script("arguments[0].scrollIntoView({block: 'center'})", another)
    another.click()
    choose(console.page, "grants-0-tenant", "Alice's")
    save(console.page)
    console.soon(lambda: is_listed(console.alice))
    assert not is_listed(console.bob)
    assert console.alice.generate(adapters=[{"name": "style"}]).status_code == 200
    console.act("inference/adapter", "switch_off", row.pk)
    console.soon(lambda: not is_listed(console.alice))


def test_a_file_that_is_no_model_is_refused_with_the_reason_and_a_waiting_import_is_cancelled(
    console: Console, tmp_path: Path
) -> None:
    """The upload is slow, so that its progress is seen."""
    file = tmp_path / "letter.gguf"
    file.write_bytes(b"Dear all, " * 100_000)
    fill(console.page, f"{console.base}/inference/modelimport/add/", name="letter")
    save(console.page)
    slow = {"offline": False, "latency": 5, "downloadThroughput": -1, "uploadThroughput": 500_000}
    console.page.execute_cdp_cmd("Network.enable", {})
    console.page.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    find(console.page, "[data-upload] input[type=file]").send_keys(str(file))
    find(console.page, "[data-upload] button").click()
    parts = "return document.querySelector('[data-upload] progress')?.value ?? 0"
    WebDriverWait(console.page, SOON, 0.02).until(lambda page: 0 < page.execute_script(parts) < 100)
    fast = {**slow, "latency": 0, "uploadThroughput": -1}
    console.page.execute_cdp_cmd("Network.emulateNetworkConditions", fast)
    WebDriverWait(console.page, 30, ignored_exceptions=[StaleElementReferenceException]).until(
        lambda page: "Refused: " in find(page, "[data-state]").text
    )
    (told,) = results(console.operator, "imports")
    assert told["state"] == "refused" and told["problem"] in console.said()

    fill(console.page, f"{console.base}/inference/modelimport/add/", name="another")
    save(console.page)
    newest = results(console.operator, "imports")[0]
    assert newest["state"] == "receiving"
    assert "1 cancelled" in console.act("inference/modelimport", "cancel", newest["id"])
    assert results(console.operator, "imports")[0]["state"] == "cancelled"


def test_an_upload_waits_for_what_the_server_still_holds_of_it(console: Console, tmp_path: Path) -> None:
    """As after a connection that broke without a word: the next try is refused, and the one after it is not."""
    file = tmp_path / "letter.gguf"
    file.write_bytes(b"Dear all, ")
    fill(console.page, f"{console.base}/inference/modelimport/add/", name="held")
    save(console.page)
    (row,) = results(console.operator, "imports")
    find(console.page, "[data-upload] input[type=file]").send_keys(str(file))
    with quarantine.held(row["id"]):
        find(console.page, "[data-upload] button").click()
        wait = WebDriverWait(console.page, SOON)
        wait.until(lambda page: "goes on in a moment" in find(page, "[data-upload] [role=status]").text)
    WebDriverWait(console.page, 30, ignored_exceptions=[StaleElementReferenceException]).until(
        lambda page: "Refused: " in find(page, "[data-state]").text
    )


# What runs


def test_requests_are_cancelled_from_the_list_and_from_their_page(console: Console) -> None:
    def begun() -> str:
        answer = console.alice.generate(max_new_tokens=200, cache=False, background=True)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    asked = [begun(), begun()]
    console.open("requests/")
    assert all(each in console.said() for each in asked)
    console.press(f"form:has([value='{asked[0]}']) button")
    assert f"{asked[0]} is cancelled" in console.said()
    console.open(f"requests/{asked[1]}/")
    console.press("form[action$='/cancel/'] button")
    for each in asked:
        console.soon(lambda each=each: console.alice.get(f"/v1/requests/{each}").json()["status"] == "cancelled")  # type: ignore[misc]


def test_a_saved_state_is_deleted(console: Console) -> None:
    console.site.ask(console.site.cast.alice, FRANCE, 1)
    assert act(console.alice, 1, "save", "diary").status_code == 200
    assert act(console.alice, 0, "restore", "diary").status_code == 200
    console.open("slots/")
    console.press("form[action$='/forget/'] button", asks=True)
    assert act(console.alice, 0, "restore", "diary").status_code == 400


def test_a_batch_is_cancelled(console: Console) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions"}
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 200}
    lines = "\n".join(json.dumps({**line, "custom_id": str(number), "body": body}) for number in range(40))
    files = {"file": ("lines.jsonl", lines.encode())}
    sent = console.alice.post("/v1/files", files=files, data={"purpose": "batch"})
    order = {"input_file_id": sent.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = console.alice.post("/v1/batches", json=order).json()["id"]
    console.soon(lambda: console.alice.get(f"/v1/batches/{batch}").json()["status"] == "in_progress")
    console.open("inference/batch/")
    find(console.page, "#result_list a[href*='/change/']").click()
    console.press("button[formaction$='/cancel/']", asks=True)
    wait_until(lambda: console.alice.get(f"/v1/batches/{batch}").json()["status"] == "cancelled", 40)


# Usage


def test_what_was_used_is_corrected(console: Console) -> None:
    console.alice.generate()
    console.site.settle()

    def used() -> int:
        return int(console.alice.get("/v1/me/usage").json()["periods"]["tenant"]["tokens"]["used"])

    before = used()
    (period,) = [
        each["id"]
        for each in results(console.operator, "quotas")
        if each["tenant"] == "Alice's" and not each.get("key")
    ]
    fill(console.page, f"{console.base}/correct/{period}/", tokens="-5", requests="0", cost="0", reason="an outage")
    console.press("form .play-button")
    assert used() == before - 5
    assert "an outage" in json.dumps(results(console.operator, "ledger"))
    console.open("accounts/auditentry/")
    assert "olga" in console.said()
