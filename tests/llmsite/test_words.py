"""What people read in the console: words that are code look like it, and no page shows the marks of Markdown."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from django.urls import reverse

from llmsite.console.words import with_code
from tests.accounts.test_roles import House, house, page, registered  # noqa: F401 a fixture


class Words(HTMLParser):
    """The text of a page, titles and placeholders included, without scripts, styles and what is in fields."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._within: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style", "textarea"):
            self._within.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("title", "placeholder", "aria-label")]

    def handle_endtag(self, tag: str) -> None:
        if self._within and self._within[-1] == tag:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if not self._within:
            self.found.append(data)


@pytest.mark.integration
@pytest.mark.django_db
@pytest.mark.parametrize("person", ["superuser", "auditor"])
def test_no_page_of_a_row_shows_a_backtick(
    house: House,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    person: str,
) -> None:
    """Lists, empty forms, forms that come back with errors, rows that may be changed and rows that may be read."""
    monkeypatch.setattr("llmsite.doctor.look_at_llama", lambda: iter(()))
    client, wrong, number = house.client(person), [], 0
    rows = {**house.common, **house.alices}
    for label in registered():
        asked = [client.get(page(label, "changelist")), client.get(page(label, "add")), client.post(page(label, "add"))]
        if label in rows:
            asked += [
                client.get(page(label, "change", rows[label].pk)),
                client.post(page(label, "change", rows[label].pk)),
            ]
        for answer in asked:
            if answer.status_code == 200:
                number += 1
                wrong += [f"{label}: {text}" for text in Words(answer.content.decode()).found if "`" in text]
    for name in ("admin:index", "console-settings"):
        wrong += [text for text in Words(client.get(reverse(name)).content.decode()).found if "`" in text]
    assert not wrong, "\n".join(wrong)
    assert number > 50


@pytest.mark.integration
@pytest.mark.django_db
def test_what_is_code_is_marked_as_code(house: House) -> None:  # noqa: F811
    add = house.client("superuser").get(page("inference.adapter", "add")).content.decode()
    assert "also as <code>model:name</code>" in add
    read = house.client("auditor").get(page("inference.adapter", "change", house.alices["inference.adapter"].pk))
    assert "also as <code>model:name</code>" in read.content.decode()


@pytest.mark.unit
def test_a_mark_without_its_other_stays_a_mark() -> None:
    assert with_code("one ` alone\nand ` another") == "one ` alone\nand ` another"
    assert with_code("`a` and `b`, <b>bold</b>") == "<code>a</code> and <code>b</code>, <b>bold</b>"
