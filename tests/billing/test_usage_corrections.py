"""Corrections through command, API and admin, with a preview that says what billing will book.

acme pays 3.00 / 4.00 USD per 1,000,000 input / output tokens, bedrock costs 2.65 / 3.50, meta is due 5 % of net.
"""

import json
import re
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from billing.core.periods import Month
from billing.models import Contract, Tenant
from billing.services.accruals import accrue_period
from billing.services.catalog import publish_catalog
from metering.core.corrections import MoneyDifference
from metering.correction_report import describe_preview
from metering.corrections import CorrectionKind, CorrectionRequest, preview_correction, record_correction
from metering.models import UsageCorrection, UsageEvent
from metering.pricing import price_deltas
from metering.verification import verify_period
from tests.billing import scenario
from tests.billing.house import built_house, create_staff, house, log_in

__all__ = ["built_house", "house"]

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)


def get_call(tenant, month):
    """The tenant's only call of a month of the house."""
    tenant_id = Tenant.objects.get(party__slug=tenant).pk
    return UsageEvent.objects.get(tenant_id=tenant_id, usage_on__gte=month.start, usage_on__lt=month.end)


def ask(kind, call=None, *, key="test", **fields):
    if call is not None:
        fields["call_id"] = call.pk
    return CorrectionRequest(kind=CorrectionKind(kind), idempotency_key=key, reason="miscounted", **fields)


def create_tenant_without_contract():
    """initech pays from December on."""
    scenario.create_tenant("initech", scenario.World().book("usd-list"))
    Contract.objects.filter(tenant__party__slug="initech").update(effective_from=date(2026, 12, 1))
    scenario.forget_caches()  # another test's catalog may have had the same version
    publish_catalog()


def price(request):
    return price_deltas(preview_correction(request).deltas)


@pytest.fixture
def acme_call(house):
    """2,000,000 input and 1,000,000 output tokens of 3 November."""
    return get_call("acme", NOVEMBER)


@pytest.fixture
def finance(house):
    return log_in(create_staff("fiona", "Finance"))


def test_preview_is_what_the_ledger_gains(acme_call):
    """−100,000 input: 0.1 × 3.00 = −0.30 of revenue, 0.1 × 2.65 = −0.265 of cost, 5 % of the net −0.035."""
    request = ask("amend", acme_call, input_tokens=1_900_000)
    priced = price(request)
    assert priced.problems == ()
    assert priced.amounts == (
        MoneyDifference("2026-11", "2026-11", "provider cost", "USD", Decimal("-0.265")),
        MoneyDifference("2026-11", "2026-11", "revenue", "USD", Decimal("-0.30")),
        MoneyDifference("2026-11", "2026-11", "royalties", "USD", Decimal("-0.00175")),
    )
    record_correction(request, actor_name="ann")
    result = accrue_period(NOVEMBER)
    assert (result.revenue, result.provider_cost, result.royalties) == (
        {"USD": Decimal("-0.30")},
        {"USD": Decimal("-0.265")},
        {"USD": Decimal("-0.00175")},
    )
    assert accrue_period(NOVEMBER).run_number is None


def test_preview_of_a_closed_month_names_the_open_one(house):
    (one,) = {(one.month, one.books_in) for one in price(ask("void", get_call("acme", OCTOBER))).amounts}
    assert one == ("2026-10", "2026-11")


def test_preview_says_what_has_no_price(acme_call):
    create_tenant_without_contract()
    preview = preview_correction(ask("amend", acme_call, tenant="initech"))
    facts = describe_preview(preview, price_deltas(preview.deltas))
    assert facts["problems"] == [
        "initech: llama-3-70b-instruct at bedrock-llama-3-70b: the tenant has no contract on 2026-11-01"
    ]
    assert {one["side"]: one["amount"] for one in facts["money"]} == {
        "revenue": "-10",
        "provider cost": "-8.8",
        "royalties": "-0.06",
    }


