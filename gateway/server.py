"""uvicorn around the application: httptools, uvloop, one listening socket, and a bounded drain on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import socket

import uvicorn

from gateway.app import GatewayApp
from gateway.exchange import GatewayHttpProtocol, watch_receiving
from gateway.settings import Settings

KEEP_ALIVE_S = 75


def serve(settings: Settings, listener: socket.socket, *, worker: str) -> int:
    """Serve on `listener` until SIGTERM; return the exit status."""
    GatewayHttpProtocol.header_bytes_max = settings.header_bytes_max
    GatewayHttpProtocol.receive_timeout_s = settings.receive_timeout_s
    config = uvicorn.Config(
        GatewayApp(settings, worker=worker),
        http=GatewayHttpProtocol,
        loop="uvloop",
        ws="none",
        lifespan="on",
        interface="asgi3",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
    )
    server = _Server(config)
    server.run(sockets=[listener])
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """uvicorn's server with the tick that cuts off clients which never finish a request."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What exists now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        self._watcher = asyncio.get_running_loop().create_task(
            watch_receiving(lambda: tuple(self.server_state.connections))
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.cancel()
        await super().shutdown(sockets)
