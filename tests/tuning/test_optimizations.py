"""Searches begun in the console or left to the web: how far, cancelled, interrupted, alone, audited, and who may."""

from __future__ import annotations

import io
import json
import platform
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import IntegrityError, transaction
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import AuditEntry, Membership, StaffRole
from inference.catalog import registry
from inference.imports.rounds import Stopped
from inference.models import ModelVariant, ServedModel
from inference.tuning import desk, optimizer
from inference.tuning.models import Optimization
from inference.tuning.workshop import workshop
from inference.vetting.trial import Trial
from tests.conftest import Cast
from tests.tuning.fakes import WritingSteps

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
LIST, ADD = (reverse(f"admin:inference_optimization_{name}") for name in ("changelist", "add"))
MODELS = reverse("admin:inference_servedmodel_changelist")
State = Optimization.State


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, settings: Any) -> Path:
    """Where variants go."""
    changed = {**settings.CONFIG.model_dump(), "state_dir": tmp_path / "state"}
    settings.CONFIG = type(settings.CONFIG).model_validate(changed)
    return Path(settings.CONFIG.state)


@pytest.fixture
def console(client: Client) -> Client:
    user = User.objects.create_user("olga")
    StaffRole.objects.create(user=user, role=StaffRole.Role.OPERATOR)
    client.force_login(user)
    return client


def started(console: Client, base: ServedModel, **fields: Any) -> Any:
    asked = {"formats": "Q4_0,Q8_0", "min_gain": 3, "max_perplexity_increase": 3, "max_minutes": 20, "rounds": 1}
    asked["tunes_settings"] = "on"
    return console.post(ADD, {"base_model": base.pk, **asked, "seconds": 0.1, **fields}, follow=True)


def begun(base: ServedModel, **values: Any) -> Optimization:
    """As `started`, without a page."""
    row = Optimization(base_model=base, formats="Q4_0,Q8_0", rounds=1, **values)
    desk.ask(row)
    return row


def measure() -> None:
    """A round of the web's thread."""
    optimizer.Optimizer().measure_due()


def page_of(row: Optimization, name: str = "change") -> str:
    return reverse(f"admin:inference_optimization_{name}", args=[row.pk])


def text_of(response: Any) -> str:
    return str(response.content, "utf-8")


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.glob("*"))


def during(monkeypatch: pytest.MonkeyPatch, fake: WritingSteps, act: Callable[[], None]) -> None:
    """Do something while the first speed is measured."""
    measured, done = fake.speed, threading.Event()

    def speed(*args: Any) -> Any:
        if not done.is_set():
            done.set()
            act()
        return measured(*args)

    monkeypatch.setattr(fake, "speed", speed)


def test_an_operator_starts_it_sees_the_table_and_serves_what_it_found(
    console: Client, base: ServedModel, own_state: Path
) -> None:
    chosen = console.post(MODELS, {"action": "optimize", "_selected_action": [base.pk]}, follow=True)
    assert chosen.redirect_chain[-1][0] == f"{ADD}?base_model={base.pk}"
    assert f'<option value="{base.pk}" selected>' in text_of(chosen)
    page = started(console, base)
    row = Optimization.objects.get()
    assert page.redirect_chain[-1][0] == page_of(row)
    assert "Waits to be begun." in text_of(page) and "data-open" in text_of(page)
    assert (row.asked_by, row.name, row.started_at, row.rounds) == ("olga", "tiny", None, 1)

    measure()
    row.refresh_from_db()
    variant = ModelVariant.objects.get()
    assert (row.state, row.host, variant.is_active) == (State.DONE, platform.node(), False)
    assert files(own_state / "models" / "variants") == [Path(variant.path).name]
    shown = text_of(console.get(page_of(row)))
    for words in ("Q4_0", "15 tok/s (1.50)", "1.50x", "+0.00 %", "chosen", "may win", "Kept as the variant q4_0"):
        assert words in shown, words
    assert "data-open" not in shown and "1.50 times as fast" in text_of(console.get(LIST))

    assert console.get(page_of(row, "activate_this")).status_code == 405
    said = text_of(console.post(page_of(row, "activate_this"), follow=True))
    assert "tiny is served from q4_0 now." in said and "q4_0 is served." in said
    registry.forget()
    assert [(each.digest, each.quantization) for each in registry.every()] == [(variant.digest, "Q4_0")]
    ModelVariant.objects.all().delete()
    assert "There is no variant of it to serve." in text_of(console.get(page_of(row)))
    assert console.post(page_of(row, "activate_this")).status_code == 404


