"""The API layer over fakes behind a real uvicorn, configured as `serve` configures it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from service.api.errors import ErrorRenderer
from service.api.protocol import Policy, bounded_protocol
from tests.fakes_api import Service


class _Server(uvicorn.Server):
    """Sees within milliseconds that it is to exit; uvicorn's own looks ten times a second."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)


def _server(service: Service) -> uvicorn.Server:
    policy = Policy(
        limits=service.settings.http,
        errors=ErrorRenderer(lambda: 0.0),
        metrics=service.metrics,
        new_id=lambda: "refused",
    )
    config = uvicorn.Config(
        service.app,
        http=bounded_protocol(policy),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=1,
        timeout_graceful_shutdown=1,
    )
    service.server = _Server(config)
    return service.server


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[int]:
    """A real server in this event loop; gives its port."""
    server = _server(service)
    with _listener() as listener:
        task = asyncio.ensure_future(server._serve(sockets=[listener]))
        try:
            while not server.started:
                await asyncio.sleep(0)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


@contextmanager
def serving_in_thread(service: Service) -> Iterator[str]:
    """A real server with a loop of its own, for synchronous clients; gives its URL."""
    server = _server(service)
    with _listener() as listener:

        async def run() -> None:
            service.loop = asyncio.get_running_loop()
            await server._serve(sockets=[listener])

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
