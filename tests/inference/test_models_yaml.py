"""models.yaml: read strictly, all problems at once, applied as a whole, twice the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from django.conf import settings

from accounts.models import Plan, Tenant
from inference.catalog import registry
from inference.models import Adapter, ServedModel
from inference.site_file import models_yaml
from inference.site_file.adapters_yaml import AdapterEntry
from inference.site_file.models_form import MAX_FILE_BYTES, Entry, File, ModelsYamlError, place_of_file
from inference.site_file.models_yaml import Outcome
from tests.inference import gguf_files
from tests.inference.gguf_files import FailingTrial, PassingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    registry.forget()
    yield
    registry.forget()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models and a folder to write models.yaml into."""
    for name in ("first", "second"):
        gguf_files.write(tmp_path, f"{name}.gguf", changes={"general.name": (8, name)})
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "models.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return path


def sync(folder: Path, text: str, **options: Any) -> Outcome:
    return models_yaml.sync(write(folder, text), trial=PassingTrial(), **options)


def problems(folder: Path, text: str, **options: Any) -> list[str]:
    with pytest.raises(ModelsYamlError) as caught:
        sync(folder, text, **options)
    assert caught.value.code == "models_yaml_invalid"
    return caught.value.problems


def actions(outcome: Outcome) -> dict[str, str]:
    return {change.name: change.action for change in outcome.changes}


WHOLE = """
    default_model: second
    defaults:
      backend: local
      load_mode: lazy
      device: cpu
      capabilities: {generate: true}
      n_slots: 4
    models:
      - first.gguf
      - id: second
        path: second.gguf
        aliases: [chat]
        max_context: 1024
        load_mode: eager
        device: auto
        n_gpu_layers: 7
        kv_type: q8_0
        keep_alive_seconds: 60
        notes: The one for chats.
"""


def test_a_file_becomes_the_registry(folder: Path) -> None:
    outcome = sync(folder, WHOLE)
    assert actions(outcome) == {"first": "created", "second": "created"}
    assert (outcome.default, outcome.warnings) == ("second", [])
    first, second = ServedModel.objects.order_by("name")
    assert (first.load_mode, first.n_slots, first.n_gpu_layers, first.path) == ("lazy", 4, 0, f"{folder}/first.gguf")
    assert (second.load_mode, second.n_slots, second.n_gpu_layers) == ("eager", 4, 7)
    assert (second.n_ctx, second.kv_type, second.keep_alive_seconds) == (1024, "q8_0", 60)
    assert (second.aliases, second.notes, second.is_default) == (["chat"], "The one for chats.", True)
    assert first.capabilities == {"generate": True}


def test_a_second_run_changes_nothing(folder: Path) -> None:
    sync(folder, WHOLE)
    before = list(ServedModel.objects.values())
    assert set(actions(sync(folder, WHOLE)).values()) == {"unchanged"}
    assert list(ServedModel.objects.values()) == before


def test_what_the_file_does_not_name_stays(folder: Path) -> None:
    sync(folder, WHOLE)
    ServedModel.objects.filter(name="first").update(notes="by hand", pool="gpu")
    sync(folder, WHOLE)
    assert ServedModel.objects.filter(name="first", notes="by hand", pool="gpu").exists()


def test_null_is_the_default_of_the_registry(folder: Path) -> None:
    sync(folder, WHOLE)
    sync(folder, "models: [{id: second, keep_alive_seconds: null, aliases: null, n_slots: null}]")
    second = ServedModel.objects.get(name="second")
    assert (second.keep_alive_seconds, second.aliases, second.n_slots) == (None, [], 8)


def test_changes_are_told_with_before_and_after(folder: Path) -> None:
    sync(folder, WHOLE)
    outcome = sync(folder, WHOLE.replace("n_slots: 4", "n_slots: 5"), dry_run=True)
    assert [change.details for change in outcome.changes] == [{"n_slots": "4 → 5"}, {"n_slots": "4 → 5"}]
    gguf_files.write(folder, "first.gguf", changes={"general.name": (8, "new weights")})
    assert sync(folder, WHOLE, dry_run=True).changes[0].details == {"file": "the file changed"}
    assert sync(folder, WHOLE).changes[0].details == {"file": "the file changed"}
    assert ServedModel.objects.get(name="first").metadata["title"] == "new weights"


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = PassingTrial.calls
    assert actions(sync(folder, WHOLE, dry_run=True)) == {"first": "created", "second": "created"}
    assert (ServedModel.objects.count(), PassingTrial.calls) == (0, before)


