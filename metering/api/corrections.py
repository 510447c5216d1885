"""Corrections by API: staff amend, void and backfill calls; a preview says what it would do, in tokens and money."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import serializers
from rest_framework.exceptions import ValidationError
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from gateway.contract.token_kind import Outcome
from metering.correction_report import describe_correction, describe_preview
from metering.corrections import (
    CorrectionKind,
    CorrectionRequest,
    preview_correction,
    record_correction,
)
from metering.errors import (
    CallUnknownError,
    CatalogMissingError,
    CorrectionError,
    CorrectionKeyReusedError,
    CorrectionRefusedError,
)
from metering.models import UsageCorrection
from metering.pricing import price_deltas

IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    required=True,
    description="a repetition with the same key and content changes nothing and is answered by what was recorded",
)
_STATUSES: dict[type[CorrectionError], int] = {
    CallUnknownError: 404,
    CorrectionRefusedError: 422,
    CorrectionKeyReusedError: 422,
}


class CorrectionAsked(serializers.Serializer):
    """What is stated of a call, with the names of the catalog; what is left out stays what it is."""

    kind = serializers.ChoiceField([kind.value for kind in CorrectionKind])
    reason = serializers.CharField(max_length=500)
    call_id = serializers.UUIDField(required=False)
    occurred_at = serializers.DateTimeField(required=False, help_text="of a backfill; a call id has it too")
    tenant = serializers.CharField(required=False)
    api_key = serializers.CharField(required=False, help_text="the public id of a key")
    served_model = serializers.CharField(required=False)
    upstream = serializers.CharField(required=False)
    outcome = serializers.ChoiceField([outcome.value for outcome in Outcome], required=False)
    input_tokens = serializers.IntegerField(required=False, min_value=0, help_text="with cached input and cache writes")
    cached_input_tokens = serializers.IntegerField(required=False, min_value=0)
    cache_write_tokens = serializers.IntegerField(required=False, min_value=0)
    output_tokens = serializers.IntegerField(required=False, min_value=0, help_text="with reasoning")
    reasoning_tokens = serializers.IntegerField(required=False, min_value=0)
    confirmed_previous_id = serializers.IntegerField(
        required=False, min_value=0, help_text="previous_id of the preview: refused where it is another by now"
    )


class CallStateShown(serializers.Serializer):
    """What a call counts for; `calls` is 0 where it is void."""

    tenant = serializers.CharField()
    usage_on = serializers.DateField()
    api_key = serializers.CharField()
    served_model = serializers.CharField()
    upstream = serializers.CharField()
    outcome = serializers.CharField()
    calls = serializers.IntegerField()
    input_tokens = serializers.IntegerField()
    cached_input_tokens = serializers.IntegerField()
    cache_write_tokens = serializers.IntegerField()
    output_tokens = serializers.IntegerField()
    reasoning_tokens = serializers.IntegerField()


class MoneyShown(serializers.Serializer):
    """What a month's usage gains on one side, exactly; `books_in` is the month that carries it."""

    month = serializers.CharField()
    books_in = serializers.CharField()
    side = serializers.ChoiceField(["revenue", "provider cost", "royalties"])
    currency = serializers.CharField()
    amount = serializers.CharField()


class PreviewShown(serializers.Serializer):
    """What a correction would do. `tokens` are differences by disjoint kind."""

    kind = serializers.CharField()
    call_id = serializers.UUIDField()
    occurred_at = serializers.DateTimeField()
    previous_id = serializers.IntegerField()
    before = CallStateShown(allow_null=True)
    after = CallStateShown()
    tokens = serializers.DictField(child=serializers.IntegerField())
    money = MoneyShown(many=True)
    problems = serializers.ListField(child=serializers.CharField())


class CorrectionShown(serializers.Serializer):
    """A correction on record."""

    id = serializers.IntegerField()
    kind = serializers.CharField()
    call_id = serializers.UUIDField()
    idempotency_key = serializers.CharField()
    reason = serializers.CharField()
    actor = serializers.CharField()
    created_at = serializers.DateTimeField()
    supersedes = serializers.IntegerField(allow_null=True)
    after = CallStateShown()


