"""The double-entry ledger. Insert-only: triggers refuse UPDATE, DELETE and TRUNCATE, and check each balance.

Amounts are signed: a debit is positive, a credit is negative, so a journal entry sums to zero per currency.
"""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from billing.models.agreements import Agreement
from billing.models.catalog import ServedModel
from billing.models.parties import CURRENCY, Party, Tenant


class Book(models.Model):
    """A set of accounts that balances by itself: one per tenant, and one corporate book (no tenant)."""

    slug = models.CharField(max_length=80, unique=True)
    tenant = models.OneToOneField(Tenant, models.PROTECT, null=True, blank=True, related_name="book")

    class Meta:
        ordering = ("slug",)
        constraints = (
            models.UniqueConstraint(models.Value(1), condition=Q(tenant__isnull=True), name="book_one_corporate"),
        )

    def __str__(self) -> str:
        return self.slug


class LedgerAccount(models.Model):
    """An account of the chart in `billing/core/chart_of_accounts.py`; dimensions are columns of the posting."""

    class Type(models.TextChoices):
        ASSET = "ASSET"
        LIABILITY = "LIABILITY"
        EQUITY = "EQUITY"
        INCOME = "INCOME"
        EXPENSE = "EXPENSE"

    code = models.CharField(max_length=10, primary_key=True)
    name = models.CharField(max_length=100, unique=True)
    type = models.CharField(max_length=10, choices=Type)

    class Meta:
        ordering = ("code",)

    def __str__(self) -> str:
        return f"{self.code} {self.name}"


class JournalEntry(models.Model):
    """A balanced set of postings with one cause. A database column `created_in xid8` seals it at commit."""

    book = models.ForeignKey(Book, models.PROTECT, related_name="journal_entries")
    kind = models.CharField(max_length=40, help_text="name of the posting rule")
    description = models.CharField(max_length=300)
    effective_on = models.DateField(help_text="accounting day: decides the period")
    occurred_at = models.DateTimeField(help_text="when the cause happened")
    posted_at = models.DateTimeField(db_default=Now(), editable=False)
    origin_period = models.CharField(max_length=7, blank=True, help_text="YYYY-MM, where it corrects a closed period")
    reverses = models.OneToOneField("self", models.PROTECT, null=True, blank=True, related_name="reversed_by")
    # Stated with the entry, so that no posting can be added once the entry has been found complete.
    posting_count = models.PositiveIntegerField()

    class Meta:
        verbose_name_plural = "journal entries"
        ordering = ("-id",)
        indexes = (models.Index(fields=("effective_on", "book")),)
        constraints = (models.CheckConstraint(condition=Q(posting_count__gte=2), name="journal_entry_two_postings"),)

    def __str__(self) -> str:
        return f"{self.kind} {self.effective_on} #{self.pk}"


class Posting(models.Model):
    """One debit (positive) or credit (negative) on one account, with the dimensions that reports group by."""

    # The unique constraint below is the index.
    journal_entry = models.ForeignKey(JournalEntry, models.PROTECT, related_name="postings", db_index=False)
    position = models.PositiveIntegerField(help_text="1 to the entry's posting_count")
    account = models.ForeignKey(LedgerAccount, models.PROTECT, related_name="postings")
    currency = models.CharField(max_length=3, validators=[CURRENCY])
    amount = models.DecimalField(max_digits=38, decimal_places=9)
    tenant = models.ForeignKey(Tenant, models.PROTECT, null=True, blank=True, related_name="+")
    party = models.ForeignKey(Party, models.PROTECT, null=True, blank=True, related_name="+")
    served_model = models.ForeignKey(ServedModel, models.PROTECT, null=True, blank=True, related_name="+")
    agreement = models.ForeignKey(Agreement, models.PROTECT, null=True, blank=True, related_name="+")

    class Meta:
        ordering = ("journal_entry", "position")
        indexes = (models.Index(fields=("account", "currency")),)
        constraints = (
            models.UniqueConstraint(fields=("journal_entry", "position"), name="posting_position_once"),
            # The upper bound refuses NaN and Infinity, which compare as greater than every number.
            models.CheckConstraint(
                condition=~Q(amount=0) & Q(amount__lt=10**28) & Q(amount__gt=-(10**28)),
                name="posting_amount_finite",
            ),
        )

    def __str__(self) -> str:
        return f"{self.account_id} {self.amount.normalize():f} {self.currency}"


class JournalKey(models.Model):
    """The idempotency key of a write: the same key and payload gives the first entry, another payload an error."""

    book = models.ForeignKey(Book, models.PROTECT, related_name="+")
    key = models.CharField(max_length=200)
    payload_sha256 = models.BinaryField(max_length=32)
    journal_entry = models.OneToOneField(JournalEntry, models.PROTECT, related_name="journal_key")

    class Meta:
        constraints = (models.UniqueConstraint(fields=("book", "key"), name="journal_key_once"),)

    def __str__(self) -> str:
        return self.key