def test_only_prune_switches_off_what_is_not_named(folder: Path) -> None:
    sync(folder, WHOLE)
    only_first = "models: [first]"
    assert actions(sync(folder, only_first)) == {"first": "unchanged", "second": "left"}
    default = registry.default()
    assert default is not None
    assert default.name == "second"
    outcome = sync(folder, only_first, prune=True)
    assert (actions(outcome), outcome.default) == ({"first": "unchanged", "second": "switched_off"}, "first")
    assert ServedModel.objects.get(name="second").load_mode == "off"
    assert ServedModel.objects.get(is_default=True).name == "first"
    assert actions(sync(folder, only_first, prune=True))["second"] == "left"


def test_a_file_whose_models_are_all_off_has_no_default_to_choose(folder: Path) -> None:
    outcome = sync(folder, "models: [{id: first, load_mode: 'off'}]")
    assert (outcome.default, ServedModel.objects.filter(is_default=True).exists()) == (None, False)


def test_a_default_may_be_named_by_an_alias(folder: Path) -> None:
    assert sync(folder, WHOLE.replace("default_model: second", "default_model: chat")).default == "second"


def test_aliases_may_move_between_models(folder: Path) -> None:
    sync(folder, "models: [{id: first, aliases: [a]}, {id: second, aliases: [b]}]")
    sync(folder, "models: [{id: first, aliases: [b]}, {id: second, aliases: [a]}]")
    assert list(ServedModel.objects.order_by("name").values_list("aliases", flat=True)) == [["b"], ["a"]]


def test_a_model_is_found_by_path_beside_the_file_or_in_the_registry(folder: Path, tmp_path_factory: Any) -> None:
    elsewhere = gguf_files.write(tmp_path_factory.mktemp("models"), "third.gguf")
    sync(folder, f"models: [first, {{id: other, path: {elsewhere}}}]")
    assert ServedModel.objects.get(name="other").path == str(elsewhere)
    assert actions(sync(folder, "models: [other]"))["other"] == "unchanged"
    assert problems(folder, "models: [nowhere]") == [
        "models.0.path: name the .gguf file, or put it beside this file as nowhere.gguf"
    ]


def test_grants_are_tenants_by_name(folder: Path) -> None:
    plan = Plan.objects.create(name="plan")
    for name in ("Alice's", "Bob's", "Charlie's"):
        Tenant.objects.create(name=name, plan=plan)
    text = """models: [{id: first, visibility: granted, granted_tenants: ["Alice's", "Bob's"]}]"""
    sync(folder, text)
    row = ServedModel.objects.get()
    assert sorted(tenant.name for tenant in row.granted_tenants.all()) == ["Alice's", "Bob's"]
    assert actions(sync(folder, text)) == {"first": "unchanged"}
    outcome = sync(folder, text.replace(', "Bob\'s"', ""))
    assert outcome.changes[0].details == {"granted_tenants": '["Alice\'s", "Bob\'s"] → ["Alice\'s"]'}
    assert problems(folder, text.replace("Bob", "Bobby")) == ['models.0.granted_tenants: there is no tenant "Bobby\'s"']


def test_all_problems_are_listed_with_their_places(folder: Path) -> None:
    found = problems(
        folder,
        """
        default: first
        defaults: {n_slots: 0, load_mode: sometimes}
        models:
          - {id: first, n_ctx: "1024"}
          - {path: second.gguf}
          - {id: third, capabilities: {generate: 1}, colour: red}
        """,
    )
    places = [problem.partition(":")[0] for problem in found]
    assert sorted(places) == sorted(
        [
            "default",
            "defaults.n_slots",
            "defaults.load_mode",
            "models.0.n_ctx",
            "models.1.id",
            "models.2.capabilities.generate",
            "models.2.colour",
        ]
    )


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ("backend: remote", "models.0.backend"),
        ("base_url: http://elsewhere", "models.0.backend"),
        ("trust_remote_code: true", "models.0.trust_remote_code"),
        ("quantization: int8", "models.0.quantization"),
        ("n_ctx: 512, max_context: 1024", "models.0.max_context"),
    ],
)
def test_keys_of_elsewhere_that_would_serve_something_else_are_refused(folder: Path, keys: str, place: str) -> None:
    found = problems(folder, f"models: [{{id: first, {keys}}}]")
    assert [problem.partition(":")[0] for problem in found] == [place]
    assert not ServedModel.objects.exists()


