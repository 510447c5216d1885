"""The pages of metering: everything is shown, nothing is edited; quarantine is decided on, with a reason."""

from __future__ import annotations

import uuid
from datetime import datetime
from functools import cached_property
from textwrap import shorten
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import action
from unfold.forms import ActionForm

from gateway.contract import usage_event
from gateway.contract.usage_event import EventDecodeError
from metering.admin_corrections import run_correction
from metering.core.attribution import QuarantineReason
from metering.corrections import CorrectionKind
from metering.dead_letters import release_dead_letter, void_dead_letters
from metering.errors import MeteringError
from metering.losses import accept_losses, find_acceptance
from metering.models import (
    AcceptedLoss,
    ConflictingEvent,
    CorrectionDelta,
    DeadLetter,
    ExportedDay,
    HourlyCount,
    Producer,
    QuarantinedEvent,
    Recording,
    SequenceGap,
    StreamPartition,
    UsageCorrection,
    UsageEvent,
    UsageRollup,
)
from metering.names import get_name
from metering.quarantine import EXPLANATIONS, release_quarantined_events, void_quarantined_events

_COUNTED_MAX = 10_000
# Ids are shown by the catalog's names for them.
_NAMED = {
    "tenant_id": "tenant",
    "api_key_id": "api_key",
    "served_model_id": "served_model",
    "provider_id": "provider",
    "upstream_id": "upstream",
}


class CountedSoFar(int):
    """A number of rows at which counting ended: there are more, and lists say so."""

    def __str__(self) -> str:
        return f"more than {int(self):,}"


class BoundedPaginator(Paginator):
    """Counts to 10,000 and no further: counting a hundred million rows for a page number would take minutes."""

    @cached_property
    def count(self) -> int:
        counted = len(self.object_list.order_by().values_list("pk")[: _COUNTED_MAX + 1])
        return counted if counted <= _COUNTED_MAX else CountedSoFar(_COUNTED_MAX)


class MeteringAdmin(ModelAdmin):
    """Show, never write: the writers are the services, in their own transactions."""

    actions = None
    show_full_result_count = False
    paginator = BoundedPaginator
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [_NAMED.get(name, name) for name in super().get_fields(request, obj)]

    @admin.display(description="tenant", ordering="tenant_id")
    def tenant(self, row: Any) -> str:
        return get_name("tenants", row.tenant_id)

    @admin.display(description="served model", ordering="served_model_id")
    def served_model(self, row: Any) -> str:
        return get_name("served_models", row.served_model_id)

    @admin.display(description="provider", ordering="provider_id")
    def provider(self, row: Any) -> str:
        return get_name("providers", row.provider_id)

    @admin.display(description="upstream", ordering="upstream_id")
    def upstream(self, row: Any) -> str:
        return get_name("upstreams", row.upstream_id)

    @admin.display(description="API key", ordering="api_key_id")
    def api_key(self, row: Any) -> str:
        return get_name("api_keys", row.api_key_id)


@admin.register(UsageEvent)
class UsageEventAdmin(MeteringAdmin):
    """Raw events, newest first. A receipt is found by its call id, in one partition."""

    list_display = (
        *("call", "occurred_at", "tenant", "served_model", "upstream", "outcome"),
        *("input_tokens", "output_tokens"),
    )
    search_fields = ("call_id",)
    search_help_text = "A whole call id"
    ordering = ("-call_id",)
    sortable_by = ("call",)
    list_filter = ("outcome", "usage_source")
    readonly_fields = ("corrections",)
    actions_detail = ("amend_page", "void_page")

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[UsageEvent], search_term: str
    ) -> tuple[QuerySet[UsageEvent], bool]:
        if not search_term.strip():
            return queryset, False
        try:
            return queryset.filter(call_id=uuid.UUID(search_term.strip())), False
        except ValueError:
            self.message_user(request, f"{search_term!r} is not a call id.", messages.WARNING)
            return queryset.none(), False

    @admin.display(description="call id", ordering="call_id")
    def call(self, event: UsageEvent) -> SafeString:
        return format_html('<span class="tb-nowrap">{}</span>', event.pk)

    @admin.display(description="corrections")
    def corrections(self, event: UsageEvent) -> SafeString | str:
        rows = UsageCorrection.objects.filter(call_id=event.pk).order_by("pk")
        lines = ((get_correction_url(row), _describe_correction(row)) for row in rows)
        return format_html_join("\n", '<a class="tb-link" href="{}">{}</a>', lines) or "none: it counts as recorded"

    def has_correct_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return request.user.has_perm("metering.add_usagecorrection")

    @action(description="Amend…", icon="edit", url_path="amend", permissions=["correct"])
    def amend_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """State anew what a call used or whose it was."""
        return run_correction(self, request, CorrectionKind.AMEND, self._get_event(object_id))

    @action(description="Void…", icon="block", url_path="void", permissions=["correct"])
    def void_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Decide that a call bills nothing."""
        return run_correction(self, request, CorrectionKind.VOID, self._get_event(object_id))

    def _get_event(self, object_id: str) -> UsageEvent:
        return get_object_or_404(UsageEvent, pk=object_id)


def get_correction_url(correction: UsageCorrection) -> str:
    """Return the address of a correction's page."""
    return reverse("admin:metering_usagecorrection_change", args=[correction.pk])


