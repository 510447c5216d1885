"""The tenant's side of a call on another wire: what the relay sends as a chat completion goes out in the dialect.

The relay knows nothing of it: it settles before the last bytes, `data: [DONE]`, and these become `message_stop` or
`response.completed`. So every rule about what is recorded when holds on all wires alike.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.calls import NOTHING_USED, Call
from gateway.endpoints.dialect import Answering, AnswerNotTranslatableError, Dialect
from gateway.endpoints.messages import Messages
from gateway.endpoints.responses import Responses
from gateway.errors import GatewayError, UpstreamConnectionError
from gateway.exchange import Exchange, ExchangeLayer, Headers
from gateway.providers.base import CallRequest, ReportedUsage
from gateway.providers.transcript import parse_json

_JSON = (b"content-type", b"application/json")
DIALECTS: dict[str, Dialect] = {dialect.endpoint: dialect for dialect in (Messages(), Responses())}


def translate_request(request: CallRequest, dialect: Dialect) -> CallRequest:
    """Return a tenant's request as a chat completion; raises GatewayError (400)."""
    chat = dialect.read_request(request.json)
    # The usage that the client sees is the one on record, not the provider's chunk.
    return CallRequest(
        "chat.completions",
        msgspec.json.encode(chat),
        chat,
        streamed=request.streamed,
        client_asked_usage=False,
        headers=request.headers,
    )


def send_error(exchange: Exchange, error: GatewayError) -> None:
    """Answer with an error in the shape of the path, and of those below it: OpenAI's, or that of a dialect."""
    name = exchange.path.removeprefix("/v1").split("/", 2)[1:2]
    dialect = DIALECTS.get(name[0]) if name else None
    if dialect is None:
        exchange.send_error(error)
    else:
        call_id = exchange.call_id
        exchange.send_error(error, dialect.build_error(error, request_id=call_id), _build_id_headers(dialect, call_id))


class TranslatedExchange(ExchangeLayer):
    """What the relay answers a call on: `inner` sends, or also keeps, what comes out of the translation."""

    __slots__ = ("_answering", "_dialect", "_id_headers", "_stream")

    def __init__(self, inner: Exchange, call: Call, *, dialect: Dialect, asked: dict[str, Any]) -> None:
        super().__init__(inner)
        self._dialect = dialect
        self._answering = _build_answering(call, asked)
        self._id_headers = _build_id_headers(dialect, call.call_id)
        self._stream = dialect.open_stream(self._answering)

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer with a whole chat completion, translated."""
        kept = (header for header in headers if header[0] != b"content-type")
        body = self._dialect.build_answer(parse_json(body), self._answering)
        await super().send_whole(status, [_JSON, *kept, *self._id_headers], body)

    def start_stream(self, headers: Headers) -> None:
        """Begin the stream; see Exchange."""
        super().start_stream([*headers, *self._id_headers])

    def send_chunk(self, data: bytes) -> None:
        """Send what frames of a chat stream mean; raises UpstreamConnectionError where they cannot be said."""
        try:
            events = self._stream.feed(data)
        except AnswerNotTranslatableError as error:
            raise UpstreamConnectionError(error.code, str(error)) from error
        if events:
            super().send_chunk(events)

    async def finish_stream(self, data: bytes) -> None:
        """Send the last events: `data` is `[DONE]` or an error frame, so there are some."""
        await super().finish_stream(self._stream.feed(data))


def _build_answering(call: Call, asked: dict[str, Any]) -> Answering:
    def get_usage() -> ReportedUsage:
        running = call.meter.last_usage if call.meter is not None else None
        return call.recorded_usage or running or NOTHING_USED

    return Answering(
        call_id=call.call_id,
        created_at_s=call.occurred_at_us // 1_000_000,
        model=call.model.name,
        request=asked,
        get_usage=get_usage,
    )


def _build_id_headers(dialect: Dialect, call_id: str) -> list[tuple[bytes, bytes]]:
    name = dialect.request_id_header
    return [] if name is None else [(name, call_id.encode())]
