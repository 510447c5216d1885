"""What a wire of ours that is not chat completions must say: the request in, the answer, the stream and errors out.

A dialect is pure: bytes and parsed JSON in and out. Everything between the two translations, admission, upstreams,
counting and settling, sees a plain chat completion, so there is one meter for all endpoints. What a dialect cannot
express is refused with 400 and never served differently from what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from gateway.errors import GatewayError
from gateway.providers.base import ReportedUsage


class AnswerNotTranslatableError(ValueError):
    """A streamed answer is beyond its bound, or in an order that no event of the dialect can say."""

    code: ClassVar[str] = "upstream_invalid_response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """What an answer says of its call. `request` is the tenant's own body, `model` the name that it asked for.

    `get_usage` returns the counts that are on record, in tokens and inclusive, once the call is settled; before
    that the running ones, or zeros. So what a tenant is shown is what it is billed.
    """

    call_id: str
    created_at_s: int
    model: str
    request: dict[str, Any]
    get_usage: Callable[[], ReportedUsage]


class StreamTranslator(Protocol):
    """Turns one stream of chat completions into the dialect's events."""

    def feed(self, data: bytes) -> bytes:
        """Return the events for whole frames of a chat stream; `data: [DONE]` or an error frame gives the last ones.

        Raises AnswerNotTranslatableError.
        """
        ...


class Dialect(Protocol):
    """One wire. Stateless: one object serves all calls.

    `endpoint` is its name in usage events and in the scopes of keys. `request_id_header` is where this wire's
    clients look for the request id, beside `x-request-id`.
    """

    endpoint: str
    request_id_header: bytes | None

    def read_request(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the chat completion request of a tenant's body; raises GatewayError (400)."""
        ...

    def build_answer(self, chat: Any, answering: Answering) -> bytes:
        """Return the body for a parsed whole chat completion, after the call is settled."""
        ...

    def open_stream(self, answering: Answering) -> StreamTranslator:
        """Return the translator of one stream."""
        ...

    def build_error(self, error: GatewayError, *, request_id: str) -> bytes:
        """Return the body of an error."""
        ...


def build_unsupported(param: str, why: str = "") -> GatewayError:
    """Return the refusal of something that this gateway cannot express."""
    detail = f": {why}" if why else ""
    return GatewayError(400, "unsupported_parameter", f"{param} is not supported here{detail}.", param=param)


def build_invalid(param: str, expected: str) -> GatewayError:
    """Return the refusal of a member that is not what it should be."""
    return GatewayError(400, "invalid_parameter", f"{param}: {expected}.", param=param)


def read_list(value: Any, param: str) -> list[Any]:
    """Return a list of objects; raises GatewayError (400)."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise build_invalid(param, "must be a list of objects")
    return value


def read_text(value: Any, param: str) -> str:
    """Return a text; raises GatewayError (400)."""
    if not isinstance(value, str):
        raise build_invalid(param, "must be a text")
    return value


def join_parts(parts: list[dict[str, Any]]) -> Any:
    """Return the content of a chat message: plain text where it is a single text, as every server takes it."""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts
