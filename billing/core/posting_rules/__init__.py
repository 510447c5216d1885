"""One function per journal template of the reference, J00 to J22. Pure: amounts in, drafts out.

Each docstring has the T-accounts of an example, numbers and all. Tests compute each example and compare it with its
table and with the reference's journal; `billing/README.md` shows them all.
"""

from billing.core.posting_rules.accruals import (
    build_agent_usage_accrual,
    build_prepaid_usage_accrual,
    build_promoted_usage_accrual,
    build_provider_cost_accrual,
    build_royalty_accrual,
    build_usage_accrual,
)
from billing.core.posting_rules.corrections import build_reversal
from billing.core.posting_rules.credits import (
    build_breakage,
    build_credit_note,
    build_credit_purchase,
    build_expected_loss,
    build_recovery,
    build_refund_paid,
    build_unclaimed_property,
    build_write_off,
)
from billing.core.posting_rules.equity import build_annual_close, build_capital_paid_in
from billing.core.posting_rules.exchange import (
    build_foreign_revenue,
    build_foreign_royalty_accrual,
    build_foreign_royalty_paid,
    build_foreign_stripe_payment,
    build_realised_gain,
    build_revaluation,
)
from billing.core.posting_rules.invoices import build_invoice_finalization, build_payment_received
from billing.core.posting_rules.payables import (
    PayableKind,
    build_payable_approval,
    build_payable_confirmed,
    build_payable_failed,
    build_payable_sent,
    build_provider_variance,
    build_reserve_held,
    build_reserve_released,
    build_statement_rounding,
)
from billing.core.posting_rules.payments import (
    build_dispute_lost,
    build_dispute_opened,
    build_stripe_available,
    build_stripe_payment,
    build_stripe_payout_arrived,
    build_stripe_payout_initiated,
    build_tax_remitted,
    build_unapplied_payment,
    build_withholding_remitted,
)
from billing.core.posting_rules.royalties import (
    build_advance_paid,
    build_guarantee_earned,
    build_guarantee_paid,
    build_guarantee_shortfall,
    build_recoupment,
    build_royalty_gross_up,
)

__all__ = [
    "PayableKind",
    "build_advance_paid",
    "build_agent_usage_accrual",
    "build_annual_close",
    "build_breakage",
    "build_capital_paid_in",
    "build_credit_note",
    "build_credit_purchase",
    "build_dispute_lost",
    "build_dispute_opened",
    "build_expected_loss",
    "build_foreign_revenue",
    "build_foreign_royalty_accrual",
    "build_foreign_royalty_paid",
    "build_foreign_stripe_payment",
    "build_guarantee_earned",
    "build_guarantee_paid",
    "build_guarantee_shortfall",
    "build_invoice_finalization",
    "build_payable_approval",
    "build_payable_confirmed",
    "build_payable_failed",
    "build_payable_sent",
    "build_payment_received",
    "build_prepaid_usage_accrual",
    "build_promoted_usage_accrual",
    "build_provider_cost_accrual",
    "build_provider_variance",
    "build_realised_gain",
    "build_recoupment",
    "build_recovery",
    "build_refund_paid",
    "build_reserve_held",
    "build_reserve_released",
    "build_revaluation",
    "build_reversal",
    "build_royalty_accrual",
    "build_royalty_gross_up",
    "build_statement_rounding",
    "build_stripe_available",
    "build_stripe_payment",
    "build_stripe_payout_arrived",
    "build_stripe_payout_initiated",
    "build_tax_remitted",
    "build_unapplied_payment",
    "build_unclaimed_property",
    "build_usage_accrual",
    "build_withholding_remitted",
    "build_write_off",
]
