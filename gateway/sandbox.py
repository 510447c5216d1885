"""A stand-in inference server over real HTTP, for demos, test keys and tests: `python -m gateway.sandbox`.

It speaks vLLM's dialect of OpenAI's API (continuous usage included) and answers deterministic text with true
Llama 3 token counts. The request's `sandbox` member, or a suffix of the model's name, asks for delays, chunk
sizes and faults: see `sandbox_answers.py`. `/stats` says what was served, so a test can count both sides.
It listens on the loopback only and knows no keys.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec
import uvicorn

from gateway.sandbox_answers import (
    Choice,
    Options,
    SandboxRequestError,
    build_usage,
    count_input,
    generate_choices,
    get_tool_arguments,
    read_options,
)
from gateway.sse import DONE_FRAME, build_frame
from gateway.tokenizer import RanksNotFoundError, load_encoding

type Scope = MutableMapping[str, Any]
type Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
type Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PORT_DEFAULT = 8090
RECORDS_MAX = 100_000
BODY_BYTES_MAX = 32 * 1024 * 1024
HANG_S_MAX = 600
MODELS = ("llama-3-8b-instruct", "llama-3-70b-instruct", "llama-3.1-405b-instruct")
_ENDPOINTS = {
    "/v1/chat/completions": "chat.completions",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
_EMBEDDING_DIMENSIONS = 8
_ERRORS: dict[str, tuple[int, dict[str, Any]]] = {
    "http_400": (400, {"error": {"message": "The request is refused.", "type": "BadRequestError", "code": 400}}),
    "http_401": (
        401,
        {"error": {"message": "Invalid key sk-sandbox-secret", "type": "AuthenticationError", "code": 401}},
    ),
    "http_429": (429, {"error": {"message": "Too many requests.", "type": "RateLimitError", "code": 429}}),
    "http_500": (500, {"error": {"message": "The engine failed.", "type": "InternalServerError", "code": 500}}),
    "http_503": (503, {"error": {"message": "Loading model.", "type": "unavailable_error", "code": 503}}),
    "flat_error": (400, {"object": "error", "message": "A flat error.", "type": "BadRequestError", "code": 400}),
    "error_in_200": (200, {"error": {"message": "The engine failed.", "type": "InternalServerError", "code": 500}}),
}


class _CutError(Exception):
    """Breaks the connection off: the server closes it without ending the body."""


@dataclass(slots=True)
class Record:
    """One request as this side saw it. `output_tokens` are those sent; outcome: served, failed, cut or aborted.

    `caller_request_id` is the `x-request-id` that came with it: a gateway's call id.
    """

    request_id: str
    caller_request_id: str
    user: str
    model: str
    endpoint: str
    streamed: bool
    input_tokens: int = 0
    output_tokens: int = 0
    outcome: str = "in_flight"


class Sandbox:
    """The ASGI application."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque(maxlen=RECORDS_MAX)
        self.sequence = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path in _ENDPOINTS and scope["method"] == "POST":
            await self._serve(_ENDPOINTS[path], scope, receive, send)
        elif path == "/healthz":
            await _send_json(send, 200, {"status": "ok"})
        elif path == "/v1/models":
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "sandbox"} for name in MODELS]
            await _send_json(send, 200, {"object": "list", "data": models})
        elif path == "/stats" and scope["method"] == "DELETE":
            self.records.clear()
            await _send_json(send, 200, self._sum_records(with_records=False))
        elif path == "/stats":
            await _send_json(send, 200, self._sum_records(with_records=b"records" in scope["query_string"]))
        else:
            await _send_json(send, 404, {"detail": "Not Found"})

    def _sum_records(self, *, with_records: bool) -> dict[str, Any]:
        outcomes = dict.fromkeys(("served", "failed", "cut", "aborted", "in_flight"), 0)
        for record in self.records:
            outcomes[record.outcome] += 1
        stats: dict[str, Any] = {
            "calls": len(self.records),
            **outcomes,
            "input_tokens": sum(record.input_tokens for record in self.records if record.outcome != "failed"),
            "output_tokens": sum(record.output_tokens for record in self.records if record.outcome != "failed"),
        }
        if with_records:
            stats["records"] = [msgspec.to_builtins(record) for record in self.records]
        return stats

    async def _serve(self, endpoint: str, scope: Scope, receive: Receive, send: Send) -> None:
        self.sequence += 1
        record = Record(
            f"{'chatcmpl' if endpoint == 'chat.completions' else 'cmpl'}-sandbox-{self.sequence}",
            dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")[:64],
            "",
            "",
            endpoint,
            False,
        )
        self.records.append(record)
        gone: asyncio.Task[None] | None = None
        try:
            request = await _read_request(receive)
            options = read_options(request)
            record.user = str(request.get("user", ""))[:256]
            record.model = request["model"]
            record.streamed = request.get("stream") is True and endpoint != "embeddings"
            gone = asyncio.create_task(_wait_until_gone(receive))
            await _pause(options.delay_ms, gone)
            if gone.done():
                record.outcome = "aborted"
                return
            if await _send_fault(options, gone, send):
                record.outcome = "failed"
                return
            record.input_tokens = count_input(request, options, endpoint=endpoint)
            if endpoint == "embeddings":
                await _send_json(send, 200, _build_embeddings(request, record, options))
            else:
                answer = Answer(request, options, record)
                await (_send_stream(answer, gone, send) if record.streamed else _send_whole(answer, send))
            record.outcome = "served" if record.outcome == "in_flight" else record.outcome
        except SandboxRequestError as error:
            record.outcome = "failed"
            await _send_json(send, 400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}})
        except _CutError:
            record.outcome = "cut"
            raise
        finally:
            if gone is not None:
                gone.cancel()


