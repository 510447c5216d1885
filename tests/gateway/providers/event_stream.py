"""AWS's event stream, written: the framing of Bedrock and SageMaker."""

from __future__ import annotations

import struct
import zlib


def encode_message(payload: bytes, **headers: str) -> bytes:
    """Frame one message, as botocore's decoder takes it (see test_aws)."""
    headers = headers or {":event-type": "PayloadPart", ":message-type": "event"}
    block = b"".join(
        bytes([len(name)]) + name.encode() + b"\7" + struct.pack(">H", len(value)) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack(">II", 16 + len(block) + len(payload), len(block))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + block + payload
    return message + struct.pack(">I", zlib.crc32(message))
