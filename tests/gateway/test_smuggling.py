"""A corpus of requests that two parsers may read differently: the upstream, which counts, sees one call or none.

Each case is what goes to the gateway, how many answers come back, and how many calls reach the upstream. A hidden
request would be a second one: it carries the words `smuggled call`, which no upstream must ever see.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fakes.gateway_stack import MODEL, read_events, wait_for_events
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer, build_chat_body
from tests.gateway.conftest import Stack

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "plain call"}]}).encode()
HIDDEN_BODY = BODY.replace(b"plain call", b"smuggled call")
ANSWER = build_answer(build_chat_body(["fine"], input_tokens=12, output_tokens=2))
SIZE = b"%x" % len(BODY)
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"
ONE_CHUNK = b"%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)


@dataclass
class Wire:
    """A raw connection to the gateway of a stack, and its upstream."""

    stack: Stack
    upstream: ScriptedUpstream

    @property
    def start(self) -> bytes:
        """Request line, host and key of a call."""
        return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + self.authorization

    @property
    def authorization(self) -> bytes:
        """The header with the key."""
        return b"authorization: Bearer %b\r\n" % self.stack.api_key.encode()

    @property
    def hidden(self) -> bytes:
        """A whole request that must not be found inside another."""
        return self.start + b"content-length: %d\r\n\r\n%b" % (len(HIDDEN_BODY), HIDDEN_BODY)

    def send(self, data: bytes) -> bytes:
        """Send bytes and return all that comes back until the gateway closes, or has nothing more to say."""
        with socket.create_connection(("127.0.0.1", self.stack.gateway.port), timeout=3) as connection:
            received = b""
            try:
                connection.sendall(data)
                while chunk := connection.recv(65536):
                    received += chunk
                    connection.settimeout(0.3)
            except (ConnectionResetError, BrokenPipeError, TimeoutError):
                pass
            return received


@pytest.fixture
def wire(stack: Stack) -> Iterator[Wire]:
    upstream = ScriptedUpstream(lambda _request: [ANSWER])
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, upstream.url + "/v1", kind="openai_compatible")
    stack.publish()
    yield Wire(stack, upstream)
    upstream.close()


def list_statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def check(wire: Wire, answer: bytes, *, calls: int) -> None:
    """Check that the upstream saw `calls` plain calls and no other, and that each is recorded."""
    assert len(wire.upstream.requests) == calls, answer
    assert all(request.count(b"POST ") == 1 and b"smuggled" not in request for request in wire.upstream.requests)
    assert len(wait_for_events(wire.stack.redis, calls)) == calls


# Heads that must be refused, whatever stands behind them.
REFUSED_HEADS = {
    "length and chunks": LENGTH + CHUNKED,
    "chunks and length": CHUNKED + LENGTH,
    "two lengths": b"content-length: 3\r\n" + LENGTH,
    "the same length twice": LENGTH + LENGTH,
    "a list of lengths": b"content-length: %d, %d\r\n" % (len(BODY), len(BODY)),
    "length with a sign": b"content-length: +%d\r\n" % len(BODY),
    "negative length": b"content-length: -1\r\n",
    "hexadecimal length": b"content-length: 0x%b\r\n" % SIZE,
    "length with an underscore": b"content-length: 1_0\r\n",
    "length in other digits": "content-length: ١٢\r\n".encode(),
    "length beyond 64 bits": b"content-length: 18446744073709551617\r\n",
    "length of a thousand digits": b"content-length: " + b"9" * 1_000 + b"\r\n",
    "length with inner blanks": b"content-length: 1 0\r\n",
    "empty length": b"content-length: \r\n",
    "blank before the colon": b"content-length : %d\r\n" % len(BODY),
    "tab before the colon": b"transfer-encoding\t: chunked\r\n",
    "folded length": b"content-length:\r\n %d\r\n" % len(BODY),
    "folded coding": b"transfer-encoding:\r\n chunked\r\n",
    "folded other header": b"x-a: b\r\n " + CHUNKED + LENGTH,
    "coding that is not the last": b"transfer-encoding: chunked, identity\r\n",
    "coding twice": b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
    "unknown coding": b"transfer-encoding: xchunked\r\n",
    "quoted coding": b'transfer-encoding: "chunked"\r\n',
    "coding with a control character": b"transfer-encoding: \x0bchunked\r\n",
    "coding with a NUL": b"transfer-encoding: chunked\x00\r\n",
    "name with a NUL": b"x\x00y: 1\r\n" + LENGTH,
    "name with a blank": b"x y: 1\r\n" + LENGTH,
    "empty name": b": 1\r\n" + LENGTH,
    "no colon": b"x-nothing\r\n" + LENGTH,
    "bare CR in a value": b"x: a\rtransfer-encoding: chunked\r\n" + LENGTH,
    "bare CR as a line end": b"x: a\r" + CHUNKED + LENGTH,
    "bare LF as a line end": b"x: a\n" + CHUNKED + LENGTH,
    "NUL in a value": b"x: a\x00b\r\n" + LENGTH,
    "folded first line": b" x: a\r\n" + LENGTH,
}


@pytest.mark.parametrize("head", REFUSED_HEADS.values(), ids=REFUSED_HEADS)
def test_a_head_that_can_be_read_in_two_ways_is_refused(wire: Wire, head: bytes) -> None:
    answer = wire.send(wire.start + head + b"\r\n" + BODY + wire.hidden)
    assert list_statuses(answer) == [400], answer
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    check(wire, answer, calls=0)


REFUSED_CHUNKS = {
    "size that is no number": b"zz\r\n",
    "size with a sign": b"+%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "size with 0x": b"0x%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "size beyond 64 bits": b"1" + b"0" * 16 + b"%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "size that wraps around": b"f" * 17 + b"\r\n" + BODY,
    "size with a blank before": b" %b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "chunk longer than its size": b"%b\r\n%bxx\r\n0\r\n\r\n" % (SIZE, BODY),
    "chunk shorter than its size": b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY) + 1, BODY),
    "bare LF after a size": b"%b\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "bare CR after a size": b"%b\r%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "bare LF after a chunk": b"%b\r\n%b\n0\r\n\r\n" % (SIZE, BODY),
    "LF inside an extension": b"%b;a\n=b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "NUL after a size": b"%b\x00\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "trailer without a colon": b"%b\r\n%b\r\n0\r\nx\r\n\r\n" % (SIZE, BODY),
    "empty size": b"\r\n%b\r\n0\r\n\r\n" % BODY,
    "trailer with a length": b"%b\r\n%b\r\n0\r\ncontent-length: 5\r\n\r\n" % (SIZE, BODY),
    "never ended": b"%b\r\n%b\r\n" % (SIZE, BODY),
}


@pytest.mark.parametrize("chunks", REFUSED_CHUNKS.values(), ids=REFUSED_CHUNKS)
def test_bad_chunks_reach_no_upstream(wire: Wire, chunks: bytes) -> None:
    answer = wire.send(wire.start + CHUNKED + b"\r\n" + chunks + b"\r\n" + wire.hidden)
    assert list_statuses(answer) in ([400], [408], []), answer
    check(wire, answer, calls=0)


ONE_CALL = {
    "chunk extensions": CHUNKED + b'\r\n%b;a=b;c="d"\r\n%b\r\n0;e\r\n\r\n' % (SIZE, BODY),
    "size with zeros": CHUNKED + b"\r\n000000%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
    "coding in capitals": b"Transfer-Encoding: CHUNKED\r\n\r\n" + ONE_CHUNK,
    "trailers that look like headers": CHUNKED
    + b"\r\n%b\r\n%b\r\n0\r\nauthorization: x\r\nidempotency-key: x\r\ntraceparent: x\r\n\r\n" % (SIZE, BODY),
    "blanks around the length": b"content-length: \t %d \t\r\n\r\n%b" % (len(BODY), BODY),
    "upgrade to another protocol": b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n" + LENGTH + b"\r\n" + BODY,
    "connection options that name a length": b"connection: content-length\r\n" + LENGTH + b"\r\n" + BODY,
    "an empty line before": b"",
}


@pytest.mark.parametrize("rest", ONE_CALL.values(), ids=ONE_CALL)
def test_an_odd_call_is_one_call(wire: Wire, rest: bytes) -> None:
    data = wire.start + rest if rest else b"\r\n" + wire.start + LENGTH + b"\r\n" + BODY
    answer = wire.send(data)
    assert list_statuses(answer) == [200], answer
    check(wire, answer, calls=1)
    sent = wire.upstream.requests[0].lower()
    assert sent.count(b"content-length:") == 1
    assert b"transfer-encoding" not in sent
    assert b"upgrade" not in sent


REQUEST_LINES = {
    "HTTP/0.9": (b"POST /v1/chat/completions\r\n", 400),
    "no version": (b"POST /v1/chat/completions \r\n", 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", 400),
    "version 1.2": (b"POST /v1/chat/completions HTTP/1.2\r\n", 400),
    "version with a blank": (b"POST /v1/chat/completions HTTP/ 1.1\r\n", 400),
    "unknown method": (b"SMUGGLE /v1/chat/completions HTTP/1.1\r\n", 400),
    "method in lower case": (b"post /v1/chat/completions HTTP/1.1\r\n", 400),
    "tunnel": (b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n", 404),
    "control character in the target": (b"POST /v1/chat/completions\x01 HTTP/1.1\r\n", 400),
    "dot segments": (b"POST /v1/x/../chat/completions HTTP/1.1\r\n", 404),
    "encoded slash": (b"POST /v1/chat%2Fcompletions%00 HTTP/1.1\r\n", 404),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\n", 404),
}


@pytest.mark.parametrize(("line", "status"), REQUEST_LINES.values(), ids=REQUEST_LINES)
def test_an_odd_request_line_reaches_no_upstream(wire: Wire, line: bytes, status: int) -> None:
    answer = wire.send(line + b"host: x\r\n" + wire.authorization + LENGTH + b"\r\n" + BODY)
    assert list_statuses(answer) == [status], answer
    check(wire, answer, calls=0)


def test_an_absolute_target_is_served_here_and_nowhere_else(wire: Wire) -> None:
    start = wire.start.replace(b"POST /v1", b"POST http://169.254.169.254/v1")
    answer = wire.send(start + LENGTH + b"\r\n" + BODY)
    assert list_statuses(answer) == [200]
    check(wire, answer, calls=1)
    assert wire.upstream.requests[0].startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:")


@pytest.mark.parametrize("line", [b"connection: close\r\n", b""], ids=["HTTP/1.1 close", "HTTP/1.0"])
def test_nothing_is_served_behind_the_last_request_of_a_connection(wire: Wire, line: bytes) -> None:
    start = wire.start if line else wire.start.replace(b"HTTP/1.1", b"HTTP/1.0")
    answer = wire.send(start + line + LENGTH + b"\r\n" + BODY + wire.hidden)
    assert list_statuses(answer) == [200]
    check(wire, answer, calls=1)


def test_the_body_of_a_refused_request_is_never_a_request(wire: Wire) -> None:
    for path, status in ((b"/v1/unknown", 404), (b"/v1/models", 405)):
        inner = wire.hidden
        head = b"POST %b HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n" % (path, wire.authorization, len(inner))
        assert list_statuses(wire.send(head + inner)) == [status]
        # Nor when it comes late.
        with socket.create_connection(("127.0.0.1", wire.stack.gateway.port), timeout=5) as connection:
            connection.sendall(head)
            received = connection.recv(65536)
            connection.sendall(inner)
            while chunk := connection.recv(65536):
                received += chunk
            assert list_statuses(received) == [status]
    # A key that is not accepted is refused before its body is read.
    bad = wire.start.replace(wire.stack.api_key.encode(), b"sk-tb-no-such-key")
    assert list_statuses(wire.send(bad + b"content-length: %d\r\n\r\n%b" % (len(wire.hidden), wire.hidden))) == [401]
    check(wire, b"", calls=0)


def test_pipelined_calls_are_one_each_in_order(wire: Wire) -> None:
    whole = wire.start + LENGTH + b"\r\n" + BODY
    answer = wire.send(whole * 3)
    assert list_statuses(answer) == [200, 200, 200]
    check(wire, answer, calls=3)


def test_offers_of_another_protocol_are_not_taken_and_cost_nothing(wire: Wire) -> None:
    """As Java's own client makes them with each request: the body is the call's, and the connection goes on."""
    offer = b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\nupgrade: h2c\r\n"
    whole = wire.start + offer + LENGTH + b"\r\n" + BODY
    answer = wire.send(whole + wire.start + offer + CHUNKED + b"\r\n" + ONE_CHUNK + whole)
    assert list_statuses(answer) == [200, 200, 200]
    check(wire, answer, calls=3)


def test_a_pipelined_request_that_is_broken_ends_the_connection_after_the_answers_before_it(wire: Wire) -> None:
    whole = wire.start + LENGTH + b"\r\n" + BODY
    answer = wire.send(whole + wire.start + LENGTH + CHUNKED + b"\r\n" + BODY + wire.hidden)
    assert list_statuses(answer) == [200, 400]
    check(wire, answer, calls=1)


def test_a_client_cannot_write_into_the_upstreams_head(wire: Wire) -> None:
    """What is forwarded of the client's headers, and the model's name, are data and stay data."""
    body = BODY[:-1] + b', "user": "a\\r\\nx-evil: 1"}'
    forwarded = (
        b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\ntracestate: a=b\r\ncookie: c=d\r\n"
    )
    answer = wire.send(wire.start + forwarded + b"content-length: %d\r\n\r\n%b" % (len(body), body))
    assert list_statuses(answer) == [200]
    head = wire.upstream.requests[0].partition(b"\r\n\r\n")[0]
    names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
    assert sorted(names) == [
        b"content-length",
        b"content-type",
        b"host",
        b"traceparent",
        b"tracestate",
        b"x-request-id",
    ]
    (event,) = read_events(wire.stack.redis)
    assert event.labels == {"user": "a\r\nx-evil: 1"}
