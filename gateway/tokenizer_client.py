"""Asks the process beside this worker that counts tokens (`tokenizer_process.py`): starts it, and starts it again.

A process and not a thread: a thread that counts makes the event loop wait for the interpreter's lock at each of its
callbacks, which costs many times what the count does (deploy/decisions/0020).

One text is at the process at a time, the others wait here. A process that ends is started again, and what it had not
answered is asked once more; a second end while it waits makes a question uncountable. The one that was being answered
goes behind the others, so that a text that ends the process takes no other text with it and every question has an end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from gateway.background import keep_running
from gateway.tokenizer import TokenizerBusyError, TokenizerError, TokenizerUnavailableError

log = logging.getLogger("gateway.tokenizer")

LENGTH_BYTES = 4
# What may wait. Beyond it a call is recorded without our own count.
PENDING_COUNT_MAX = 1024
PENDING_BYTES_MAX = 64 * 1024 * 1024
# Loading the ranks or counting the longest text takes a second. A process that is silent for so long hangs.
ANSWER_MAX_S = 30.0
CRASHES_MAX = 2
RESTART_DELAY_S = 0.1
RESTART_DELAY_MAX_S = 5.0
HEALTHY_AFTER_S = 5.0


class _Question:
    """A message for the process, and who waits for its answer. `crashes`: how often the process ended meanwhile."""

    def __init__(self, message: bytes, answer: asyncio.Future[Any]) -> None:
        self.message = message
        self.answer = answer
        self.crashes = 0

    def fail(self, text: str) -> None:
        """End it without an answer."""
        if not self.answer.done():
            self.answer.set_exception(TokenizerUnavailableError(text))


class TokenizerClient(asyncio.Protocol):
    """The counting process of one event loop. `on_restart` is called whenever it is started again."""

    def __init__(self, on_restart: Callable[[], None]) -> None:
        self._on_restart = on_restart
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()
        self._lost = asyncio.Event()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self._is_ready = False
        # The last start failed, so it is of no use to wait for the next one.
        self._is_broken = False
        self._running: _Question | None = None
        self._waiting: deque[_Question] = deque()
        self._waiting_last: deque[_Question] = deque()
        self._pending_count = 0
        self._pending_bytes = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process and wait until its ranks are loaded; raises TokenizerError where they cannot be.

        It goes on trying: the ranks are looked for at each question, the process is started again for ever.
        """
        self._task = self._loop.create_task(keep_running(self._keep_alive))
        await self._loaded

    async def close(self) -> None:
        """End the process; what still waits gets no count."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._clear_alarm()
        if self._transport is not None:
            self._transport.abort()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._is_broken = True
        for question in (*self._waiting, *self._waiting_last, *([self._running] if self._running else ())):
            question.fail("the process that counts is stopped")

    async def ask(self, function: Callable[..., Any], arguments: tuple[Any, ...], *, can_wait: bool) -> Any:
        """Return `function(*arguments)` as the process computes it; raises what it raises, or TokenizerError."""
        if self._is_broken:
            raise TokenizerUnavailableError("the process that counts does not start")
        message = pickle.dumps((function, arguments))
        size = len(message)
        if self._pending_count >= PENDING_COUNT_MAX or self._pending_bytes + size > PENDING_BYTES_MAX:
            raise TokenizerBusyError(f"{self._pending_count} texts of {self._pending_bytes} bytes are waiting")
        question = _Question(message, self._loop.create_future())
        (self._waiting_last if can_wait else self._waiting).append(question)
        self._pending_count += 1
        self._pending_bytes += size
        try:
            self._send_next()
            return await question.answer
        finally:
            # It may lie in its queue for a while yet where the call was cancelled.
            question.message = b""
            self._pending_count -= 1
            self._pending_bytes -= size

    # Life of the process

    async def _keep_alive(self) -> None:
        delay_s = RESTART_DELAY_S
        while True:
            started_at = self._loop.time()
            self._lost.clear()
            try:
                await self._loop.create_unix_connection(lambda: self, sock=self._start_process())
            except OSError as error:
                self.connection_lost(error)
            await self._lost.wait()
            if self._loop.time() - started_at > HEALTHY_AFTER_S:
                delay_s = RESTART_DELAY_S
            if self._process is not None:
                # It may hang, or have closed its end only.
                self._process.kill()
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RESTART_DELAY_MAX_S)
            status = self._process.poll() if self._process is not None else None
            log.error("the process that counts tokens ended with %s; starting it again", status)
            self._on_restart()

    def _start_process(self) -> socket.socket:
        """Return our end of its socket."""
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway.tokenizer_process", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return ours

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first answer: the ranks are loaded."""
        self._transport = transport  # type: ignore[assignment]
        self._set_alarm()

    def data_received(self, data: bytes) -> None:
        """Gather the only answer that can be on its way."""
        self._received += data
        if len(self._received) < LENGTH_BYTES:
            return
        end = LENGTH_BYTES + int.from_bytes(self._received[:LENGTH_BYTES])
        if len(self._received) < end:
            return
        answer = bytes(self._received[LENGTH_BYTES:end])
        self._received.clear()
        self._take_answer(answer)

    def connection_lost(self, _error: Exception | None) -> None:
        """Count the end against all that wait."""
        self._clear_alarm()
        self._received.clear()
        self._transport = None
        self._is_broken = not self._is_ready
        self._is_ready = False
        if not self._loaded.done():
            self._loaded.set_exception(TokenizerUnavailableError("the process that counts ended while it started"))
        if self._running is not None:
            self._waiting_last.append(self._running)
            self._running = None
        self._waiting = _count_crash(self._waiting)
        self._waiting_last = _count_crash(self._waiting_last)
        self._lost.set()

    # Questions and answers

    def _send_next(self) -> None:
        while self._is_ready and self._running is None and (self._waiting or self._waiting_last):
            question = (self._waiting or self._waiting_last).popleft()
            if question.answer.done():
                continue  # cancelled
            self._running = question
            assert self._transport is not None
            self._transport.writelines((len(question.message).to_bytes(LENGTH_BYTES), question.message))
            self._set_alarm()

    def _take_answer(self, message: bytes) -> None:
        self._clear_alarm()
        try:
            is_failure, value = pickle.loads(message)
        except Exception as error:
            # Some exceptions can be pickled and not be read again.
            is_failure, value = True, TokenizerError(f"an answer cannot be read: {type(error).__name__}")
        future = self._loaded
        if self._running is not None:
            future = self._running.answer
            self._running = None
        self._is_ready = True
        self._is_broken = False
        if not future.done():
            if is_failure:
                future.set_exception(value)
            else:
                future.set_result(value)
        self._send_next()

    def _set_alarm(self) -> None:
        self._alarm = self._loop.call_later(ANSWER_MAX_S, self._give_up)

    def _clear_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _give_up(self) -> None:
        log.error("the process that counts tokens has been silent for %g s", ANSWER_MAX_S)
        if self._transport is not None:
            self._transport.abort()


