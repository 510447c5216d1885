"""One pipelined connection to the Redis-protocol server: all commands of a loop tick go out in one write.

hiredis packs commands and parses replies; this file only batches, matches replies to commands in order,
reconnects, and notices a server that does not answer. RESP3, so that pushes arrive on the same connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

import hiredis

from gateway.background import keep_running
from gateway.errors import RedisReplyError, RedisUnavailableError

log = logging.getLogger("gateway.redis")

RECONNECT_DELAY_MIN_S = 0.02
RECONNECT_DELAY_MAX_S = 0.5
HEALTH_TICK_S = 0.1
CONNECT_TIMEOUT_S = 2.0
_NOT_ENOUGH: Final = object()
# Lengths of arguments below it have their lines made once.
LENGTHS_USUAL: Final = 1024
_LENGTH_LINES: Final = [b"$%d\r\n" % length for length in range(LENGTHS_USUAL)]

Argument = bytes | str | int
# What a command's owner gets: the reply, or a RedisReplyError, or a RedisUnavailableError.
OnReply = Callable[[Any], None]


class ConnectionListener(Protocol):
    """Told when the connection is usable and when it is lost; of a cluster, when one of its masters is."""

    def on_redis_up(self) -> None:
        """Called after the handshake and the loading of scripts, before anyone else can send."""

    def on_redis_down(self) -> None:
        """Called after the owners of all unanswered commands were told. `is_up_for` says for which keys."""


class Script:
    """A Lua script of `gateway/scripts/`, called by its digest and loaded on each connect."""

    def __init__(self, name: str) -> None:
        self.source = (Path(__file__).parent / "scripts" / f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest().encode()


class RedisConnection(asyncio.Protocol):
    """A self-healing connection. Not thread-safe: one event loop owns it."""

    def __init__(self, url: str, *, timeout_s: float, scripts: tuple[Script, ...] = ()) -> None:
        self.is_up = False
        # By then every process that lives has connected again to a server that is back.
        self.reconnect_s_max = CONNECT_TIMEOUT_S + RECONNECT_DELAY_MAX_S
        self._url = urlsplit(url)
        self._timeout_s = timeout_s
        self._scripts = scripts
        self._listeners: list[ConnectionListener] = []
        self._on_push: Callable[[list[Any]], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH)
        self._waiting: deque[OnReply] = deque()
        self._outgoing: list[bytes] = []
        self._progress_at = 0.0
        self._lost = asyncio.Event()
        self._came_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def is_partly_up(self) -> bool:
        """Whether commands for some keys can be sent, and for others not."""
        return False

    def is_up_for(self, key: str) -> bool:
        """Return whether commands for `key`, and for all with its hash tag, can be sent now."""
        return self.is_up

    def add_listener(self, listener: ConnectionListener) -> None:
        """Have `listener` told of ups and downs, in the order of registration."""
        self._listeners.append(listener)

    def set_push_handler(self, on_push: Callable[[list[Any]], None]) -> None:
        """Have `on_push` called with each RESP3 push, e.g. `[b"message", channel, data]`."""
        self._on_push = on_push

    def start(self) -> None:
        """Begin to connect, and to reconnect for ever."""
        self._task = self._loop.create_task(keep_running(self._keep_connected))

    async def wait_up(self, timeout_s: float) -> bool:
        """Return whether the connection came up within `timeout_s`."""
        try:
            await asyncio.wait_for(self._came_up.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop reconnecting and close."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._transport is not None:
            self._transport.abort()
        self._drop()

    def send(self, command: tuple[Argument, ...], on_reply: OnReply) -> None:
        """Queue `command`; `on_reply` gets the reply or an error object. Fails at once when down."""
        if not self.is_up:
            on_reply(RedisUnavailableError("not connected to the Redis-protocol server"))
            return
        self._queue(pack_command(command), on_reply)

    def send_packed(self, command: bytes, on_reply: OnReply) -> None:
        """As `send`, for a command that `build_command_head` and `pack_arguments` have made."""
        if not self.is_up:
            on_reply(RedisUnavailableError("not connected to the Redis-protocol server"))
            return
        self._queue(command, on_reply)

    def call_packed(self, command: bytes) -> asyncio.Future[Any]:
        """As `call`, for a packed command."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self.send_packed(command, partial(_resolve, future))
        return future

    def call(self, *command: Argument) -> asyncio.Future[Any]:
        """Return a future of the reply to `command`; it raises RedisReplyError or RedisUnavailableError."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self.send(command, partial(_resolve, future))
        return future

    def call_script(self, script: Script, keys: tuple[Argument, ...], *arguments: Argument) -> asyncio.Future[Any]:
        """Return a future of the script's reply; it raises as `call` does."""
        return self.call(b"EVALSHA", script.sha, len(keys), *keys, *arguments)

    def break_connection(self) -> None:
        """Drop the connection, so that everything unanswered is decided anew after a reconnect."""
        if self._transport is not None:
            self._transport.abort()

    def _queue(self, command: bytes, on_reply: OnReply) -> None:
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        if not self._waiting:
            self._progress_at = self._loop.time()
        self._outgoing.append(command)
        self._waiting.append(on_reply)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._transport is not None:
            self._transport.write(b"".join(outgoing))

    async def _keep_connected(self) -> None:
        delay_s = RECONNECT_DELAY_MIN_S
        while True:
            try:
                await asyncio.wait_for(self._connect(), CONNECT_TIMEOUT_S)
                delay_s = RECONNECT_DELAY_MIN_S
                await self._watch()
            except (OSError, TimeoutError, RedisReplyError, RedisUnavailableError) as error:
                log.debug("cannot reach the Redis-protocol server: %s", error)
            finally:
                self.break_connection()
                self._drop()
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RECONNECT_DELAY_MAX_S)

    async def _connect(self) -> None:
        self._reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH)
        self._outgoing = []
        self._lost = asyncio.Event()
        url = self._url
        if url.scheme == "unix":
            await self._loop.create_unix_connection(lambda: self, url.path)
        else:
            tls = ssl.create_default_context() if url.scheme == "rediss" else None
            await self._loop.create_connection(lambda: self, url.hostname or "127.0.0.1", url.port or 6379, ssl=tls)
        hello: tuple[Argument, ...] = (b"HELLO", b"3")
        if url.password:
            hello += (b"AUTH", unquote(url.username or "default"), unquote(url.password))
        database = url.path.strip("/") if url.scheme != "unix" else ""
        handshake: list[tuple[Argument, ...]] = [hello, (b"CLIENT", b"SETNAME", b"tollbook-gateway")]
        if database:
            handshake.append((b"SELECT", database))
        handshake += [(b"SCRIPT", b"LOAD", script.source) for script in self._scripts]
        futures = []
        for command in handshake:
            future: asyncio.Future[Any] = self._loop.create_future()
            self._queue(pack_command(command), partial(_resolve, future))
            futures.append(future)
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        self.is_up = True
        self._came_up.set()
        log.info("connected to the Redis-protocol server")
        for listener in self._listeners:
            listener.on_redis_up()

    async def _watch(self) -> None:
        """Return when the connection is lost; abort it when nothing is answered in time."""
        while not self._lost.is_set():
            await asyncio.sleep(HEALTH_TICK_S)
            if self._waiting and self._loop.time() - self._progress_at > self._timeout_s:
                log.warning("the Redis-protocol server does not answer; reconnecting")
                return
        log.warning("lost the connection to the Redis-protocol server")

    def _drop(self) -> None:
        """Tell the owners of unanswered commands, then the listeners, once for each loss."""
        was_up, self.is_up = self.is_up, False
        self._transport = None
        self._outgoing = []
        waiting, self._waiting = self._waiting, deque()
        for on_reply in waiting:
            on_reply(RedisUnavailableError("lost the connection to the Redis-protocol server"))
        if was_up:
            for listener in self._listeners:
                listener.on_redis_down()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()
        self._drop()

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        waiting = self._waiting
        self._progress_at = self._loop.time()
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NOT_ENOUGH:
                if reply.__class__ is hiredis.PushNotification:
                    if waiting and reply[0] == b"subscribe":  # a push, and the reply to its command too
                        waiting.popleft()(reply)
                    if self._on_push is not None:
                        self._on_push(reply)
                elif reply.__class__ is hiredis.ReplyError:
                    if waiting:
                        waiting.popleft()(RedisReplyError(str(reply)))
                    if str(reply).startswith("NOSCRIPT"):
                        # The server has lost its scripts: a new connection begins with loading them.
                        self.break_connection()
                else:
                    waiting.popleft()(reply)
        except hiredis.ProtocolError:
            log.exception("malformed reply from the Redis-protocol server")
            self.break_connection()