def test_its_page_says_which_step_goes_on(
    console: Client, base: ServedModel, fake: WritingSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(console, base)
    row, seen = Optimization.objects.get(), []
    during(monkeypatch, fake, lambda: seen.append(text_of(console.get(page_of(row, "state")))))
    measure()
    (words,) = seen
    assert "Step 7 of 9: round 1 of 1: speed of source" in words and "data-open" in words
    assert "data-open" not in text_of(console.get(page_of(row, "state")))


def test_who_asked_is_in_the_audit_log_and_so_is_what_came_of_it(console: Client, base: ServedModel) -> None:
    started(console, base)
    measure()
    entries = AuditEntry.objects.filter(model__in=("inference.optimization", "inference.modelvariant")).order_by("pk")
    asked, made = entries
    assert (asked.actor, asked.diff["asked for"][1]["formats"]) == ("olga", "Q4_0,Q8_0")
    assert (made.actor_kind, made.actor, made.action) == ("person", "olga", "create")


def test_one_runs_at_a_time_whoever_asks(console: Client, base: ServedModel) -> None:
    row = begun(base)
    assert "two would measure each other" in text_of(started(console, base))
    output = io.StringIO()
    with pytest.raises(CommandError):
        call_command("optimize_model", "tiny", "--json", stdout=output)
    assert json.loads(output.getvalue())["error"]["code"] == "optimization_running"
    with pytest.raises(IntegrityError), transaction.atomic():
        Optimization.objects.create(base_model=base, name="tiny")
    assert Optimization.objects.get() == row


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"formats": "Q9_9"}, "is none of Q4_0"),
        ({"rounds": 10}, "less than or equal to 9"),
        ({"max_minutes": 601}, "less than or equal to 600"),
        ({"min_gain": -91}, "greater than or equal to -90"),
        ({"seconds": "nan"}, "Enter a number"),
        ({"base_model": 0}, "valid choice"),
    ],
)
def test_mistakes_are_told_at_their_field(
    console: Client, base: ServedModel, fields: dict[str, Any], words: str
) -> None:
    assert words in text_of(started(console, base, **fields)) and not Optimization.objects.exists()


# Its ends