def _count_crash(waiting: deque[_Question]) -> deque[_Question]:
    """Return those that are asked once more; the others have ended without an answer."""
    remaining: deque[_Question] = deque()
    for question in waiting:
        question.crashes += 1
        if question.crashes < CRASHES_MAX:
            remaining.append(question)
        else:
            question.fail(f"the process that counts ended {CRASHES_MAX} times")
    return remaining


_client: TokenizerClient | None = None


async def start_tokenizer(on_restart: Callable[[], None] = lambda: None) -> None:
    """Start the process that `run_in_tokenizer` asks from now on; raises TokenizerError where it cannot count."""
    global _client
    _client = TokenizerClient(on_restart)
    await _client.start()


async def stop_tokenizer() -> None:
    """End the process."""
    global _client
    if _client is not None:
        client, _client = _client, None
        await client.close()


async def run_in_tokenizer[*Args, R](function: Callable[[*Args], R], *args: *Args, can_wait: bool = False) -> R:
    """Return `function(*args)`, computed in the counting process; raises what it raises, or TokenizerError.

    The function is found there by its name, so it is one of a module; arguments and result are pickled. `can_wait`:
    only when nothing else waits, so that no bill does.
    """
    if _client is None:
        raise TokenizerUnavailableError("no process that counts was started")
    result: R = await _client.ask(function, args, can_wait=can_wait)
    return result
