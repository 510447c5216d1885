"""Routes of metering below `/api/v1/`. Each has an entry in `tests/billing/api/test_isolation.py`, or that fails."""

from __future__ import annotations

from django.urls import URLPattern, path

from metering.api.usage_events import UsageEventsView

urlpatterns: list[URLPattern] = [
    path("usage-events", UsageEventsView.as_view(), name="api_usage_events"),
]
