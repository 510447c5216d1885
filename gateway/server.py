"""uvicorn runs the process: one listening socket, signals, a bounded drain on SIGTERM. HTTP is `http_server.py`'s."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from gateway.app import GatewayApp
from gateway.background import keep_running
from gateway.http_server import HttpConnection, watch_time
from gateway.settings import Settings

GC_THRESHOLDS = (100_000, 20, 20)


def serve(settings: Settings, listener: socket.socket, *, worker: str) -> int:
    """Serve on `listener` until SIGTERM or SIGINT; return the exit status."""
    HttpConnection.header_bytes_max = settings.header_bytes_max
    HttpConnection.body_bytes_max = settings.request_bytes_max
    HttpConnection.receive_timeout_s = settings.receive_timeout_s
    HttpConnection.client_stall_s = settings.client_stall_s
    HttpConnection.answer_max_s = settings.answer_max_s
    application = GatewayApp(settings, worker=worker)

    def build_connection(*, server_state: ServerState, **_others: Any) -> HttpConnection:
        return HttpConnection(application, server_state.connections, server_state.tasks)

    config = uvicorn.Config(
        application,
        http=build_connection,  # type: ignore[arg-type]
        loop="uvloop",
        ws="none",
        lifespan="on",
        interface="asgi3",
        access_log=False,
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=settings.drain_s,
    )
    server = _Server(config)
    server.run(sockets=[listener])
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """uvicorn's server with the tick that cuts off slow clients, and an end that loses nothing.

    SIGTERM and SIGINT let the calls end that run, for `drain_s` at most; what runs longer is stopped and recorded.
    SIGINT after that stops them now. uvicorn itself would then leave without the application's own shutdown, which
    records them. A second SIGTERM changes nothing: some send it to the supervisor and to its workers, too.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._is_hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal. uvicorn's own would raise it again at the end, and the process would not end with 0."""
        self._is_hurried = self._is_hurried or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What exists now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        # Calls leave almost no cycles behind. Looking for them after each 2,000 new objects, the default, which is
        # each burst of calls, costs a twentieth of a call.
        gc.set_threshold(*GC_THRESHOLDS)
        connections: set[Any] = self.server_state.connections
        self._watcher = asyncio.get_running_loop().create_task(
            keep_running(partial(watch_time, lambda: tuple(connections)))
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._watcher.cancel()

    async def _wait_tasks_to_complete(self) -> None:
        """Return when all have ended; raises TimeoutError when that must not be waited for: then they are cancelled."""
        while self.server_state.connections or self.server_state.tasks:
            if self._is_hurried:
                raise TimeoutError
            await asyncio.sleep(0.05)
