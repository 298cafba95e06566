"""The console as an operator meets it: a real browser, a real site, the real model.

Skipped where there is no chromium with its driver; with REQUIRE_BROWSER=1 that is a failure.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import Select, WebDriverWait

from llmsite.demo import ADAPTER_FOLDER
from tests.browser import chromium, walk
from tests.browser.chromium import find
from tests.conftest import Site, manage

pytestmark = [
    pytest.mark.integration,
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.xdist_group("live_site"),
]

REQUIRE_BROWSER = os.environ.get("REQUIRE_BROWSER", "") not in {"", "0", "false"}
KEY = re.compile(r"llms_[0-9A-Za-z]{12}_[0-9A-Za-z]{38}")
REFUSED_WITHIN_SECONDS = 1.0


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Chromium with an empty profile."""
    found = chromium.programs()
    if found is None:
        missing = "chromium and chromedriver are not installed"
        if REQUIRE_BROWSER:
            pytest.fail(missing)
        pytest.skip(missing)
    with chromium.chromium(*found) as chrome:
        yield chrome


@pytest.fixture
def console(browser: webdriver.Chrome, live_site: Site) -> webdriver.Chrome:
    chromium.sign_in(browser, live_site.base_url, live_site.demo["admin"])
    return browser


def choose(browser: webdriver.Chrome, field: str, name: str, shown: str = "") -> None:
    """Pick from an autocomplete field by typing, as a person does. shown: the answer, where it says more."""
    find(browser, f"#id_{field} + .select2 .select2-selection").click()
    find(browser, ".select2-search__field").send_keys(name)

    def is_only_answer(page: webdriver.Chrome) -> WebElement | None:
        answers = page.find_elements(By.CSS_SELECTOR, ".select2-results__option")
        return answers[0] if [each.text for each in answers] == [shown or name] else None

    WebDriverWait(browser, 20, ignored_exceptions=[StaleElementReferenceException]).until(is_only_answer).click()


def generate(site: Site, key: str) -> httpx.Response:
    body = {"prompt": "One, two,", "max_new_tokens": 4, "cache": False}
    return httpx.post(f"{site.base_url}/v1/generate", json=body, headers=site.headers(key), timeout=60)


def test_the_dashboard_shows_how_things_stand(console: webdriver.Chrome, live_site: Site) -> None:
    assert console.current_url == f"{live_site.base_url}/admin/"
    text = find(console, "#dashboard").text
    assert "All models are served." in text and live_site.demo["models"][0] in text
    entries = console.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert entries and all(each.startswith(live_site.base_url) for each in entries)


def test_a_key_is_issued_used_and_revoked(console: webdriver.Chrome, live_site: Site) -> None:
    console.get(f"{live_site.base_url}/admin/accounts/apikey/add/")
    choose(console, "tenant", live_site.demo["tenants"][0]["name"])
    console.find_element(By.NAME, "name").send_keys("from a browser")
    find(console, "button[name=_save]").click()
    text = find(console, "#issued-key").text
    assert KEY.fullmatch(text)
    page_of_key = find(console, "a[href*='/accounts/apikey/'][href$='/change/']").get_attribute("href")
    assert page_of_key is not None

    answer = generate(live_site, text)
    assert answer.status_code == 200, answer.text

    console.refresh()  # neither shows it again nor issues another
    assert find(console, "[name=name]").get_attribute("value") == "from a browser"
    assert console.current_url == page_of_key
    assert text not in console.page_source

    find(console, "button[name$=revoke_this]").click()
    console.switch_to.alert.accept()
    WebDriverWait(console, 20).until(lambda page: "is revoked" in page.page_source)
    time.sleep(REFUSED_WITHIN_SECONDS)
    assert generate(live_site, text).status_code == 401


def fill(browser: webdriver.Chrome, page: str, **values: str) -> None:
    """Opens the form of a new row and fills fields by their names; selects too."""
    browser.get(page)
    fill_here(browser, **values)


def fill_here(browser: webdriver.Chrome, **values: str) -> None:
    for name, value in values.items():
        field = find(browser, f"[name={name}]")
        if field.tag_name == "select":
            Select(field).select_by_value(value)
        else:
            field.clear()
            field.send_keys(value)


