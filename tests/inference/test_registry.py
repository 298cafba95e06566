"""Registering models and asking for them by name: who sees what, one default, nothing half done."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.db import IntegrityError

from accounts.identity import known_keys
from accounts.models import Plan, Tenant
from accounts.trail.refusals import Refusal
from inference.catalog import model_rows, registry
from inference.catalog.model_memory import estimate_memory
from inference.catalog.served import snapshot
from inference.chat.prompt import MAX_TEMPLATE_BYTES, ChatPrompt, Message
from inference.models import ServedModel
from inference.vetting import inspection
from inference.vetting.inspection import RegistrationError, vocabulary_path
from tests.inference import gguf_files
from tests.inference.gguf_files import FailingTrial, PassingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


@dataclass(frozen=True)
class Caller:
    tenant_id: int
    allowed_models: frozenset[str] | None = None
    allowed_adapters: frozenset[str] | None = None


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    registry.forget()
    yield
    registry.forget()


@pytest.fixture
def tenants() -> dict[str, Tenant]:
    plan = Plan.objects.create(name="plan")
    return {name: Tenant.objects.create(name=name, plan=plan) for name in ("Alice's", "Bob's", "Charlie's")}


def caller(tenants: dict[str, Tenant], name: str) -> Caller:
    return Caller(tenants[name].pk)


ANYBODY = Caller(0)


def register(folder: Path, name: str, **options: Any) -> ServedModel:
    """A file of its own for each name, so digests differ."""
    path = gguf_files.write(folder, f"{name}.gguf", changes={"general.name": (8, name)})
    return model_rows.register(path, name, trial=PassingTrial(), **options)


def refusal(name: str | None, who: Caller) -> str:
    with pytest.raises(Refusal) as caught:
        registry.resolve(name, who)
    return caught.value.code


# Registering


def test_a_registered_model_is_served_as_its_file_says(tmp_path: Path) -> None:
    row = register(tmp_path, "tiny", aliases=["default-chat"], n_ctx=1024, n_slots=4, notes="for tests")
    served = registry.resolve("tiny", ANYBODY)
    assert (served.n_ctx, served.n_slots, served.trained_context, served.vocabulary_size) == (1024, 4, 4096, 4)
    assert (served.digest, served.path) == (row.digest, tmp_path / "tiny.gguf")
    assert (served.bos_token_id, served.eos_token_id, served.add_bos_token) == (0, 1, True)
    assert served.chat_template == "{{ messages[0].content }}"
    assert served.vocabulary_path == settings.CONFIG.state / "models" / "vocab" / f"{row.digest}.gguf"
    assert served.vocabulary_path.is_file()
    assert registry.resolve("default-chat", ANYBODY) is served
    with pytest.raises(dataclasses.FrozenInstanceError):
        served.n_ctx = 1  # type: ignore[misc]


def test_the_progress_of_hashing_ends_at_the_size_of_the_file(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path)
    seen: list[tuple[int, int]] = []
    model_rows.register(path, "tiny", trial=PassingTrial(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_registering_again_changes_only_what_is_given(tmp_path: Path) -> None:
    register(tmp_path, "tiny", n_slots=4, aliases=["chat"])
    row = register(tmp_path, "tiny", n_ctx=512)
    assert (row.n_slots, row.n_ctx, row.aliases, ServedModel.objects.count()) == (4, 512, ["chat"], 1)


def test_a_file_that_did_not_change_is_not_inspected_again(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path)
    model_rows.register(path, "tiny", trial=PassingTrial())
    before = PassingTrial.calls
    model_rows.register(path, "tiny", trial=PassingTrial())
    assert PassingTrial.calls == before
    model_rows.register(path, "tiny", trial=PassingTrial(), force=True)
    assert PassingTrial.calls == before + 1
    path.write_bytes(gguf_files.build({"general.name": (8, "Another")}))
    assert model_rows.register(path, "tiny", trial=PassingTrial()).metadata["title"] == "Another"
    vocabulary_path(ServedModel.objects.get().digest).unlink()
    model_rows.register(path, "tiny", trial=PassingTrial())
    assert vocabulary_path(ServedModel.objects.get().digest).is_file()


def test_the_context_of_a_new_model_fits_its_training(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path, changes={"llama.context_length": (4, 256)})
    assert model_rows.register(path, "small", trial=PassingTrial()).n_ctx == 256


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"general.type": (8, "adapter")}, "not_a_model"),
        ({"general.architecture": (8, "clip")}, "not_a_model"),
        ({"llama.context_length": None}, "not_a_model"),
        ({"tokenizer.ggml.tokens": None}, "not_a_model"),
        ({"tokenizer.chat_template": (8, "x" * (MAX_TEMPLATE_BYTES + 1))}, "chat_template_too_large"),
        ({"general.architecture": None}, "gguf_malformed"),
    ],
)
def test_files_that_cannot_be_served_are_refused_before_hashing(
    tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    path = gguf_files.write(tmp_path, changes=changes)
    with pytest.raises(RegistrationError) as caught:
        model_rows.register(path, "bad", trial=PassingTrial(), progress=lambda *_: pytest.fail("it was hashed"))
    assert (caught.value.code, list(caught.value.fields), ServedModel.objects.count()) == (code, ["path"], 0)


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="no weights"):
        model_rows.register(gguf_files.write(tmp_path, tensors=()), "bad", trial=PassingTrial())


def test_a_failed_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path, changes={"general.name": (8, "crashes")})
    with pytest.raises(RegistrationError, match="SIGSEGV") as caught:
        model_rows.register(path, "bad", trial=FailingTrial())
    folder = vocabulary_path("x").parent
    assert (caught.value.code, ServedModel.objects.count()) == ("trial_failed", 0)
    assert not [entry for entry in folder.iterdir() if "trial" in entry.name]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path)

    class Meddling(PassingTrial):
        def run(self, path: Path, vocabulary: Path) -> dict[str, Any]:
            path.write_bytes(gguf_files.build({"general.name": (8, "swapped")}))
            return super().run(path, vocabulary)

    with pytest.raises(RegistrationError) as caught:
        model_rows.register(path, "tiny", trial=Meddling())
    assert caught.value.code == "file_changed"


@pytest.mark.parametrize(("left", "code"), [(100, "gguf_truncated"), (None, "gguf_missing")])
def test_a_file_that_shrinks_or_goes_while_it_is_hashed_is_refused(tmp_path: Path, left: int | None, code: str) -> None:
    path = gguf_files.write(tmp_path)

    def meddle(_done: int, _total: int) -> None:
        if left is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:left])

    with pytest.raises(RegistrationError) as caught:
        model_rows.register(path, "tiny", trial=PassingTrial(), progress=meddle)
    assert caught.value.code == code


def test_a_file_that_goes_before_it_is_hashed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_files.write(tmp_path)
    header = inspection.check_header(path)

    def check_and_remove(path: Path) -> Any:
        path.unlink()
        return header

    monkeypatch.setattr(inspection, "check_header", check_and_remove)
    with pytest.raises(RegistrationError) as caught:
        model_rows.register(path, "tiny", trial=PassingTrial())
    assert caught.value.code == "gguf_unreadable"


def test_a_state_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("a file where a folder must be")
    monkeypatch.setattr(inspection, "vocabulary_path", lambda digest: tmp_path / "occupied" / digest)
    with pytest.raises(RegistrationError) as caught:
        model_rows.register(gguf_files.write(tmp_path), "tiny", trial=PassingTrial())
    assert caught.value.code == "state_unwritable"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n_ctx": 5000}, "n_ctx"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_slots": 257}, "n_slots"),
        ({"n_lanes": 17}, "n_lanes"),
        ({"kv_type": "q2"}, "kv_type"),
        ({"pool": "No Pool"}, "pool"),
        ({"pool": "gpu\n"}, "pool"),
        ({"aliases": ["spaces are bad"]}, "aliases"),
        ({"aliases": ["twice", "twice"]}, "aliases"),
        ({"aliases": ["tiny"]}, "aliases"),
        ({"aliases": "text"}, "aliases"),
        ({"aliases": [f"name-{number}" for number in range(33)]}, "aliases"),
        ({"capabilities": ["generate"]}, "capabilities"),
    ],
)
def test_wrong_options_are_errors_of_their_field(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(RegistrationError) as caught:
        register(tmp_path, "tiny", **options)
    assert (caught.value.code, list(caught.value.fields)) == ("invalid", [field])
    assert not ServedModel.objects.exists()


@pytest.mark.parametrize("name", ["", "-dash", "a b", "a" * 101, "line\n"])
def test_names_that_could_confuse_are_refused(tmp_path: Path, name: str) -> None:
    path = gguf_files.write(tmp_path)
    with pytest.raises(RegistrationError) as caught:
        model_rows.register(path, name, trial=PassingTrial())
    assert list(caught.value.fields) == ["name"]


def test_an_unknown_option_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="n_context"):
        register(tmp_path, "tiny", n_context=5)


def test_a_name_means_one_model_only(tmp_path: Path) -> None:
    register(tmp_path, "first", aliases=["chat"])
    with pytest.raises(RegistrationError, match="already means the model 'first'"):
        register(tmp_path, "chat")
    with pytest.raises(RegistrationError, match="already means the model 'first'"):
        register(tmp_path, "second", aliases=["chat"])


def test_two_registrations_at_the_same_moment_are_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collide(*_args: object) -> None:
        raise IntegrityError("served_model_one_default")

    monkeypatch.setattr(model_rows, "settle_default", collide)
    with pytest.raises(RegistrationError) as caught:
        register(tmp_path, "tiny")
    assert (caught.value.code, ServedModel.objects.count()) == ("conflict", 0)


# The default


def test_there_is_exactly_one_default_whatever_is_registered(tmp_path: Path) -> None:
    register(tmp_path, "first")
    assert registry.resolve(None, ANYBODY).name == "first"
    register(tmp_path, "second")
    assert registry.resolve(None, ANYBODY).name == "first"
    register(tmp_path, "third", default=True)
    assert registry.resolve(None, ANYBODY).name == "third"
    model_rows.make_default(ServedModel.objects.get(name="second").pk)
    default = registry.default()
    assert default is not None
    assert default.name == "second"
    assert ServedModel.objects.filter(is_default=True).count() == 1


def test_removing_the_default_promotes_another(tmp_path: Path) -> None:
    first = register(tmp_path, "first")
    register(tmp_path, "second", load_mode="off")
    register(tmp_path, "third")
    assert model_rows.remove([first.pk]) == 1
    assert registry.resolve(None, ANYBODY).name == "third"


def test_without_any_model_the_answer_is_no_model() -> None:
    assert refusal(None, ANYBODY) == "no_model"
    assert registry.default() is None
    assert refusal("tiny", ANYBODY) == "model_not_found"


def test_a_model_that_is_switched_off_is_not_loaded(tmp_path: Path) -> None:
    row = register(tmp_path, "tiny")
    assert model_rows.set_load_mode([row.pk], "off") == 1
    assert (refusal("tiny", ANYBODY), refusal(None, ANYBODY)) == ("llm_not_loaded", "llm_not_loaded")
    assert (registry.visible(ANYBODY), registry.in_pool("default")) == ([], [])
    assert [model.name for model in registry.every()] == ["tiny"]
    with pytest.raises(ValueError, match="sometimes"):
        model_rows.set_load_mode([row.pk], "sometimes")


# Who sees what


def test_a_granted_model_does_not_exist_for_charlie(tmp_path: Path, tenants: dict[str, Tenant]) -> None:
    register(tmp_path, "shared", default=True)
    register(
        tmp_path,
        "private",
        aliases=["secret"],
        visibility="granted",
        granted_tenants=[tenants["Alice's"], tenants["Bob's"]],
    )
    for name in ("Alice's", "Bob's"):
        assert [model.name for model in registry.visible(caller(tenants, name))] == ["private", "shared"]
        assert registry.resolve("secret", caller(tenants, name)).name == "private"
    charlie = caller(tenants, "Charlie's")
    assert [model.name for model in registry.visible(charlie)] == ["shared"]
    texts = set()
    for name in ("private", "secret", "invented"):
        with pytest.raises(Refusal) as caught:
            registry.resolve(name, charlie)
        assert caught.value.code == "model_not_found"
        texts.add(caught.value.message.replace(name, "NAME"))
    assert len(texts) == 1


def test_a_default_that_is_not_granted_does_not_exist_for_charlie(tmp_path: Path, tenants: dict[str, Tenant]) -> None:
    register(tmp_path, "private", visibility="granted", granted_tenants=[tenants["Alice's"]])
    assert registry.resolve(None, caller(tenants, "Alice's")).name == "private"
    assert refusal(None, caller(tenants, "Charlie's")) == "model_not_found"


def test_a_pool_holds_its_own_models(tmp_path: Path) -> None:
    register(tmp_path, "one")
    register(tmp_path, "two", pool="gpu")
    assert [model.name for model in registry.in_pool("gpu")] == ["two"]


# The cache


def test_questions_cost_three_queries_in_all(tmp_path: Path, django_assert_num_queries: Any) -> None:
    for number in range(5):
        register(tmp_path, f"model-{number}")
    registry.forget()
    with django_assert_num_queries(3):
        for _ in range(20):
            registry.resolve("model-3", ANYBODY)
            registry.visible(ANYBODY)


def test_a_change_elsewhere_is_seen_when_the_cache_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path, "tiny")
    registry.resolve("tiny", ANYBODY)
    ServedModel.objects.update(n_slots=3)
    assert registry.resolve("tiny", ANYBODY).n_slots == 8
    monkeypatch.setattr(registry, "CACHE_SECONDS", 0.0)
    assert registry.resolve("tiny", ANYBODY).n_slots == 3


def test_a_change_that_another_process_announces_is_seen_at_once(tmp_path: Path) -> None:
    register(tmp_path, "tiny")
    registry.resolve("tiny", ANYBODY)
    ServedModel.objects.update(n_slots=3)
    known_keys.CACHE.forget()  # what its watcher does when the counter in Redis has moved
    assert registry.resolve("tiny", ANYBODY).n_slots == 3


@pytest.mark.django_db(transaction=True)
def test_a_committed_change_moves_the_counter_for_other_processes(tmp_path: Path, valkey: Any) -> None:
    before = int(valkey.get(known_keys.VERSION_KEY) or 0)
    register(tmp_path, "tiny")
    assert int(valkey.get(known_keys.VERSION_KEY) or 0) > before


def test_what_was_read_before_a_change_is_not_kept_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path, "tiny")
    registry.forget()
    read = registry._read

    def read_slowly(version: int) -> Any:
        catalogue = read(version)
        registry.forget()  # another thread changes the registry while this one still reads
        return catalogue

    monkeypatch.setattr(registry, "_read", read_slowly)
    registry.resolve("tiny", ANYBODY)
    assert registry._catalogue is None


def test_many_threads_get_the_same_answer(tmp_path: Path) -> None:
    register(tmp_path, "tiny")
    registry.resolve("tiny", ANYBODY)
    names: list[str] = []
    threads = [
        threading.Thread(target=lambda: names.extend(registry.resolve("tiny", ANYBODY).name for _ in range(200)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["tiny"] * 1600


def test_a_cached_answer_takes_microseconds(tmp_path: Path) -> None:
    register(tmp_path, "tiny")
    registry.resolve("tiny", ANYBODY)
    began = time.thread_time()
    for _ in range(1000):
        registry.resolve("tiny", ANYBODY)
    assert time.thread_time() - began < 0.5


# Memory


def test_memory_is_weights_and_cache_and_scores() -> None:
    metadata = {"tensor_bytes": 1000, "kv_elements_per_token": 10, "vocabulary_size": 100}
    need = estimate_memory(metadata, n_ctx=300, n_slots=2, kv_type="f16")
    assert (need.weights_bytes, need.kv_bytes, need.compute_bytes) == (1000, 512 * 2 * 10 * 2, 400 * 514)
    assert need.total_bytes == 1000 + 20480 + 205_600
    smaller = estimate_memory(metadata, n_ctx=300, n_slots=2, kv_type="q8_0")
    assert smaller.kv_bytes == 512 * 2 * 10 * 34 // 32
    lanes = estimate_memory(metadata, n_ctx=300, n_slots=2, kv_type="f16", n_lanes=3)
    assert (lanes.weights_bytes, lanes.kv_bytes) == (1000, 3 * need.kv_bytes)
    assert lanes.compute_bytes == 3 * need.compute_bytes
    assert estimate_memory({}, n_ctx=8, n_slots=1, kv_type="q4_0").total_bytes == 0


def test_a_row_costs_no_query_to_turn_into_a_snapshot(tmp_path: Path, django_assert_num_queries: Any) -> None:
    row = register(tmp_path, "tiny")
    with django_assert_num_queries(0):
        assert snapshot(row, [7]).granted_tenant_ids == frozenset({7})


# Chat templates

TALK = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHATTING = {"tokenizer.chat_template": (8, TALK)}
SHORT = ChatPrompt(messages=(Message(role="user", content="x"),))


def test_a_template_is_tried_at_registration_and_its_facts_are_kept(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path, changes=CHATTING)
    row = model_rows.register(path, "tiny", trial=PassingTrial())
    served = registry.resolve("tiny", ANYBODY)
    assert served.chat is not None
    assert served.template_for(SHORT) is served.chat
    assert (served.chat.source, served.chat.has_system, served.chat.has_tools) == (TALK, True, False)
    assert row.metadata["chat"]["default"].items() <= served.chat.facts().items()


def test_a_template_that_is_no_good_leaves_a_model_without_conversations(tmp_path: Path) -> None:
    model_rows.register(gguf_files.write(tmp_path), "tiny", trial=PassingTrial())
    served = registry.resolve("tiny", ANYBODY)
    assert served.chat is None
    assert "leaves out what was said" in ServedModel.objects.get().metadata["chat"]["default"]["error"]
    with pytest.raises(Refusal) as caught:
        served.template_for(SHORT)
    assert caught.value.code == "capability_not_supported"


def test_a_second_template_named_tool_use_serves_requests_with_tools(tmp_path: Path) -> None:
    with_tools = TALK + "{{ tools | tojson }}"
    changes = {**CHATTING, "tokenizer.chat_template.tool_use": (8, with_tools)}
    model_rows.register(gguf_files.write(tmp_path, changes=changes), "tiny", trial=PassingTrial())
    served = registry.resolve("tiny", ANYBODY)
    assert served.template_for(SHORT).source == TALK
    assert served.template_for(dataclasses.replace(SHORT, tools=({"type": "function"},))).source == with_tools


def test_an_operators_template_takes_the_place_of_the_files(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path, changes=CHATTING)
    own = TALK + "{{ tools | tojson }}"
    model_rows.register(path, "tiny", trial=PassingTrial(), chat_template=own)
    served = registry.resolve("tiny", ANYBODY)
    assert served.chat is not None
    assert (served.chat.source, served.chat.has_tools, served.chat_template) == (own, True, own)
    model_rows.register(path, "tiny", trial=PassingTrial(), n_slots=2)
    assert registry.resolve("tiny", ANYBODY).chat == served.chat
    model_rows.register(path, "tiny", trial=PassingTrial(), chat_template="")
    again = registry.resolve("tiny", ANYBODY).chat
    assert again is not None
    assert again.source == TALK


def test_an_operators_template_that_is_no_good_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path, changes=CHATTING)
    model_rows.register(path, "tiny", trial=PassingTrial())
    for bad in ("{{ messages", "Hello", "x" * (MAX_TEMPLATE_BYTES + 1)):
        with pytest.raises(RegistrationError) as caught:
            model_rows.register(path, "tiny", trial=PassingTrial(), chat_template=bad, n_slots=3)
        assert (caught.value.code, list(caught.value.fields)) == ("chat_template_invalid", ["chat_template"])
    row = ServedModel.objects.get()
    assert (row.chat_template, row.chat_facts, row.n_slots) == ("", {}, 8)


def test_a_model_of_an_earlier_version_is_inspected_again_for_its_template(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path, changes=CHATTING)
    row = model_rows.register(path, "tiny", trial=PassingTrial())
    del row.metadata["chat"], row.metadata["chat_templates"]
    row.save()
    registry.forget()
    assert registry.resolve("tiny", ANYBODY).chat is None
    model_rows.register(path, "tiny", trial=PassingTrial())
    assert registry.resolve("tiny", ANYBODY).chat is not None


# Embeddings


@pytest.mark.parametrize(
    ("header", "options", "embeds", "pooling"),
    [
        ({}, {}, False, "mean"),
        ({}, {"capabilities": {"embeddings": True}}, True, "mean"),
        ({}, {"capabilities": {"embeddings": True}, "embedding_pooling": "last"}, True, "last"),
        ({"llama.pooling_type": (4, 3)}, {}, True, "last"),
        ({"llama.pooling_type": (4, 2)}, {"embedding_pooling": "mean"}, True, "mean"),
        ({"llama.pooling_type": (4, 1)}, {"capabilities": {"embeddings": False}}, False, "mean"),
        ({"llama.pooling_type": (4, 4)}, {"capabilities": {"embeddings": True}}, False, "mean"),
    ],
)
def test_a_file_says_whether_it_embeds_unless_the_operator_does(
    tmp_path: Path, header: dict[str, Any], options: dict[str, Any], embeds: bool, pooling: str
) -> None:
    path = gguf_files.write(tmp_path, "one.gguf", changes=header)
    model_rows.register(path, "one", trial=PassingTrial(), **options)
    served = registry.resolve("one", ANYBODY)
    assert (served.embeds, served.pooling, served.generates) == (embeds, pooling, True)
    if not embeds:
        with pytest.raises(Refusal) as caught:
            served.check_ability(embeds=True)
        assert caught.value.code == "capability_not_supported"


def test_an_encoder_embeds_and_does_not_generate(tmp_path: Path) -> None:
    changes = {"llama.attention.causal": (7, False), "llama.pooling_type": (4, 1)}
    path = gguf_files.write(tmp_path, "one.gguf", changes=changes)
    model_rows.register(path, "one", trial=PassingTrial())
    served = registry.resolve("one", ANYBODY)
    assert (served.embeds, served.generates, served.embedding_length) == (True, False, 64)
    with pytest.raises(Refusal) as caught:
        served.check_ability(embeds=False)
    assert caught.value.code == "capability_not_supported"


def test_vectors_need_memory_of_four_slots_more() -> None:
    metadata = {"tensor_bytes": 1000, "kv_elements_per_token": 10, "vocabulary_size": 100}
    options: dict[str, Any] = {"n_ctx": 300, "n_slots": 2, "kv_type": "q8_0"}
    plain, more = (estimate_memory(metadata, **options, embeds=embeds) for embeds in (False, True))
    assert more.kv_bytes - plain.kv_bytes == 4 * 512 * 10 * 2
    assert more.compute_bytes - plain.compute_bytes == 2 * 400 * 128
