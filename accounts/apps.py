from django.apps import AppConfig


class AccountsConfig(AppConfig):
    name = "accounts"
    verbose_name = "Tenants and accounts"

    def ready(self) -> None:
        from accounts.trail import audit_log, sign_ins

        audit_log.connect()
        sign_ins.connect()
