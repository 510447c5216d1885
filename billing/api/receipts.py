"""The receipt of one call, by API. The gateway asks here with the tenant's key for calls that have been recorded."""

from __future__ import annotations

import uuid

import msgspec
from django.http import HttpResponse
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.exceptions import NotFound
from rest_framework.request import Request
from rest_framework.views import APIView

from billing.selectors.receipts import get_receipt
from gateway.contract.receipt import ReceiptState
from metering.api.callers import get_own_tenant_id
from metering.api.problems import Problem

CALL_ID = OpenApiParameter("call_id", str, OpenApiParameter.PATH, description="the `x-request-id` of the answer")


class ReceiptTokensShown(serializers.Serializer):
    """Tokens used, inclusive: input includes cached input and cache writes, output includes reasoning."""

    input = serializers.IntegerField()
    cached_input = serializers.IntegerField()
    cache_write = serializers.IntegerField()
    output = serializers.IntegerField()
    reasoning = serializers.IntegerField()


class ReceiptAttemptShown(serializers.Serializer):
    """One try at one upstream."""

    upstream = serializers.CharField()
    outcome = serializers.CharField()
    status = serializers.IntegerField(help_text="0 where there was no answer")


class ReceiptChargeShown(serializers.Serializer):
    """Tokens of one kind (disjoint) at one price."""

    token_kind = serializers.CharField()
    quantity_tokens = serializers.IntegerField()
    price_per_mtok = serializers.CharField()
    amount = serializers.CharField()


class ReceiptCostShown(serializers.Serializer):
    """What the call costs, not rounded: an invoice rounds once, at its line."""

    basis = serializers.ChoiceField(["rated", "estimated"])
    currency = serializers.CharField()
    amount = serializers.CharField()
    charges = ReceiptChargeShown(many=True)


class ReceiptShown(serializers.Serializer):
    """What is known of a call; what is not known is null. Documents `gateway.contract.receipt.Receipt`."""

    object = serializers.CharField()
    call_id = serializers.UUIDField()
    state = serializers.ChoiceField([state.value for state in ReceiptState])
    reason = serializers.CharField(allow_null=True, help_text="why it is in quarantine")
    occurred_at = serializers.DateTimeField()
    model = serializers.CharField()
    endpoint = serializers.CharField()
    streamed = serializers.BooleanField()
    outcome = serializers.CharField(allow_null=True)
    usage_source = serializers.CharField(allow_null=True)
    tokens = ReceiptTokensShown(allow_null=True)
    cost = ReceiptCostShown(allow_null=True)
    attempts = ReceiptAttemptShown(many=True)
    finish_reason = serializers.CharField(allow_null=True)
    provider_request_id = serializers.CharField(allow_null=True)
    first_byte_us = serializers.IntegerField(allow_null=True)
    total_us = serializers.IntegerField(allow_null=True)
    labels = serializers.DictField(child=serializers.CharField())


class ReceiptView(APIView):
    """One recorded call."""

    @extend_schema(
        operation_id="getUsageEvent",
        parameters=[CALL_ID],
        responses={200: ReceiptShown, 401: Problem, 403: Problem, 404: Problem, 503: Problem},
    )
    def get(self, request: Request, call_id: str) -> HttpResponse:
        """Return the receipt of a call; 404 where the caller has none of it, whoever else may."""
        try:
            asked = uuid.UUID(call_id)
        except ValueError:
            asked = None
        receipt = None if asked is None else get_receipt(asked, tenant_id=get_own_tenant_id(request))
        if receipt is None:
            raise NotFound("no call of yours with this id is recorded")
        return HttpResponse(msgspec.json.encode(receipt), content_type="application/json")
