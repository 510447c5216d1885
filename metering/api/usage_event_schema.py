"""The shapes of usage events in the API's schema, made from the structs that decode and answer them."""

from __future__ import annotations

from typing import Any

import msgspec

from metering.cloud_events import CloudEvent, IngestionReport

_DEFINITIONS = "#/$defs/"


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """Replace references by what they refer to: the structs are small and none contains itself."""
    if isinstance(schema, list):
        return [_inline(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref", "")
    if reference.startswith(_DEFINITIONS):
        return _inline(definitions[reference.removeprefix(_DEFINITIONS)], definitions)
    return {name: _inline(part, definitions) for name, part in schema.items()}


def _build_schema(struct: type[msgspec.Struct]) -> dict[str, Any]:
    (schema,), definitions = msgspec.json.schema_components([struct], ref_template=_DEFINITIONS + "{name}")
    return dict(_inline(schema, definitions))


EVENT_SCHEMA = _build_schema(CloudEvent)
# Each is judged alone: what is no event is rejected in its result, and the others are recorded.
_ITEM = {"anyOf": [EVENT_SCHEMA, {"description": "anything else is rejected, in its result"}]}
BATCH_SCHEMA = {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": 1_000}
REPORT_SCHEMA = _build_schema(IngestionReport)


def require_body(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Say in the whole schema that sending usage events takes a body: for a shape that is no serializer, no
    annotation can say it."""
    result["paths"]["/api/v1/usage-events"]["post"]["requestBody"]["required"] = True
    return result
