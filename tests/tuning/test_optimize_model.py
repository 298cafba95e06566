"""optimize_model and activate_variant, with fakes for llama.cpp: rows, files, what tenants see, what is left behind."""

from __future__ import annotations

import io
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import IntegrityError, transaction
from django.test import Client
from django.urls import reverse

from accounts.trail.refusals import Refusal
from inference.catalog import model_rows, registry, variants
from inference.models import ModelVariant, ServedModel
from inference.vetting.inspection import RegistrationError
from inference.vetting.trial import Trial
from inference.worker import hosted
from llmsite import doctor
from tests.inference import gguf_files
from tests.tuning.fakes import WritingSteps

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


@dataclass(frozen=True)
class Caller:
    tenant_id: int
    allowed_models: frozenset[str] | None = None
    allowed_adapters: frozenset[str] | None = None


ANYBODY = Caller(0)


def optimize(folder: Path, *more: str) -> Any:
    output = io.StringIO()
    call_command(
        "optimize_model", "tiny", "--formats", "Q4_0,Q8_0", "--out", str(folder / "out"), "--json", *more, stdout=output
    )
    return json.loads(output.getvalue())


def switch(*arguments: str) -> Any:
    output = io.StringIO()
    call_command("activate_variant", "tiny", *arguments, "--json", stdout=output)
    return json.loads(output.getvalue())


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in (folder / "out").iterdir())


def test_the_best_becomes_a_variant_that_nobody_is_served_yet(base: ServedModel, tmp_path: Path) -> None:
    result = optimize(tmp_path)
    row = ModelVariant.objects.get()
    assert (row.name, row.is_active, row.source_digest) == ("q4_0", False, base.digest)
    assert (row.path, row.measured["gain"]) == (result["variant"]["path"], pytest.approx(1.5))
    assert files(tmp_path) == [Path(row.path).name]
    served = registry.resolve("chat", ANYBODY)
    assert (served.digest, [each.name for each in registry.every()]) == (base.digest, ["tiny"])
    with pytest.raises(Refusal):
        registry.resolve("q4_0", ANYBODY)


def test_an_active_variant_is_served_under_every_name_of_the_model_until_it_is_reverted(
    base: ServedModel, tmp_path: Path
) -> None:
    optimize(tmp_path)
    before = registry.resolve("chat", ANYBODY)
    assert switch("q4_0")["changed"] is True
    row, served = ModelVariant.objects.get(), registry.resolve("chat", ANYBODY)
    assert (served.name, served.id, served.quantization) == ("tiny", base.pk, "Q4_0")
    assert (served.digest, str(served.path)) == (row.digest, row.path)
    assert served.vocabulary_path.is_file()
    assert hosted.fingerprint(served) != hosted.fingerprint(before)  # so workers load it anew
    assert switch("q4_0")["changed"] is False
    assert [finding.level for finding in doctor.look_at_models()] == ["ok"]
    assert switch("--revert")["changed"] is True
    assert registry.resolve("chat", ANYBODY) == before
    assert switch("--revert")["changed"] is False


def test_the_settings_of_an_active_variant_are_those_of_the_engine(base: ServedModel, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path, "other.gguf", changes={"general.file_type": (4, 7)})
    row = variants.register(base, "fast", path, n_threads=7, flash_attention=False, measured={})
    variants.activate(row)
    served = registry.resolve("tiny", ANYBODY)
    assert (served.n_threads, served.flash_attention) == (7, False)
    model_rows.save("tiny", model_rows.examine(base.path, known=base), kv_type="q8_0")
    assert registry.resolve("tiny", ANYBODY).flash_attention is None  # such a cache needs it


def test_settings_alone_are_a_variant_of_the_models_own_file(
    base: ServedModel, fake: WritingSteps, tmp_path: Path
) -> None:
    fake.times.update(Q4_0=0.5, Q8_0=0.5)
    fake.one_thread = 2.0
    result = optimize(tmp_path)
    assert (result["variant"]["name"], result["variant"]["path"]) == ("tuned", base.path)
    assert (ModelVariant.objects.get().n_threads, files(tmp_path)) == (1, [])
    switch("tuned")
    served = registry.resolve("tiny", ANYBODY)
    assert (served.digest, served.n_threads) == (base.digest, 1)


def test_the_perplexity_decides_which_may_win(base: ServedModel, fake: WritingSteps, tmp_path: Path) -> None:
    fake.its_losses["Q4_0"] = 3.1
    assert optimize(tmp_path)["chosen_format"] == "Q8_0"
    result = optimize(tmp_path, "--max-perplexity-increase", "20")
    assert result["chosen_format"] == "Q4_0"
    assert result["variant"]["perplexity_increase_percent"] == pytest.approx(10.517, abs=0.01)


def test_nothing_better_is_no_failure_and_leaves_nothing(base: ServedModel, fake: WritingSteps, tmp_path: Path) -> None:
    fake.times.update(Q4_0=0.9, Q8_0=1.0)
    assert optimize(tmp_path)["variant"] is None
    assert (files(tmp_path), ModelVariant.objects.count()) == ([], 0)