def test_call_that_was_emptied_needs_no_price(acme_call):
    """Usage attributed to a tenant without a contract blocks the month until it is moved, and then does not."""
    create_tenant_without_contract()
    at = datetime(2026, 11, 10, tzinfo=UTC)
    scenario.record_calls("initech", "bedrock-llama-3-70b", at=at, input_tokens=1_000, output_tokens=1)
    call = get_call("initech", NOVEMBER)
    assert len(accrue_period(NOVEMBER).problems) == 1
    record_correction(ask("amend", call, tenant="acme"), actor_name="ann")
    assert accrue_period(NOVEMBER).problems == ()


# --- command


def run(capsys, *arguments):
    call_command("correct_usage", *arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_command_previews_and_records(acme_call, capsys):
    arguments = ["amend", str(acme_call.pk), "--output-tokens", "900000", "--reason", "their log says so", "--key", "a"]
    facts = run(capsys, *arguments, "--dry-run")
    assert facts["tokens"] == {"input": 0, "cached_input": 0, "cache_write": 0, "output": -100_000, "reasoning": 0}
    assert {one["side"]: one["amount"] for one in facts["money"]} == {
        "revenue": "-0.4",
        "provider cost": "-0.35",
        "royalties": "-0.0025",
    }
    call_command("correct_usage", *arguments, "--dry-run")
    shown = capsys.readouterr().out
    assert "output_tokens          1000000 -> 900000" in shown
    assert "revenue                -0.4 USD for 2026-11" in shown
    assert not UsageCorrection.objects.exists()
    assert run(capsys, *arguments, "--actor", "ann")["is_new"] is True
    assert run(capsys, *arguments, "--actor", "bob")["is_new"] is False
    correction = UsageCorrection.objects.get()
    assert (correction.actor_name, correction.reason, correction.output_tokens) == ("ann", "their log says so", 900_000)
    with pytest.raises(CommandError, match="counts for exactly that already"):
        call_command("correct_usage", *arguments[:-2])


def test_command_backfills(house, capsys):
    facts = run(
        capsys,
        *("backfill", "--occurred-at", "2026-11-05T10:00:00Z", "--tenant", "acme", "--reason", "lost in the fire"),
        *("--served-model", "llama-3-70b-instruct", "--input-tokens", "10", "--output-tokens", "5"),
    )
    assert (facts["kind"], facts["after"]["input_tokens"], facts["after"]["usage_on"]) == ("backfill", 10, "2026-11-05")
    assert UsageEvent.objects.get(call_id=facts["call_id"]).output_tokens == 5


def test_file_is_recorded_once_and_says_what_it_refused(house, tmp_path, capsys):
    acme, globex = get_call("acme", NOVEMBER), get_call("globex", NOVEMBER)
    path = tmp_path / "corrections.csv"
    path.write_text(
        "kind,idempotency_key,reason,call_id,input_tokens\n"
        f"amend,case-1,,{acme.pk},1900000\n"
        f"void,case-2,not theirs,{globex.pk},\n"
        f"amend,case-3,,{uuid.UUID('01a10d38-f900-7000-8000-000000000000')},1\n"
        f"amend,case-4,,{acme.pk},lots\n"
    )
    dry = run(capsys, "file", str(path), "--reason", "June audit", "--dry-run")
    rejected = {"call_unknown": 1, "invalid_record": 1}
    assert (dry["recorded"], dry["rejected"], dry["rejects_path"]) == (2, rejected, None)
    assert {(one["side"], one["currency"]): one["amount"] for one in dry["money"]}["revenue", "USD"] == "-0.3"
    assert not UsageCorrection.objects.exists()
    facts = run(capsys, "file", str(path), "--reason", "June audit")
    assert (facts["lines"], facts["recorded"], facts["repeated"], facts["rejected"]) == (4, 2, 0, rejected)
    lines = [json.loads(line) for line in Path(facts["rejects_path"]).read_text().splitlines()]
    assert [(line["line"], line["code"]) for line in lines] == [(4, "call_unknown"), (5, "invalid_record")]
    assert dict(UsageCorrection.objects.values_list("idempotency_key", "reason")) == {
        "case-1": "June audit",
        "case-2": "not theirs",
    }
    assert run(capsys, "file", str(path), "--reason", "June audit")["repeated"] == 2
    assert verify_period(NOVEMBER.start, NOVEMBER.end).differences == []
    json_lines = tmp_path / "more.jsonl"
    json_lines.write_text(json.dumps({"kind": "void", "idempotency_key": "v", "reason": "r", "call_id": str(acme.pk)}))
    assert run(capsys, "file", str(json_lines))["recorded"] == 1
    for broken in ("{", '{"a":' * 100_000):
        json_lines.write_text(broken)
        with pytest.raises(CommandError, match="line 1 is not JSON"):
            call_command("correct_usage", "file", str(json_lines))


# --- API


def post(client, path, body, **headers):
    return client.post(f"/api/v1/usage-corrections{path}", body, content_type="application/json", headers=headers)


def test_api_previews_records_and_repeats(acme_call, finance):
    body = {"kind": "amend", "call_id": str(acme_call.pk), "reason": "miscounted", "input_tokens": 1_900_000}
    preview = post(finance, "/preview", body)
    assert preview.status_code == 200
    assert preview.json()["before"]["input_tokens"] == 2_000_000
    assert {one["side"]: one["amount"] for one in preview.json()["money"]} == {
        "revenue": "-0.3",
        "provider cost": "-0.265",
        "royalties": "-0.00175",
    }
    assert post(finance, "", body).status_code == 400
    first = post(finance, "", body | {"confirmed_previous_id": preview.json()["previous_id"]}, Idempotency_Key="k")
    again = post(finance, "", body, Idempotency_Key="k")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert (first.json()["actor"], first.json()["after"]["input_tokens"]) == ("fiona", 1_900_000)
    chain = finance.get("/api/v1/usage-corrections", {"call_id": str(acme_call.pk)}).json()
    assert [one["id"] for one in chain] == [first.json()["id"]]


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"call_id": "01a10d38-f900-7000-8000-000000000000"}, 404, "call_unknown"),
        ({"input_tokens": 2_000_000}, 422, "nothing_changes"),
        ({"tenant": "nobody"}, 422, "unknown_tenant"),
        ({"confirmed_previous_id": 99}, 409, "correction_stale"),
        ({"colour": "red"}, 400, None),
        ({"input_tokens": -1}, 400, None),
        ({"reason": " "}, 400, None),
    ],
)
def test_api_refuses_with_a_code(acme_call, finance, changes, status, code):
    body = {"kind": "amend", "call_id": str(acme_call.pk), "reason": "miscounted", "input_tokens": 1}
    answer = post(finance, "", body | changes, Idempotency_Key="k")
    assert (answer.status_code, answer.json().get("code")) == (status, code)
    assert not UsageCorrection.objects.exists()


