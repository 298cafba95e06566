"""The form of a served model. A model is registered by its path: its file is inspected in a child process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django import forms
from unfold.widgets import UnfoldAdminTextareaWidget, UnfoldAdminTextInputWidget, UnfoldBooleanWidget

from inference.catalog import model_rows
from inference.chat.prompt import MAX_TEMPLATE_BYTES
from inference.models import ServedModel
from inference.vetting.inspection import RegistrationError

if TYPE_CHECKING:  # Django's own classes take no type arguments at run time
    ServedModelFormBase = forms.ModelForm[ServedModel]
else:
    ServedModelFormBase = forms.ModelForm


class NamesField(forms.CharField):
    """A list of names, written with commas between them."""

    def prepare_value(self, value: Any) -> Any:
        return ", ".join(map(str, value)) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        names = value if isinstance(value, list) else str(value or "").split(",")
        return [name.strip() for name in names if str(name).strip()]

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool(self.to_python(initial) != self.to_python(data))


class SourceField(forms.CharField):
    """Text whose lines end as they did before a browser sent it."""

    def to_python(self, value: Any) -> Any:
        text = super().to_python(value)
        return text.replace("\r\n", "\n") if isinstance(text, str) else text


class ServedModelForm(ServedModelFormBase):
    """Inspects the file when its path is new; everything that is wrong with it is an error of the field `path`."""

    aliases = NamesField(
        required=False,
        widget=UnfoldAdminTextInputWidget,
        help_text="Other names that requests may use, separated by commas, such as chat, default-chat.",
    )
    chat_template = SourceField(
        required=False,
        strip=False,
        max_length=MAX_TEMPLATE_BYTES,
        label="Chat template of your own",
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 6, "spellcheck": "false"}),
        help_text="Jinja in place of the file's template, which is shown below. It is tried when you save.",
    )
    inspect_again = forms.BooleanField(
        required=False,
        label="Inspect the file again",
        help_text="After it was replaced under the same path.",
        widget=UnfoldBooleanWidget,
    )

    class Meta:
        model = ServedModel
        fields = "__all__"
        labels = {
            "path": "Path of the file",
            "n_ctx": "Context of one slot",
            "n_slots": "Slots",
            "n_lanes": "Lanes",
            "n_threads": "Threads",
            "n_gpu_layers": "Layers on the GPU",
            "kv_type": "Type of the key-value cache",
            "context_shift": "Shift full contexts",
            "load_mode": "Load it",
            "keep_alive_seconds": "Unload after idle seconds",
            "is_pinned": "Keep it in memory",
            "draft_kind": "Who guesses tokens",
            "draft_model": "Model that guesses",
            "draft_n_min": "Shortest draft",
            "draft_n_max": "Longest draft",
            "draft_p_min": "Least probability of a guess",
            "draft_policy": "Draft",
            "embedding_pooling": "Pooling of embeddings",
            "pool": "Pool of workers",
        }
        help_texts = {
            "name": "What requests call it in their field model.",
            "path": "GGUF file on the worker's disk. It is read, hashed and loaded for a trial when you save.",
            "n_gpu_layers": "0: none. -1: all.",
            "kv_type": "q8_0 and q4_0 need less memory and are less exact.",
            "keep_alive_seconds": "Empty: never, if it is loaded when the worker starts, else as "
            "MODEL_IDLE_TIMEOUT_SECONDS says.",
            "granted_tenants": "Counts where only granted tenants may use the model.",
            "notes": "For operators; tenants do not see them.",
        }
        widgets = {"notes": UnfoldAdminTextareaWidget(attrs={"rows": 3})}

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if not self.errors and "path" in self.fields and self._is_due():
            self._inspect(self.cleaned_data["path"])
        if not self.errors and "chat_template" in self.changed_data:
            self._try_template(self.cleaned_data["chat_template"])
        if not self.errors:
            self._check_draft()
        return cleaned

    def _try_template(self, source: str) -> None:
        try:
            self.instance.chat_facts = model_rows.check_template(source)
        except RegistrationError as error:
            self.add_error("chat_template", error.message)

    def _check_draft(self) -> None:
        try:
            model_rows.check_draft_model(self.instance.name, self.instance.digest, self.cleaned_data)
        except RegistrationError as error:
            self.add_error("draft_model", error.message)

    def _is_due(self) -> bool:
        return not self.instance.digest or "path" in self.changed_data or bool(self.cleaned_data.get("inspect_again"))

    def _inspect(self, path: str) -> None:
        try:
            inspected = model_rows.examine(path)
        except RegistrationError as error:
            self.add_error("path", error.message)
            return
        self.cleaned_data["path"] = str(inspected.path)
        self.instance.digest = inspected.digest
        self.instance.size_bytes = inspected.size_bytes
        self.instance.metadata = inspected.metadata
