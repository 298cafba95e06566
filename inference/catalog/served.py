"""A served model as everything that serves requests sees it: a frozen snapshot of its row, without the ORM.

registry.py makes and keeps them; nothing here asks the database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accounts.trail.refusals import Refusal
from inference.catalog.model_memory import MemoryEstimate, memory_of
from inference.catalog.pooling import POOLINGS, embedding_problem, has_embeddings, pooling_of
from inference.chat.prompt import ChatPrompt, ChatTemplate
from inference.engine.types import Pooling
from inference.models import ModelVariant, ServedModel
from inference.vetting.inspection import (
    vocabulary_path,
)


class HasTenant(Protocol):
    """As much of a principal as the registry looks at."""

    @property
    def tenant_id(self) -> int: ...

    @property
    def allowed_models(self) -> frozenset[str] | None: ...

    @property
    def allowed_adapters(self) -> frozenset[str] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A served model as it was when the snapshot was taken. n_ctx is the context of one slot, in tokens."""

    id: int
    name: str
    aliases: tuple[str, ...]
    is_default: bool
    visibility: str
    granted_tenant_ids: frozenset[int]
    pool: str
    path: Path
    vocabulary_path: Path
    digest: str
    size_bytes: int
    n_ctx: int
    n_slots: int
    n_lanes: int = 1
    n_threads: int | None
    flash_attention: bool | None
    n_gpu_layers: int
    kv_type: str
    context_shift: bool
    draft_kind: str
    draft_path: Path | None
    draft_digest: str
    draft_n_min: int
    draft_n_max: int
    draft_p_min: float
    draft_policy: str
    load_mode: str
    keep_alive_seconds: int | None
    is_pinned: bool = False
    memory: MemoryEstimate
    capabilities: Mapping[str, Any]
    pooling: Pooling = Pooling.MEAN
    embedding_length: int = 0
    """Numbers of a vector."""
    is_causal: bool = True
    """Whether tokens see those before them alone, as where text is generated."""
    is_embedder: bool = False
    """The file says that it was made for vectors."""
    embedding_problem: str = ""
    """Why its vectors would not be what they are meant to be."""
    architecture: str
    quantization: str
    num_parameters: int
    trained_context: int
    vocabulary_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    add_bos_token: bool
    chat_template: str | None = field(repr=False)
    """As text: the operator's, else the file's. It is rendered only where it was found good, see `template_for`."""
    chat: ChatTemplate | None = field(repr=False)
    chat_with_tools: ChatTemplate | None = field(repr=False)
    created_unix: int

    @property
    def is_off(self) -> bool:
        return self.load_mode == ServedModel.LoadMode.OFF

    def is_visible_to(self, principal: HasTenant) -> bool:
        if principal.allowed_models is not None and self.name not in principal.allowed_models:
            return False
        shared = self.visibility == ServedModel.Visibility.SHARED
        return shared or principal.tenant_id in self.granted_tenant_ids

    @property
    def generates(self) -> bool:
        return self.is_causal and self.capabilities.get("generate", True) is not False

    @property
    def embeds(self) -> bool:
        """Chat models do where the operator says so."""
        return has_embeddings(self.capabilities, self.is_embedder, self.embedding_problem)

    def check_ability(self, *, embeds: bool) -> None:
        """Raises Refusal where the model does not do what is asked of it: embed, or generate."""
        if embeds and not self.embeds:
            why = self.embedding_problem or "the operator has not switched them on"
            raise Refusal(
                "capability_not_supported", f"The model {self.name!r} gives no embeddings: {why}.", model=self.name
            )
        if not embeds and not self.generates:
            raise Refusal(
                "capability_not_supported", f"The model {self.name!r} does not generate text.", model=self.name
            )

    def check_pools(self) -> None:
        """Raises Refusal where a text has a vector for each of its tokens, and one alone is wanted."""
        if self.pooling is Pooling.NONE:
            raise Refusal(
                "capability_not_supported",
                f"The model {self.name!r} does not pool and gives one vector for each token: use POST /embeddings.",
                model=self.name,
            )

    @property
    def num_slots(self) -> int:
        """Slots that requests can name: each lane has its own."""
        return self.n_slots * self.n_lanes

    def template_for(self, prompt: ChatPrompt) -> ChatTemplate:
        """The template that renders this conversation. Tools and calls that it does not show become plain text
        (chat/tool_text.py). Raises Refusal where there is none."""
        template = (self.chat_with_tools if prompt.tools else None) or self.chat
        if template is None:
            raise Refusal(
                "capability_not_supported",
                f"The model {self.name!r} has no chat template that can be used: send a prompt instead of messages.",
            )
        return template


