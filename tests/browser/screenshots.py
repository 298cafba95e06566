"""Makes docs/screenshots again: a demo site with a month of usage, chromium, light and dark, 1440 and 390 pixels wide.

`make screenshots`, or some by name: `python -m tests.browser.screenshots slots`. Days before today are invented numbers
in the days' sums of that site's own database; everything else on the pictures is what the site really did.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.browser import walk
from tests.browser.chromium import chromium, find, programs, sign_in
from tests.conftest import REPOSITORY, Site, running_site, site_environment

FOLDER = REPOSITORY / "docs" / "screenshots"
ADAPTER = REPOSITORY / "inference" / "demo_adapters" / "smollm2-135m-json-reply.gguf"
SIZES = {1440: 1000, 390: 844}
TALLEST, TALLEST_LIST = 2600, 1400
PROMPT = "What is the best thing about the sea?"
SEED = """
import random
from datetime import timedelta
from django.utils import timezone
from accounts.models import DayUsage, QuotaPeriod
chance = random.Random(4)
today = timezone.now().date()
tenants = list(QuotaPeriod.objects.filter(key__isnull=True).select_related("tenant"))
keys = {row.tenant_id: row for row in QuotaPeriod.objects.filter(key__isnull=False)}
for ago in range(1, 30):
    for number, period in enumerate(tenants):
        for adapters in ("", "shakespeare"):
            weekend = 0.4 if (today - timedelta(days=ago)).weekday() > 4 else 1
            requests = round(chance.uniform(40, 90) * (3 - number) * (40 - ago) / 40 * weekend)
            tokens = requests * chance.randint(90, 140)
            DayUsage.objects.create(
                day=today - timedelta(days=ago), tenant=period.tenant, key=keys[period.tenant_id].key,
                tenant_period=period, key_period=keys[period.tenant_id], model="smollm2-135m", adapters=adapters,
                operation="completions", requests=requests, used_tokens=tokens, prompt_tokens=tokens // 3,
                completion_tokens=tokens - tokens // 3, cost_nanos=tokens * 150)
"""


def main() -> None:
    found = programs()
    if found is None:
        sys.exit("chromium and chromedriver are not installed")
    wanted = frozenset(sys.argv[1:])
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llmsite-screenshots-") as folder:
        state = Path(folder) / "state"
        with running_site(state, prepared=False) as site, chromium(*found) as browser:
            use(site)
            manage(state, "shell", "-v0", "-c", SEED)
            sign_in(browser, site.base_url, site.demo["admin"])
            shown = [*pages(browser, site), *imports(site), alias_on_trial(site), *optimization(site, state)]
            for theme in ("light", "dark"):
                browser.execute_cdp_cmd(
                    "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
                )
                for name, path in shown:
                    if wanted and name not in wanted:
                        continue
                    resize(browser, 1440, SIZES[1440])
                    with busy(site) if name in BUSY else contextlib.nullcontext():
                        browser.get(f"{site.base_url}{path}")
                        if name == "playground":
                            play(browser)
                        if name == "key":
                            issue(browser)
                        if name == "bulk-preview":
                            preview(browser)
                        for width in SIZES:
                            shoot(browser, FOLDER / f"{name}-{theme}-{width}.png", width, state)


def manage(state: Path, *arguments: str) -> None:
    """A command on the site's state folder."""
    environment = site_environment(state, 1, DJANGO_SETTINGS_MODULE="llmsite.settings")
    subprocess.run([sys.executable, "manage.py", *arguments], env=environment, cwd=REPOSITORY, check=True)


def resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)


def use(site: Site) -> None:
    """Requests of both tenants: answered, from the cache, with an adapter, and refused."""
    for key in (site.key, site.other_key):
        for number in range(10):
            body = {"prompt": f"{PROMPT} {number}", "max_new_tokens": 24, "adapters": [{"name": "shakespeare"}]}
            if number % 2:
                del body["adapters"]
            httpx.post(f"{site.base_url}/v1/generate", json=body, headers=site.headers(key), timeout=60)
    for model in ("gpt-4", "llama"):
        body = {"prompt": PROMPT, "model": model}
        httpx.post(f"{site.base_url}/v1/generate", json=body, headers=site.headers(), timeout=60)
    walk.use(site)
    time.sleep(2.5)  # what is noted of refusals is written once a second


BUSY = frozenset({"requests", "slots"})
"""These pages show what runs at this moment, so something does."""


