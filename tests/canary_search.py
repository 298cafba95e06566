"""A live installation is told canaries, searched whole, and searched again when their time is over."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis

from llmsite.config import Config
from tests import stores
from tests.canary_calls import Caller, Canaries
from tests.conftest import REPOSITORY, Site, manage, running_site, site_environment
from tests.in_process import wait_until

PAGE = REPOSITORY / "docs" / "privacy.md"
LIMIT = re.compile(r"^\| `(redis [^`]+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|", re.MULTILINE)
ROW = re.compile(r"^\| `([a-z]+ [^`]+)` \| ([^|]+) \|", re.MULTILINE)
KINDS = {"prompt": "prompts", "output": "outputs", "label": "labels", "tokens": "token ids"}
FOR_MOMENTS = {
    *("redis ticket:* prompt", "redis ticket:* header", "redis settlements *"),
    *("database inference_batchline.answer", "database inference_batchline.custom_id"),
}
"""Gone before anything can be searched."""
MAX_PAGES = 120
GONE = -2
"""What Redis says of a key that is not there."""
NOWHERE = re.compile("(prompt|label) (plain|refused) |secret ")
"""Said in plain requests and in such as were refused: nowhere but in the log of an embedded Valkey, for a while."""
MAKE_OLD = """
import django
django.setup()
from datetime import timedelta
from django.db.models import F
from inference.models import Batch, StoredFile, StoredResponse
for rows in (Batch, StoredResponse, StoredFile):
    rows.objects.update(created_at=F("created_at") - timedelta(days=400))
StoredFile.objects.update(expires_at=F("expires_at") - timedelta(days=400))
"""
Found = dict[str, set[str]]


def table() -> dict[str, str]:
    """Place → what may be there."""
    rows = dict(ROW.findall(PAGE.read_text()))
    assert len(rows) > 10
    return rows


@dataclass
class Search:
    """`database` yields the rows of all tables. environment: settings of the site."""

    site: Site
    database: Callable[[], Iterator[stores.Piece]]
    environment: dict[str, str]
    canaries: Canaries = field(default_factory=Canaries)
    seen: set[str] = field(default_factory=set)
    """Rows of the table that something was found in."""

    def redis(self) -> redis.Redis:
        socket = self.site.state / "valkey" / "valkey.sock"
        return redis.Redis.from_url(self.environment.get("REDIS_URL") or f"unix://{socket}")

    def manage(self, *words: str) -> Any:
        return manage(self.site, *words, **self.environment)

    def caller(self, tenant: str, **options: Any) -> Caller:
        """With a key made for it: the demo's own are in the demo's file."""
        operator = {"Authorization": f"Bearer {self.site.demo['operator_key']}"}
        body = {"tenant": tenant, "name": "canary"}
        made = httpx.post(f"{self.site.base_url}/v1/admin/keys", json=body, headers=operator, timeout=60).json()
        self.canaries.know(f"secret key of {tenant}", made["key"].encode(), made["key"].rsplit("_", 1)[1].encode())
        headers = {"Authorization": f"Bearer {made['key']}"}
        return Caller(httpx.Client(base_url=self.site.base_url, headers=headers, timeout=60), self.canaries)

    # The search

    def everywhere(self) -> Found:
        with self.redis() as client:
            return self.in_pieces(
                self.database(), stores.redis_values(client), stores.files(self.site.state), self.said()
            )

    def in_pieces(self, *pieces: Iterator[stores.Piece]) -> Found:
        found: Found = {}
        for each in pieces:
            for name, places in stores.found_in(each, self.canaries.words).items():
                found.setdefault(name, set()).update(places)
        return found

    def said(self) -> Iterator[stores.Piece]:
        """What the processes write and show: logs, metrics, the operator's API, every page of the console."""
        yield "log", self.site.log.read_bytes()
        operator = {"Authorization": f"Bearer {self.site.demo['operator_key']}"}
        with httpx.Client(base_url=self.site.base_url, timeout=30) as client:
            yield "metrics", client.get("/metrics").content
            for name in (
                "batches",
                "ledger",
                "refusals",
                "logs",
                "usage",
                "stats",
                "keys",
                "tenants",
                "reports/summary",
            ):
                answer = client.get(f"/v1/admin/{name}", headers=operator)
                assert answer.status_code == 200, (name, answer.text)
                yield f"operator's {name}", answer.content
            yield from pages(client, self.site.demo["admin"])

    def elsewhere(self, found: Found, names: re.Pattern[str]) -> Found:
        """Of what has such a name, all that is not in Valkey's log of commands."""
        asked = {name: {each for each in found[name] if "valkey/" not in each} for name in found if names.match(name)}
        assert sum(bool(names.match(name)) for name in self.canaries.words) > 40
        return {name: places for name, places in asked.items() if places}

    def hold_to_table(self, found: Found) -> None:
        rows = table()
        wrong = []
        for name, places in found.items():
            for place in places:
                matching = [row for row in rows if fnmatch.fnmatchcase(place, row)]
                kind = name.split()[0]
                if not any(kind != "secret" and KINDS[kind] in rows[row] for row in matching):
                    wrong.append(f"{name} is in {place}")
                self.seen.update(matching)
        assert not wrong, "\n".join(sorted(wrong))