def _describe_correction(row: UsageCorrection) -> str:
    counts = f"{row.input_tokens:,} input and {row.output_tokens:,} output tokens" if row.calls else "nothing"
    at = f"{row.created_at:%Y-%m-%d %H:%M}"
    return f"{row.get_kind_display()} by {row.actor_name} on {at}: it counts {counts} ({row.reason})"


def _describe_delta(delta: CorrectionDelta) -> str:
    tenant, model = get_name("tenants", delta.tenant_id), get_name("served_models", delta.served_model_id)
    where = f"{tenant}, {delta.usage_on}, {model} at {get_name('upstreams', delta.upstream_id)}, {delta.outcome}"
    tokens = f"{delta.input_tokens:+,} input and {delta.output_tokens:+,} output tokens"
    return f"{where}: {delta.calls:+} calls, {tokens}"


@admin.register(UsageCorrection)
class UsageCorrectionAdmin(MeteringAdmin):
    """Compensating records, newest first."""

    list_display = (
        *("created_at", "kind", "event", "tenant", "input_tokens", "output_tokens", "actor_name", "why"),
        "is_live",
    )
    list_display_links = ("created_at",)
    list_filter = ("kind",)
    list_select_related = ("superseded_by",)
    search_fields = ("call_id__exact", "idempotency_key__exact", "actor_name")
    exclude = ("xid", "request_sha256")
    readonly_fields = ("deltas",)
    actions_list = ("backfill_page",)

    @admin.display(description="call")
    def event(self, row: UsageCorrection) -> SafeString:
        url = reverse("admin:metering_usageevent_change", args=[row.call_id])
        return format_html('<a class="tb-link tb-nowrap" href="{}">{}</a>', url, row.call_id)

    @admin.display(description="reason")
    def why(self, row: UsageCorrection) -> SafeString:
        return format_html('<span title="{}">{}</span>', row.reason, shorten(row.reason, 60, placeholder="…"))

    @admin.display(description="live", boolean=True)
    def is_live(self, row: UsageCorrection) -> bool:
        return not hasattr(row, "superseded_by")

    @admin.display(description="put on rollups")
    def deltas(self, row: UsageCorrection) -> str:
        lines = [_describe_delta(delta) for delta in row.deltas.all()]
        return "\n".join(lines) or "nothing: its usage is an event of its own"

    def has_correct_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("metering.add_usagecorrection")

    @action(description="Backfill a call…", icon="add", url_path="backfill", permissions=["correct"])
    def backfill_page(self, request: HttpRequest) -> HttpResponse:
        """Record a call that never arrived."""
        return run_correction(self, request, CorrectionKind.BACKFILL)


@admin.register(UsageRollup)
class UsageRollupAdmin(MeteringAdmin):
    """Sums by day, as billing reads them."""

    list_display = (
        *("usage_on", "tenant", "api_key", "served_model", "upstream", "outcome", "calls"),
        *("input_tokens", "output_tokens"),
    )
    list_filter = ("outcome", ("usage_on", admin.DateFieldListFilter))
    ordering = ("-usage_on", "tenant_id", "id")


