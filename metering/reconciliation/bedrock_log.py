"""Amazon Bedrock: model invocation logs, as delivered to S3 (`.json.gz`, a JSON object a line) or CloudWatch.

A log entry has `requestId` (the header `x-amzn-RequestId` of the answer, which our events carry), `modelId`,
`timestamp`, and token counts in `input` and `output`; see "Monitor model invocation using CloudWatch Logs and Amazon
S3" in the Bedrock user guide. `inputTokenCount` leaves out what was read from or written to the cache: we add it.
An entry with an `errorCode` and no tokens bills nothing.
"""

from __future__ import annotations

from datetime import tzinfo
from typing import Any

import msgspec

from metering.reconciliation.provider_rows import (
    ProviderRow,
    ReportFormat,
    RowError,
    parse_count,
    parse_instant,
    parse_name,
)


def read_entry(entry: Any, zone: tzinfo) -> ProviderRow | None:
    """Return what an entry bills. An entry of CloudWatch has the log as the text of its `message`."""
    if isinstance(entry, dict) and isinstance(entry.get("message"), str) and "requestId" not in entry:
        try:
            entry = msgspec.json.decode(entry["message"])
        except (msgspec.DecodeError, RecursionError) as error:
            raise RowError("invalid_json", f"message is no JSON: {error}") from error
    if not isinstance(entry, dict) or entry.get("schemaType", "ModelInvocationLog") != "ModelInvocationLog":
        raise RowError("unknown_entry", "this is no entry of a model invocation log")
    given, made = _get_part(entry, "input"), _get_part(entry, "output")
    input_tokens = sum(
        parse_count(given.get(name, 0), f"input.{name}")
        for name in ("inputTokenCount", "cacheReadInputTokenCount", "cacheWriteInputTokenCount")
    )
    output_tokens = parse_count(made.get("outputTokenCount", 0), "output.outputTokenCount")
    if "errorCode" in entry and not input_tokens + output_tokens:
        return None
    if "inputTokenCount" not in given:
        raise RowError("invalid_count", "input.inputTokenCount is missing")
    occurred_at = parse_instant(entry.get("timestamp"), zone, "timestamp")
    return ProviderRow(
        request_id=parse_name(entry.get("requestId"), "requestId"),
        occurred_at=occurred_at,
        day=occurred_at.astimezone(zone).date(),
        # An ARN ends in the id of the model or of the profile.
        model=parse_name(entry.get("modelId"), "modelId").rpartition("/")[2],
        calls=1,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )


def _get_part(entry: dict[str, Any], name: str) -> dict[str, Any]:
    part = entry.get(name) or {}
    if not isinstance(part, dict):
        raise RowError("unknown_entry", f"{name} is no object")
    return part


FORMAT = ReportFormat(name="bedrock", zone="UTC", is_csv=False, read=read_entry)
