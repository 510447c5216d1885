"""Posting rules of usage: revenue, provider cost and royalty, accrued unrounded.

Every amount may be negative: a rating run posts the difference to what it posted before, and a correction gives the
mirrored sides. A late difference of a closed month is dated in an open one and names its origin period (J14).
"""

from __future__ import annotations

from decimal import Decimal

from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import EXACT
from billing.core.posting_rules.joining import Drafts, build_joint_entries


def build_usage_accrual(
    *,
    dates: EntryDates,
    tenant_id: int,
    served_model_id: int | None,
    currency: str,
    amount: Decimal,
    description: str = "",
) -> Drafts:
    """J01, J14. Usage that the tenant owes us for; we are the principal.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1110 Unbilled receivable | 1,000.004321 | | USD |
    | tenant | 2800 Due to corporate book | | 1,000.004321 | USD |
    | corporate | 4000 Usage revenue | | 1,000.004321 | USD |
    | corporate | 1800 Due from tenant books | 1,000.004321 | | USD |
    """
    legs = [
        PostingDraft("1110", currency, amount, tenant_id=tenant_id, served_model_id=served_model_id),
        PostingDraft("4000", currency, amount.copy_negate(), tenant_id=tenant_id, served_model_id=served_model_id),
    ]
    return build_joint_entries(
        "usage_accrual", legs, dates=dates, description=description or "usage", tenant_id=tenant_id
    )


def build_provider_cost_accrual(
    *,
    dates: EntryDates,
    party_id: int,
    currency: str,
    amount: Decimal,
    tenant_id: int | None = None,
    served_model_id: int | None = None,
    description: str = "",
) -> Drafts:
    """J01p; a clawback (J04p) is negative. What the provider is owed for usage, in the provider's currency.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5000 Provider cost | 600.002593 | | USD |
    | corporate | 2100 Provider payable accrued | | 600.002593 | USD |
    """
    legs = [
        PostingDraft("5000", currency, amount, tenant_id, party_id, served_model_id),
        PostingDraft("2100", currency, amount.copy_negate(), tenant_id, party_id, served_model_id),
    ]
    return build_joint_entries("provider_cost_accrual", legs, dates=dates, description=description or "provider cost")


def build_royalty_accrual(
    *,
    dates: EntryDates,
    party_id: int,
    agreement_id: int | None,
    currency: str,
    amount: Decimal,
    tenant_id: int | None = None,
    served_model_id: int | None = None,
    description: str = "",
) -> Drafts:
    """J01r; a clawback (J04r) is negative. A model owner's share of usage, in the tenant's currency.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5010 Royalty | 50.000216 | | USD |
    | corporate | 2110 Royalty payable accrued | | 50.000216 | USD |
    """
    legs = [
        PostingDraft("5010", currency, amount, tenant_id, party_id, served_model_id, agreement_id),
        PostingDraft("2110", currency, amount.copy_negate(), tenant_id, party_id, served_model_id, agreement_id),
    ]
    return build_joint_entries("royalty_accrual", legs, dates=dates, description=description or "royalty")


def build_promoted_usage_accrual(
    *,
    dates: EntryDates,
    tenant_id: int,
    served_model_id: int | None,
    currency: str,
    amount: Decimal,
    promotion: Decimal,
    description: str = "",
) -> Drafts:
    """J06. Usage at list price, of which a promotional credit pays a part.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1110 Unbilled receivable | 600.00 | | USD |
    | tenant | 2800 Due to corporate book | | 600.00 | USD |
    | corporate | 4090 Promotions | 400.00 | | USD |
    | corporate | 4000 Usage revenue | | 1,000.00 | USD |
    | corporate | 1800 Due from tenant books | 600.00 | | USD |
    """
    legs = [
        PostingDraft("1110", currency, EXACT.subtract(amount, promotion), tenant_id, None, served_model_id),
        PostingDraft("4090", currency, promotion, tenant_id, None, served_model_id),
        PostingDraft("4000", currency, amount.copy_negate(), tenant_id, None, served_model_id),
    ]
    return build_joint_entries(
        "promoted_usage_accrual", legs, dates=dates, description=description or "promoted usage", tenant_id=tenant_id
    )


def build_prepaid_usage_accrual(
    *,
    dates: EntryDates,
    tenant_id: int,
    served_model_id: int | None,
    currency: str,
    amount: Decimal,
    description: str = "",
) -> Drafts:
    """J05u. Usage drawn from prepaid credits.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 2200 Contract liability | 1,800.00 | | USD |
    | tenant | 2800 Due to corporate book | | 1,800.00 | USD |
    | corporate | 4000 Usage revenue | | 1,800.00 | USD |
    | corporate | 1800 Due from tenant books | 1,800.00 | | USD |
    """
    legs = [
        PostingDraft("2200", currency, amount, tenant_id, None, served_model_id),
        PostingDraft("4000", currency, amount.copy_negate(), tenant_id, None, served_model_id),
    ]
    return build_joint_entries(
        "prepaid_usage_accrual", legs, dates=dates, description=description or "prepaid usage", tenant_id=tenant_id
    )


def build_agent_usage_accrual(
    *,
    dates: EntryDates,
    tenant_id: int,
    party_id: int,
    served_model_id: int | None,
    currency: str,
    amount: Decimal,
    platform_fee: Decimal,
    description: str = "",
) -> Drafts:
    """J08. Usage where the provider is the principal and we keep a fee (ASC 606-10-55-36, IFRS 15 B34).

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1110 Unbilled receivable | 500.00 | | USD |
    | tenant | 2800 Due to corporate book | | 500.00 | USD |
    | corporate | 2100 Provider payable accrued | | 400.00 | USD |
    | corporate | 4010 Platform fee | | 100.00 | USD |
    | corporate | 1800 Due from tenant books | 500.00 | | USD |
    """
    owed = EXACT.subtract(amount, platform_fee)
    legs = [
        PostingDraft("1110", currency, amount, tenant_id, None, served_model_id),
        PostingDraft("2100", currency, owed.copy_negate(), tenant_id, party_id, served_model_id),
        PostingDraft("4010", currency, platform_fee.copy_negate(), tenant_id, party_id, served_model_id),
    ]
    return build_joint_entries(
        "agent_usage_accrual", legs, dates=dates, description=description or "usage as agent", tenant_id=tenant_id
    )
