"""The canonical form of a document: the bytes that its SHA-256 is of.

UTF-8, keys sorted, no white space, no escapes but those JSON demands; quantities and minor units are integers, every
other number is a string of plain digits, days and instants are ISO 8601. Any JSON library gives the same bytes:

    hashlib.sha256(json.dumps(json.load(file), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec


def encode_canonical(document: Any) -> bytes:
    """Return the canonical bytes of a dataclass of strings, integers, dates and nested dataclasses."""
    return json.dumps(msgspec.to_builtins(document), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode_canonical[Document](data: bytes, document_type: type[Document]) -> Document:
    """Return the document in canonical bytes; raises msgspec.ValidationError where they hold another kind."""
    return msgspec.json.decode(data, type=document_type, strict=True)


def compute_sha256(document: Any) -> str:
    """Return the SHA-256 of the canonical bytes, in hexadecimal."""
    return hashlib.sha256(encode_canonical(document)).hexdigest()