class Answer:
    """One chat or text completion, whole or in frames."""

    def __init__(self, request: dict[str, Any], options: Options, record: Record) -> None:
        self.request, self.options, self.record = request, options, record
        self.choices = generate_choices(request, options, endpoint=record.endpoint)
        self.output_tokens = sum(choice.output_tokens for choice in self.choices)
        self.is_chat = record.endpoint == "chat.completions"
        self.created_s = int(time.time())

    def build_whole(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        body = self._build_envelope("chat.completion" if self.is_chat else "text_completion")
        body["choices"] = [self._build_choice(index, choice) for index, choice in enumerate(self.choices)]
        usage = self._build_usage(self.output_tokens)
        if usage is not None:
            body["usage"] = usage
        return body

    def build_frames(self) -> Iterator[tuple[bytes, int]]:
        """Yield the frames of a stream, each with the output tokens that it brings."""
        asked = self.request.get("stream_options")
        asked = asked if isinstance(asked, dict) else {}
        include_usage = asked.get("include_usage") is True
        is_continuous = include_usage and asked.get("continuous_usage_stats") is True
        fault = self.options.fault
        if fault == "empty_first_chunk":
            yield self._build_chunk([], {"prompt_filter_results": []}), 0
        sent = [0] * len(self.choices)
        for index, delta, tokens, finish_reason in self._walk_deltas():
            if fault == "error_in_stream" and sum(sent) >= self.options.fault_after_tokens:
                yield build_frame(json.dumps(_ERRORS["error_in_200"][1]).encode()), 0
                yield DONE_FRAME, 0
                return
            if fault == "bad_json_in_stream" and sum(sent) >= self.options.fault_after_tokens:
                yield build_frame(b'{"choices":[{"delta"'), 0
                fault = ""
            sent[index] += tokens
            part = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
            choice = {"index": index, **part, "logprobs": None, "finish_reason": finish_reason}
            usage = None
            if is_continuous or (fault == "usage_with_finish" and include_usage and finish_reason):
                usage = self._build_usage(sent[index])
            yield self._build_chunk([choice], {} if usage is None else {"usage": usage}), tokens
        usage = self._build_usage(self.output_tokens)
        if include_usage and usage is not None:
            yield self._build_chunk([], {"usage": usage}), 0
        if fault != "no_done":
            yield DONE_FRAME, 0

    def _walk_deltas(self) -> Iterator[tuple[int, dict[str, Any], int, str | None]]:
        """Yield (choice, delta, tokens, finish reason), the choices interleaved chunk by chunk."""
        if self.is_chat:
            for index in range(len(self.choices)):
                yield index, {"role": "assistant", "content": ""}, 0, None
        size = self.options.chunk_tokens
        longest = max(len(choice.pieces) for choice in self.choices)
        for start in range(0, longest + 1, size):
            for index, choice in enumerate(self.choices):
                pieces = choice.pieces[start : start + size]
                if choice.tool_name:
                    if start == 0:
                        yield index, _build_tool_delta(choice), len(choice.pieces), None
                elif pieces:
                    yield index, {"content": "".join(pieces)}, len(pieces), None
        for index, choice in enumerate(self.choices):
            yield index, {}, choice.output_tokens - len(choice.pieces), choice.finish_reason

    def _build_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        ending = {"logprobs": self._build_logprobs(choice), "finish_reason": choice.finish_reason}
        if not self.is_chat:
            return {"index": index, "text": choice.text, **ending}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.tool_name:
            message = {"role": "assistant", "content": None, "tool_calls": _build_tool_delta(choice)["tool_calls"]}
        return {"index": index, "message": message, **ending}

    def _build_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self.request.get("logprobs") is not True or not self.is_chat:
            return None
        tokens: list[dict[str, Any]] = [
            {"token": piece, "logprob": -0.5, "bytes": None, "top_logprobs": []} for piece in choice.pieces
        ]
        return {"content": tokens}

    def _build_usage(self, output_tokens: int) -> dict[str, Any] | None:
        return build_usage(self.options, input_tokens=self.record.input_tokens, output_tokens=output_tokens)

    def _build_envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.record.request_id, "object": kind, "created": self.created_s, "model": self.record.model}

    def _build_chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
        chunk = self._build_envelope("chat.completion.chunk" if self.is_chat else "text_completion")
        return build_frame(_to_json({**chunk, "choices": choices, **extra}))