def test_it_is_cancelled_between_two_words_and_leaves_nothing(
    console: Client, base: ServedModel, fake: WritingSteps, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = begun(base)
    during(monkeypatch, fake, lambda: console.post(page_of(row, "cancel_this")))
    measure()
    row.refresh_from_db()
    assert (row.state, row.result, ModelVariant.objects.count()) == (State.CANCELLED, None, 0)
    assert len([call for call in fake.calls if call.startswith("speed")]) == 1, "it goes no further"
    assert files(own_state / "models" / "variants") == []
    assert "It had ended already" in text_of(console.post(page_of(row, "cancel_this"), follow=True))
    entry = AuditEntry.objects.filter(model="inference.optimization").latest("pk")
    assert (entry.actor, entry.diff) == ("olga", {"state": ["running", "cancelled"]})


def test_cancelled_in_its_last_moment_it_keeps_neither_variant_nor_file(
    base: ServedModel, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, passing = begun(base), Trial.run

    def cancelled(self: Trial, path: Path, vocabulary: Path) -> dict[str, Any]:
        assert desk.cancel(row)
        return passing(self, path, vocabulary)

    monkeypatch.setattr(Trial, "run", cancelled)
    measure()
    row.refresh_from_db()
    assert (row.state, ModelVariant.objects.count()) == (State.CANCELLED, 0)
    assert files(own_state / "models" / "variants") == []


def test_a_web_that_stops_ends_it_with_a_reason(
    base: ServedModel, fake: WritingSteps, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, stop = begun(base), threading.Event()
    during(monkeypatch, fake, stop.set)
    with pytest.raises(Stopped):
        optimizer.work(row, stop)
    row.refresh_from_db()
    assert (row.state, row.problem_code) == (State.FAILED, "interrupted")
    assert files(own_state / "models" / "variants") == []


def test_what_a_killed_process_left_is_ended_by_the_next_and_what_lives_is_not(
    console: Client, base: ServedModel
) -> None:
    row = begun(base)
    with workshop(Path(row.folder), 1):
        desk.begin(row)
        measure()
        row.refresh_from_db()
        assert row.state == State.RUNNING, "who holds the folder's lock lives"
    measure()
    row.refresh_from_db()
    assert (row.state, row.problem_code) == (State.FAILED, "interrupted")
    assert "Failed: The process that measured ended" in text_of(console.get(page_of(row)))
    assert "Waits to be begun." in text_of(started(console, base)), "and the next may begin"


def test_one_on_another_machine_is_dead_once_it_is_silent_for_long(base: ServedModel) -> None:
    row = begun(base)
    now = timezone.now()
    Optimization.objects.update(host="another", started_at=now, updated_at=now - timedelta(minutes=14))
    desk.end_the_dead(now)
    row.refresh_from_db()
    assert row.state == State.RUNNING
    desk.end_the_dead(now + timedelta(minutes=2))
    row.refresh_from_db()
    assert row.state == State.FAILED


def test_one_waits_while_another_one_that_was_cancelled_is_leaving(base: ServedModel) -> None:
    row = begun(base)
    with workshop(Path(row.folder), 1):
        measure()
    row.refresh_from_db()
    assert (row.state, row.started_at) == (State.RUNNING, None)
    measure()
    row.refresh_from_db()
    assert row.state == State.DONE


def test_what_cannot_be_measured_says_why(
    console: Client, base: ServedModel, fake: WritingSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _path: usage(1, 1, 0))
        row = begun(base)
        measure()
    row.refresh_from_db()
    assert (row.state, row.problem_code) == (State.FAILED, "disk_full")
    assert row.problem in text_of(console.get(page_of(row)))
    fake.fails["losses tiny"] = "<b>broken</b>"
    row = begun(base)
    measure()
    row.refresh_from_db()
    assert row.problem_code == "not_measured"
    assert "&lt;b&gt;broken" in text_of(console.get(page_of(row))) and "<b>broken" not in text_of(console.get(LIST))
    row = begun(base)
    answer = console.post(reverse("admin:inference_servedmodel_delete", args=[base.pk]), {"post": "yes"})
    assert answer.status_code == 302 and not ServedModel.objects.exists(), "a record keeps no model from being removed"
    measure()
    row.refresh_from_db()
    assert (row.state, row.problem_code, row.name) == (State.FAILED, "model_not_found", "tiny")


# Commands


def said(*words: str) -> Any:
    output = io.StringIO()
    call_command(*words, "--json", stdout=output)
    return json.loads(output.getvalue())


def test_a_command_leaves_it_to_the_web_lists_it_and_cancels_it(base: ServedModel) -> None:
    told = said("optimize_model", "tiny", "--formats", "Q4_0", "--rounds", "1", "--background")
    assert told["state"] == "running"
    (listed,) = said("optimizations")["optimizations"]
    assert (listed["id"], listed["state"], listed["result"]) == (told["id"], "running", None)
    assert said("optimizations", "cancel", str(told["id"]))["cancelled"] == [told["id"]]
    assert said("optimizations", "cancel", str(told["id"]))["cancelled"] == []
    said("optimize_model", "tiny", "--formats", "Q4_0", "--rounds", "1", "--background")
    measure()
    newest = said("optimizations")["optimizations"][0]
    assert (newest["state"], newest["result"]["variant"]["name"]) == ("done", "q4_0")
    output = io.StringIO()
    call_command("optimizations", stdout=output)
    assert "1.50x" in output.getvalue() and "cancelled" in output.getvalue()
    with pytest.raises(CommandError, match="no such one"):
        said("optimizations", "cancel", "999999")


def test_what_a_command_measures_is_seen_in_the_console_and_left_alone_by_the_web(
    console: Client, base: ServedModel, fake: WritingSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def look() -> None:
        measure()
        seen.append(text_of(console.get(LIST)))

    during(monkeypatch, fake, look)
    result = said("optimize_model", "tiny", "--formats", "Q4_0", "--rounds", "1")
    assert "speed of source" in seen[0]
    row = Optimization.objects.get()
    assert (row.state, row.result, row.is_attended) == (State.DONE, result, True)


def test_the_web_does_not_begin_what_a_command_sees_to(base: ServedModel) -> None:
    row = begun(base, is_attended=True)
    measure()
    row.refresh_from_db()
    assert (row.state, row.started_at) == (State.RUNNING, None)
    Optimization.objects.update(updated_at=timezone.now() - timedelta(minutes=16))
    measure()
    row.refresh_from_db()
    assert row.problem_code == "interrupted", "the command was killed before it began"


def test_a_command_hears_that_it_was_cancelled(
    base: ServedModel, fake: WritingSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(monkeypatch, fake, lambda: [desk.cancel(row) for row in Optimization.objects.all()] and None)
    output = io.StringIO()
    with pytest.raises(CommandError):
        call_command("optimize_model", "tiny", "--formats", "Q4_0", "--json", stdout=output)
    assert json.loads(output.getvalue())["error"]["code"] == "optimization_cancelled"


def test_settings_are_left_alone_where_that_is_asked_for(
    console: Client, base: ServedModel, fake: WritingSteps
) -> None:
    fake.one_thread = 2.0
    assert said("optimize_model", "tiny", "--formats", "Q4_0")["variant"]["n_threads"] == 1
    assert said("optimize_model", "tiny", "--formats", "Q4_0", "--formats-only")["variant"]["n_threads"] is None
    started(console, base, tunes_settings="")
    measure()
    assert Optimization.objects.latest("pk").result["settings_tried"] == []


def test_something_slower_is_kept_where_that_is_asked_for(base: ServedModel, fake: WritingSteps) -> None:
    fake.times.update(Q4_0=0.95)
    for gain, kept in (("3", None), ("-10", "q4_0")):
        result = said("optimize_model", "tiny", "--formats", "Q4_0", f"--min-gain={gain}")
        assert (result["variant"] or {}).get("name") == kept
    assert ModelVariant.objects.get().measured["gain"] == pytest.approx(0.95)


# Who may


def test_auditors_look_and_do_nothing_and_people_of_tenants_see_nothing(
    console: Client, client: Client, cast: Cast, base: ServedModel
) -> None:
    done, auditor, owner = begun(base), User.objects.create_user("auditor"), User.objects.create_user("owner")
    measure()
    running = begun(base)
    StaffRole.objects.create(user=auditor, role=StaffRole.Role.AUDITOR)
    Membership.objects.create(user=owner, tenant=cast.charlie.tenant, role="owner")
    looks = (LIST, page_of(done), page_of(running), page_of(running, "state"))
    acts = (page_of(running, "cancel_this"), page_of(done, "activate_this"))
    for row, page in zip((running, done), acts, strict=True):
        assert f'formaction="{page}"' in text_of(console.get(page_of(row)))
    client.force_login(auditor)
    assert all(client.get(page).status_code == 200 for page in looks)
    assert all("formaction" not in text_of(client.get(page)) for page in looks)
    assert client.get(ADD).status_code == started(client, base).status_code == 403
    assert "Find its fastest file" not in text_of(client.get(MODELS))
    client.force_login(owner)
    assert all(client.get(page).status_code in (403, 404) for page in (*looks, ADD))
    for person in (auditor, owner):
        client.force_login(person)
        assert all(client.post(page).status_code in (403, 404) for page in acts)
        client.post(LIST, {"action": "cancel", "_selected_action": [running.pk]})
        client.post(MODELS, {"action": "optimize", "_selected_action": [base.pk]})
    running.refresh_from_db()
    assert running.state == State.RUNNING and Optimization.objects.count() == 2
    assert not ModelVariant.objects.filter(is_active=True).exists()
    client.logout()
    assert client.get(page_of(running, "state")).status_code == 302
