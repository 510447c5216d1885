"""`GET /api/v1/usage`: calls and tokens, of a tenant by its key or of any by staff."""

from __future__ import annotations

import csv
import io
from typing import Any

import msgspec
from django.http import HttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework import serializers
from rest_framework.exceptions import NotFound, PermissionDenied, ValidationError
from rest_framework.request import Request
from rest_framework.views import APIView

from gateway.contract.token_kind import Outcome
from metering.api.callers import get_own_tenant_id
from metering.api.problems import Problem
from metering.errors import UsageQuestionError
from metering.names import find_ids
from metering.usage_report import (
    DAYS_MAX,
    DIMENSIONS,
    FILTERS,
    LABEL_PREFIX,
    QUANTITIES,
    RAW_DAYS_MAX,
    UsagePage,
    UsageQuestion,
    list_usage_page,
)

ROWS_MAX = 10_000
_NAME_LENGTH_MAX = 200
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


class _Text(serializers.CharField):
    """A short text without NUL."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(required=False, max_length=_NAME_LENGTH_MAX, **kwargs)


class UsageParameters(serializers.Serializer):
    """Which usage is asked for: days `[start, end)`, grouped by some dimensions, in pages."""

    start = serializers.DateField(help_text="first day, in the tenant's billing zone")
    end = serializers.DateField(help_text=f"first day that no longer counts; {DAYS_MAX} days at most")
    by = serializers.CharField(
        default="day,served_model",
        max_length=400,
        help_text=f"of {', '.join(DIMENSIONS)} and one label.NAME, separated by commas; hours are UTC. By hour or "
        f"label: one tenant and {RAW_DAYS_MAX} days at most",
    )
    tenant = serializers.SlugField(required=False, max_length=63, help_text="for staff")
    served_model = _Text()
    provider = _Text(help_text="slug, or none")
    upstream = _Text(help_text="slug, or none")
    api_key = _Text(help_text="the public id of a key, or none")
    outcome = serializers.ChoiceField([outcome.value for outcome in Outcome], required=False)
    label = serializers.RegexField(
        r"^[^:\x00]{1,256}:[^\x00]{0,256}$", required=False, max_length=513, help_text="NAME:VALUE"
    )
    format = serializers.ChoiceField(["json", "csv"], default="json")
    limit = serializers.IntegerField(default=100, min_value=1, max_value=ROWS_MAX)
    cursor = serializers.CharField(
        required=False, max_length=2_000, help_text="next_cursor of the page before, of the same question"
    )

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(self.initial_data) - set(self.fields)):
            known = ", ".join(self.fields)
            raise ValidationError({name: [f"there is no such parameter; there is {known}"] for name in unknown})
        return attrs


class UsageShown(serializers.Serializer):
    """Sums of one group, with what it was grouped by. Counts are inclusive, as on the wire."""

    day = serializers.DateField(required=False)
    hour = serializers.DateTimeField(required=False, help_text="when it begins, UTC")
    tenant = serializers.CharField(required=False)
    served_model = serializers.CharField(required=False)
    provider = serializers.CharField(required=False)
    upstream = serializers.CharField(required=False)
    api_key = serializers.CharField(required=False, help_text="the key's public id")
    outcome = serializers.CharField(required=False)
    calls = serializers.IntegerField()
    input_tokens = serializers.IntegerField()
    cached_input_tokens = serializers.IntegerField()
    cache_write_tokens = serializers.IntegerField()
    output_tokens = serializers.IntegerField()
    reasoning_tokens = serializers.IntegerField()


class UsagePageShown(serializers.Serializer):
    """A page of usage; `next_cursor` is null on the last one."""

    next_cursor = serializers.CharField(allow_null=True)
    watermark = serializers.IntegerField(
        help_text="every recording with a smaller transaction id is in these sums, and none of them can follow"
    )
    results = UsageShown(many=True)


class UsageView(APIView):
    """Calls and tokens."""

    @extend_schema(
        operation_id="listUsage",
        parameters=[UsageParameters],
        responses={
            (200, "application/json"): UsagePageShown,
            (200, "text/csv"): OpenApiTypes.STR,
            400: OpenApiResponse(OpenApiTypes.OBJECT, description="a list of problems for each parameter"),
            401: Problem,
            403: Problem,
            404: Problem,
            429: Problem,
            503: Problem,
        },
    )
    def get(self, request: Request) -> HttpResponse:
        """Return usage by day and served model, or by what is asked for.

        In CSV, the next page is in the header `Link`.
        """
        asked = UsageParameters(data=request.query_params.dict())
        asked.is_valid(raise_exception=True)
        values = asked.validated_data
        label, _, label_value = values.get("label", "").partition(":")
        question = UsageQuestion(
            start=values["start"],
            end=values["end"],
            by=values["by"].split(","),
            tenant_id=_choose_tenant_id(request, values.get("tenant")),
            names={name: values[name] for name in FILTERS if name in values},
            label=(label, label_value) if label else None,
        )
        try:
            page = list_usage_page(question, rows_max=values["limit"], cursor=values.get("cursor"))
        except UsageQuestionError as error:
            raise ValidationError({error.parameter: [str(error)]}, code=error.code) from error
        return _build_csv(request, page, question) if values["format"] == "csv" else _build_json(page)


def _choose_tenant_id(request: Request, slug: str | None) -> int | None:
    own = get_own_tenant_id(request)
    if slug is None:
        return own
    ids = find_ids("tenants", slug)
    if own is not None and ids != [own]:
        raise PermissionDenied("an API key reads the usage of its own tenant only")
    if not ids:
        raise NotFound(f"there is no tenant {slug!r}")
    return ids[0]


def _build_json(page: UsagePage) -> HttpResponse:
    body = {"next_cursor": page.next_cursor, "watermark": page.watermark, "results": page.rows}
    return HttpResponse(msgspec.json.encode(body), content_type="application/json")


def _build_csv(request: Request, page: UsagePage, question: UsageQuestion) -> HttpResponse:
    text = io.StringIO()
    writer = csv.DictWriter(text, (*dict.fromkeys(question.by), *QUANTITIES))
    writer.writeheader()
    writer.writerows({name: _defuse(name, value) for name, value in row.items()} for row in page.rows)
    response = HttpResponse(text.getvalue(), content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="usage-{question.start}-{question.end}.csv"'
    if page.next_cursor:
        query = request.query_params.copy()
        query["cursor"] = page.next_cursor
        response["Link"] = f'<{request.path}?{query.urlencode()}>; rel="next"'
    return response


def _defuse(name: str, value: Any) -> Any:
    """Keep a spreadsheet from taking a label, which its tenant chose, for a formula."""
    is_formula = name.startswith(LABEL_PREFIX) and str(value).startswith(_FORMULA_STARTS)
    return f"'{value}" if is_formula else value
