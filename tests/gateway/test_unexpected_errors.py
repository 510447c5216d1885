"""An error that nobody foresaw is logged and answered: no client waits for an answer that never comes."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gateway.app import GatewayApp, Route
from gateway.exchange import Exchange
from gateway.idempotency import RecordingExchange
from gateway.settings import Settings

pytestmark = pytest.mark.sources


class FakeConnection:
    """What an exchange writes to."""

    date_line = b""
    is_stopping = False

    def __init__(self) -> None:
        self.sent = b""
        self.was_aborted = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def finish(self, _exchange: Exchange, data: bytes) -> None:
        self.sent += data

    def abort(self) -> None:
        self.was_aborted = True


async def forget(_answer: RecordingExchange, _status: int, _headers: object) -> None:
    """Store nothing."""


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("has_started", [False, True])
def test_an_unexpected_error_ends_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_started: bool, is_recorded: bool
) -> None:
    async def fail(exchange: Exchange) -> None:
        if is_recorded:
            exchange = RecordingExchange(exchange, bytes_max=1_000, store=forget)
        if has_started:
            exchange.start_stream(())
        raise TypeError("nobody foresaw this")

    connection: Any = FakeConnection()
    exchange = Exchange(connection, "POST", "/v1/chat/completions", {})
    exchange.route = Route("POST", fail, is_public=True)
    app = GatewayApp(Settings(redis_url="redis://127.0.0.1:1", api_key_pepper=b"p" * 16, data_dir=tmp_path))
    with caplog.at_level(logging.ERROR, logger="gateway"):
        asyncio.run(app.serve(exchange))
    assert "nobody foresaw this" in caplog.text
    assert connection.was_aborted is has_started
    if has_started:
        assert connection.sent.count(b"HTTP/1.1 ") == 1
    else:
        head, _, body = connection.sent.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 500 ")
        assert json.loads(body)["error"]["code"] == "internal_error"