def pack_command(command: tuple[Argument, ...]) -> bytes:
    """Return the bytes of a command."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


def build_command_head(script: Script, keys: Sequence[str], *arguments: Argument, keys_more: int, more: int) -> bytes:
    """Return the bytes of an EVALSHA up to where `more` arguments follow, of which the first `keys_more` are keys.

    Most of a script's call is the same each time: who calls and what the limits are. It is packed once.
    """
    parts = (b"EVALSHA", script.sha, len(keys) + keys_more, *keys, *arguments)
    return b"*%d\r\n" % (len(parts) + more) + pack_arguments(*parts)


def pack_arguments(*arguments: Argument) -> bytes:
    """Return the bytes of some of a command's arguments.

    Two of these are packed for each call: like this in half the time that hiredis takes for them.
    """
    pieces: list[bytes] = []
    for argument in arguments:
        if isinstance(argument, bytes):
            data = argument
        elif isinstance(argument, str):
            data = argument.encode()
        else:
            data = str(argument).encode()
        length = len(data)
        pieces.append(_LENGTH_LINES[length] if length < LENGTHS_USUAL else b"$%d\r\n" % length)
        pieces.append(data)
        pieces.append(b"\r\n")
    return b"".join(pieces)


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    """Give `reply`, which may be an error object, to a future whose owner may have gone."""
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
