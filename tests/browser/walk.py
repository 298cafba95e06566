"""Every page of the console as a person finds it: in the sidebar, in the first row of each list, and behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
from selenium import webdriver

from tests.browser.chromium import find
from tests.conftest import Site

LINKS = """
return [...document.querySelectorAll("a[href*='/admin/']")]
  .map(each => new URL(each.href)).filter(url => url.host === location.host).map(url => url.pathname)
"""
FIRST_ROW = "return document.querySelector(\"#result_list a[href*='/change/']\")?.pathname ?? ''"
LEFT_OUT = ("/admin/logout/", "/admin/password_change/")
PROMPT = "What is the best thing about the sea?"
ROWS_BEHIND = {
    "servedmodel": ("model-preview", "/admin/models/{}/"),
    "quotaperiod": ("correction", "/admin/correct/{}/"),
    "receipt": ("request", "/admin/requests/{}/"),
}
"""A row's kind → the page that its number leads to."""


def use(site: Site) -> None:
    """Something of each kind: answers, a refusal, a saved state, a batch."""
    for key in (site.key, site.other_key):
        headers = site.headers(key)
        body = {"prompt": PROMPT, "max_new_tokens": 8, "cache": False}
        httpx.post(f"{site.base_url}/v1/generate", json=body, headers=headers, timeout=60).raise_for_status()
        httpx.post(f"{site.base_url}/v1/generate", json={**body, "model": "gpt-4"}, headers=headers, timeout=60)
    slots = httpx.get(f"{site.base_url}/slots", headers=site.headers(), timeout=60).json()
    fullest = max(slots, key=lambda slot: slot.get("n_held", 0))["id"]
    slot = f"{site.base_url}/slots/{fullest}?action=save"
    httpx.post(slot, json={"filename": "sea"}, headers=site.headers(), timeout=60).raise_for_status()
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": PROMPT, "max_tokens": 4}}
    line["body"]["model"] = site.demo["models"][0]  # type: ignore[index]
    files = {"file": ("lines.jsonl", json.dumps(line).encode())}
    sent = httpx.post(f"{site.base_url}/v1/files", files=files, data={"purpose": "batch"}, headers=site.headers())
    order = {"input_file_id": sent.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    httpx.post(f"{site.base_url}/v1/batches", json=order, headers=site.headers()).raise_for_status()


def sidebar(browser: webdriver.Chrome, site: Site) -> list[str]:
    """The addresses of its pages, in its order; the dashboard first."""
    browser.get(f"{site.base_url}/admin/")
    find(browser, "#dashboard")
    found = dict.fromkeys(path for path in browser.execute_script(LINKS) if path not in LEFT_OUT)
    return [path for path in found if path.count("/") <= 4 and "/change/" not in path]


def name_of(path: str) -> str:
    """As the file of its picture is called."""
    words = [word for word in path.split("/") if word][1:]
    if not words:
        return "dashboard"
    return words[0] if len(words) == 1 else {"servedmodel": "models"}.get(words[1], f"{words[1]}-list")


def pages(browser: webdriver.Chrome, site: Site) -> Iterator[tuple[str, str]]:
    """(name, address) of each page; the browser has just opened those of the sidebar."""
    for path in sidebar(browser, site):
        browser.get(f"{site.base_url}{path}")
        row = browser.execute_script(FIRST_ROW)
        yield name_of(path), path
        if not row:
            continue
        kind, number = row.split("/")[-4], row.split("/")[-3]
        yield kind, row
        if kind in ROWS_BEHIND:
            name, behind = ROWS_BEHIND[kind]
            yield name, behind.format(number)
