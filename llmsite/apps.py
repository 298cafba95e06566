from django.apps import AppConfig


class LlmsiteConfig(AppConfig):
    name = "llmsite"
    verbose_name = "Installation"
