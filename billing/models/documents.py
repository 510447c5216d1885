"""Documents as they were issued. Insert-only."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from billing.models.invoices import Invoice
from billing.models.payables import Statement


class IssuedDocument(models.Model):
    """The canonical JSON of an invoice or a statement at the moment it became final.

    Every later rendering (PDF, CSV, e-invoice) is made from it, so names and addresses stay those of the day of issue.
    """

    invoice = models.OneToOneField(Invoice, models.PROTECT, null=True, blank=True, related_name="issued_document")
    statement = models.OneToOneField(Statement, models.PROTECT, null=True, blank=True, related_name="issued_document")
    canonical_json = models.TextField()
    sha256 = models.CharField(max_length=64)
    issued_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ("id",)
        constraints = (
            models.CheckConstraint(
                condition=Q(invoice__isnull=False, statement__isnull=True)
                | Q(invoice__isnull=True, statement__isnull=False),
                name="issued_document_of_one",
            ),
        )

    def __str__(self) -> str:
        return f"{self.invoice or self.statement} {self.sha256[:12]}"
