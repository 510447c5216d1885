"""The seam between the relay and a provider: what goes in, what comes out, and the two protocols.

A provider kind is one module of this package with one class of this shape; `get_provider` finds it by name.
The relay never looks into a provider's payload and a provider never does I/O. What is made for each call is a plain
class, which compiled code makes and reads fastest; once made it is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.contract.token_kind import UsageSource
from gateway.providers.answer_records import EmittedText, UpstreamFailure


class ProviderError(Exception):
    """Root of this package's errors; each has a stable `code`.

    ProviderError
    ├── UnknownProviderKindError    no module has this kind: a mistake in the catalog
    └── UnsupportedCallError        this kind cannot serve this call: another upstream may
    """

    code: ClassVar[str] = "provider_error"


class UnknownProviderKindError(ProviderError):
    """No provider module has this kind."""

    code: ClassVar[str] = "unknown_provider_kind"


class UnsupportedCallError(ProviderError):
    """The provider has no such endpoint or cannot express the request (HTTP 400 for the tenant)."""

    code: ClassVar[str] = "unsupported_call"


class CallRequest:
    """A tenant's call. `headers` are already filtered: only what may be forwarded.

    `has_gateway_cap`: the bound of the output is ours, the client named none; it is in `body` and `json`.
    """

    __slots__ = ("body", "client_asked_usage", "endpoint", "has_gateway_cap", "headers", "json", "streamed")

    def __init__(
        self,
        endpoint: str,
        body: bytes,
        json: dict[str, Any],
        *,
        streamed: bool,
        client_asked_usage: bool,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        has_gateway_cap: bool = False,
    ) -> None:
        self.endpoint = endpoint
        self.body = body
        self.json = json
        self.streamed = streamed
        self.client_asked_usage = client_asked_usage
        self.headers = headers
        self.has_gateway_cap = has_gateway_cap

    @property
    def client_asked_continuous_usage(self) -> bool:
        """Whether the client itself asked for usage on every chunk (a vLLM extension)."""
        options = self.json.get("stream_options")
        return isinstance(options, dict) and options.get("continuous_usage_stats") is True


class UpstreamRequest:
    """What goes over the wire. `path` includes the path of the base URL and the query.

    `headers` are without host, content-length and connection: the HTTP connection adds those.
    """

    __slots__ = ("body", "headers", "method", "path")

    def __init__(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body


@dataclass(init=False, slots=True)
class ReportedUsage:
    """Believable usage, in tokens and inclusive.

    Input includes cached input and cache writes, output includes reasoning.
    """

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    source: UsageSource

    def __init__(
        self,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        cache_write_tokens: int = 0,
        reasoning_tokens: int = 0,
        source: UsageSource = UsageSource.PROVIDER_FINAL,
    ) -> None:
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.cached_input_tokens = cached_input_tokens
        self.cache_write_tokens = cache_write_tokens
        self.reasoning_tokens = reasoning_tokens
        self.source = source


class CallResult:
    """What a finished (or cut) answer says.

    `usage` None: nothing believable was reported, so count or quarantine. `finish_reason` "" when not seen.
    `error`: a failure inside HTTP 200. `is_complete`: the end was seen as the protocol wants it.
    `emitted` parses on demand. `client_body`: the body for the client where the provider's own shape is
    not OpenAI's; None means the bytes as received.
    """

    __slots__ = ("client_body", "emitted", "error", "finish_reason", "is_complete", "provider_request_id", "usage")

    def __init__(
        self,
        *,
        usage: ReportedUsage | None,
        finish_reason: str,
        provider_request_id: str,
        error: UpstreamFailure | None,
        is_complete: bool,
        emitted: Callable[[], EmittedText],
        client_body: bytes | None = None,
    ) -> None:
        self.usage = usage
        self.finish_reason = finish_reason
        self.provider_request_id = provider_request_id
        self.error = error
        self.is_complete = is_complete
        self.emitted = emitted
        self.client_body = client_body


class StreamMeter(Protocol):
    """Reads one streamed answer on its way to the client. Never raises on what an upstream sends.

    `last_usage` is the running count, for the lease. `is_done`: nothing more will come for the client, so settle
    now, then write `data: [DONE]`, or an error frame where `finish().error` is set or the answer is not complete.
    """

    last_usage: ReportedUsage | None
    is_done: bool

    def feed(self, data: bytes) -> bytes:
        """Return the bytes for the client now: whole frames, unchanged, minus usage that it did not ask for.

        Held back: the terminal `data: [DONE]` and error frames (they are `finish().error`, normalised).
        """
        ...

    def finish(self) -> CallResult:
        """Return what was seen. Call once, on the end, on an abort or when the upstream died."""
        ...

    def copy_emitted(self) -> Callable[[], EmittedText]:
        """Return what builds the text so far; it may run on another thread while the stream goes on."""
        ...


class Provider(Protocol):
    """One kind of upstream. Stateless: one object serves all calls.

    `stream_content_type` is how the content type of a streamed answer begins; any other is a whole body, which is
    no answer where a stream was asked for.

    `call`, where it is passed to the two readers, gives them what the request asked for: whether continuous
    usage was the client's own wish, the number of choices, and the model's name for translated answers.
    """

    kind: str
    stream_content_type: str

    def build_request(self, call: CallRequest, upstream: UpstreamRecord, credential: str) -> UpstreamRequest:
        """Return the request to send; raises UnsupportedCallError. No authentication with `credential` ""."""
        ...

    def parse_response(
        self,
        body: bytes,
        headers: Mapping[str, str],
        *,
        context_tokens_max: int,
        call: CallRequest | None = None,
    ) -> CallResult:
        """Read the whole body of a non-streamed HTTP 200. `headers` have lower-case names."""
        ...

    def open_stream(
        self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None = None
    ) -> StreamMeter:
        """Return the meter of one streamed HTTP 200."""
        ...

    def classify_error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        """Turn any answer that is not HTTP 200 into the failure that the tenant sees."""
        ...
