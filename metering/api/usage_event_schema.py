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
BATCH_SCHEMA = {"type": "array", "items": EVENT_SCHEMA, "minItems": 1, "maxItems": 1_000}
REPORT_SCHEMA = _build_schema(IngestionReport)