def save(browser: webdriver.Chrome, seconds: float = 60) -> None:
    """Saves; fails with what the form says if it does not."""
    button = find(browser, "button[name=_save]")
    browser.execute_script("arguments[0].click()", button)
    WebDriverWait(browser, seconds).until(staleness_of(button))
    errors = [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".errorlist, .errornote") if each.text]
    assert not errors, errors


def names_of_models(site: Site, key: str) -> set[str]:
    answer = httpx.get(f"{site.base_url}/v1/models", headers=site.headers(key), timeout=20)
    return {each["id"] for each in answer.json()["data"]}


def play(browser: webdriver.Chrome, *, model: str, adapter: str, text: str) -> tuple[str, str]:
    """The answers of two vectors side by side: with the adapter, and without."""
    Select(find(browser, "[name=model]")).select_by_value(model)
    find(browser, "[name=compare]").click()
    script = "const e = document.querySelector(arguments[0]); e.value = 1; e.dispatchEvent(new Event('input'))"
    browser.execute_script(script, f"#vector-a [data-adapter='{adapter}']")
    for name, value in {"temperature": "0", "max_new_tokens": "40", "text": text}.items():
        field = find(browser, f"#play-form [name={name}]")
        field.clear()
        field.send_keys(value)
    browser.execute_script("document.getElementById('play-send').click()")
    find(browser, "#play-form[data-answers]", 90)
    errors = [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#playground .console-bad")]
    assert not errors, errors
    first, second = (find(browser, f"#answer-{side} .is-model").text for side in "ab")
    return first, second


def test_from_an_empty_tenant_to_an_answer_in_the_adapters_style_and_a_refusal(
    console: webdriver.Chrome, live_site: Site, model_path: Path
) -> None:
    base, tenant = f"{live_site.base_url}/admin", "<script>document.title='owned'</script> & Walk"
    fill(console, f"{base}/accounts/plan/add/", name="Walk")
    save(console)
    fill(console, f"{base}/accounts/tenant/add/", name=tenant)
    choose(console, "plan", "Walk")
    save(console)
    fill(console, f"{base}/accounts/apikey/add/", name="walk")
    choose(console, "tenant", tenant)
    save(console)
    key = find(console, "#issued-key").text
    page_of_key = console.current_url
    number_of_key = page_of_key.split("/")[-3]
    assert names_of_models(live_site, key) and "walk-model" not in names_of_models(live_site, key)

    options = {"n_ctx": "512", "n_slots": "2", "load_mode": "lazy", "visibility": "granted"}
    fill(console, f"{base}/inference/servedmodel/add/", name="walk-model", path=str(model_path), **options)
    choose(console, "granted_tenants", tenant)
    save(console)
    assert "walk-model" in names_of_models(live_site, key) - names_of_models(live_site, live_site.key)

    file = ADAPTER_FOLDER / "smollm2-135m-json-reply.gguf"
    fill(console, f"{base}/inference/adapter/add/", name="clerk", path=str(file))
    choose(console, "base_model", "walk-model")
    choose(console, "owner", tenant)
    save(console)
    assert "walk-model:clerk" in names_of_models(live_site, key)

    console.get(f"{base}/playground/?key={number_of_key}")
    styled, plain = play(console, model="walk-model", adapter="clerk", text="What is a whale?")
    assert styled.startswith("{") and '"topic"' in styled
    assert plain and not plain.startswith("{")
    assert key not in console.page_source and "walk-model" in copied(console, "copy-curl")

    used = WebDriverWait(console, 20).until(lambda _: usage_of(live_site, key, requests=2))
    console.get(f"{base}/?by=tenant&show=requests")
    text = find(console, "#dashboard").text
    assert tenant in text and f"{used['total_tokens']:,}" in text
    assert "owned" not in console.title

    console.get(page_of_key)
    find(console, "button[name$=revoke_this]").click()
    console.switch_to.alert.accept()
    WebDriverWait(console, 20).until(lambda page: "is revoked" in page.page_source)
    WebDriverWait(console, 20).until(lambda _: generate(live_site, key).status_code == 401)
    console.get(f"{base}/playground/?key={number_of_key}")
    assert "This key is refused" in find(console, "#playground").text

    for rows in ("adapter", "servedmodel"):  # the site is as it was, but for the tenant
        name = {"adapter": "clerk", "servedmodel": "walk-model"}[rows]
        remove(console, base, rows, name)


def test_an_adapter_is_uploaded_and_its_page_follows_it_to_the_end(console: webdriver.Chrome, live_site: Site) -> None:
    base, model = f"{live_site.base_url}/admin", live_site.demo["models"][0]
    console.get_log("browser")
    fill(console, f"{base}/inference/modelimport/add/", kind="adapter", name="uploaded")
    choose(console, "base_model", model)
    save(console)
    find(console, "[data-upload] input[type=file]").send_keys(str(ADAPTER_FOLDER / "smollm2-135m-json-reply.gguf"))
    find(console, "[data-upload] button").click()
    WebDriverWait(console, 60, ignored_exceptions=[StaleElementReferenceException]).until(
        lambda page: "Ready: uploaded" in page.find_element(By.CSS_SELECTOR, "[data-state]").text
    )
    blocked = [line["message"] for line in console.get_log("browser") if "Content Security Policy" in line["message"]]
    assert not blocked, blocked
    assert "uploaded" in adapters_of(live_site)
    remove(console, base, "adapter", "uploaded")
    assert "uploaded" not in adapters_of(live_site)


@pytest.mark.timeout(600)
def test_a_models_fastest_file_is_found_served_and_a_search_is_cancelled(
    console: webdriver.Chrome, live_site: Site, model_path: Path
) -> None:
    """A short one; what it finds may be slower, so that there is always something to serve."""
    base, name = f"{live_site.base_url}/admin", "walk-quick"
    fill(
        console,
        f"{base}/inference/servedmodel/add/",
        name=name,
        path=str(model_path),
        n_ctx="512",
        n_slots="2",
        load_mode="lazy",
    )
    save(console)
    short = {"formats": "Q4_0", "rounds": "1", "seconds": "0.1", "max_minutes": "6"}
    ask_for_fastest(console, base, name, **short, min_gain="-90", max_perplexity_increase="1000")
    seen: set[str] = set()

    def is_measured(page: webdriver.Chrome) -> bool:
        seen.add(page.find_element(By.CSS_SELECTOR, "[data-state]").text)
        return bool(page.find_elements(By.CSS_SELECTOR, "td[data-label=verdict]"))

    WebDriverWait(console, 400, 0.3, ignored_exceptions=[StaleElementReferenceException]).until(is_measured)
    assert any("writing Q4_0" in each for each in seen) and any("speed of" in each for each in seen), seen
    table = find(console, ".console-table").text
    assert "Q4_1 (source)" in table and "tok/s" in table and "chosen" in table
    (searched,) = manage(live_site, "optimizations")["optimizations"]
    assert (searched["state"], searched["asked_by"]) == ("done", live_site.demo["admin"]["username"])

    press(console, "button[formaction$='/activate/']")
    assert "is served from q4_0 now" in find(console, "body").text
    (variant,) = manage(live_site, "activate_variant", name)["variants"]
    assert (variant["name"], variant["active"], variant["digest"]) == (
        "q4_0",
        True,
        searched["result"]["variant"]["digest"],
    )
    body = {"prompt": "One, two,", "max_new_tokens": 4, "cache": False, "model": name}
    answer = httpx.post(f"{live_site.base_url}/v1/generate", json=body, headers=live_site.headers(), timeout=90)
    assert answer.status_code == 200, answer.text
    receipt = httpx.get(
        f"{live_site.base_url}/v1/requests/{answer.headers['x-request-id']}", headers=live_site.headers(), timeout=20
    ).json()
    assert receipt["model"] == name

    ask_for_fastest(console, base, name, **{**short, "formats": ""})
    WebDriverWait(console, 60, ignored_exceptions=[StaleElementReferenceException]).until(
        lambda page: "Step 1" in page.find_element(By.CSS_SELECTOR, "[data-state]").text
    )
    press(console, "button[formaction$='/cancel/']")
    assert "Cancelled: nothing is kept." in find(console, "body").text
    folder = live_site.state / "models" / "variants"
    WebDriverWait(console, 20).until(lambda _: [each.name for each in folder.iterdir()] == [Path(variant["path"]).name])
    assert manage(live_site, "optimizations")["optimizations"][0]["state"] == "cancelled"

    manage(live_site, "activate_variant", name, "--revert")  # the site is as it was
    manage(live_site, "activate_variant", name, "q4_0", "--remove")
    remove(console, base, "servedmodel", name)


def ask_for_fastest(browser: webdriver.Chrome, base: str, model: str, **fields: str) -> None:
    """From the list of models to the form of a search, which has the model, and on to its page."""
    browser.get(f"{base}/inference/servedmodel/?q={model}")
    browser.execute_script("document.querySelector('input.action-select').click()")
    WebDriverWait(browser, 20).until(lambda page: find(page, "select[name=action]").is_displayed())
    Select(find(browser, "select[name=action]")).select_by_value("optimize")
    browser.execute_script("document.querySelector('#changelist-actions button[name=index]').click()")
    fill_here(browser, **fields)
    find(browser, "[name=tunes_settings]").click()
    assert find(browser, "#id_base_model option[selected]").text == model
    save(browser)


def press(browser: webdriver.Chrome, selector: str) -> None:
    """A button that asks first."""
    button = find(browser, selector)
    browser.execute_script("setTimeout(() => arguments[0].click())", button)
    WebDriverWait(browser, 20).until(lambda page: page.switch_to.alert).accept()
    WebDriverWait(browser, 20).until(staleness_of(button))


def adapters_of(site: Site) -> set[str]:
    headers = site.headers(site.demo["operator_key"])
    answer = httpx.get(f"{site.base_url}/v1/admin/adapters", headers=headers, timeout=20)
    return {each["name"] for each in answer.raise_for_status().json()["results"]}


def remove(browser: webdriver.Chrome, base: str, rows: str, name: str) -> None:
    """Deletes what a test made."""
    browser.get(f"{base}/inference/{rows}/?q={name}")
    row = str(find(browser, "#result_list a[href*='/change/']").get_attribute("href"))
    browser.get(row.partition("?")[0].replace("/change/", "/delete/"))
    find(browser, "form input[name=post][value=yes]").submit()
    WebDriverWait(browser, 20).until(lambda page: page.current_url.endswith(f"/{rows}/"))


def copied(browser: webdriver.Chrome, button: str) -> str:
    find(browser, f"#{button}").click()
    return str(WebDriverWait(browser, 20).until(lambda page: find(page, "#play-copied").text))


def usage_of(site: Site, key: str, *, requests: int) -> dict[str, Any] | None:
    answer = httpx.get(f"{site.base_url}/v1/me/usage", headers=site.headers(key), timeout=20).json()
    return answer if answer["total_requests"] >= requests else None


def test_a_script_in_a_name_does_nothing_and_no_page_needs_one(console: webdriver.Chrome, live_site: Site) -> None:
    """The policy of content stops what an unescaped name would do, and nothing that the pages do themselves."""
    hostile = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"
    headers = live_site.headers(live_site.demo["operator_key"])
    plan = httpx.get(f"{live_site.base_url}/v1/admin/plans", headers=headers).json()["results"][0]["name"]
    made = httpx.post(f"{live_site.base_url}/v1/admin/tenants", json={"name": hostile, "plan": plan}, headers=headers)
    assert made.status_code == 201, made.text
    pk = made.json()["id"]
    console.get_log("browser")
    for page in (
        "",
        "accounts/tenant/",
        f"accounts/tenant/{pk}/change/",
        f"accounts/tenant/{pk}/history/",
        "accounts/auditentry/",
    ):
        console.get(f"{live_site.base_url}/admin/{page}")
        find(console, "#main, #content, #dashboard, body")
        assert console.execute_script("return window.owned") is None
        assert console.execute_script("return typeof Alpine") == "object", "the console's own scripts run"
    blocked = [line["message"] for line in console.get_log("browser") if "Content Security Policy" in line["message"]]
    assert not blocked, blocked
    console.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.owned = 1'; document.body.append(s);"
        "const i = document.createElement('div'); i.innerHTML = arguments[0]; document.body.append(i);",
        hostile,
    )
    WebDriverWait(console, 20).until(
        lambda page: any("Content Security Policy" in line["message"] for line in page.get_log("browser"))
    )
    assert console.execute_script("return window.owned") is None, "not even where it is no longer text"


