"""Refusals as JSON: a stable `code`, and a `detail` that says what to do."""

from __future__ import annotations

import logging
from typing import Any

from django.db import InterfaceError, OperationalError
from rest_framework import serializers, status
from rest_framework.exceptions import APIException
from rest_framework.response import Response
from rest_framework.views import exception_handler

from metering.errors import CatalogMissingError, ExportUnreadableError

logger = logging.getLogger(__name__)


class Problem(serializers.Serializer):
    """Why a request was refused as a whole."""

    code = serializers.CharField()
    detail = serializers.CharField()


class NotNowError(APIException):
    """What is behind does not answer. The same request may be sent again."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "unavailable"
    default_detail = "the database does not answer: nothing was done, send the same request again in a moment"
    wait = 2


class RequestTooLargeError(APIException):
    """More than one request may carry."""

    status_code = status.HTTP_413_REQUEST_ENTITY_TOO_LARGE
    default_code = "too_large"


class LengthRequiredError(APIException):
    """A body without its length."""

    status_code = status.HTTP_411_LENGTH_REQUIRED
    default_code = "length_required"
    default_detail = "send Content-Length: a body in chunks is not read"


def handle_exception(error: Exception, context: dict[str, Any]) -> Response | None:
    """Answer an exception of a view; add the code to what has a reason only."""
    if isinstance(error, OperationalError | InterfaceError):
        logger.error("an API request failed: %s", error)
        error = NotNowError()
    elif isinstance(error, CatalogMissingError):
        error = NotNowError(str(error), code=error.code)
    elif isinstance(error, ExportUnreadableError):
        logger.error("an API request failed: %s", error)  # with the path, which is the operator's to know
        error = NotNowError(
            f"the calls of {error.day} are in an export that cannot be read now: ask again later. The operator finds "
            "in the log of the web process which file to bring back",
            code=error.code,
        )
    response = exception_handler(error, context)
    if response is not None and isinstance(response.data, dict) and set(response.data) == {"detail"}:
        response.data["code"] = getattr(response.data["detail"], "code", "error")
    return response