@contextlib.contextmanager
def busy(site: Site) -> Iterator[None]:
    """More long answers than the model has slots, of both tenants; cancelled at the end."""
    asked = []
    for number in range(11):
        key = site.key if number % 3 else site.other_key
        body = {"prompt": f"{PROMPT} {number}", "max_new_tokens": 1400, "ignore_eos": True, "background": True}
        if number % 2:
            body["adapters"] = [{"name": "shakespeare"}]
        answer = httpx.post(f"{site.base_url}/v1/generate", json=body, headers=site.headers(key), timeout=60)
        asked.append((answer.raise_for_status().headers["x-request-id"], key))
    time.sleep(2)
    try:
        yield
    finally:
        for request_id, key in asked:
            address = f"{site.base_url}/v1/requests/{request_id}/cancel"
            httpx.post(address, headers=site.headers(key), timeout=60)


def operate(site: Site, path: str, values: dict[str, Any]) -> dict[str, Any]:
    """What the operator's API answers to a POST."""
    headers = site.headers(site.demo["operator_key"])
    answer = httpx.post(f"{site.base_url}/v1/admin/{path}", json=values, headers=headers, timeout=60)
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def imports(site: Site) -> list[tuple[str, str]]:
    """The form that asks for one, and one of each fate: refused, finished, and half of its file here."""
    headers = site.headers(site.demo["operator_key"])
    (model,) = httpx.get(f"{site.base_url}/v1/admin/models", headers=headers).json()["results"]
    refused = operate(site, "imports", {"kind": "model", "name": "pirate-7b"})
    upload(site, refused["id"], ADAPTER)
    finished = operate(site, "imports", {"kind": "adapter", "name": "clerk", "base_model": model["name"]})
    upload(site, finished["id"], ADAPTER)
    for row in (refused, finished):
        deadline = time.monotonic() + 60
        address = f"{site.base_url}/v1/admin/imports/{row['id']}"
        while httpx.get(address, headers=headers).json()["state"] not in ("ready", "refused"):
            assert time.monotonic() < deadline, "the import does not end"
            time.sleep(0.2)
    coming = operate(site, "imports", {"kind": "model", "name": "smollm2-135m-next"})
    upload(site, coming["id"], Path(model["path"]), part=0.6)
    rows = (("refused", refused), ("finished", finished), ("coming", coming))
    shown = [(f"import-{name}", f"/admin/inference/modelimport/{row['id']}/change/") for name, row in rows]
    return [("import-form", "/admin/inference/modelimport/add/"), *shown]


def upload(site: Site, import_id: int, file: Path, part: float = 1.0) -> None:
    """The bytes of an import, or the first of them: then the connection breaks."""
    content = file.read_bytes()
    host = site.base_url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.putrequest("PUT", f"/v1/admin/imports/{import_id}/content")
    connection.putheader("Content-Length", str(len(content)))
    for name, value in site.headers(site.demo["operator_key"]).items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(content[: round(part * len(content))])
    if part < 1:
        time.sleep(2)
    else:
        assert connection.getresponse().status == 200
    connection.close()


def alias_on_trial(site: Site) -> tuple[str, str]:
    """(name, address) of the page of an alias that some conversations reach."""
    headers = site.headers(site.demo["operator_key"])
    listed = httpx.get(f"{site.base_url}/v1/admin/adapters", headers=headers, timeout=60).json()["results"]
    ids = {each["name"]: each["id"] for each in listed}
    tenant = site.demo["tenants"][1]["name"]
    operate(site, f"adapters/{ids['clerk']}/grant", {"tenant": tenant})
    values = {"model": site.demo["models"][0], "name": "style", "target": "shakespeare", "canary": "clerk", "share": 30}
    alias = operate(site, "aliases", values)
    for number in range(16):
        body = {"prompt": f"{PROMPT} {number}", "max_new_tokens": 24, "session": str(number), "cache": False}
        body["adapters"] = [{"name": "style"}]
        httpx.post(f"{site.base_url}/v1/generate", json=body, headers=site.headers(site.other_key), timeout=60)
    time.sleep(2)  # receipts are written behind the answers
    return "alias", f"/admin/inference/adapteralias/{alias['id']}/change/"


def optimization(site: Site, state: Path) -> list[tuple[str, str]]:
    """The form that begins a search for the fastest file, and the page of one that has ended: a short one."""
    short = ("--formats", "Q4_0,Q8_0", "--formats-only", "--rounds", "1", "--seconds", "1", "--min-gain", "-50")
    manage(state, "optimize_model", site.demo["models"][0], *short)
    folder = "/admin/inference/optimization"
    return [("optimization-form", f"{folder}/add/?base_model=1"), ("optimization", f"{folder}/1/change/")]


ROWS = frozenset({"tenant", "servedmodel", "adapter", "receipt", "batch", "quotaperiod", "refusedrequest"})
"""Of these lists the first row's page has a picture, too."""


