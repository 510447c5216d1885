"""Look and navigation of the admin (django-unfold). Imported by the settings: no Django tables here."""

from __future__ import annotations

from typing import Any

from django.templatetags.static import static
from django.urls import reverse_lazy

# Teal: calm beside red and green badges, with enough contrast in the light and in the dark theme.
PRIMARY = {
    "50": "oklch(98.4% .014 180.72)",
    "100": "oklch(95.3% .051 180.801)",
    "200": "oklch(91% .096 180.426)",
    "300": "oklch(85.5% .138 181.071)",
    "400": "oklch(77.7% .152 181.912)",
    "500": "oklch(70.4% .14 182.503)",
    "600": "oklch(52% .094 184.704)",
    "700": "oklch(45% .08 186.391)",
    "800": "oklch(39% .068 188.216)",
    "900": "oklch(34% .058 188.416)",
    "950": "oklch(27.7% .046 192.524)",
}


def _page(title: str, view: str, permission: str) -> dict[str, Any]:
    """Return a tab: its URL name in the admin, shown to those who may view the table `app.model`."""
    app, model = permission.split(".")
    return {
        "title": title,
        "link": reverse_lazy(f"admin:{view}"),
        "permission": lambda request: request.user.has_perm(f"{app}.view_{model}"),
    }


def _list(title: str, table: str, app: str = "billing") -> dict[str, Any]:
    return _page(title, f"{app}_{table}_changelist", f"{app}.{table}")


# What finance does → the pages for it. The first page is where the sidebar leads; the others are tabs beside it.
TASKS: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "Tenants": (
        "groups",
        [
            _list("Tenants", "tenant"),
            _list("API keys", "apikey"),
            _list("Contracts", "contract"),
            _list("Credit purchases", "creditpurchase"),
            _list("Parties", "party"),
        ],
        ["billing.tenant", "billing.apikey", "billing.contract", "billing.creditpurchase", "billing.party"],
    ),
    "Usage": (
        "monitoring",
        [
            _page("Usage by day", "billing_usage", "billing.tenant"),
            _list("Events", "usageevent", "metering"),
            _list("Corrections", "usagecorrection", "metering"),
            _list("Quarantine", "quarantinedevent", "metering"),
            _list("Sequence gaps", "sequencegap", "metering"),
            _list("Dead letters", "deadletter", "metering"),
            _list("Conflicts", "conflictingevent", "metering"),
            _list("Provider reports", "providerreport", "metering"),
            _page("Own counts", "metering_count_drift", "metering.usageevent"),
            _list("Rollups", "usagerollup", "metering"),
            _list("Hours", "hourlycount", "metering"),
            _list("Exports", "exportedday", "metering"),
            _list("Recordings", "recording", "metering"),
            _list("Producers", "producer", "metering"),
            _list("Sources", "ingestionsource", "metering"),
            _list("Streams", "streampartition", "metering"),
        ],
        [
            "metering.usageevent",
            "metering.usagecorrection",
            "metering.quarantinedevent",
            "metering.sequencegap",
            "metering.deadletter",
            "metering.conflictingevent",
            "metering.providerreport",
            "metering.usagerollup",
            "metering.hourlycount",
            "metering.exportedday",
            "metering.recording",
            "metering.producer",
            "metering.ingestionsource",
            "metering.streampartition",
        ],
    ),
    "Invoices": (
        "receipt_long",
        [_list("Invoices", "invoice")],
        ["billing.invoice"],
    ),
    "Payables": (
        "payments",
        [
            _list("Payables", "payable"),
            _list("Statements", "statement"),
            _list("Agreements", "agreement"),
            _list("Agreement versions", "agreementversion"),
        ],
        ["billing.payable", "billing.statement", "billing.agreement", "billing.agreementversion"],
    ),
    "Ledger": (
        "account_balance",
        [
            _list("Journal entries", "journalentry"),
            _list("Accounts", "ledgeraccount"),
            _page("Trial balance", "billing_trial_balance", "billing.ledgeraccount"),
        ],
        ["billing.journalentry", "billing.ledgeraccount"],
    ),
    "Catalog": (
        "deployed_code",
        [
            _list("Language models", "languagemodel"),
            _list("Served models", "servedmodel"),
            _list("Upstreams", "upstream"),
            _list("Providers", "provider"),
            _list("Price books", "pricebook"),
            _list("Rate cards", "ratecard"),
            _list("Exchange rates", "exchangerate"),
        ],
        [
            "billing.languagemodel",
            "billing.servedmodel",
            "billing.upstream",
            "billing.provider",
            "billing.pricebook",
            "billing.ratecard",
            "billing.exchangerate",
        ],
    ),
    "Close": (
        "event_available",
        [_list("Settlement periods", "settlementperiod")],
        ["billing.settlementperiod"],
    ),
    "Staff": (
        "shield_person",
        [
            _list("Audit records", "auditrecord"),
            _list("Users", "user", "auth"),
            _list("Groups", "group", "auth"),
        ],
        ["billing.auditrecord", "auth.user", "auth.group"],
    ),
}

# Counts that wait for a person, shown in the sidebar.
BADGES = {
    "Invoices": "billing.admin.badges.count_draft_invoices",
    "Payables": "billing.admin.badges.count_payables_to_approve",
}


def _is_any_allowed(pages: list[dict[str, Any]]) -> Any:
    return lambda request: any(page["permission"](request) for page in pages)


def _build_sidebar() -> list[dict[str, Any]]:
    today = {"title": "Today", "icon": "today", "link": reverse_lazy("admin:index")}
    items = [today]
    for title, (icon, pages, _) in TASKS.items():
        item = {
            "title": title,
            "icon": icon,
            "link": pages[0]["link"],
            "permission": _is_any_allowed(pages),
        }
        if title in BADGES:
            item |= {"badge": BADGES[title], "badge_variant": "warning", "badge_style": "solid"}
        items.append(item)
    return [{"title": None, "items": items}]


def _build_tabs() -> list[dict[str, Any]]:
    return [
        {"page": title.lower(), "models": tables, "items": pages}
        for title, (_, pages, tables) in TASKS.items()
        if len(pages) > 1
    ]


UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "Tollbook",
    "SITE_HEADER": "Tollbook",
    "SITE_SUBHEADER": "Usage billing and revenue share",
    "SITE_SYMBOL": "toll",
    "SITE_URL": None,
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("billing/favicon.svg")}],
    "SHOW_VIEW_ON_SITE": False,
    "SHOW_HISTORY": False,
    "BORDER_RADIUS": "6px",
    "COLORS": {"primary": PRIMARY},
    "STYLES": [lambda request: static("billing/admin.css")],
    "SITE_VIEWS": [
        ("usage/", "billing_usage", "billing.admin.pages.UsageView"),
        ("own-counts/", "metering_count_drift", "metering.drift_admin.CountDriftView"),
        ("trial-balance/", "billing_trial_balance", "billing.admin.pages.TrialBalanceView"),
    ],
    "DASHBOARD_CALLBACK": "billing.admin.dashboard.build_dashboard",
    "LOGIN": {"form": "billing.admin.login.RateLimitedLoginForm"},
    "SIDEBAR": {"show_search": True, "show_all_applications": False, "navigation": _build_sidebar()},
    "TABS": _build_tabs(),
}