def test_a_script_that_a_model_says_is_text(console: webdriver.Chrome, live_site: Site) -> None:
    """The real model is made to say it by a grammar, which the page itself would not send."""
    said = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"
    console.get(f"{live_site.base_url}/admin/playground/")
    console.execute_script(
        "const real = window.fetch; const grammar = arguments[0];"
        "window.fetch = (url, more) =>"
        " real(url, {...more, body: JSON.stringify({...JSON.parse(more.body), grammar, max_new_tokens: 100})});",
        f'root ::= "{said}"',
    )
    find(console, "#play-form [name=text]").send_keys("Say something")
    console.execute_script("document.getElementById('play-send').click()")
    find(console, "#play-form[data-answers]", 90)
    assert find(console, "#answer-a .is-model").text == said
    assert console.find_elements(By.CSS_SELECTOR, "#answer-a script, #answer-a img") == []
    assert console.execute_script("return window.owned") is None


OVERFLOW = """
const wide = Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth;
return wide > 0 ? wide : 0;
"""


def test_every_page_opens_without_an_error_and_fits_its_window(console: webdriver.Chrome, live_site: Site) -> None:
    """At 1440 and at 390 pixels."""
    walk.use(live_site)
    console.get_log("browser")
    wrong, seen = [], set()
    for name, path in walk.pages(console, live_site):
        if console.current_url != f"{live_site.base_url}{path}":
            console.get(f"{live_site.base_url}{path}")
        seen.add(name)
        for width, height in ((1440, 1000), (390, 844)):
            shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            console.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
            if too_wide := console.execute_script(OVERFLOW):
                wrong.append(f"{path} is {too_wide} pixels too wide at {width}")
        wrong += [f"{path}: {line['message']}" for line in console.get_log("browser") if line["level"] == "SEVERE"]
    console.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not wrong, "\n".join(wrong)
    assert {"dashboard", "playground", "requests", "slots", "settings", "models", "receipt-list"} <= seen
    assert {"model-preview", "correction", "request", "batch", "tenant"} <= seen and len(seen) > 45


