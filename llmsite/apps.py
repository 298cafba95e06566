"""The Django application of the wiring itself: it registers the system checks, and dates sessions."""

from django.apps import AppConfig


class LlmsiteConfig(AppConfig):
    name = "llmsite"
    verbose_name = "Installation"

    def ready(self) -> None:
        from django.contrib.auth.signals import user_logged_in

        from llmsite.console import door as console_door

        user_logged_in.connect(console_door.begin_session, dispatch_uid="console-session-began")
