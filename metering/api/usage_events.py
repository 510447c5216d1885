"""`POST /api/v1/usage-events`: usage of calls that did not pass the gateway."""

from __future__ import annotations

from typing import Any

import msgspec
from django.http import HttpResponse
from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework import status
from rest_framework.exceptions import ParseError, UnsupportedMediaType
from rest_framework.parsers import BaseParser
from rest_framework.request import Request
from rest_framework.views import APIView

from metering.api.problems import LengthRequiredError, Problem, RequestTooLargeError
from metering.api.source_authentication import MaySendUsage, SourceTokenAuthentication
from metering.api.throttles import IngestionThrottle
from metering.api.usage_event_schema import BATCH_SCHEMA, EVENT_SCHEMA, REPORT_SCHEMA
from metering.cloud_events import IngestionReport, ItemStatus, record_cloud_events

EVENTS_MAX = 1_000
BODY_BYTES_MAX = 4 * 1024 * 1024
SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
# How one event alone is answered; a batch is answered 200, whatever became of its events.
_STATUS_CODES = {ItemStatus.CONFLICT: status.HTTP_409_CONFLICT, ItemStatus.REJECTED: 422}

_batch_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_encoder = msgspec.json.Encoder()


class UsageEventsView(APIView):
    """Usage events as CloudEvents 1.0."""

    authentication_classes = (SourceTokenAuthentication,)
    permission_classes = (MaySendUsage,)
    throttle_classes = (IngestionThrottle,)
    # Bodies are read below: events are decoded one by one, so that one that is wrong spoils no other.
    parser_classes: tuple[type[BaseParser], ...] = ()

    @extend_schema(
        operation_id="sendUsageEvents",
        request={SINGLE: EVENT_SCHEMA, BATCH: BATCH_SCHEMA},
        responses={
            200: OpenApiResponse(REPORT_SCHEMA, description="recorded and committed; a result for each event"),
            400: OpenApiResponse(Problem, description="not JSON, or no list of events"),
            401: Problem,
            409: OpenApiResponse(REPORT_SCHEMA, description="one event alone, known with other content: kept apart"),
            411: Problem,
            413: OpenApiResponse(Problem, description=f"more than {EVENTS_MAX:,} events or {BODY_BYTES_MAX:,} bytes"),
            415: Problem,
            422: OpenApiResponse(REPORT_SCHEMA, description="one event alone, rejected: nothing was recorded"),
            429: Problem,
            503: OpenApiResponse(Problem, description="nothing was recorded: send the same request again"),
        },
    )
    def post(self, request: Request) -> HttpResponse:
        """Record one usage event, or up to 1,000.

        Each is recorded once for its `source` and `id`, however often it is sent: after a failure or without an
        answer, send the same request again. The answer comes after the commit and has a result for each event.
        """
        is_batch = _is_batch(request)
        items = _read_items(_read_body(request), is_batch=is_batch)
        report = record_cloud_events(request.user.source, items)
        code = 200 if is_batch else _STATUS_CODES.get(report.results[0].status, 200)
        return _build_response(report, code)


def _is_batch(request: Request) -> bool:
    """Return whether the body is a batch, by its content type."""
    media_type, _, parameters = str(request.content_type or "").partition(";")
    media_type = media_type.strip().lower()
    charset = parameters.strip().lower().replace(" ", "").replace('"', "")
    if media_type not in (SINGLE, BATCH) or charset not in ("", "charset=utf-8"):
        raise UnsupportedMediaType(
            media_type, detail=f"send Content-Type {SINGLE} for one event or {BATCH} for a list, in UTF-8"
        )
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType(media_type, detail="send the body as it is, without Content-Encoding")
    return media_type == BATCH


def _read_body(request: Request) -> bytes:
    length = request.META.get("CONTENT_LENGTH") or ""
    if not length and "chunked" in request.headers.get("Transfer-Encoding", "").lower():
        raise LengthRequiredError
    if length.isdigit() and int(length) > BODY_BYTES_MAX:
        raise RequestTooLargeError(f"a request may have {BODY_BYTES_MAX:,} bytes: send fewer events in each")
    return bytes(request.body)


def _read_items(body: bytes, *, is_batch: bool) -> list[msgspec.Raw]:
    if not is_batch:
        _check_json(body)
        return [msgspec.Raw(body)]
    try:
        items = _batch_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ParseError(f"the body is no JSON list of events: {error}", code="invalid_json") from error
    if not items:
        raise ParseError("the list is empty: send at least one event", code="empty_batch")
    if len(items) > EVENTS_MAX:
        raise RequestTooLargeError(f"a batch may have {EVENTS_MAX:,} events, this has {len(items):,}: split it")
    return items


def _check_json(body: bytes) -> None:
    """Refuse a body that is no JSON object at all; what is wrong in it is a matter of its result."""
    try:
        msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ParseError(f"the body is no JSON object: {error}", code="invalid_json") from error


def _build_response(report: IngestionReport, code: int) -> HttpResponse:
    return HttpResponse(_encoder.encode(report), content_type="application/json", status=code)