def test_a_request_is_replayed_to_the_same_tokens(console: webdriver.Chrome, live_site: Site) -> None:
    body = {"prompt": "One, two, three,", "max_new_tokens": 6, "cache": False, "seed": 5}
    answer = httpx.post(f"{live_site.base_url}/v1/generate", json=body, headers=live_site.headers(), timeout=60)
    request_id = answer.headers["x-request-id"]
    address = f"{live_site.base_url}/admin/requests/{request_id}/"
    for said, sent in (("The same tokens: ", body), ("other tokens than", {**body, "prompt": "Four, five, six,"})):
        WebDriverWait(console, 20).until(lambda page: page.get(address) or page.find_elements(By.NAME, "body"))
        field = find(console, "[name=body]")
        field.clear()
        field.send_keys(json.dumps(sent))
        find(console, "form[action$='/replay/'] [type=submit]").click()
        assert said in find(console, "#replayed", 120).text


def test_slots_are_erased_in_a_browser(console: webdriver.Chrome, live_site: Site) -> None:
    body = {"prompt": "A slot that holds this text, and more of it. " * 4, "max_new_tokens": 2, "cache": False}

    def held() -> int:
        slots = httpx.get(f"{live_site.base_url}/slots", headers=live_site.headers(), timeout=60).json()
        return sum(slot.get("n_held", 0) for slot in slots)

    httpx.post(f"{live_site.base_url}/v1/generate", json=body, headers=live_site.headers(), timeout=60)
    assert held() > 0
    console.get(f"{live_site.base_url}/admin/slots/")
    while buttons := console.find_elements(By.CSS_SELECTOR, "form[action$='/erase/'] button"):
        buttons[0].click()
        console.switch_to.alert.accept()
        WebDriverWait(console, 20).until(staleness_of(buttons[0]))
    assert held() == 0