class DecisionForm(ActionForm):
    """The choice of an action, and why."""

    note = forms.CharField(
        required=False,
        max_length=500,
        label="",
        widget=forms.TextInput(
            {"class": "tb-note-input", "placeholder": "Reason, kept on record", "aria-label": "Reason"}
        ),
    )


def get_note(model_admin: ModelAdmin, request: HttpRequest) -> str:
    """Return the reason of an action, or say that nothing is done without one."""
    note = request.POST.get("note", "").strip()[:500]
    if not note:
        model_admin.message_user(request, "Nothing was done: give a reason, it is kept on record.", messages.ERROR)
    return note


@admin.register(SequenceGap)
class SequenceGapAdmin(MeteringAdmin):
    """What has not arrived, and what came late. A loss that is final can be accepted, with a reason."""

    list_display = (
        *("producer", "partition", "first_seq", "last_seq", "event_count", "noticed_at", "closed_at", "acceptance"),
    )
    list_filter = (("closed_at", admin.EmptyFieldListFilter),)
    list_select_related = ("producer",)
    search_fields = ("producer__name",)
    readonly_fields = ("acceptance",)
    action_form = DecisionForm
    actions = ("accept",)

    @admin.display(description="partition", ordering="producer__partition")
    def partition(self, row: SequenceGap) -> int | None:
        return row.producer.partition

    @admin.display(description="events")
    def event_count(self, row: SequenceGap) -> int:
        return row.event_count

    @admin.display(description="accepted as lost", empty_value="no")
    def acceptance(self, row: SequenceGap) -> str | None:
        loss = find_acceptance(row)
        return f"by {loss.actor_name} on {loss.accepted_at:%Y-%m-%d %H:%M}: {loss.reason}" if loss else None

    def has_accept_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("metering.add_acceptedloss")

    @admin.action(description="Accept this loss: no alarm any more", permissions=["accept"])
    def accept(self, request: HttpRequest, queryset: QuerySet[SequenceGap]) -> None:
        note = get_note(self, request)
        if not note:
            return
        ids = list(queryset.values_list("pk", flat=True))
        try:
            losses = accept_losses(ids, actor_name=request.user.get_username(), reason=note)
        except MeteringError as error:
            self.message_user(request, f"Nothing was done: {error}.", messages.ERROR)
        else:
            count = sum(loss.event_count for loss in losses)
            self.message_user(request, f"{count:,} events in {len(losses)} gaps are accepted as lost.")


@admin.register(AcceptedLoss)
class AcceptedLossAdmin(MeteringAdmin):
    """Decisions that events are lost for good."""

    list_display = ("producer", "first_seq", "last_seq", "actor_name", "accepted_at", "reason")
    list_select_related = ("producer",)


class EventBytesAdmin(MeteringAdmin):
    """Rows that hold an event's bytes: shown decoded."""

    exclude = ("body", "body_sha256")
    readonly_fields = ("event",)

    @admin.display(description="event")
    def event(self, row: Any) -> str:
        try:
            decoded = usage_event.from_wire(bytes(row.body))
        except EventDecodeError:
            return bytes(row.body).hex(" ", 2)
        return "\n".join(f"{name}: {getattr(decoded, name)}" for name in decoded.__struct_fields__)


@admin.register(QuarantinedEvent)
class QuarantinedEventAdmin(EventBytesAdmin):
    """Events held, and what became of them. Release and void ask for a reason."""

    list_display = ("call_id", "reason", "tenant", "state", "producer", "seq", "quarantined_at", "resolved_by")
    list_filter = ("state", "reason")
    list_select_related = ("producer",)
    search_fields = ("call_id__exact", "producer__name")
    readonly_fields = ("explanation", "event")
    action_form = DecisionForm
    actions = ("release", "void")

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        first = ("state", "reason", "explanation")
        return [*first, *(name for name in super().get_fields(request, obj) if name not in first)]

    @admin.display(description="what it means")
    def explanation(self, row: QuarantinedEvent) -> str:
        return EXPLANATIONS[QuarantineReason(row.reason)]

    def has_decide_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("metering.change_quarantinedevent")

    @admin.action(description="Try again and roll up", permissions=["decide"])
    def release(self, request: HttpRequest, queryset: QuerySet[QuarantinedEvent]) -> None:
        note = get_note(self, request)
        if note:
            ids = list(queryset.values_list("pk", flat=True))
            result = release_quarantined_events(ids, actor_name=request.user.get_username(), note=note)
            level = messages.SUCCESS if result.released else messages.WARNING
            text = f"{result.released} rolled up, {result.refused} were known already, {result.held} stay held."
            self.message_user(request, text, level)

    @admin.action(description="Void: never count", permissions=["decide"])
    def void(self, request: HttpRequest, queryset: QuerySet[QuarantinedEvent]) -> None:
        note = get_note(self, request)
        if note:
            ids = list(queryset.values_list("pk", flat=True))
            count = void_quarantined_events(ids, actor_name=request.user.get_username(), note=note)
            self.message_user(request, f"{count} events voided.", messages.SUCCESS)


