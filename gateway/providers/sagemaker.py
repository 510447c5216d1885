"""Kind `sagemaker`: a SageMaker endpoint whose container speaks OpenAI's chat API (TGI, LMI, vLLM).

`base_url` is `https://runtime.sagemaker.{region}.amazonaws.com`, `provider_model` the endpoint's name, and the
credential `ACCESS_KEY_ID:SECRET_ACCESS_KEY[:SESSION_TOKEN]`. A stream's PayloadParts are arbitrary cuts of the
container's own stream, so that is put together again first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import quote

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.providers.aws import BrokenEventStreamError, EventStreamSplitter, build_aws_headers
from gateway.providers.base import CallRequest, StreamMeter, UnsupportedCallError, UpstreamRequest
from gateway.providers.openai_compatible import OpenAICompatible, edit_body, join_path
from gateway.providers.openai_stream import OpenAIStreamMeter
from gateway.providers.transcript import parse_json
from gateway.providers.upstream_errors import build_invalid_answer, classify_aws_exception


class SageMaker(OpenAICompatible):
    """Implements Provider."""

    kind = "sagemaker"
    stream_content_type = "application/vnd.amazon.eventstream"
    paths: ClassVar[Mapping[str, str]] = {"chat.completions": "/invocations"}

    def build_request(self, call: CallRequest, upstream: UpstreamRecord, credential: str) -> UpstreamRequest:
        """Return the signed invocation with the tenant's body; raises UnsupportedCallError."""
        if call.endpoint not in self.paths:
            raise UnsupportedCallError(f"{self.kind} upstreams do not serve {call.endpoint}")
        action = "invocations-response-stream" if call.streamed else "invocations"
        path = join_path(upstream.base_url, f"/endpoints/{quote(upstream.provider_model, safe='')}/{action}")
        body = edit_body(call, upstream)
        headers = build_aws_headers(
            credential,
            region=upstream.region,
            service="sagemaker",
            base_url=upstream.base_url,
            path=path,
            body=body,
        )
        return UpstreamRequest("POST", path, headers, body)

    def open_stream(
        self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None = None
    ) -> StreamMeter:
        """Return the meter of one streamed answer."""
        return _PayloadPartMeter(
            client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call
        )


class _PayloadPartMeter(OpenAIStreamMeter):
    """Unpacks the container's stream, and meters that."""

    __slots__ = ("_events",)

    def __init__(self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None) -> None:
        super().__init__(client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call)
        self._events = EventStreamSplitter()

    def feed(self, data: bytes) -> bytes:
        """Return the bytes for the client now; see StreamMeter."""
        if self.is_done:
            return b""
        relayed = []
        try:
            for event in self._events.split(data):
                if event.exception_type:
                    self.fail(classify_aws_exception(event.exception_type, parse_json(event.payload)))
                    break
                relayed.append(super().feed(event.payload))
        except BrokenEventStreamError as error:
            self.fail(build_invalid_answer(str(error)))
        return b"".join(relayed)