def test_keys_of_elsewhere_that_change_nothing_are_warned_of(folder: Path) -> None:
    outcome = sync(
        folder,
        """
        defaults: {dtype: float16, text_only: false, trust_remote_code: false, quantization: null, backend: local}
        models: [first]
        """,
    )
    assert [warning.partition(":")[0] for warning in outcome.warnings] == ["models.0.dtype", "models.0.text_only"]
    assert actions(outcome) == {"first": "created"}


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_gpu_device_puts_all_layers_there(folder: Path, device: str) -> None:
    sync(folder, f"models: [{{id: first, device: {device}}}]")
    assert ServedModel.objects.get().n_gpu_layers == -1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: []", "models"),
        ("[]", "the file"),
        ("", "the file"),
        ("models: [first", "is not YAML"),
        ("models: [first]\nmodels: [second]", "is there twice"),
        ("models: !!python/object/apply:os.system [id]", "is not YAML"),
        ("models: [first, {id: other, path: first.gguf, aliases: [first]}]", "the name 'first' is there twice"),
        ("default_model: third\nmodels: [first]", "is none of the models"),
        ("default_model: first\nmodels: [{id: first, load_mode: 'off'}]", "has load_mode off"),
        ("models: [{id: first, path: missing.gguf}]", "There is no file"),
        ("models: [{id: first, n_ctx: 100000}]", "trained for 4096"),
        ("models: [{id: 'bad name', path: first.gguf}]", "models.0.name"),
    ],
)
def test_a_wrong_file_is_refused_and_nothing_changes(folder: Path, text: str, said: str) -> None:
    assert said in "\n".join(problems(folder, text))
    assert not ServedModel.objects.exists()


def test_a_model_that_fails_its_trial_stops_the_whole_file(folder: Path) -> None:
    with pytest.raises(ModelsYamlError) as caught:
        models_yaml.sync(write(folder, "models: [first, second]"), trial=FailingTrial())
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["models.0.path", "models.1.path"]
    assert not ServedModel.objects.exists()


def test_a_conflict_with_a_model_that_the_file_does_not_name_rolls_all_back(folder: Path) -> None:
    sync(folder, "models: [{id: second, aliases: [chat]}]")
    found = problems(folder, "models: [{id: first, aliases: [chat]}]")
    assert found == ["models.0.aliases: 'chat' already means the model 'second'."]
    assert ServedModel.objects.count() == 1


def test_a_file_that_is_missing_too_large_or_no_text_is_said(folder: Path) -> None:
    with pytest.raises(ModelsYamlError) as caught:
        models_yaml.sync(folder / "none.yaml")
    assert caught.value.code == "models_yaml_missing"
    for data in (b"#" * (MAX_FILE_BYTES + 1), b"\xff\xfe\x00"):
        path = folder / "models.yaml"
        path.write_bytes(data)
        with pytest.raises(ModelsYamlError) as caught:
            models_yaml.sync(path)
        assert caught.value.code == "models_yaml_invalid"


def test_the_environment_names_the_file_before_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of_file() == tmp_path / "config" / "models.yaml"
    assert place_of_file("my.yaml") == tmp_path / "my.yaml"
    configured = settings.CONFIG.model_copy(update={"models_yaml": Path("from-env.yaml")})
    monkeypatch.setattr(settings, "CONFIG", configured)
    assert place_of_file("my.yaml") == tmp_path / "from-env.yaml"