def pages(browser: webdriver.Chrome, site: Site) -> list[tuple[str, str]]:
    """(name, address) of each page of the console, and of the form that issues a key."""
    behind = {name for name, _ in walk.ROWS_BEHIND.values()}
    found = [
        (name, path)
        for name, path in walk.pages(browser, site)
        if "/change/" not in path or name in ROWS or name in behind
    ]
    return [
        *found,
        ("key", "/admin/accounts/apikey/add/?tenant=1&name=shop"),
        ("bulk-preview", "/admin/accounts/tenant/"),
    ]


def play(browser: webdriver.Chrome) -> None:
    find(browser, "[name=compare]").click()
    set_value(browser, "#vector-b [data-adapter=shakespeare]", "1")
    set_value(browser, "[name=max_new_tokens]", "64")
    set_value(browser, "[name=seed]", "7")
    find(browser, "[name=text]").send_keys(PROMPT)
    browser.execute_script("document.getElementById('play-send').click()")
    WebDriverWait(browser, 60).until(lambda page: page.find_elements(By.CSS_SELECTOR, "#play-form[data-answers]"))


def set_value(browser: webdriver.Chrome, selector: str, value: str) -> None:
    find(browser, selector)
    script = (
        "const e = document.querySelector(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, selector, value)


def issue(browser: webdriver.Chrome) -> None:
    """The page that shows a new key: it ends with the demo's folder."""
    find(browser, "button[name=_save]").click()
    find(browser, "#issued-key")


def preview(browser: webdriver.Chrome) -> None:
    """Of two tenants about to be suspended, who are not."""
    for box in browser.find_elements(By.CSS_SELECTOR, "input.action-select")[:2]:
        browser.execute_script("arguments[0].click()", box)
    Select(find(browser, "select[name=action]")).select_by_value("suspend")
    find(browser, "#changelist-actions button[name=index]").click()
    find(browser, "#bulk-preview")


def shoot(browser: webdriver.Chrome, file: Path, width: int, state: Path) -> None:
    """As tall as its content, within bounds; folders of this machine under the names that they have elsewhere."""
    resize(browser, width, SIZES[width])
    browser.execute_script(RENAME, [[str(REPOSITORY), "/srv/llmsite"], [str(state), "/srv/llmsite/.state"]])
    time.sleep(0.4)  # fonts, and what slides in
    script = "return Math.max(...[...document.querySelectorAll('#page, #main, body')].map(e => e.scrollHeight))"
    tallest = TALLEST_LIST if "-list-" in file.name else TALLEST
    resize(browser, width, min(tallest, max(SIZES[width], int(browser.execute_script(script)))))
    time.sleep(0.2)
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    file.write_bytes(with_palette(browser, picture))
    print(f"{file.relative_to(REPOSITORY)}: {file.stat().st_size:,} bytes")


RENAME = """
const renamed = (text) => arguments[0].reduce((said, [from, to]) => said.replaceAll(from, to), text);
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) if (renamed(texts.currentNode.data) !== texts.currentNode.data) {
  texts.currentNode.data = renamed(texts.currentNode.data);
}
for (const field of document.querySelectorAll("input[type=text], textarea")) field.value = renamed(field.value);
"""
PIXELS = """
const done = arguments[1];
const image = new Image();
image.onload = () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height).data;
  let text = "";
  for (let at = 0; at < pixels.length; at += 32768) text += String.fromCharCode(...pixels.subarray(at, at + 32768));
  done([image.width, image.height, btoa(text)]);
};
image.src = "data:image/png;base64," + arguments[0];
"""


def with_palette(browser: webdriver.Chrome, picture: str) -> bytes:
    """The PNG with the 256 most frequent colours, others as the nearest of them: a third of its size."""
    width, height, text = browser.execute_async_script(PIXELS, picture)
    pixels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 4).astype(np.int32)
    packed, places, counts = np.unique(pixels[:, :3] @ (65536, 256, 1), return_inverse=True, return_counts=True)
    colours = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)
    palette = colours[np.argsort(-counts)[:256]].astype(np.int32)
    nearest = np.concatenate(
        [
            ((part[:, None, :] - palette[None]) ** 2).sum(2).argmin(1)
            for part in np.array_split(colours, len(colours) // 4096 + 1)
        ]
    ).astype(np.uint8)
    rows = nearest[places.reshape(-1)].reshape(height, width)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()  # filter 0: none
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    body = (header, palette.astype(np.uint8).tobytes(), zlib.compress(lines, 9), b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in zip((b"IHDR", b"PLTE", b"IDAT", b"IEND"), body, strict=True)
    )


if __name__ == "__main__":
    main()
