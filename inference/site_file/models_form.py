"""The form of models.yaml, read strictly: unknown keys, keys that stand twice and numbers out of bounds are problems.

site_yaml.py's file is this one with more in it. The format is described in docs/registry.md.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from django.conf import settings
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inference.chat.prompt import MAX_TEMPLATE_BYTES
from inference.engine.drafting import MAX_DRAFT
from inference.site_file import aliases_yaml
from inference.site_file.adapters_yaml import MAX_ADAPTERS, AdapterEntry
from inference.site_file.aliases_yaml import AliasEntry
from inference.site_file.variants_yaml import MAX_VARIANTS, VariantEntry
from inference.vetting.inspection import absolute

DEFAULT_PLACE = Path("config") / "models.yaml"
MAX_FILE_BYTES = 1 << 20
MAX_MODELS = 1000


class ModelsYamlError(Exception):
    """`code` is models_yaml_missing or models_yaml_invalid; `problems` holds one sentence each, with its place."""

    def __init__(self, code: str, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.code = code
        self.problems = problems


class Options(BaseModel):
    """Keys that `defaults` and each model may have. Absent and null differ: null means the registry's own default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    backend: Literal["local", "remote"] | None = None
    base_url: str | None = None
    load_mode: Literal["eager", "lazy", "off"] | None = None
    device: Literal["auto", "cuda", "mps", "cpu"] | None = None
    dtype: str | None = None
    text_only: bool | None = None
    trust_remote_code: bool | None = None
    quantization: str | None = None
    max_context: int | None = Field(None, ge=8, le=1 << 20)
    capabilities: dict[str, bool] | None = None

    n_ctx: int | None = Field(None, ge=8, le=1 << 20)
    n_slots: int | None = Field(None, ge=1, le=256)
    n_lanes: int | None = Field(None, ge=1, le=16)
    n_threads: int | None = Field(None, ge=1, le=512)
    n_gpu_layers: int | None = Field(None, ge=-1, le=10000)
    kv_type: Literal["f16", "q8_0", "q4_0"] | None = None
    context_shift: bool | None = None
    draft_kind: Literal["none", "prompt_lookup", "model"] | None = None
    draft_model: str | None = Field(None, max_length=100)
    draft_n_min: int | None = Field(None, ge=0, le=MAX_DRAFT)
    draft_n_max: int | None = Field(None, ge=1, le=MAX_DRAFT)
    draft_p_min: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    draft_policy: Literal["adaptive", "always"] | None = None
    embedding_pooling: Literal["auto", "none", "mean", "cls", "last"] | None = None
    keep_alive_seconds: int | None = Field(None, ge=0, le=2**31 - 1)
    is_pinned: bool | None = None
    visibility: Literal["shared", "granted"] | None = None
    granted_tenants: list[str] | None = None
    pool: str | None = Field(None, pattern=r"^[a-z0-9-]{1,32}$")

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class Entry(Options):
    """One model. As a bare string it is its id, or a file whose stem is the id."""

    id: str = Field(min_length=1, max_length=100)
    path: str | None = Field(None, min_length=1, max_length=1000)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    aliases: list[str] | None = None
    notes: str | None = Field(None, max_length=10_000)
    chat_template: str | None = Field(None, max_length=MAX_TEMPLATE_BYTES)
    adapters: list[AdapterEntry] | None = Field(None, max_length=MAX_ADAPTERS)
    adapter_aliases: dict[str, AliasEntry] | None = Field(None, max_length=aliases_yaml.MAX_ALIASES)
    variants: list[VariantEntry] | None = Field(None, max_length=MAX_VARIANTS)

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return {"id": Path(value).stem, "path": value} if value.endswith(".gguf") else {"id": value}


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    default_model: str | None = None
    defaults: Options = Field(default_factory=Options)
    models: list[Entry] = Field(min_length=1, max_length=MAX_MODELS)


def place_of_file(named: str | Path | None = None) -> Path:
    """MODELS_YAML from the environment, else the `named` file, else config/models.yaml; relative to where we run."""
    configured: Path | None = settings.CONFIG.models_yaml
    return absolute(configured or named or DEFAULT_PLACE)


def read_file(path: Path) -> File:
    """Raises ModelsYamlError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelsYamlError("models_yaml_invalid", [f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB."])
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelsYamlError(
            "models_yaml_missing", [f"There is no file {path}: write it, or name another with --file or MODELS_YAML."]
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelsYamlError("models_yaml_invalid", [f"{path} cannot be read: {error}"]) from error
    return parse_text(text, File, str(path))


FileForm = TypeVar("FileForm", bound=File)


def parse_text(text: str, form: type[FileForm], place: str) -> FileForm:
    """YAML as `form`. Raises ModelsYamlError."""
    try:
        return form.model_validate(yaml.load(text, _UniqueKeyLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise ModelsYamlError("models_yaml_invalid", [f"{place} is not YAML: {error}"]) from error
    except ValidationError as error:
        raise ModelsYamlError("models_yaml_invalid", [_sentence(problem) for problem in error.errors()]) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a second key of the same name win silently; here it is a problem."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key in (key for key, count in keys.items() if count > 1):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _sentence(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "the file"
    return f"{place}: {problem['msg']}"
