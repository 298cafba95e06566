"""The console as an operator meets it: a real browser, a real site, the real model.

Skipped where there is no chromium with its driver; with REQUIRE_BROWSER=1 that is a failure.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import Site

pytestmark = [
    pytest.mark.integration,
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.xdist_group("live_site"),
]

REQUIRE_BROWSER = os.environ.get("REQUIRE_BROWSER", "") not in {"", "0", "false"}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,1000",
)
KEY = re.compile(r"llms_[0-9A-Za-z]{12}_[0-9A-Za-z]{38}")
REFUSED_WITHIN_SECONDS = 1.0


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Chromium with an empty profile."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        missing = "chromium and chromedriver are not installed"
        if REQUIRE_BROWSER:
            pytest.fail(missing)
        pytest.skip(missing)
    with tempfile.TemporaryDirectory(prefix="llmsite-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        chrome.set_page_load_timeout(60)
        yield chrome
        chrome.quit()


@pytest.fixture
def console(browser: webdriver.Chrome, live_site: Site) -> webdriver.Chrome:
    """Signed in, from the sign-in page itself."""
    browser.delete_all_cookies()
    browser.get(f"{live_site.base_url}/admin/login/")
    admin = live_site.demo["admin"]
    browser.find_element(By.NAME, "username").send_keys(admin["username"])
    browser.find_element(By.NAME, "password").send_keys(admin["password"])
    browser.find_element(By.CSS_SELECTOR, "#login-form [type=submit]").click()
    find(browser, "#dashboard")
    return browser


def find(browser: webdriver.Chrome, selector: str) -> WebElement:
    return WebDriverWait(browser, 20).until(lambda page: page.find_element(By.CSS_SELECTOR, selector))


def choose(browser: webdriver.Chrome, field: str, name: str) -> None:
    """Pick from an autocomplete field by typing, as a person does."""
    find(browser, f"#id_{field} + .select2 .select2-selection").click()
    find(browser, ".select2-search__field").send_keys(name)

    def is_only_answer(page: webdriver.Chrome) -> WebElement | None:
        answers = page.find_elements(By.CSS_SELECTOR, ".select2-results__option")
        return answers[0] if [each.text for each in answers] == [name] else None

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
