"""The Django application of the wiring itself: it only registers the system checks."""

from django.apps import AppConfig


class LlmsiteConfig(AppConfig):
    name = "llmsite"
    verbose_name = "Installation"

    def ready(self) -> None:
        from llmsite import checks  # noqa: F401 - registers itself
