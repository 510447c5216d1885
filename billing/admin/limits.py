"""Limits in forms: the monthly budget in currency units, stored in nano-currency."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django import forms
from unfold.widgets import UnfoldAdminTextInputWidget

from billing.core.catalog_file import EXACT_INTEGER_MAX, NANO
from billing.core.money import EXACT
from billing.models import ModelBudget

LIMIT_FIELDS = (("requests_per_minute", "tokens_per_minute"), ("concurrent_calls", "monthly_budget"))


def _build_budget_field(*, required: bool) -> forms.DecimalField:
    return forms.DecimalField(
        required=required,
        min_value=0,
        max_value=EXACT_INTEGER_MAX // NANO,
        decimal_places=9,
        help_text="in the tenant's currency, per calendar month (UTC)",
        widget=UnfoldAdminTextInputWidget,
    )


class LimitsForm(forms.ModelForm):
    """A form of a table with limits, where an empty limit means none."""

    monthly_budget = _build_budget_field(required=False)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nano = self.instance.monthly_budget_nano
        if nano is not None:
            self.initial["monthly_budget"] = f"{EXACT.scaleb(Decimal(nano), -9):f}".rstrip("0").rstrip(".")

    def save(self, commit: bool = True) -> Any:
        budget = self.cleaned_data["monthly_budget"]
        self.instance.monthly_budget_nano = None if budget is None else int(EXACT.scaleb(budget, 9))
        return super().save(commit)


class ModelBudgetForm(LimitsForm):
    """The budget of one model; to have none, delete it."""

    monthly_budget = _build_budget_field(required=True)

    class Meta:
        model = ModelBudget
        fields = ("served_model",)
