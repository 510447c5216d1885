"""Server-sent events: cutting a byte stream into whole frames, wherever the network cut it.

A frame is the bytes up to and including the blank line that ends it, with LF or CRLF line ends, as they came in.
Lines may be longer than any read buffer; a frame beyond FRAME_BYTES_MAX is refused, because an upstream that never
ends one would fill the memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

FRAME_BYTES_MAX = 8 * 1024 * 1024
DONE_FRAME = b"data: [DONE]\n\n"

# The end of a line and then a blank line. It covers LF, CRLF and mixtures of both.
_FRAME_END = re.compile(rb"\n\r?\n")


class FrameTooLargeError(ValueError):
    """A frame did not end within FRAME_BYTES_MAX."""

    code: ClassVar[str] = "sse_frame_too_large"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One parsed frame: the event's name ("" where it has none) and its data lines joined by LF."""

    event: str
    data: bytes


class FrameSplitter:
    """Cuts chunks into frames. `pending` holds the bytes of a frame that has not ended."""

    __slots__ = ("_limit", "pending")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self.pending = b""
        self._limit = frame_bytes_max

    def split(self, data: bytes) -> list[bytes]:
        """Return the frames that `data` completes, in order; raises FrameTooLargeError.

        >>> splitter = FrameSplitter()
        >>> splitter.split(b"data: 1\\n"), splitter.split(b"\\ndata: 2")
        ([], [b'data: 1\\n\\n'])
        """
        # A frame's end may straddle the cut by up to two bytes; before that, `pending` was searched already.
        search_from = max(0, len(self.pending) - 2)
        buffer = self.pending + data if self.pending else data
        frames = []
        start = 0
        for match in _FRAME_END.finditer(buffer, search_from):
            frames.append(buffer[start : match.end()])
            start = match.end()
        self.pending = buffer[start:] if start else buffer
        if len(self.pending) > self._limit:
            raise FrameTooLargeError(f"a frame is longer than {self._limit} bytes")
        return frames


def get_frame_data(frame: bytes) -> bytes | None:
    """Return the data of a frame; None where it has no data line (a comment, a keepalive).

    >>> get_frame_data(b"data: 1\\n\\n"), get_frame_data(b": ping\\n\\n"), get_frame_data(b"data:x\\r\\n\\r\\n")
    (b'1', None, b'x')
    """
    if frame.startswith(b"data: ") and frame.find(b"\n") == len(frame) - 2 and frame.find(b"\r") < 0:
        return frame[6:-2]
    lines = [line[5:].removeprefix(b" ") for line in frame.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def parse_frame(frame: bytes) -> ServerSentEvent:
    """Return the event's name and data; comments, `id` and `retry` are ignored."""
    event = b""
    for line in frame.splitlines():
        if line.startswith(b"event:"):
            event = line[6:].strip()
    return ServerSentEvent(event.decode("utf-8", "replace"), get_frame_data(frame) or b"")


def build_frame(data: bytes) -> bytes:
    """Return the frame of one line of data."""
    return b"data: " + data + b"\n\n"