def test_api_is_for_staff_who_may_correct(acme_call):
    body = {"kind": "void", "call_id": str(acme_call.pk), "reason": "no"}
    for group in ("Operator", "Auditor (read-only)"):
        client = log_in(create_staff(group[:3], group))
        assert post(client, "", body, Idempotency_Key="k").status_code == 403
        assert post(client, "/preview", body).status_code == 403


# --- admin


def read_hidden(page, name):
    return re.search(rf'name="{name}" value="([^"]*)"', page)[1]


def test_admin_asks_previews_and_records(acme_call, finance):
    url = f"/admin/metering/usageevent/{acme_call.pk}/amend"
    page = finance.get(f"/admin/metering/usageevent/{acme_call.pk}/change/").content.decode()
    assert url in page
    assert "none: it counts as recorded" in page
    form = finance.get(url, follow=True)
    values = {name: value for name, value in form.context["form"].initial.items() if name not in ("calls", "usage_on")}
    values |= {"input_tokens": "1900000", "reason": "their log"}
    address = form.request["PATH_INFO"]
    preview = finance.post(address, values | {"preview": "1"}).content.decode()
    for shown in ("1,900,000", "-100,000", "-0.3 USD", "-0.265 USD", "-0.00175 USD", "their log"):
        assert shown in preview
    assert not UsageCorrection.objects.exists()
    confirmed = values | {"confirm": "1", "confirmed_previous_id": read_hidden(preview, "confirmed_previous_id")}
    assert finance.post(address, values | {"edit": "1"}).context["form"]["reason"].value() == "their log"
    after = finance.post(address, confirmed, follow=True).content.decode()
    correction = UsageCorrection.objects.get()
    assert f"Correction {correction.pk} of call {acme_call.pk} is recorded." in after
    assert re.search(
        r"amend by fiona on \d{4}-\d\d-\d\d \d\d:\d\d: it counts 1,900,000 input and 1,000,000 output", after
    )
    assert (correction.actor_name, correction.reason, correction.input_tokens) == ("fiona", "their log", 1_900_000)
    # The second click of a double click, and somebody who looked at an older preview.
    assert "was recorded before" in finance.post(address, confirmed, follow=True).content.decode()
    stale = confirmed | {"idempotency_key": "other", "input_tokens": "1"}
    assert "was corrected since the preview" in finance.post(address, stale).content.decode()
    assert UsageCorrection.objects.count() == 1
    assert "their log" in finance.get("/admin/metering/usagecorrection/").content.decode()
    page = finance.get(f"/admin/metering/usagecorrection/{correction.pk}/change/").content.decode()
    assert "+0 calls, -100,000 input and +0 output tokens" in page


