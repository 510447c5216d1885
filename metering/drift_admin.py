"""The page of the audit: own counts beside what providers reported."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from django.views.generic import TemplateView
from unfold.views import UnfoldSiteViewMixin

from metering.names import get_name
from metering.selectors_drift import DRIFT_DAYS, CountDrift, format_drift, list_count_drift

# As the alert ProviderCountsDrift: 0.5 % of what is reported.
_OVER_PERMILLE_MAX = 5


class CountDriftView(UnfoldSiteViewMixin, TemplateView):
    """Calls audited and how far their counts differ, by provider and model, of the last days."""

    title = "Own counts"
    permission_required = "metering.view_usageevent"
    template_name = "metering/count_drift.html"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        rows = [_describe(drift) for drift in list_count_drift(datetime.now(UTC).date())]
        return super().get_context_data(**kwargs) | {"rows": rows, "days": DRIFT_DAYS}


def _describe(drift: CountDrift) -> dict[str, Any]:
    return {
        "provider": get_name("providers", drift.provider_id),
        "served_model": get_name("served_models", drift.served_model_id),
        "kind": drift.kind,
        "calls": f"{drift.calls:,}",
        "differing_calls": f"{drift.differing_calls:,}",
        "reported": f"{drift.reported_tokens:,}",
        "over": f"{drift.over_tokens:,}",
        "under": f"{drift.under_tokens:,}",
        "difference": f"{drift.difference:+,}" if drift.difference else "0",
        "share": format_drift(drift.difference, drift.reported_tokens),
        "is_bad": drift.over_tokens * 1000 > drift.reported_tokens * _OVER_PERMILLE_MAX,
    }
