"""Tables of the control plane, one file per family. Import them from here."""

from billing.models.agreements import Agreement, AgreementVersion
from billing.models.audit import AuditRecord
from billing.models.catalog import LanguageModel, ServedModel, Upstream
from billing.models.charges import AccrualRun, RatedCharge, RatedRoyalty
from billing.models.closing import CloseStep, SettlementPeriod
from billing.models.documents import IssuedDocument
from billing.models.invoices import Invoice, InvoiceLine, InvoiceSeries
from billing.models.ledger import Book, JournalEntry, JournalKey, LedgerAccount, Posting
from billing.models.parties import ApiKey, Party, Provider, Tenant
from billing.models.payables import Payable, Statement, StatementLine
from billing.models.prepaid import CreditPurchase, ModelBudget
from billing.models.pricing import Contract, ExchangeRate, PriceBook, Rate, RateCard

__all__ = [
    "AccrualRun",
    "Agreement",
    "AgreementVersion",
    "ApiKey",
    "AuditRecord",
    "Book",
    "CloseStep",
    "Contract",
    "CreditPurchase",
    "ExchangeRate",
    "Invoice",
    "InvoiceLine",
    "InvoiceSeries",
    "IssuedDocument",
    "JournalEntry",
    "JournalKey",
    "LanguageModel",
    "LedgerAccount",
    "ModelBudget",
    "Party",
    "Payable",
    "Posting",
    "PriceBook",
    "Provider",
    "Rate",
    "RateCard",
    "RatedCharge",
    "RatedRoyalty",
    "ServedModel",
    "SettlementPeriod",
    "Statement",
    "StatementLine",
    "Tenant",
    "Upstream",
]