def test_the_example_in_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (DOCS / "models.yaml").read_text(encoding="utf-8")
    (tmp_path / "models.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "models").mkdir()
    for name in ("smollm2-135m-instruct-q4_1", "qwen3-8b-q4_k_m", "house-style"):
        gguf_files.write(tmp_path / "models", f"{name}.gguf", changes={"llama.context_length": (4, 40960)})
    (tmp_path / "adapters").mkdir()
    for name in ("terse", "support"):
        gguf_files.write_adapter(tmp_path / "adapters", f"{name}.gguf")
    Tenant.objects.create(name="Alice's", plan=Plan.objects.create(name="plan"))
    outcome = models_yaml.sync(tmp_path / "models.yaml", trial=PassingTrial())
    assert set(actions(outcome).values()) == {"created"}
    assert outcome.warnings == []


ADAPTERS = """
    models:
      - id: first
        path: first.gguf
        adapters:
          - terse.gguf
          - name: support
            path: support.gguf
            default_scale: 0.5
            owner: Alice's
            granted_tenants: [Bob's]
"""


@pytest.fixture
def adapter_folder(folder: Path) -> Path:
    plan = Plan.objects.create(name="plan")
    for name in ("Alice's", "Bob's", "Charlie's"):
        Tenant.objects.create(name=name, plan=plan)
    for name in ("terse", "support"):
        gguf_files.write_adapter(folder, f"{name}.gguf")
    return folder


def granted(name: str) -> set[str]:
    return set(Adapter.objects.get(name=name).grants.values_list("tenant__name", flat=True))


def test_adapters_are_made_what_the_file_says_and_a_second_time_changes_nothing(adapter_folder: Path) -> None:
    outcome = sync(adapter_folder, ADAPTERS)
    assert outcome.changes[0].details == {"adapters.terse": "new", "adapters.support": "new"}
    support = Adapter.objects.get(name="support")
    assert (support.base_model.name, support.default_scale, support.rank) == ("first", 0.5, 2)
    assert (granted("support"), granted("terse")) == ({"Alice's", "Bob's"}, set())
    calls = PassingTrial.calls
    assert actions(sync(adapter_folder, ADAPTERS)) == {"first": "unchanged"}
    assert PassingTrial.calls == calls


def test_changes_of_adapters_are_named_and_made(adapter_folder: Path) -> None:
    sync(adapter_folder, ADAPTERS)
    text = ADAPTERS.replace("0.5", "2.0").replace("[Bob's]", "[Charlie's]")
    said = {
        "adapters.support": 'default_scale 0.5 → 2.0, granted_tenants ["Alice\'s", "Bob\'s"] → '
        '["Alice\'s", "Charlie\'s"]'
    }
    assert sync(adapter_folder, text, dry_run=True).changes[0].details == said
    assert granted("support") == {"Alice's", "Bob's"}
    assert sync(adapter_folder, text).changes[0].details == said
    assert granted("support") == {"Alice's", "Charlie's"}
    assert Adapter.objects.get(name="support").default_scale == 2.0
    gguf_files.write_adapter(adapter_folder, "terse.gguf", changes={"adapter.lora.alpha": (6, 8.0)})
    assert sync(adapter_folder, text).changes[0].details == {"adapters.terse": "the file changed"}
    assert Adapter.objects.get(name="terse").alpha == 8.0


def test_problems_of_adapters_are_listed_with_their_places_and_nothing_changes(adapter_folder: Path) -> None:
    (adapter_folder / "terse.gguf").write_bytes(b"no adapter")
    assert problems(adapter_folder, ADAPTERS) == [
        "models.0.adapters.0.path: The file has 10 bytes: it is not a GGUF file."
    ]
    text = ADAPTERS.replace("[Bob's]", "[Nobody's]").replace("name: support", "name: terse")
    assert problems(adapter_folder, text) == [
        "models.0.adapters.1: the name 'terse' is there twice",
        'models.0.adapters.1: there is no tenant "Nobody\'s"',
    ]
    gguf_files.write_adapter(adapter_folder, "terse.gguf")
    text = ADAPTERS.replace("path: support.gguf", "path: support.gguf\n            visibility: shared")
    assert problems(adapter_folder, text) == [
        "models.0.adapters.1.visibility: A tenant's own adapter is not shared with every tenant."
    ]
    assert problems(adapter_folder, ADAPTERS.replace("0.5", ".inf"))[0].startswith("models.0.adapters.1.default_scale")
    assert not ServedModel.objects.exists()


def test_an_adapter_that_fails_its_trial_is_a_problem_of_its_path(
    adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PassingTrial, "run_adapter", FailingTrial.run_adapter)
    found = problems(adapter_folder, ADAPTERS)
    assert len(found) == 2
    assert "SIGSEGV" in found[0]


def test_every_key_of_the_file_is_in_the_documentation() -> None:
    text = (DOCS / "registry.md").read_text(encoding="utf-8")
    names = {*Entry.model_fields, *File.model_fields, *AdapterEntry.model_fields}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_a_chat_template_may_be_in_the_file(folder: Path) -> None:
    own = "models: [{id: first, path: first.gguf, chat_template: '{% for m in messages %}{{ m.content }}{% endfor %}'}]"
    assert actions(sync(folder, own)) == {"first": "created"}
    assert ServedModel.objects.get().chat_facts["has_system"] is True
    assert actions(sync(folder, own)) == {"first": "unchanged"}
    (change,) = sync(folder, own.replace("{{ m.content }}", "{{ m.content }}" + "x" * 500)).changes
    assert change.details["chat_template"].endswith("…")
    assert len(change.details["chat_template"]) < 500
    assert problems(folder, own.replace("endfor", "end")) == [
        "models.0.chat_template: The template is no good: Line 1: Encountered unknown tag 'end'. Jinja was looking for "
        "the following tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'.."
    ]
    sync(folder, "models: [{id: first, path: first.gguf, chat_template: null}]")
    row = ServedModel.objects.get()
    assert (row.chat_template, row.chat_facts) == ("", {})
