"""Kind `qianfan_v1`: Baidu Qianfan's first API, where its Llama models live. Version 2 is `openai_compatible`.

`base_url` is `https://aip.baidubce.com/rpc/2.0/ai_custom/v1/wenxinworkshop`; the credential is an access token,
which goes into the query. `completion_tokens` of a stream are per chunk while `total_tokens` are cumulative, so the
output is total minus input. Errors come with HTTP 200.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.contract.token_kind import UsageSource
from gateway.providers.answer_records import UpstreamFailure
from gateway.providers.base import (
    CallRequest,
    CallResult,
    ReportedUsage,
    StreamMeter,
    UnsupportedCallError,
    UpstreamRequest,
)
from gateway.providers.chat_translation import TranslatedAnswer, Turn, build_result, get_model_name, read_chat
from gateway.providers.openai_compatible import build_failed_result, join_path
from gateway.providers.transcript import parse_json
from gateway.providers.translated_stream import TranslatedStreamMeter, read_event
from gateway.providers.upstream_errors import build_invalid_answer, classify_answer, classify_body
from gateway.sse import FrameSplitter
from gateway.token_usage import believe_usage

_OPTIONS = ("temperature", "top_p", "top_k", "penalty_score", "stop")
_TOTAL_HEADER = re.compile(r"eb_total_tokens:(\d{1,9}),prompt_tokens:(\d{1,9})\b")


class QianfanV1:
    """Implements Provider."""

    kind = "qianfan_v1"
    stream_content_type = "text/event-stream"

    def build_request(self, call: CallRequest, upstream: UpstreamRecord, credential: str) -> UpstreamRequest:
        """Return the request in Qianfan's shape; raises UnsupportedCallError for what it cannot say."""
        chat = read_chat(call, kind=self.kind, supported=_OPTIONS)
        # A cap of ours is left out: the provider's own bound is the model's, see `gateway/README.md`.
        if chat.output_tokens_max is not None and not call.has_gateway_cap:
            raise UnsupportedCallError(f"{self.kind} upstreams do not support 'max_tokens'")
        _check_turns(chat.turns, self.kind)
        body: dict[str, Any] = {
            "messages": [{"role": turn.role, "content": turn.text} for turn in chat.turns],
            "stream": call.streamed,
            **chat.options,
        }
        path = join_path(upstream.base_url, f"/chat/{quote(upstream.provider_model, safe='')}")
        path += f"{'&' if '?' in path else '?'}access_token={quote(credential, safe='')}"
        return UpstreamRequest("POST", path, [(b"content-type", b"application/json")], msgspec.json.encode(body))

    def parse_response(
        self, body: bytes, headers: Mapping[str, str], *, context_tokens_max: int, call: CallRequest | None = None
    ) -> CallResult:
        """Read a whole answer; see Provider. A header repeats the counts and stands in for missing ones."""
        answer = parse_json(body)
        failure = classify_body(answer)
        if failure is None and not (isinstance(answer, dict) and isinstance(answer.get("result"), str)):
            failure = build_invalid_answer("The provider's answer has no result.")
        if failure is not None:
            return build_failed_result(failure, headers)
        usage = None
        for said in (read_usage(answer.get("usage")), _read_header(headers.get("x-aipe-self-def", ""))):
            if said is not None and usage is None:
                usage = believe_usage(said, context_tokens_max=context_tokens_max, choices_count=1)
        return build_result(
            TranslatedAnswer(
                identity=answer["id"] if isinstance(answer.get("id"), str) else "",
                model=get_model_name(call),
                text=answer["result"],
                finish_reason="length" if answer.get("is_truncated") is True else "stop",
                usage=usage,
            )
        )

    def open_stream(
        self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None = None
    ) -> StreamMeter:
        """Return the meter of one streamed answer."""
        return _QianfanMeter(client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call)

    def classify_error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        """Return the failure as the tenant sees it."""
        return classify_answer(status, headers, body)


class _QianfanMeter(TranslatedStreamMeter):
    """Reads `data:` frames until `is_end`; an error may come as a bare line of JSON."""

    def __init__(self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None) -> None:
        super().__init__(client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call)
        self._splitter = FrameSplitter()

    def read(self, data: bytes) -> None:
        for frame in self._splitter.split(data):
            # A bare line is an error, or nothing that concerns anybody.
            self._read_event(read_event(frame) or parse_json(frame.strip()))

    def read_tail(self) -> None:
        self._read_event(parse_json(self._splitter.pending.strip()))

    def _read_event(self, event: Any) -> None:
        if not isinstance(event, dict) or self.is_done:
            return
        failure = classify_body(event)
        if failure is not None:
            self.fail(failure)
            return
        identity, text = event.get("id"), event.get("result")
        self.request_id = self.request_id or (identity if isinstance(identity, str) else "")
        self.say(text if isinstance(text, str) else "")
        usage = read_usage(event.get("usage"))
        if usage is not None:
            self.report(usage)
        if event.get("is_end") is True:
            self.end("length" if event.get("is_truncated") is True else "stop")
            self.close()


def read_usage(usage: Any) -> ReportedUsage | None:
    """Return Qianfan's usage, to be judged: output is total minus input, right for running and for whole counts."""
    if not isinstance(usage, dict):
        return None
    total, prompt = usage.get("total_tokens"), usage.get("prompt_tokens")
    if type(total) is not int or type(prompt) is not int:
        return None
    return ReportedUsage(prompt, total - prompt)


def _read_header(text: str) -> ReportedUsage | None:
    match = _TOTAL_HEADER.search(text)
    if match is None:
        return None
    total, prompt = int(match.group(1)), int(match.group(2))
    return ReportedUsage(prompt, total - prompt, source=UsageSource.PROVIDER_HEADER)


def _check_turns(turns: list[Turn], kind: str) -> None:
    """Raise UnsupportedCallError unless user and assistant alternate and the user has the last word."""
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [turn.role for turn in turns] != expected:
        raise UnsupportedCallError(f"{kind} upstreams need user and assistant in turn, and no system message")
