"""Chromium for tests and screenshots: headless, with an empty profile. Needs chromium and chromedriver on the PATH."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

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
    "--hide-scrollbars",
    "--window-size=1440,1000",
)


def programs() -> tuple[str, str] | None:
    """(browser, driver), or None where one of them is missing."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    return (program, driver) if program and driver else None


@contextlib.contextmanager
def chromium(program: str, driver: str) -> Iterator[webdriver.Chrome]:
    with tempfile.TemporaryDirectory(prefix="llmsite-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        chrome.set_page_load_timeout(60)
        try:
            yield chrome
        finally:
            chrome.quit()


def sign_in(browser: webdriver.Chrome, base_url: str, admin: dict[str, Any]) -> None:
    """From the sign-in page itself. What the page before still asks for would be answered with a token of its own."""
    browser.get("about:blank")
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    browser.get(f"{base_url}/admin/login/")
    browser.find_element(By.NAME, "username").send_keys(admin["username"])
    browser.find_element(By.NAME, "password").send_keys(admin["password"])
    browser.find_element(By.CSS_SELECTOR, "#login-form [type=submit]").click()
    find(browser, "#dashboard")


def find(browser: webdriver.Chrome, selector: str, seconds: float = 60) -> WebElement:
    return WebDriverWait(browser, seconds).until(lambda page: page.find_element(By.CSS_SELECTOR, selector))
