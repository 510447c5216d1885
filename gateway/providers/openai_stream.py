"""The meter of an OpenAI-shaped stream: passes bytes through, reads usage, hides what nobody asked for.

The hot path is a read of whole frames that carry only text: a few byte searches, a look that they are JSON at all,
and the bytes go on as they are. They are taken apart only where they can carry usage, an error or a finish reason.
What is not JSON goes to nobody, for the official clients die of it: it ends the stream as a failed one.

`find` is used instead of `in`, which on bytes costs four times as much.

How usage is merged (reference: `providers/README.md`):

| where it is seen | meaning |
|---|---|
| a chunk with `choices: []` | the whole call; the last one wins (vLLM repeats it with `cached_tokens`) |
| the same, `sums_final_usage` | one choice each: summed (llama-server, n > 1) |
| a chunk with choices | running count of those choices: the last of each choice, summed over choices |
| anything followed by more text | stale: it covers only a part, so it is not used (our own count is) |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import msgspec

from gateway.contract.token_kind import UsageSource
from gateway.providers.answer_records import EmittedText, UpstreamFailure
from gateway.providers.base import CallRequest, CallResult, ReportedUsage
from gateway.providers.chunk_records import RunningCount
from gateway.providers.transcript import Transcript, parse_json, repair_json
from gateway.providers.upstream_errors import build_invalid_answer, classify_body
from gateway.sse import FrameSplitter, FrameTooLargeError, build_frame, get_frame_data
from gateway.token_usage import believe_usage, get_choices_count, mark_source, read_openai_usage

_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_skip_json = msgspec.json.Decoder(msgspec.Raw).decode


def needs_parsing(data: bytes) -> bool:
    """Return whether the data of one or more frames can carry usage, an error or a finish reason.

    Quotes inside JSON strings are escaped, so `"usage"` with bare quotes is a member name or a whole string.
    """
    return (
        not _is_always_null(data, b'"usage"')
        or not _is_always_null(data, b'"finish_reason"')
        or data.find(b'"error') >= 0
    )


def _is_always_null(data: bytes, name: bytes) -> bool:
    """Return whether a member is null wherever it is, if it is anywhere."""
    count = data.count(name)
    if count == 0:
        return True
    tight_count = data.count(name + b":null")
    return count == tight_count or count == tight_count + data.count(name + b": null")


def is_plain(data: bytes) -> bool:
    """Return whether `data` is whole frames of a single `data: {…}` line each, with LF line ends."""
    return (
        data.endswith(b"}\n\n")
        and data.startswith(b"data: {")
        and (data.find(b"\n") == len(data) - 2 or data.count(b"\n") == 2 * data.count(b"}\n\ndata: {") + 2)
        and data.find(b"\r") < 0
    )


def is_json(data: bytes) -> bool:
    """Return whether each frame of plain `data` is JSON in UTF-8, so a JSON object. Nothing is built of it."""
    try:
        if not data.isascii():
            data.decode()
        for text in data[6:-2].split(b"\n\ndata: "):
            _skip_json(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def normalize_frame(frame: bytes, data: bytes | None) -> bytes:
    """Return a frame as every client takes it: its data on one line, or else its comments.

    The official Python client dies of `id`, `retry` and `event` lines; vLLM's benchmark client wants `data: ` with
    the blank, LF line ends, and no comment beside the data.

    >>> normalize_frame(b"id: 1\\r\\ndata:{}\\r\\n\\r\\n", b"{}")
    b'data: {}\\n\\n'
    """
    if data is not None:
        return build_frame(data.replace(b"\n", b" "))
    comments = [line for line in frame.splitlines() if line.startswith(b":")]
    return b"\n".join(comments) + b"\n\n" if comments else b""


_decode_running_count: Final = msgspec.json.Decoder(RunningCount).decode


class OpenAIStreamMeter:
    """Implements StreamMeter for `data: {chunk}` streams that end with `data: [DONE]`."""

    __slots__ = (
        "_around_text",
        "_asked_continuous",
        "_asked_usage",
        "_by_choice",
        "_choices_count",
        "_context_tokens_max",
        "_error",
        "_final",
        "_final_count",
        "_finish_reason",
        "_finished_with_usage",
        "_has_end",
        "_has_started",
        "_is_continuous",
        "_request_id",
        "_splitter",
        "_sums_final_usage",
        "_transcript",
        "is_done",
        "last_usage",
    )

    def __init__(
        self,
        *,
        client_asked_usage: bool,
        context_tokens_max: int,
        call: CallRequest | None = None,
        sums_final_usage: bool = False,
    ) -> None:
        self.last_usage: ReportedUsage | None = None
        self.is_done = False
        self._asked_usage = client_asked_usage
        self._asked_continuous = call is not None and call.client_asked_continuous_usage
        self._choices_count = get_choices_count(call)
        self._context_tokens_max = context_tokens_max
        self._sums_final_usage = sums_final_usage
        self._splitter = FrameSplitter()
        self._transcript = Transcript()
        self._final: ReportedUsage | None = None
        self._final_count = 0
        self._by_choice: dict[int, ReportedUsage] = {}
        self._finished_with_usage = False
        self._is_continuous = False
        self._has_end = False
        self._has_started = False
        self._error: UpstreamFailure | None = None
        self._around_text = b"", b""
        self._finish_reason = ""
        self._request_id = ""

    def feed(self, data: bytes) -> bytes:
        """Return the bytes for the client now; see StreamMeter."""
        if self.is_done:
            return b""
        if self._has_started and not self._splitter.pending:
            shortened = self._feed_running_count(data) if self._is_continuous else None
            if shortened is not None:
                return shortened
            if is_plain(data) and not needs_parsing(data) and is_json(data):
                self._transcript.add_frames(data)
                return data
        try:
            frames = self._splitter.split(data)
        except FrameTooLargeError as error:
            self.fail(build_invalid_answer(str(error)))
            return b""
        relayed = []
        for frame in frames:
            relayed.append(self._take(frame))
            if self.is_done:
                break
        return b"".join(relayed)

    def _feed_running_count(self, data: bytes) -> bytes | None:
        """Take one frame of text that ends in vLLM's running count, and return what the client gets of it.

        None sends the frame the long way. It is a shortcut only: an object that is followed by one brace and the
        frame's end is a member of the chunk itself, so neither the chunk nor its text need be parsed.
        """
        start = data.rfind(b',"usage":{')
        if start < 0:
            return None
        is_known = self._is_known_but_for_its_text(data[:start])
        if not is_known:
            if self._choices_count != 1 or not is_plain(data) or needs_parsing(data[:start]):
                return None
            if data.find(b"[]") >= 0:
                # Perhaps the chunk of the whole call, `"choices":[]`, hidden from those who did not ask for it.
                return None
        try:
            reported = _decode_running_count(data[start + 9 : -3])
        except msgspec.DecodeError:
            return None
        if data[-3:] != b"}\n\n" or data.count(b"\n") != 2 or not is_json(data):
            return None
        usage = believe_usage(
            ReportedUsage(reported.prompt_tokens, reported.completion_tokens),
            context_tokens_max=self._context_tokens_max,
            choices_count=1,
        )
        if usage is None:
            return None
        if not is_known:
            self._remember(data[:start])
        self._by_choice[0] = self.last_usage = usage
        self._transcript.add_frames(data)
        self._transcript.mark()
        return data if self._asked_continuous else data[:start] + b"}\n\n"

    def _is_known_but_for_its_text(self, head: bytes) -> bool:
        """Return whether a chunk before its usage differs only in its text from one that was looked through.

        Text without quotes and escapes cannot be the name of a member.
        """
        before, after = self._around_text
        if not after or not head.startswith(before) or not head.endswith(after, len(before)):
            return False
        text = head[len(before) : -len(after)]
        return text.find(b'"') < 0 and text.find(b"\\") < 0 and text.find(b"\r") < 0

    def _remember(self, head: bytes) -> None:
        begin = head.find(b'"content":"') + 11
        end = head.find(b'"', begin)
        if begin > 10 and end > 0:
            self._around_text = head[:begin], head[end:]

    def finish(self) -> CallResult:
        """Return what was seen; see StreamMeter."""
        if self._splitter.pending and not self.is_done:
            # An error may come as a bare JSON line at the end, without a blank line or even `data:`.
            tail = self._splitter.pending
            failure = classify_body(parse_json(get_frame_data(tail + b"\n\n") or tail.strip()))
            if failure is not None:
                self.fail(failure)
        return CallResult(
            usage=self._settle_usage(),
            finish_reason=self._finish_reason,
            provider_request_id=self._request_id,
            error=self._error,
            is_complete=self._has_end and self._error is None,
            emitted=self._transcript.build_emitted,
        )

    def copy_emitted(self) -> Callable[[], EmittedText]:
        """Return what builds the text so far; see StreamMeter."""
        return self._transcript.copy().build_emitted

    def _take(self, frame: bytes) -> bytes:
        """Take in one frame and return what the client gets of it."""
        data = (get_frame_data(frame) or b"").strip()
        if data == b"[DONE]":
            self._has_end = self.is_done = True
            return b""
        if not data:
            return normalize_frame(frame, None)
        if not is_plain(frame):
            frame = normalize_frame(frame, data)
        if self._has_started and is_plain(frame) and not needs_parsing(data) and is_json(frame):
            self._transcript.add_frames(frame)
            return frame
        chunk = parse_json(data)
        if not isinstance(chunk, dict):
            self.fail(build_invalid_answer("The provider's stream has a line that is not a JSON object."))
            return b""
        failure = classify_body(chunk)
        if failure is not None:
            self.fail(failure)
            return b""
        repaired = repair_json(data)
        if repaired is not data:
            data, frame = repaired, build_frame(repaired)
        return self._take_chunk(frame, data, chunk)

    def _take_chunk(self, frame: bytes, data: bytes, chunk: dict[str, Any]) -> bytes:
        if not self._has_started:
            self._has_started = True
            identity = chunk.get("id")
            self._request_id = identity if isinstance(identity, str) else ""
        self._transcript.add_frames(frame)
        choices = chunk.get("choices")
        choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
        has_finish = False
        for choice in choices:
            if isinstance(choice.get("finish_reason"), str):
                has_finish = True
                self._finish_reason = choice["finish_reason"]
        usage = chunk.get("usage")
        if usage is None:
            return frame
        self._take_usage(usage, choices, has_finish=has_finish)
        if not choices:
            return frame if self._asked_usage else b""
        if self._asked_continuous or (self._asked_usage and has_finish and not self._is_continuous):
            return frame
        # OpenAI's contract: only the last chunk has usage, unless the client asked for it on each.
        return build_frame(_drop_usage(data))

    def _take_usage(self, usage: Any, choices: list[dict[str, Any]], *, has_finish: bool) -> None:
        reported = read_openai_usage(
            usage, context_tokens_max=self._context_tokens_max, choices_count=self._choices_count
        )
        if choices and not has_finish:
            self._is_continuous = True
        if reported is None:
            return
        if not choices:
            total = self._final
            self._final = _add_choice(total, reported) if total and self._sums_final_usage else reported
            self._final_count += 1
            self.last_usage = self._final
        else:
            for choice in choices:
                index = choice.get("index", 0)
                self._by_choice[index if type(index) is int else 0] = reported
            self._finished_with_usage = has_finish
            total = None
            for part in self._by_choice.values():
                total = part if total is None else _add_choice(total, part)
            self.last_usage = total
        self._transcript.mark()

    def _settle_usage(self) -> ReportedUsage | None:
        """Return the usage that covers all that was relayed, or None."""
        if self.last_usage is None or self._transcript.has_text_since_mark():
            return None
        if self._sums_final_usage and self._final_count < self._choices_count:
            return None
        usage = self.last_usage
        if usage.output_tokens == 0 and not self._transcript.build_emitted().is_empty:
            return None
        is_final = self._has_end and (self._final is not None or self._finished_with_usage)
        return mark_source(usage, UsageSource.PROVIDER_FINAL if is_final else UsageSource.PROVIDER_PARTIAL)

    def fail(self, failure: UpstreamFailure) -> None:
        """End the stream as failed."""
        self._error = failure
        self.is_done = True


def _drop_usage(data: bytes) -> bytes:
    """Return a chunk without its `usage`; the other members keep their bytes, unless half a character is among them."""
    try:
        members: dict[str, Any] = _decode_members(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        members = json.loads(data)
        del members["usage"]
        return json.dumps(members).encode()
    members.pop("usage", None)
    return msgspec.json.encode(members)


def _add_choice(total: ReportedUsage, part: ReportedUsage) -> ReportedUsage:
    """Return the usage of several choices of one call: the prompt was read once, the outputs add up."""
    return ReportedUsage(
        input_tokens=max(total.input_tokens, part.input_tokens),
        output_tokens=total.output_tokens + part.output_tokens,
        cached_input_tokens=max(total.cached_input_tokens, part.cached_input_tokens),
        cache_write_tokens=max(total.cache_write_tokens, part.cache_write_tokens),
        reasoning_tokens=total.reasoning_tokens + part.reasoning_tokens,
    )
