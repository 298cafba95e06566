"""GET /slots and the actions on a slot, over HTTP: a tenant's own, by its own numbers, and nothing of anyone else's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.conf import settings

from tests.in_process import MODEL, N_CTX, N_SLOTS, OTHER_MODEL, Client, FakeSpeed, InProcessSite, wait_until
from tests.timing import PATIENCE_SECONDS

pytestmark = [pytest.mark.integration, pytest.mark.api]

FRANCE = tuple(range(100, 120))
GERMANY = (*FRANCE[:15], 1, 2, 3, 4, 5, 6)
IDLE = {"n_ctx": N_CTX, "speculative": False, "is_processing": False}


@pytest.fixture
def alice(site: InProcessSite) -> Client:
    return site.client(site.cast.alice)


@pytest.fixture
def bob(site: InProcessSite) -> Client:
    return site.client(site.cast.bob)


def act(client: Client, slot: Any, action: str, filename: Any = None, **fields: Any) -> httpx.Response:
    body = {"json": {"filename": filename}} if filename is not None else fields
    return client.post(f"/slots/{slot}", params={"action": action}, **body)


def computed(last: dict[str, Any]) -> int:
    return int(last["receipt"]["prompt_tokens"] - last["receipt"]["cached_tokens"])


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == status
    return str(response.json()["error"]["message"])


def test_save_and_restore_as_llama_cpp_tests_it(site: InProcessSite, alice: Client) -> None:
    first = site.ask(site.cast.alice, FRANCE, 1, max_tokens=64)
    assert (computed(first), first["receipt"]["slot_id"]) == (20, 1)
    saved = act(alice, 1, "save", "slot1.bin")
    assert saved.status_code == 200, saved.text
    content = saved.json()
    assert (content["id_slot"], content["filename"], content["n_saved"]) == (1, "slot1.bin", 83)
    assert content["n_written"] > 0
    assert content["timings"]["save_ms"] >= 0
    assert computed(site.ask(site.cast.alice, GERMANY, 1)) == 6
    restored = act(alice, 0, "restore", "slot1.bin").json()
    assert (restored["n_restored"], restored["n_read"]) == (content["n_saved"], content["n_written"])
    assert computed(site.ask(site.cast.alice, GERMANY, 0)) == 6
    assert computed(site.ask(site.cast.alice, GERMANY, 1)) == 1


def test_erase_as_llama_cpp_tests_it(site: InProcessSite, alice: Client) -> None:
    assert computed(site.ask(site.cast.alice, FRANCE, 1)) == 20
    assert computed(site.ask(site.cast.alice, FRANCE, 1)) == 1
    erased = act(alice, 1, "erase")
    assert (erased.status_code, erased.json()) == (200, {"id_slot": 1, "n_erased": 35})
    assert computed(site.ask(site.cast.alice, FRANCE, 1)) == 20


def test_a_slot_outlives_a_restart_of_the_worker(site: InProcessSite, alice: Client) -> None:
    site.ask(site.cast.alice, FRANCE, 1)
    act(alice, 1, "save", "diary")
    site.stop_worker()
    site.start_worker()
    assert act(alice, 1, "restore", "diary").json()["n_restored"] == 35
    assert computed(site.ask(site.cast.alice, FRANCE, 1)) == 1


def test_an_empty_slot_is_saved_and_erased_as_nothing(alice: Client) -> None:
    assert act(alice, 2, "save", "nothing").json()["n_saved"] == 0
    assert act(alice, 2, "restore", "nothing").json()["n_restored"] == 0
    assert act(alice, 2, "erase").json()["n_erased"] == 0


def test_errors_come_in_llama_cpps_order_and_words(site: InProcessSite, alice: Client) -> None:
    for slot in ("x", "-1", "1.0", str(N_SLOTS), "9" * 30, "%00", "１"):
        assert "Invalid slot ID" in error_of(act(alice, slot, "nonsense", "../x"), 400)
    assert "Invalid action" in error_of(act(alice, 0, "nonsense", "../x"), 400)
    assert "Invalid action" in error_of(alice.post("/slots/0"), 400)
    assert error_of(act(alice, 0, "save", "../x"), 400) == "Invalid filename"
    error_of(act(alice, 0, "save", 7), 400)
    error_of(act(alice, 0, "save", json={}), 400)
    error_of(act(alice, 0, "save", content=b"\xff"), 400)
    assert "Unable to restore slot" in error_of(act(alice, 0, "restore", "missing"), 400)
    assert error_of(alice.get("/slots", params={"model": "no such"}), 404)


def test_a_damaged_file_is_refused_and_the_slot_is_empty_and_usable(site: InProcessSite, alice: Client) -> None:
    site.ask(site.cast.alice, FRANCE, 1)
    act(alice, 1, "save", "diary")
    (path,) = (settings.CONFIG.state / "slots" / str(site.cast.alice.tenant.pk)).glob("*.saved")
    path.write_bytes(path.read_bytes()[:-5])
    assert "Unable to restore slot: the file is damaged" in error_of(act(alice, 1, "restore", "diary"), 400)
    assert alice.get("/slots").json()[1] == {"id": 1, **IDLE}
    assert computed(site.ask(site.cast.alice, FRANCE, 1)) == 20


HOSTILE = [
    "", ".", "..", "...", "a..b", "../x", "..\\x", "/etc/passwd", "a/b", "a\\b", "a:b", "a*", "a?", 'a"', "a<", "a>",
    "a|", " a", "a ", "a.", "\0", "a\0b", "\n", "a\tb", "\x7f", "\x85", "\u202egpj.exe", "\ufeffa", "a\u200b",
    "x" * 256, "é" * 128, "~/.ssh/../../x", "%2e%2e/x", "C:\\x", "\\\\host\\share", "file:///etc/passwd", "....//",
    "a\r\nb",
]  # fmt: skip
HOSTILE += [
    f"{chr(number)}{place}" for number in [*range(32), *range(0x80, 0xA0)] for place in ("", "a", "a.bin", "/..")
]
LOOKS_BAD = [
    "%2e%2e",
    "%00",
    "~root",
    "nul",
    "con",
    "$(id)",
    "`id`",
    "-rf",
    "';--",
    "𝕬",
    "ａ",
    "saved",
    "{}",
    ".hidden",
]


def test_300_hostile_labels_touch_nothing_outside(site: InProcessSite, alice: Client) -> None:
    assert len(HOSTILE) + len(LOOKS_BAD) >= 300
    state: Path = settings.CONFIG.state
    before = {path for path in state.rglob("*") if path.is_file()}
    for label in HOSTILE:
        assert error_of(act(alice, 0, "save", label), 400) == "Invalid filename", repr(label)
    assert {path for path in state.rglob("*") if path.is_file()} == before
    for label in LOOKS_BAD:
        assert act(alice, 0, "save", label).status_code == 200, repr(label)
    written = {path for path in state.rglob("*") if path.is_file()} - before
    assert {path.parent for path in written} == {state / "slots" / str(site.cast.alice.tenant.pk)}
    assert all(path.suffix == ".saved" and path.stem.isalnum() for path in written)
    assert len(written) == len(LOOKS_BAD)


def test_bob_sees_saves_restores_and_erases_nothing_of_alice(site: InProcessSite, alice: Client, bob: Client) -> None:
    site.ask(site.cast.alice, FRANCE, 1)
    act(alice, 1, "save", "diary")
    assert bob.get("/slots").json() == [{"id": number, **IDLE} for number in range(N_SLOTS)]
    assert act(bob, 1, "save", "mine").json()["n_saved"] == 0
    assert act(bob, 1, "erase").json()["n_erased"] == 0
    assert "nothing is saved" in error_of(act(bob, 1, "restore", "diary"), 400)
    assert computed(site.ask(site.cast.bob, FRANCE, 1)) == 20
    assert computed(site.ask(site.cast.alice, FRANCE, 1)) == 1
    assert act(bob, 1, "save", "diary").json()["n_saved"] == 35
    assert act(alice, 0, "restore", "diary").json()["n_restored"] == 35


def test_a_tenant_sees_its_own_slots_and_an_operator_all(site: InProcessSite, alice: Client) -> None:
    site.ask(site.cast.bob, FRANCE)
    site.ask(site.cast.alice, FRANCE, 3)
    slots = alice.get("/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
    assert {name: slots[3][name] for name in ("id", *IDLE, "n_held")} == {"id": 3, **IDLE, "n_held": 35}
    assert slots[:3] == [{"id": number, **IDLE} for number in range(3)]
    operator = site.client(site.cast.operator)
    seen = operator.get("/slots").json()
    tenants = {site.cast.alice.tenant.pk, site.cast.bob.tenant.pk, None}
    assert {slot["tenant"] for slot in seen} == tenants
    assert sum(slot.get("n_held", 0) for slot in seen) == 70
    assert site.client().get("/slots").status_code == 401
    error_of(act(operator, 0, "erase"), 403)
    assert alice.get("/slots", params={"model": OTHER_MODEL}).json() == slots_of_nobody()
    assert error_of(site.client(site.cast.bob).get("/slots", params={"model": OTHER_MODEL}), 404)


def test_a_slot_keeps_what_its_last_task_was_as_long_as_it_holds_something_of_it(
    site: InProcessSite, alice: Client
) -> None:
    last = site.ask(site.cast.alice, FRANCE, 2)
    slot = alice.get("/slots").json()[2]
    assert not slot["is_processing"]
    assert last["receipt"]["prompt_tokens"] == slot["n_prompt_tokens"] == 20
    assert (slot["n_prompt_tokens_processed"], slot["n_prompt_tokens_cache"]) == (20, 0)
    assert slot["next_token"] == [{"has_next_token": False, "n_remain": 0, "n_decoded": 16}]
    assert slot["params"] == {"n_predict": 16, "max_tokens": 16}
    site.settle()
    assert alice.get(f"/v1/requests/{slot['id_task']}").json()["receipt"]["prompt_tokens"] == 20
    assert act(alice, 2, "erase").status_code == 200
    assert alice.get("/slots").json()[2] == {"id": 2, **IDLE}


def test_a_slot_is_speculative_where_drafts_are_made(site: InProcessSite, alice: Client) -> None:
    from inference.catalog import registry
    from inference.engine.backend import Abilities

    row = site.models[MODEL]
    row.draft_kind = "prompt_lookup"
    row.save()
    registry.forget()
    site.stop_worker()
    site.start_worker()
    assert {slot["speculative"] for slot in alice.get("/slots").json()} == {True}
    (model,) = [each for each in site.host._models.values() if each.served.is_default]
    model.abilities = Abilities(trim=False, reasons={"trim": "it is recurrent"})
    site.host.beat()
    assert {slot["speculative"] for slot in alice.get("/slots").json()} == {False}


def slots_of_nobody() -> list[dict[str, Any]]:
    return [{"id": number, **IDLE} for number in range(N_SLOTS)]


class TestWhileSomethingRuns:
    @pytest.fixture
    def fake_speed(self) -> FakeSpeed:
        return FakeSpeed(seconds_per_step=0.02)

    def test_a_busy_slot_says_so_and_actions_wait_for_it(self, site: InProcessSite, alice: Client, bob: Client) -> None:
        site.ask(site.cast.alice, FRANCE, 1, max_tokens=60, wait=False)
        wait_until(lambda: alice.get("/slots").json()[1]["is_processing"])
        slot = alice.get("/slots").json()[1]
        assert (slot["n_prompt_tokens"], slot["n_prompt_tokens_cache"]) == (20, 0)
        assert slot["next_token"][0]["n_decoded"] + slot["next_token"][0]["n_remain"] == 60
        assert "prompt" not in slot
        assert bob.get("/slots").json() == slots_of_nobody()
        assert act(alice, 1, "save", "diary").json()["n_saved"] == 79
        assert not alice.get("/slots").json()[1]["is_processing"]

    def test_a_slot_that_stays_busy_is_503_and_bounded(
        self, site: InProcessSite, alice: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from inference.api.llamacpp import slot_views

        monkeypatch.setattr(slot_views, "WAIT_SECONDS", 0.1)
        site.ask(site.cast.alice, FRANCE, 1, max_tokens=200, wait=False)
        wait_until(lambda: alice.get("/slots").json()[1]["is_processing"])
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(act(alice, 1, "erase").status_code)) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert answers == [503] * 6

    def test_no_slot_free_is_503_where_it_is_asked_for(self, site: InProcessSite, alice: Client, bob: Client) -> None:
        for number in range(N_SLOTS):
            site.ask(site.cast.alice, FRANCE, number, max_tokens=200, wait=False)
        wait_until(lambda: all(slot["is_processing"] for slot in alice.get("/slots").json()))
        assert error_of(alice.get("/slots", params={"fail_on_no_slot": "1"}), 503)
        assert bob.get("/slots", params={"fail_on_no_slot": "1"}).status_code == 200


def test_without_a_worker_it_is_503(site: InProcessSite, alice: Client) -> None:
    site.stop_worker()
    assert error_of(alice.get("/slots"), 503)
    assert error_of(act(alice, 0, "erase"), 503)


def test_where_nothing_may_be_written_every_action_is_501(alice: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.CONFIG, "slot_disk_mb", 0)
    for action in ("save", "restore", "erase", "nonsense"):
        assert error_of(act(alice, "x", action, "a"), 501)


def test_a_memory_that_cannot_be_saved_is_501_with_the_reason(site: InProcessSite, alice: Client) -> None:
    from inference.engine.backend import Abilities

    (model,) = [each for each in site.host._models.values() if each.served.is_default]
    model._runner._engine._backend.abilities = Abilities(save=False, reasons={"save": "it is recurrent"})
    assert "it is recurrent" in error_of(act(alice, 0, "save", "a"), 501)
    assert act(alice, 0, "erase").status_code == 200


def test_completions_name_their_slot(site: InProcessSite, alice: Client, bob: Client) -> None:
    body = {"prompt": "What is the capital of France today", "id_slot": 1, "n_predict": 8, "temperature": 0}
    first = alice.post("/completion", json=body).json()
    assert (first["id_slot"], first["timings"]["prompt_n"]) == (1, 7)
    assert act(alice, 1, "save", "france").json()["n_saved"] == first["tokens_cached"] == 14
    again = alice.post("/completion", json=body).json()
    assert (again["timings"]["prompt_n"], again["content"]) == (1, first["content"])
    assert act(alice, 1, "erase").json()["n_erased"] == 14
    assert alice.post("/completion", json=body).json()["timings"]["prompt_n"] == 7
    other = bob.post("/completion", json=body).json()
    assert (other["id_slot"], other["timings"]["prompt_n"], other["content"]) == (1, 7, first["content"])
    assert error_of(alice.post("/completion", json={**body, "id_slot": N_SLOTS}), 400)


def test_56_hellos_in_a_small_context_shift(site: InProcessSite, alice: Client) -> None:
    from inference.catalog import registry
    from inference.models import ServedModel

    site.stop_worker()
    ServedModel.objects.update(n_ctx=64)
    registry.forget()
    site.start_worker()
    body = {"prompt": "Hello " * 56, "n_predict": 64, "temperature": 0}
    answer = alice.post("/completion", json=body).json()
    assert (answer["tokens_predicted"], answer["truncated"]) == (64, True)
    ended = alice.post("/completion", json={**body, "n_predict": -1}).json()
    assert (ended["tokens_predicted"], ended["truncated"], ended["stop_type"]) == (8, True, "limit")
    native = {"prompt": "Hello " * 56, "max_new_tokens": 64}
    assert alice.post("/v1/generate", json={**native, "cache": False}).headers["x-usage-completion-tokens"] == "8"
    shifted = alice.post("/v1/generate", json={**native, "cache": False, "context_shift": True})
    assert shifted.headers["x-usage-completion-tokens"] == "64"


def test_props_say_what_the_memory_can_do(site: InProcessSite, alice: Client) -> None:
    props = alice.get("/props").json()
    assert props["context_shift"] is True
    assert props["abilities"] == {"trim": True, "copy": True, "shift": True, "save": True}
    assert props["is_sleeping"] is False
    (model,) = [each for each in site.host._models.values() if each.served.is_default]
    model.unload()
    site.host.beat()
    assert alice.get("/props").json()["is_sleeping"] is True
    site.stop_worker()
    assert alice.get("/props").json()["abilities"] is None