def test_admin_voids_and_backfills(acme_call, finance):
    void = f"/admin/metering/usageevent/{acme_call.pk}/void/"
    form = finance.get(void).context["form"]
    values = {"idempotency_key": form.initial["idempotency_key"], "reason": "a test of ours"}
    assert "-10 USD" in finance.post(void, values | {"preview": "1"}).content.decode()
    finance.post(void, values | {"confirm": "1", "confirmed_previous_id": "0"})
    assert UsageCorrection.objects.get().kind == "VOID"
    backfill = "/admin/metering/usagecorrection/backfill/"
    assert finance.get(backfill).status_code == 200
    values = {"idempotency_key": "b", "reason": "lost", "tenant": "acme", "served_model": "llama-3-70b-instruct"}
    values |= {"outcome": "completed", "input_tokens": 7, "output_tokens": 3, "occurred_at": "2026-11-05T10:00:00Z"}
    values |= {"cached_input_tokens": 0, "cache_write_tokens": 0, "reasoning_tokens": 0}
    assert "not recorded" not in finance.post(backfill, values | {"preview": "1"}).content.decode()
    finance.post(backfill, values | {"confirm": "1", "confirmed_previous_id": "0"})
    assert UsageCorrection.objects.get(kind="BACKFILL").occurred_at == datetime(2026, 11, 5, 10, tzinfo=UTC)
    unknown = finance.post(backfill, values | {"preview": "1", "tenant": "nobody", "idempotency_key": "c"})
    assert unknown.status_code == 400
    assert "is not in the catalog" in unknown.content.decode()


def test_admin_lets_auditors_look_and_not_correct(acme_call):
    auditor = log_in(create_staff("audrey", "Auditor (read-only)"))
    page = auditor.get(f"/admin/metering/usageevent/{acme_call.pk}/change/")
    assert page.status_code == 200
    assert "/amend" not in page.content.decode()
    for url in (f"usageevent/{acme_call.pk}/amend/", f"usageevent/{acme_call.pk}/void/", "usagecorrection/backfill/"):
        assert auditor.get(f"/admin/metering/{url}").status_code == 403
        assert auditor.post(f"/admin/metering/{url}", {"reason": "x", "confirm": "1"}).status_code == 403