def snapshot(row: ServedModel, granted_tenant_ids: Iterable[int] = (), variant: ModelVariant | None = None) -> Served:
    """The row without the ORM, with the file and the settings of its active variant. Grants and variant are passed
    in, so that no query hides here."""
    file = variant or row
    data, trial = file.metadata, file.metadata.get("trial", {})
    # A quantized key-value cache needs flash attention, whatever was measured before.
    flash_attention = variant.flash_attention if variant and row.kv_type == ServedModel.KVType.F16 else None
    draft = row.draft_model if row.draft_kind == ServedModel.DraftKind.MODEL else None
    return Served(
        id=row.pk,
        name=row.name,
        aliases=tuple(row.aliases),
        is_default=row.is_default,
        visibility=row.visibility,
        granted_tenant_ids=frozenset(granted_tenant_ids),
        pool=row.pool,
        path=Path(file.path),
        vocabulary_path=vocabulary_path(file.digest),
        digest=file.digest,
        size_bytes=file.size_bytes,
        n_ctx=row.n_ctx,
        n_slots=row.n_slots,
        n_threads=file.n_threads or row.n_threads,
        flash_attention=flash_attention,
        n_lanes=row.n_lanes,
        n_gpu_layers=row.n_gpu_layers,
        kv_type=row.kv_type,
        context_shift=row.context_shift,
        draft_kind=row.draft_kind,
        draft_path=Path(draft.path) if draft else None,
        draft_digest=draft.digest if draft else "",
        draft_n_min=row.draft_n_min,
        draft_n_max=row.draft_n_max,
        draft_p_min=row.draft_p_min,
        draft_policy=row.draft_policy,
        load_mode=row.load_mode,
        keep_alive_seconds=row.keep_alive_seconds,
        is_pinned=row.is_pinned,
        memory=memory_of(row, variant),
        capabilities=dict(row.capabilities),
        pooling=pooling_of(row.embedding_pooling, data),
        embedding_length=data.get("embedding_length") or 0,
        is_causal=data.get("is_causal") is not False,
        is_embedder=data.get("pooling_type") in POOLINGS,
        embedding_problem=embedding_problem(data),
        architecture=data.get("architecture") or "",
        quantization=data.get("quantization") or "",
        num_parameters=data.get("num_parameters") or 0,
        trained_context=data.get("context_length") or 0,
        vocabulary_size=trial.get("vocabulary_size") or data.get("vocabulary_size") or 0,
        bos_token_id=data.get("bos_token_id"),
        eos_token_id=data.get("eos_token_id"),
        add_bos_token=bool(trial.get("add_bos_token", data.get("add_bos_token"))),
        chat_template=row.chat_template or (data.get("chat_templates") or {}).get("default"),
        chat=chat_template_of(row, "default"),
        chat_with_tools=None if row.chat_template else chat_template_of(row, "tool_use"),
        created_unix=int(row.created_at.timestamp()),
    )


def chat_template_of(row: ServedModel, name: str) -> ChatTemplate | None:
    """The operator's template, else the file's of that name; None where there is none, or it was found no good."""
    if row.chat_template:
        return ChatTemplate.of(row.chat_template, row.chat_facts)
    source = (row.metadata.get("chat_templates") or {}).get(name)
    return ChatTemplate.of(source, row.metadata.get("chat", {}).get(name, {})) if source else None