def pages(client: httpx.Client, admin: dict[str, str]) -> Iterator[stores.Piece]:
    """Every list of the console, and the first rows of each."""
    client.get("/admin/login/")
    form = {**admin, "csrfmiddlewaretoken": client.cookies["csrftoken"], "next": "/admin/"}
    answer = client.post("/admin/login/", data=form, headers={"Referer": f"{client.base_url}/admin/login/"})
    assert answer.status_code == 302, "the demo's administrator signs in"
    waiting, known = ["/admin/", "/admin/requests/", "/admin/playground/", "/admin/board/"], set()
    per_list: dict[str, int] = {}
    while waiting and len(known) < MAX_PAGES:
        path = waiting.pop(0)
        if path in known:
            continue
        known.add(path)
        answer = client.get(path)
        yield f"page {path}", answer.content
        for link in re.findall(r'href="(/admin/[a-z_]+/[a-z_]+/(?:[^/"?]+/(?:change|history)/)?)"', answer.text):
            kind = link.split("/")[3]
            if not link.endswith(("/change/", "/history/")) or per_list.get(kind, 0) < 3:
                per_list[kind] = per_list.get(kind, 0) + ("/change/" in link)
                waiting.append(link)
    assert len(known) > 30, f"only {len(known)} pages were seen"


def say_all(search: Search) -> tuple[Caller, Caller, dict[str, str]]:
    """Alice stores responses, Bob does not. Returns both, and the ids of Alice's files."""
    names = [tenant["name"] for tenant in search.site.demo["tenants"]]
    search.manage("stored_responses", "--tenant", names[0], "--days", "1")
    alice, bob = (search.caller(name) for name in names)
    alice.native()
    alice.held()
    alice.openai()
    alice.responses("stored response")
    alice.anthropic()
    alice.llama()
    bob.responses("plain response")
    alice.refused()
    alice.wrong_keys()
    alice.cut()
    files = alice.batch()
    alice.know_tokens("plain llama", "plain native", "held background", "plain response", "stored response", "held cut")
    return alice, bob, files


def hold_time_limits(search: Search, found: Found) -> None:
    """Whatever of it is in Redis goes by itself, within what its row says."""
    rows = dict(LIMIT.findall(PAGE.read_text()))
    with search.redis() as client:
        for place in {place for places in found.values() for place in places if place.startswith("redis ")}:
            limits = [seconds(limit) for row, limit in rows.items() if fnmatch.fnmatchcase(place, row)]
            left = client.ttl(place.split()[1])
            assert left == GONE or 0 < left <= max(limits), (place, left, limits)


def seconds(words: str) -> int:
    """The longest of the settings that are named."""
    names = re.findall(r"`([A-Z_]+_(?:SECONDS|HOURS))`", words)
    units = {"SECONDS": 1, "HOURS": 3600}
    return max(int(Config.model_fields[name.lower()].default * units[name.rsplit("_", 1)[1]]) for name in names)


def let_time_pass(search: Search, found: Found) -> None:
    """Everything is as old as it may become: keys in Redis end, rows are from long ago. Then what is due goes."""
    with search.redis() as client:
        for place in {place for places in found.values() for place in places if place.startswith("redis ")}:
            client.pexpire(place.split()[1], 1)
    port = int(search.site.base_url.rsplit(":", 1)[1])
    env = site_environment(search.site.state, port, DJANGO_SETTINGS_MODULE="llmsite.settings", **search.environment)
    subprocess.run([sys.executable, "-c", MAKE_OLD], env=env, cwd=REPOSITORY, timeout=60, check=True)
    assert search.manage("stored_responses", "--purge")["removed"] == 1
    removed = search.manage("purge_files")
    assert (removed["files"], removed["batches"]) == (4, 2)
    assert search.manage("purge")["wiped"] == ([] if search.environment.get("REDIS_URL") else ["valkey", "sqlite"])
    with search.redis() as client:
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])


def make_slots_old(state: Path) -> None:
    for path in (state / "slots").rglob("*.*"):
        os.utime(path, (0, 0))


def run(state: Path, database: Callable[[], Iterator[stores.Piece]], **environment: str) -> None:
    """The whole story; environment: settings of the site."""
    environment = {"LOG_FORMAT": "json", "LOG_LEVEL": "DEBUG", **environment}
    with running_site(state, **environment) as site:
        search = Search(site, database, environment)
        say_all(search)
        time.sleep(2.0)  # refusals are written after a second, and what ended is settled
        found = search.everywhere()
        search.hold_to_table(found)
        hold_time_limits(search, found)
        assert not search.elsewhere(found, NOWHERE)
        assert not {
            place for name in found if " unstored" in name for place in found[name] if "storedresponse" in place
        }
    found = search.in_pieces(stores.files(state))
    search.hold_to_table(found)
    rows = set(table()) - FOR_MOMENTS
    if environment.get("REDIS_URL"):
        rows -= {row for row in rows if row.startswith(("file valkey", "file db"))}
    assert search.seen >= rows, f"nothing was found in {rows - search.seen}: is the table right?"
    make_slots_old(state)
    with running_site(state, **environment) as site:
        search.site = site
        with search.redis() as client:
            places = {place for places in search.in_pieces(stores.redis_values(client)).values() for place in places}
        let_time_pass(search, {"": places})
        assert search.everywhere() == {}
