"""Routes of metering below `/api/v1/`. Each has an entry in `tests/billing/api/test_isolation.py`, or that fails."""

from __future__ import annotations

from django.urls import URLPattern, path

from metering.api.corrections import CorrectionPreviewView, CorrectionsView
from metering.api.usage import UsageView
from metering.api.usage_events import UsageEventsView

urlpatterns: list[URLPattern] = [
    path("usage", UsageView.as_view(), name="api_usage"),
    path("usage-corrections", CorrectionsView.as_view(), name="api_usage_corrections"),
    path("usage-corrections/preview", CorrectionPreviewView.as_view(), name="api_usage_correction_preview"),
    path("usage-events", UsageEventsView.as_view(), name="api_usage_events"),
]
