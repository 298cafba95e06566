"""Drafts as an operator sets them and a tenant bounds them: registry, models.yaml, worker, native bodies, metrics."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import IntegrityError, transaction
from django.db.models.deletion import ProtectedError
from prometheus_client import REGISTRY
from pydantic import ValidationError

from inference.api.native.schemas import GenerateBody
from inference.catalog import model_rows, registry
from inference.catalog.model_memory import estimate_memory, memory_of
from inference.catalog.served import snapshot
from inference.engine.backend import Abilities
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.engine import Engine
from inference.engine.fake_backend import FakeBackend
from inference.engine.speculative import PromptLookup
from inference.engine.types import Decoding, EngineError, Speculation
from inference.models import ServedModel
from inference.site_file import models_yaml
from inference.site_file.models_form import ModelsYamlError
from inference.transport.queue import Pulse
from inference.vetting.inspection import RegistrationError, vocabulary_path
from inference.worker import hosted
from inference.worker.worker_metrics import EngineMetrics
from tests.inference import gguf_files
from tests.inference.gguf_files import PassingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

OTHER_TOKENS = {"tokenizer.ggml.tokens": (9, (8, ["<s>", "</s>", "a", "c"]))}


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    registry.forget()
    yield
    registry.forget()


def file(folder: Path, name: str, changes: dict[str, Any] | None = None) -> Path:
    """A file of its own for each name, so digests differ."""
    return gguf_files.write(folder, f"{name}.gguf", changes={"general.name": (8, name), **(changes or {})})


def register(folder: Path, name: str, changes: dict[str, Any] | None = None, **options: Any) -> ServedModel:
    return model_rows.register(file(folder, name, changes), name, trial=PassingTrial(), **options)


# Registering


def test_nobody_guesses_unless_the_operator_says_so(tmp_path: Path) -> None:
    register(tmp_path, "large")
    (served,) = registry.in_pool("default")
    assert (served.draft_kind, served.draft_path) == ("none", None)


def test_a_model_of_the_same_vocabulary_may_guess(tmp_path: Path) -> None:
    small = register(tmp_path, "small", {"llama.block_count": (4, 1)}, load_mode="off")
    row = register(tmp_path, "large", draft_kind="model", draft_model="small", draft_n_max=8, draft_p_min=0.4)
    assert row.draft_model == small
    (served,) = registry.in_pool("default")
    assert (served.draft_kind, served.draft_path, served.draft_digest) == ("model", Path(small.path), small.digest)
    assert (served.draft_n_min, served.draft_n_max, served.draft_p_min, served.draft_policy) == (0, 8, 0.4, "adaptive")


def test_its_memory_is_that_of_both(tmp_path: Path) -> None:
    small = register(tmp_path, "small")
    alone = memory_of(register(tmp_path, "large", n_ctx=512, n_slots=2))
    both = memory_of(register(tmp_path, "large", draft_kind="model", draft_model="small"))
    draft = estimate_memory(small.metadata, n_ctx=512, n_slots=2, kv_type="f16")
    assert both.total_bytes == alone.total_bytes + draft.total_bytes


def refused(folder: Path, code: str, field: str, **options: Any) -> str:
    before = list(ServedModel.objects.values())
    with pytest.raises(RegistrationError) as caught:
        register(folder, "large", **options)
    assert caught.value.code == code
    assert list(caught.value.fields) == [field]
    assert list(ServedModel.objects.values()) == before
    return caught.value.message


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = register(tmp_path, "other", OTHER_TOKENS)
    message = refused(tmp_path, "draft_model_unfit", "draft_model", draft_kind="model", draft_model=other)
    assert "'other' cannot guess for this model: its vocabulary is another one: token 3 is 'c', not 'b'" in message
    register(tmp_path, "large", draft_model=other)  # nobody guesses: it is only noted
    refused(tmp_path, "draft_model_unfit", "draft_model", draft_kind="model")


def test_a_file_of_another_vocabulary_under_the_same_name_is_refused(tmp_path: Path) -> None:
    register(tmp_path, "small")
    register(tmp_path, "large", draft_kind="model", draft_model="small")
    refused(tmp_path, "draft_model_unfit", "draft_model", changes=OTHER_TOKENS)
    with pytest.raises(RegistrationError, match="another one"):
        register(tmp_path, "small", OTHER_TOKENS)


def test_vocabularies_that_are_not_there_are_no_match(tmp_path: Path) -> None:
    small = register(tmp_path, "small")
    vocabulary_path(small.digest).unlink()
    message = refused(tmp_path, "draft_model_unfit", "draft_model", draft_kind="model", draft_model="small")
    assert "Inspect both models again" in message


def test_a_model_that_is_not_registered_cannot_guess(tmp_path: Path) -> None:
    assert "'nobody'" in refused(tmp_path, "invalid", "draft_model", draft_kind="model", draft_model="nobody")
    assert "Choose the model" in refused(tmp_path, "invalid", "draft_model", draft_kind="model")


def test_a_model_does_not_guess_for_itself(tmp_path: Path) -> None:
    row = register(tmp_path, "large")
    assert "no faster" in refused(tmp_path, "invalid", "draft_model", draft_kind="model", draft_model=row)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"draft_kind": "oracle"}, "draft_kind"),
        ({"draft_policy": "sometimes"}, "draft_policy"),
        ({"draft_n_max": 0}, "draft_n_max"),
        ({"draft_n_max": 65}, "draft_n_max"),
        ({"draft_n_min": 5, "draft_n_max": 4}, "draft_n_min"),
        ({"draft_p_min": 1.5}, "draft_p_min"),
        ({"draft_p_min": float("nan")}, "draft_p_min"),
    ],
)
def test_lengths_and_chances_are_bounded(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    refused(tmp_path, "invalid", field, **options)


def test_the_database_keeps_the_bounds_too(tmp_path: Path) -> None:
    row = register(tmp_path, "large")
    for values in ({"draft_n_max": 0}, {"draft_n_min": 17}, {"draft_p_min": 2.0}, {"draft_kind": "model"}):
        with pytest.raises(IntegrityError), transaction.atomic():
            ServedModel.objects.filter(pk=row.pk).update(**values)


def test_a_model_that_guesses_for_another_cannot_be_deleted(tmp_path: Path) -> None:
    small = register(tmp_path, "small")
    register(tmp_path, "large", draft_kind="model", draft_model="small")
    with pytest.raises(ProtectedError):
        model_rows.remove([small.pk])


def test_models_yaml_names_who_guesses_in_any_order(tmp_path: Path) -> None:
    for name in ("large", "small"):
        file(tmp_path, name)
    place = tmp_path / "models.yaml"
    place.write_text(
        textwrap.dedent("""
            models:
              - {id: large, draft_kind: model, draft_model: small, draft_n_min: 2, draft_n_max: 8, draft_policy: always}
              - id: small
        """)
    )
    for expected in ("created", "unchanged"):
        outcome = models_yaml.sync(place, trial=PassingTrial())
        assert [change.action for change in outcome.changes] == [expected] * 2
    large = ServedModel.objects.get(name="large")
    assert large.draft_model == ServedModel.objects.get(name="small")
    assert (large.draft_n_min, large.draft_n_max, large.draft_policy) == (2, 8, "always")
    place.write_text("models: [{id: large, draft_kind: null, draft_model: null}]")
    outcome = models_yaml.sync(place, trial=PassingTrial())
    assert outcome.changes[0].details["draft_model"] == "'small' → None"
    assert ServedModel.objects.get(name="large").draft_kind == "none"
    place.write_text("models: [{id: large, draft_kind: model, draft_model: nobody}]")
    with pytest.raises(ModelsYamlError, match=r"models.0.draft_model: There is no model 'nobody'"):
        models_yaml.sync(place, trial=PassingTrial())


# In a worker


@pytest.fixture
def fake_engine(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.CONFIG, "engine", "fake")


def test_who_guesses_is_what_the_registry_says(tmp_path: Path, fake_engine: None) -> None:
    row = register(tmp_path, "large")
    plain = snapshot(row)
    backend = hosted.load_backend(plain)
    assert hosted.load_proposer(plain, backend) is None
    row = register(tmp_path, "large", draft_kind="prompt_lookup", draft_n_min=2, draft_n_max=5, draft_policy="always")
    drafting = snapshot(row)
    assert isinstance(hosted.load_proposer(drafting, backend), PromptLookup)
    assert hosted.draft_settings(drafting) == DraftSettings(num_min=2, num_max=5, policy=DraftPolicy.ALWAYS)
    assert hosted.fingerprint(drafting) != hosted.fingerprint(plain)
    rigid = FakeBackend(1, 64, abilities=Abilities(trim=False, reasons={"trim": "it is recurrent"}))
    assert hosted.load_proposer(drafting, rigid) is None


def test_another_file_that_guesses_is_another_model(tmp_path: Path) -> None:
    register(tmp_path, "small")
    row = register(tmp_path, "large", draft_kind="model", draft_model="small")
    before = hosted.fingerprint(snapshot(row))
    register(tmp_path, "small", {"llama.block_count": (4, 1)})
    assert hosted.fingerprint(snapshot(ServedModel.objects.get(name="large"))) != before


def test_a_draft_model_that_cannot_be_loaded_fails_the_model_and_frees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = []

    class Freed(FakeBackend):
        def free(self) -> None:
            freed.append(self)

    def refuse(served: Any, backend: Any) -> None:
        raise EngineError("draft_model_unfit", "its vocabulary is another one")

    served = snapshot(register(tmp_path, "large"))
    monkeypatch.setattr(hosted, "load_proposer", refuse)
    model = hosted.HostedModel(served, load=lambda _served: Freed(1, 64), sink=lambda _events: None)
    with pytest.raises(EngineError, match="its vocabulary is another one"):
        model.load()
    assert model.state is hosted.State.FAILED
    assert len(freed) == 1


def test_a_model_whose_kept_states_cannot_be_taken_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []

    class Freed(FakeBackend):
        def free(self) -> None:
            freed.append(self)

    def broken(*_: Any) -> None:
        raise OSError("the disk is gone")

    served = snapshot(register(tmp_path, "large"))
    monkeypatch.setattr(hosted.SlotFiles, "take_kept", broken)
    model = hosted.HostedModel(served, load=lambda _served: Freed(1, 64), sink=lambda _events: None)
    with pytest.raises(EngineError, match="the disk is gone"):
        model.load()
    assert len(freed) == 1


def test_guesses_are_counted_under_both_families_of_names() -> None:
    def count(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, {"model_id": "guesser", **labels}) or 0.0

    engine = Engine(FakeBackend(1, 64))
    model: Any = SimpleNamespace(served=SimpleNamespace(name="guesser"), num_slots=1, stats=engine.stats)
    seen = EngineMetrics()
    for _ in range(2):
        engine._counters.count_draft(3, 2)
        seen.update("default", Pulse({}, frozenset(), 0), [model])
    assert count("llm_engine_drafts_total") == count("llamacpp:spec_decode_num_drafts_total") == 2
    assert count("llm_engine_drafted_tokens_total") == count("llamacpp:spec_decode_num_draft_tokens_total") == 6
    assert count("llm_engine_accepted_tokens_total") == count("llamacpp:spec_decode_num_accepted_tokens_total") == 4
    by_position = "llamacpp:spec_decode_num_accepted_tokens_per_pos_total"
    assert [count(by_position, position=str(position)) for position in range(3)] == [2, 2, 0]


# In a request


def decoding(**fields: Any) -> Decoding:
    return GenerateBody.model_validate({"prompt": "a", **fields}).decoding()


def test_a_request_bounds_its_drafts_or_wants_none() -> None:
    assert decoding() == Decoding()
    assert decoding(speculative=False) == Decoding(speculation=Speculation(num_max=0))
    asked = decoding(speculative={"n_min": 2, "n_max": 4, "p_min": 0.5})
    assert asked == Decoding(speculation=Speculation(num_min=2, num_max=4, min_probability=0.5))
    assert decoding(speculative={}) == Decoding(speculation=Speculation())


@pytest.mark.parametrize(
    "speculative",
    [True, "yes", {"n_max": 65}, {"n_max": -1}, {"n_min": 2.5}, {"p_min": 1.1}, {"p_min": float("nan")}, {"n": 3}],
)
def test_other_bounds_are_refused(speculative: Any) -> None:
    with pytest.raises(ValidationError):
        decoding(speculative=speculative)