def test_an_interrupted_run_leaves_nothing(base: ServedModel, fake: WritingSteps, tmp_path: Path) -> None:
    fake.fails["quantize Q8_0"] = "interrupt"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CommandError, match="nothing was changed") as caught:
        optimize(tmp_path)
    assert (caught.value.returncode, files(tmp_path), ModelVariant.objects.count()) == (130, [], 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_file_that_cannot_be_registered_is_not_left(
    base: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "run", gguf_files.FailingTrial.run)
    output = io.StringIO()
    with pytest.raises(CommandError):
        call_command(
            "optimize_model", "tiny", "--formats", "Q4_0", "--out", str(tmp_path / "out"), "--json", stdout=output
        )
    assert json.loads(output.getvalue())["error"]["code"] == "trial_failed"
    assert (files(tmp_path), ModelVariant.objects.count()) == ([], 0)


def test_the_table_tells_what_requantizing_means_and_what_each_format_costs(
    base: ServedModel, fake: WritingSteps, tmp_path: Path
) -> None:
    fake.its_losses["Q4_0"] = 3.1
    fake.fails["quantize Q6_K"] = "llama.cpp refuses the format"
    model_rows.save("tiny", model_rows.examine(gguf_files.write(tmp_path, changes={"general.file_type": (4, 7)})))
    fake.times.update(Q5_0=1.3)
    output = io.StringIO()
    call_command("optimize_model", "tiny", "--formats", "Q4_0,Q6_K,Q5_0", "--out", str(tmp_path / "out"), stdout=output)
    text = output.getvalue()
    assert "quantized already (Q8_0)" in text
    assert "+10.52 %" in text
    assert "llama.cpp refuses the format" in text
    assert "activate_variant tiny q5_0" in text
    assert "step 1 of " in text


def test_optimizing_again_replaces_the_variant_but_never_the_active_one(base: ServedModel, tmp_path: Path) -> None:
    optimize(tmp_path)
    optimize(tmp_path)
    assert [row.name for row in ModelVariant.objects.all()] == ["q4_0"]
    switch("q4_0")
    assert optimize(tmp_path)["variant"]["name"] == "q4_0-2"
    assert ModelVariant.objects.get(is_active=True).name == "q4_0"


def test_a_variant_of_another_file_is_neither_served_nor_activated(base: ServedModel, tmp_path: Path) -> None:
    optimize(tmp_path)
    switch("q4_0")
    other = gguf_files.write(tmp_path, "other.gguf", changes={"general.name": (8, "Another")})
    row = model_rows.register(other, "tiny")
    assert registry.resolve("tiny", ANYBODY).digest == row.digest
    with pytest.raises(CommandError, match="optimize_model again"):
        call_command("activate_variant", "tiny", "q4_0", stdout=io.StringIO())


def test_a_variant_whose_file_is_gone_is_not_activated(base: ServedModel, tmp_path: Path) -> None:
    Path(optimize(tmp_path)["variant"]["path"]).unlink()
    with pytest.raises(CommandError, match="missing"):
        call_command("activate_variant", "tiny", "q4_0", stdout=io.StringIO())
    assert registry.resolve("tiny", ANYBODY).digest == base.digest


def test_a_file_of_another_model_is_no_variant(base: ServedModel, tmp_path: Path) -> None:
    other = gguf_files.write(tmp_path, "other.gguf", changes={"llama.embedding_length": (4, 128)})
    with pytest.raises(RegistrationError, match="embedding_length"):
        variants.register(base, "other", other, n_threads=None, flash_attention=None, measured={})


def test_the_database_allows_one_active_variant_of_a_model(base: ServedModel, tmp_path: Path) -> None:
    make = {"base_model": base, "source_digest": base.digest, "is_active": True}
    ModelVariant.objects.create(name="a", **make)
    with pytest.raises(IntegrityError), transaction.atomic():
        ModelVariant.objects.create(name="b", **make)


def test_operators_see_and_switch_variants_in_commands_and_in_the_admin(base: ServedModel, tmp_path: Path) -> None:
    optimize(tmp_path)
    output = io.StringIO()
    call_command("activate_variant", "tiny", stdout=output)
    assert "1.50x" in output.getvalue()
    chief = get_user_model().objects.create_superuser("chief", "", "a password")
    page, client = reverse("admin:inference_modelvariant_changelist"), Client()
    client.force_login(chief)
    row = ModelVariant.objects.get()
    assert "1.50 times" in client.get(page).content.decode()
    client.post(page, {"action": "activate", "_selected_action": [row.pk]})
    assert registry.resolve("tiny", ANYBODY).digest == row.digest
    assert "variant q4_0" in client.get(reverse("admin:inference_servedmodel_changelist")).content.decode()
    output = io.StringIO()
    call_command("models", stdout=output)
    assert "Q4_0 (variant q4_0)" in output.getvalue()
    client.post(page, {"action": "serve_own_file", "_selected_action": [row.pk]})
    assert registry.resolve("tiny", ANYBODY).digest == base.digest
    variants.activate(row)
    client.post(reverse("admin:inference_modelvariant_delete", args=[row.pk]), {"post": "yes"})
    assert registry.resolve("tiny", ANYBODY).digest == base.digest


def test_unknown_names_are_clear_errors(base: ServedModel) -> None:
    for arguments, word in ((("nobody",), "no model"), (("tiny", "q9"), "no variant")):
        with pytest.raises(CommandError, match=word):
            call_command("activate_variant", *arguments, stdout=io.StringIO())
    with pytest.raises(CommandError, match="none of"):
        call_command("optimize_model", "tiny", "--formats", "Q9_9", stdout=io.StringIO())