@admin.register(ConflictingEvent)
class ConflictingEventAdmin(EventBytesAdmin):
    """Events whose call id was recorded with other content."""

    list_display = ("call_id", "tenant", "producer", "seq", "noticed_at")
    list_select_related = ("producer",)
    search_fields = ("call_id__exact",)


@admin.register(DeadLetter)
class DeadLetterAdmin(EventBytesAdmin):
    """Stream entries that could not be read, with their bytes. Release and void ask for a reason."""

    list_display = ("stream_id", "partition", "state", "error", "received_at", "resolved_by")
    list_filter = ("state", "partition")
    exclude = ("body", "body_sha256", "mended_body")
    action_form = DecisionForm
    actions = ("release", "void")

    def has_decide_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("metering.change_deadletter")

    @admin.action(description="Read again and record", permissions=["decide"])
    def release(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> None:
        note = get_note(self, request)
        if not note:
            return
        for letter in queryset.order_by("pk"):
            try:
                became = release_dead_letter(letter.pk, actor_name=request.user.get_username(), note=note)
            except MeteringError as error:
                self.message_user(request, str(error), messages.WARNING)
            else:
                self.message_user(request, f"{letter} is recorded: {became}.", messages.SUCCESS)

    @admin.action(description="Void: never record", permissions=["decide"])
    def void(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> None:
        note = get_note(self, request)
        if note:
            ids = list(queryset.values_list("pk", flat=True))
            count = void_dead_letters(ids, actor_name=request.user.get_username(), note=note)
            self.message_user(request, f"{count} dead letters voided.", messages.SUCCESS)


@admin.register(Producer)
class ProducerAdmin(MeteringAdmin):
    """Gateways and imports, and how far they have counted."""

    list_display = ("name", "partition", "last_seq", "accounted_count", "first_seen_at", "last_seen_at")
    search_fields = ("name",)


@admin.register(StreamPartition)
class StreamPartitionAdmin(MeteringAdmin):
    """The streams and their cursors."""

    list_display = ("partition", "cursor", "regressions", "updated_at")


@admin.register(Recording)
class RecordingAdmin(MeteringAdmin):
    """Transactions that recorded events."""

    list_display = (
        *("id", "kind", "partition", "recorded_at", "rolled_up_count", "quarantined_count", "conflict_count"),
        *("dead_letter_count", "duplicate_count"),
    )
    list_filter = ("kind",)
    exclude = ("xid",)


@admin.register(ExportedDay)
class ExportedDayAdmin(MeteringAdmin):
    """Files of raw events; those with a time of detachment stand for their day."""

    list_display = ("day", "part", "event_count", "file_bytes", "path", "exported_at", "detached_at")
    list_filter = (("day", admin.DateFieldListFilter),)
    list_select_related = ("detachment",)

    @admin.display(description="detached at", ordering="detachment__detached_at", empty_value="—")
    def detached_at(self, row: ExportedDay) -> datetime | None:
        return row.detachment.detached_at if hasattr(row, "detachment") else None


@admin.register(HourlyCount)
class HourlyCountAdmin(MeteringAdmin):
    """What came in and where it went, by tenant and hour."""

    list_display = (
        *("hour", "tenant", "received", "accepted", "rolled_up", "quarantined", "conflicts", "duplicates"),
        "superseded",
    )

    @admin.display(description="accepted")
    def accepted(self, row: HourlyCount) -> int:
        return row.accepted


from metering import reconciliation_admin  # noqa: E402, F401 (registers its pages, which build on MeteringAdmin)
