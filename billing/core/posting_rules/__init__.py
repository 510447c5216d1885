"""One function per journal template of the chart's reference, J01 to J22. Pure: amounts in, drafts out.

Each docstring has the T-accounts of an example; a test computes them, and `billing/README.md` shows them all.
"""

from billing.core.posting_rules.accruals import (
    build_provider_cost_accrual,
    build_royalty_accrual,
    build_usage_accrual,
)
from billing.core.posting_rules.corrections import build_reversal
from billing.core.posting_rules.invoices import build_invoice_finalization, build_payment_received
from billing.core.posting_rules.payables import (
    PayableKind,
    build_payable_approval,
    build_payable_confirmed,
    build_payable_failed,
    build_payable_sent,
    build_statement_rounding,
)

__all__ = [
    "PayableKind",
    "build_invoice_finalization",
    "build_payable_approval",
    "build_payable_confirmed",
    "build_payable_failed",
    "build_payable_sent",
    "build_payment_received",
    "build_provider_cost_accrual",
    "build_reversal",
    "build_royalty_accrual",
    "build_statement_rounding",
    "build_usage_accrual",
]