def _build_tool_delta(choice: Choice) -> dict[str, Any]:
    function = {"name": choice.tool_name, "arguments": get_tool_arguments(choice)}
    return {"tool_calls": [{"index": 0, "id": "call_sandbox", "type": "function", "function": function}]}


def _build_embeddings(request: dict[str, Any], record: Record, options: Options) -> dict[str, Any]:
    inputs = request.get("input")
    is_one = isinstance(inputs, str) or (isinstance(inputs, list) and type(inputs[0]) is int)
    vectors = []
    for index, text in enumerate([inputs] if is_one else inputs or []):
        digest = str(text).encode("utf-8", "replace").ljust(_EMBEDDING_DIMENSIONS, b"\0")[:_EMBEDDING_DIMENSIONS]
        vector: Any = [byte / 256 for byte in digest]
        if request.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        vectors.append({"object": "embedding", "index": index, "embedding": vector})
    usage = build_usage(options, input_tokens=record.input_tokens, output_tokens=0) or {}
    usage.pop("completion_tokens", None)
    return {"object": "list", "model": record.model, "data": vectors, **({"usage": usage} if usage else {})}


async def _send_stream(answer: Answer, gone: asyncio.Task[None], send: Send) -> None:
    """Send the frames until the client is gone: then generation stops, as vLLM's does."""
    record, options = answer.record, answer.options
    await send(_build_start(200, b"text/event-stream; charset=utf-8"))
    for frame, tokens in answer.build_frames():
        if gone.done():
            record.outcome = "aborted"
            return
        if options.fault in ("cut_stream", "hang_in_stream") and record.output_tokens >= options.fault_after_tokens:
            if options.fault == "hang_in_stream":
                await asyncio.wait({gone}, timeout=HANG_S_MAX)
            raise _CutError
        record.output_tokens += tokens
        await send({"type": "http.response.body", "body": frame, "more_body": True})
        await _pause(options.chunk_delay_ms if tokens else 0, gone)
    await send({"type": "http.response.body", "body": b""})


async def _send_whole(answer: Answer, send: Send) -> None:
    if answer.options.fault == "cut_stream":
        body = _to_json(answer.build_whole())
        await send(_build_start(200, b"application/json", len(body)))
        await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
        raise _CutError
    await _send_json(send, 200, answer.build_whole())
    answer.record.output_tokens = answer.output_tokens


async def _send_fault(options: Options, gone: asyncio.Task[None], send: Send) -> bool:
    """Answer a fault that comes instead of an answer; return whether there was one."""
    if options.fault in _ERRORS:
        status, body = _ERRORS[options.fault]
        headers = [(b"retry-after", b"1")] if status == 429 else []
        await _send_json(send, status, body, headers)
        return True
    if options.fault == "bad_json":
        await send(_build_start(200, b"application/json", 1))
        await send({"type": "http.response.body", "body": b"{"})
        return True
    if options.fault == "hang":
        await asyncio.wait({gone}, timeout=HANG_S_MAX)
        return True
    return False


async def _read_request(receive: Receive) -> dict[str, Any]:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > BODY_BYTES_MAX:
            raise SandboxRequestError("the body is too large")
        if not message.get("more_body"):
            break
    try:
        request = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SandboxRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise SandboxRequestError("the body is not a JSON object")
    return request


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pause(delay_ms: int, gone: asyncio.Task[None]) -> None:
    """Wait, but no longer than the client does."""
    if delay_ms:
        await asyncio.wait({gone}, timeout=delay_ms / 1000)


def _to_json(value: Any) -> bytes:
    """Return compact JSON. The standard library's writes NaN as `NaN`, which the fault needs."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _build_start(status: int, content_type: bytes, length: int | None = None) -> dict[str, Any]:
    headers = [(b"content-type", content_type)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _send_json(
    send: Send, status: int, value: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = _to_json(value)
    start = _build_start(status, b"application/json", len(body))
    start["headers"].extend(headers or [])
    await send(start)
    await send({"type": "http.response.body", "body": body})


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gateway.sandbox", description=(__doc__ or "").split("\n\n")[0])
    default = int(os.environ.get("TOLLBOOK_SANDBOX_PORT") or PORT_DEFAULT)
    parser.add_argument("--port", type=int, default=default, help="loopback port (TOLLBOOK_SANDBOX_PORT, %(default)s)")
    options = parser.parse_args(arguments)
    try:
        load_encoding()
    except RanksNotFoundError as error:
        sys.stderr.write(f"sandbox: {error}\n")
        return 1
    uvicorn.run(
        Sandbox(),
        host="127.0.0.1",
        port=options.port,
        log_level="critical",
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
