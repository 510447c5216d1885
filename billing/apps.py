"""Django registration of the control plane."""

from django.apps import AppConfig


class BillingConfig(AppConfig):
    """Parties, catalog, prices, ledger, invoices, payables, closing."""

    name = "billing"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from billing import privileges
        from billing.admin import registration
        from billing.services import ledger_accounts

        privileges.connect()
        ledger_accounts.connect()
        registration.connect(self)
