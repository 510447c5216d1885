"""What can go wrong in billing. Every error has a stable snake_case `code`; messages say what to do.

BillingError                          billing_error
├── InvalidInputError                 invalid_input            a value that no rule accepts
│   ├── UnknownCurrencyError          unknown_currency         not an ISO 4217 code with a minor unit
│   ├── CurrencyMismatchError         currency_mismatch        two currencies where one is needed
│   ├── InvalidAmountError            invalid_amount           a float, NaN, Infinity or too many decimals
│   ├── InvalidAllocationError        invalid_allocation       weights that cannot share a sum
│   └── InvalidPeriodError            invalid_period           not a month, or bounds out of order
├── LedgerError                       ledger_error
│   ├── InvalidJournalError           invalid_journal          a draft that the ledger would refuse
│   │   └── UnbalancedJournalError    unbalanced_journal       debits and credits differ in a currency
│   ├── IdempotencyConflictError      idempotency_conflict     the key was used with another payload
│   ├── ClosedPeriodError             closed_period            the accounting day lies in a closed month
│   ├── AlreadyReversedError          already_reversed         an entry is reversed once only
│   └── ChartConflictError            chart_conflict           an account in use changed its type
├── NotFoundError                     not_found                nothing has that name or id
├── WrongStateError                   wrong_state              a status machine refuses the step
├── UnpricedUsageError                unpriced_usage           no price for some usage on its day
├── MissingFigureError                missing_figure           an agreement needs an amount that is not known
├── CloseRefusedError                 close_refused            a check of the month close is red
└── MissingExchangeRateError          missing_exchange_rate    no stored rate between two currencies

None is retryable: the same call fails again until a person or another call changes something.
"""

from __future__ import annotations


class BillingError(Exception):
    """Root of the errors of billing."""

    code = "billing_error"


class InvalidInputError(BillingError, ValueError):
    """A value that no rule accepts."""

    code = "invalid_input"


class UnknownCurrencyError(InvalidInputError):
    """Not an ISO 4217 code with a minor unit."""

    code = "unknown_currency"


class CurrencyMismatchError(InvalidInputError):
    """Two currencies where one is needed."""

    code = "currency_mismatch"


class InvalidAmountError(InvalidInputError):
    """A float, NaN, Infinity, or more digits than the column holds."""

    code = "invalid_amount"


class InvalidAllocationError(InvalidInputError):
    """Weights that cannot share a sum."""

    code = "invalid_allocation"


class InvalidPeriodError(InvalidInputError):
    """Not a month, an unknown zone, or bounds out of order."""

    code = "invalid_period"


class LedgerError(BillingError):
    """Something about the books."""

    code = "ledger_error"


class InvalidJournalError(LedgerError, ValueError):
    """A draft that the ledger would refuse."""

    code = "invalid_journal"


class UnbalancedJournalError(InvalidJournalError):
    """Debits and credits differ in a currency."""

    code = "unbalanced_journal"


class IdempotencyConflictError(LedgerError):
    """The key was used before with another payload."""

    code = "idempotency_conflict"


class ClosedPeriodError(LedgerError):
    """The accounting day lies in a closed month. Post to an open one and name the origin period."""

    code = "closed_period"


class AlreadyReversedError(LedgerError):
    """An entry is reversed once only."""

    code = "already_reversed"


class ChartConflictError(LedgerError):
    """An account of the chart changed its type after the database had learnt it."""

    code = "chart_conflict"


class NotFoundError(BillingError, LookupError):
    """Nothing has that name or id."""

    code = "not_found"


class WrongStateError(BillingError):
    """A status machine refuses the step."""

    code = "wrong_state"


class UnpricedUsageError(BillingError):
    """No price for some usage on its day. Usage is never billed as zero for want of a price."""

    code = "unpriced_usage"


class MissingFigureError(BillingError):
    """A clause of an agreement needs an amount that the facts of the period do not give."""

    code = "missing_figure"


class CloseRefusedError(BillingError):
    """A check of the month close is red; the message lists every reason, and `checks` is the whole checklist."""

    code = "close_refused"

    def __init__(self, message: str, checks: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.checks = checks


class MissingExchangeRateError(BillingError):
    """No stored exchange rate between two currencies on or before the day."""

    code = "missing_exchange_rate"
