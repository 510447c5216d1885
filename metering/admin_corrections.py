"""Pages that correct usage: a form, then a preview in tokens and money, then the record. Who and why is kept."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from django import forms
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import reverse
from unfold.admin import ModelAdmin
from unfold.widgets import UnfoldAdminIntegerFieldWidget, UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from gateway.contract.token_kind import Outcome
from metering.correction_report import describe_preview, describe_state
from metering.correction_rows import build_state, get_live_correction
from metering.corrections import (
    TOKEN_FIELDS,
    CorrectionKind,
    CorrectionPreview,
    CorrectionRequest,
    preview_correction,
    record_correction,
)
from metering.errors import MeteringError
from metering.models import UsageEvent
from metering.pricing import price_deltas

_EXPLANATIONS = {
    CorrectionKind.AMEND: "State what the call really used, or whose it was. The event stays as it was recorded; a "
    "correction is kept beside it and changes what is billed.",
    CorrectionKind.VOID: "The call will bill nothing: not to its tenant, not from its provider, not to an owner.",
    CorrectionKind.BACKFILL: "Record a call that never arrived. If its event comes after all, the event's numbers take "
    "the place of these.",
}


class VoidForm(forms.Form):
    """Why, and the hidden key that makes a double click one correction."""

    idempotency_key = forms.CharField(max_length=200, widget=forms.HiddenInput)
    reason = forms.CharField(
        max_length=500, widget=UnfoldAdminTextInputWidget, label="Reason", help_text="kept on record"
    )


def _text(label: str, help_text: str = "", **options: Any) -> forms.CharField:
    return forms.CharField(
        max_length=200, widget=UnfoldAdminTextInputWidget, label=label, help_text=help_text, **options
    )


def _count(label: str, help_text: str = "") -> forms.IntegerField:
    return forms.IntegerField(min_value=0, widget=UnfoldAdminIntegerFieldWidget, label=label, help_text=help_text)


class AmendForm(VoidForm):
    """What the call counts for, to be changed where it is wrong."""

    tenant = _text("Tenant")
    api_key = _text("API key", "its public id; empty for none", required=False)
    served_model = _text("Served model")
    upstream = _text("Upstream", "empty: the only one of the model", required=False)
    outcome = forms.ChoiceField(
        choices=[(o.value, o.value.replace("_", " ")) for o in Outcome], widget=UnfoldAdminSelectWidget
    )
    input_tokens = _count("Input tokens", "with cached input and cache writes")
    cached_input_tokens = _count("Cached input tokens")
    cache_write_tokens = _count("Cache write tokens")
    output_tokens = _count("Output tokens", "with reasoning")
    reasoning_tokens = _count("Reasoning tokens")
    field_order = (
        *("tenant", "api_key", "served_model", "upstream", "outcome"),
        *TOKEN_FIELDS,
        "reason",
    )


class BackfillForm(AmendForm):
    """A whole call."""

    call_id = forms.UUIDField(
        required=False, widget=UnfoldAdminTextInputWidget, label="Call id", help_text="where it is known"
    )
    occurred_at = _text("Time", "e.g. 2026-10-05T18:00:00Z; empty where the call id says it", required=False)
    field_order = ("call_id", "occurred_at", *AmendForm.field_order)


_FORMS: dict[CorrectionKind, type[VoidForm]] = {
    CorrectionKind.AMEND: AmendForm,
    CorrectionKind.VOID: VoidForm,
    CorrectionKind.BACKFILL: BackfillForm,
}


def run_correction(
    model_admin: ModelAdmin, request: HttpRequest, kind: CorrectionKind, event: UsageEvent | None = None
) -> HttpResponse:
    """Show the form, the preview, or record and go back; `event` is the call to correct, None for a backfill."""
    back = _get_back_url(event)
    form = _build_form(request, kind, event)
    context: dict[str, Any] = {
        **model_admin.admin_site.each_context(request),
        "title": _get_title(kind, event),
        "explanation": _EXPLANATIONS[kind],
        "kind": kind.value,
        "form": form,
        "back": back,
    }
    status = 200
    if request.method == "POST" and "edit" not in request.POST and form.is_valid():
        try:
            asked = _build_request(kind, form, event)
            if "confirm" in request.POST:
                return _record(request, asked, back)
            preview = preview_correction(asked)
            context |= _describe(preview)
        except (MeteringError, msgspec.ValidationError) as error:
            messages.error(request, str(error))
            status = 400
    elif request.method == "POST" and form.errors:
        status = 400
    request.current_app = model_admin.admin_site.name
    return TemplateResponse(request, "metering/correction.html", context, status=status)


def _get_title(kind: CorrectionKind, event: UsageEvent | None) -> str:
    return "Backfill a call" if event is None else f"{kind.value.title()} call {event.call_id}"


def _get_back_url(event: UsageEvent | None) -> str:
    if event is None:
        return reverse("admin:metering_usagecorrection_changelist")
    return reverse("admin:metering_usageevent_change", args=[event.pk])


def _build_form(request: HttpRequest, kind: CorrectionKind, event: UsageEvent | None) -> VoidForm:
    initial: dict[str, Any] = {"idempotency_key": f"admin/{uuid.uuid4()}"}
    if kind == CorrectionKind.AMEND and event is not None:
        facts = describe_state(build_state(get_live_correction(event.pk) or event)) or {}
        initial |= facts
    if kind == CorrectionKind.BACKFILL:
        initial |= dict.fromkeys(TOKEN_FIELDS, 0) | {"outcome": Outcome.COMPLETED.value}
    return _FORMS[kind](request.POST if request.method == "POST" else None, initial=initial)


def _build_request(kind: CorrectionKind, form: VoidForm, event: UsageEvent | None) -> CorrectionRequest:
    """State the whole call as the form has it: a confirmation is what was previewed, and a double click the same."""
    values = {name: value for name, value in form.cleaned_data.items() if value not in ("", None)}
    if event is not None:
        values["call_id"] = event.pk
    return msgspec.convert(values | {"kind": kind.value}, CorrectionRequest)


def _record(request: HttpRequest, asked: CorrectionRequest, back: str) -> HttpResponse:
    recorded = record_correction(
        asked,
        actor_name=request.user.get_username(),
        confirmed_previous_id=int(request.POST["confirmed_previous_id"]),
    )
    text = "is recorded" if recorded.is_new else "was recorded before"
    messages.success(request, f"{str(recorded.correction).capitalize()} {text}.")
    return redirect(back)


def _describe(preview: CorrectionPreview) -> dict[str, Any]:
    facts = describe_preview(preview, price_deltas(preview.deltas))
    before, after = facts["before"] or {}, facts["after"]
    rows = [
        {
            "name": name.replace("_", " ").replace("api", "API"),
            "before": _show(before.get(name)),
            "after": _show(value),
            "is_count": isinstance(value, int),
            "is_changed": before.get(name) != value,
        }
        for name, value in after.items()
    ]
    tokens = [(kind.replace("_", " "), f"{count:+,}") for kind, count in facts["tokens"].items() if count]
    return {"preview": facts, "rows": rows, "token_differences": tokens}


def _show(value: Any) -> str:
    if value is None or value == "":
        return "—"
    return f"{value:,}" if isinstance(value, int) else str(value)
