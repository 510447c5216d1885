"""The demonstration, step by step, against a running instance: `python -m deploy.demo`.

It does what an operator, a tenant's developer and finance would do, with the same commands and clients.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from django.core.management import call_command
from tqdm import tqdm

from billing.core.periods import Month
from billing.models import Contract, SettlementPeriod, Tenant, Upstream
from billing.services.accruals import accrue_period
from deploy.demo.history import Route, write_history
from deploy.demo.summary import DemoRun, build_summary, count_recorded_calls
from deploy.demo.traffic import RECORDED, Caller, send_calls, send_refused_calls
from deploy.embedded.runtime import PROJECT_ROOT

CATALOG = PROJECT_ROOT / "deploy" / "catalog" / "demo.toml"
ROLL_UP_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """How large the demonstration is. `gateway_url` has no path; `out_dir` takes a folder for each month."""

    gateway_url: str
    out_dir: Path
    history_calls: int
    live_calls: int


def run_demo(options: DemoOptions, *, today: date) -> dict[str, Any]:
    """Run every step and return the summary. Raises RuntimeError where a step ends otherwise than it must."""
    month = Month.of(today).previous
    options.out_dir.mkdir(parents=True, exist_ok=True)

    _say("Load the catalog: parties, models with owner and lineage, upstreams, dated prices, agreements")
    _call("load_catalog", str(CATALOG))

    _say(f"Import {options.history_calls:,} calls of {month}, as a provider's own log would give them")
    history = options.out_dir / f"history-{month}.jsonl"
    write_history(history, list_routes(), month_start=month.start, month_end=month.end, calls=options.history_calls)
    _call("import_usage", str(history))

    _say(f"Send {options.live_calls} live calls through the gateway with the openai client")
    callers, revoked_key = issue_keys(today)
    outcomes = _send_traffic(options, callers, revoked_key)

    _say("Wait until every call is rolled up")
    run = DemoRun(month=month, tenant_key_ids=tuple(callers), outcomes=outcomes)
    expected = sum(outcomes[outcome] for outcome in RECORDED)
    _wait_for_roll_up(run, expected)

    _say(f"Close {month}: verify, rate, post, invoice, state, freeze")
    if not SettlementPeriod.objects.filter(period_start=month.start, status="CLOSED").exists():
        call_command("close_period", str(month))
    accrue_period(month.next, as_of=today)

    _say("Write the documents")
    call_command("export_invoices", str(month), "--out", str(options.out_dir / str(month)))
    return build_summary(run, options.out_dir)


def list_routes() -> list[Route]:
    """Return each tenant with each upstream of each served model that its contract prices."""
    upstreams = list(Upstream.objects.filter(is_active=True).select_related("served_model"))
    return [
        Route(tenant=contract.tenant.party.slug, served_model=upstream.served_model.name, upstream=upstream.slug)
        for contract in Contract.objects.select_related("tenant__party").order_by("tenant__party__slug")
        for upstream in upstreams
        if contract.price_book.rate_cards.filter(served_model=upstream.served_model).exists()
    ]


def issue_keys(today: date) -> tuple[dict[str, Caller], str]:
    """Issue a key to each tenant, and one that is revoked at once; return callers by key id, and the revoked key."""
    callers: dict[str, Caller] = {}
    routes = list_routes()
    for tenant in Tenant.objects.filter(is_active=True).select_related("party"):
        slug = tenant.party.slug
        key = json.loads(_call("issue_api_key", slug, "--name", f"demonstration {today}", "--json"))
        models = sorted({route.served_model for route in routes if route.tenant == slug})
        callers[key["key_id"]] = Caller(tenant=slug, api_key=key["api_key"], served_models=tuple(models))
    first = next(iter(callers.values()))
    revoked = json.loads(_call("issue_api_key", first.tenant, "--name", "revoked at once", "--json"))
    _call("revoke_api_key", revoked["key_id"])
    return callers, revoked["api_key"]


def _send_traffic(options: DemoOptions, callers: dict[str, Caller], revoked_key: str) -> Counter[str]:
    base_url = f"{options.gateway_url}/v1"
    # A gateway learns of new keys and of revoked ones within a second.
    time.sleep(1.2)
    with tqdm(total=options.live_calls, unit="call", leave=False, disable=None) as bar:
        outcomes = send_calls(
            list(callers.values()), base_url=base_url, calls=options.live_calls, on_call=lambda: bar.update(1)
        )
    return outcomes + send_refused_calls(next(iter(callers.values())), revoked_key=revoked_key, base_url=base_url)


def _wait_for_roll_up(run: DemoRun, expected: int) -> None:
    deadline = time.monotonic() + ROLL_UP_TIMEOUT_S
    while (recorded := count_recorded_calls(run.tenant_key_ids)) < expected:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {recorded} of {expected} calls were recorded after {ROLL_UP_TIMEOUT_S} s")
        time.sleep(0.2)


def _say(step: str) -> None:
    print(f"\n▸ {step}", flush=True)  # noqa: T201 - a demonstration talks


def _call(command: str, *arguments: str) -> str:
    output = io.StringIO()
    call_command(command, *arguments, stdout=output)
    return output.getvalue()