class CorrectionProblem(serializers.Serializer):
    """Why a request was refused."""

    detail = serializers.CharField()
    code = serializers.CharField(required=False)


_REFUSALS: dict[Any, Any] = {
    400: OpenApiResponse(OpenApiTypes.OBJECT, description="a list of problems for each field"),
    **dict.fromkeys((401, 403, 404, 409, 422, 503), CorrectionProblem),
}


class MayCorrectUsage(BasePermission):
    """Staff who may add corrections. A tenant's key never may."""

    message = "only staff who may add corrections correct usage"

    def has_permission(self, request: Request, view: Any) -> bool:
        return bool(request.user.is_staff and request.user.has_perm("metering.add_usagecorrection"))


class _CorrectionsView(APIView):
    """Base: for staff only, and errors with their codes."""

    def get_permissions(self) -> list[BasePermission]:
        return [*super().get_permissions(), MayCorrectUsage()]

    def handle_exception(self, exc: Exception) -> Response:
        if isinstance(exc, CorrectionError):
            status = next((status for kind, status in _STATUSES.items() if isinstance(exc, kind)), 409)
            return Response({"detail": str(exc), "code": exc.code}, status=status)
        if isinstance(exc, CatalogMissingError):
            return Response({"detail": str(exc), "code": exc.code}, status=409)
        return super().handle_exception(exc)


class CorrectionsView(_CorrectionsView):
    """Corrections of calls."""

    @extend_schema(
        operation_id="listUsageCorrections",
        parameters=[OpenApiParameter("call_id", uuid.UUID, required=True)],
        responses={200: CorrectionShown(many=True), **_REFUSALS},
    )
    def get(self, request: Request) -> Response:
        """List the corrections of a call, oldest first; the last one counts."""
        try:
            call_id = uuid.UUID(request.query_params.get("call_id", ""))
        except ValueError:
            raise ValidationError({"call_id": ["name one call by its id"]}) from None
        return Response(
            [describe_correction(row) for row in UsageCorrection.objects.filter(call_id=call_id).order_by("pk")]
        )

    @extend_schema(
        operation_id="createUsageCorrection",
        parameters=[IDEMPOTENCY_KEY],
        request=CorrectionAsked,
        responses={200: CorrectionShown, 201: CorrectionShown, **_REFUSALS},
    )
    def post(self, request: Request) -> Response:
        """Record a correction: 201, or 200 where it was recorded before."""
        key = request.headers.get("Idempotency-Key", "")
        if not key:
            raise ValidationError(
                {"Idempotency-Key": ["send this header, so that a repetition corrects nothing twice"]}
            )
        asked, confirmed_previous_id = _read(request, key)
        recorded = record_correction(
            asked, actor_name=request.user.get_username(), confirmed_previous_id=confirmed_previous_id
        )
        return Response(describe_correction(recorded.correction), status=201 if recorded.is_new else 200)


class CorrectionPreviewView(_CorrectionsView):
    """What a correction would do."""

    @extend_schema(
        operation_id="previewUsageCorrection",
        request=CorrectionAsked,
        responses={200: PreviewShown, **_REFUSALS},
    )
    def post(self, request: Request) -> Response:
        """Return the difference in tokens and money; records nothing."""
        asked, _ = _read(request, "preview")
        preview = preview_correction(asked)
        return Response(describe_preview(preview, price_deltas(preview.deltas)))


def _read(request: Request, key: str) -> tuple[CorrectionRequest, int | None]:
    serializer = CorrectionAsked(data=request.data)
    serializer.is_valid(raise_exception=True)
    unknown = set(request.data) - set(serializer.fields)
    if unknown:
        raise ValidationError({name: ["there is no such field"] for name in sorted(unknown)})
    values = dict(serializer.validated_data)
    confirmed_previous_id = values.pop("confirmed_previous_id", None)
    try:
        return msgspec.convert(values | {"idempotency_key": key}, CorrectionRequest), confirmed_previous_id
    except msgspec.ValidationError as error:
        raise ValidationError({"non_field_errors": [str(error)]}) from error
