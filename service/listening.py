"""The sockets, and uvicorn on each of them: the one place that knows uvicorn's server.

There are two listeners over one application, whose lifespan is run once, around both. Each has a socket, a backlog
and a number of connections of its own, so that what fills the public one leaves the operator's alone.
Nothing here may import mlx, directly or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import uvicorn
from uvicorn.lifespan.on import LifespanOn

from service.settings import Settings
from service.settings.tls import tls_context

FLUSH_TIMEOUT = 5
"""Seconds for the last bytes of answers that are finished; readers that are slower are cut."""

OPS_FLUSH_TIMEOUT = 1

OPS_CONNECTIONS = 32

LATE_POLL = 0.1
"""Seconds between two looks for a socket that comes late; as often as uvicorn looks whether it is to exit."""

RESERVED_FILES = 128
"""Of the files that the process may open, those that no public connection gets: weights, database, Redis, logs, and
the operator's connections."""

ASGI = Callable[..., Any]


class Application(Protocol):
    """What is served."""

    @property
    def asgi(self) -> ASGI: ...

    @property
    def operations(self) -> ASGI:
        """The same application, as the operator's listener has it."""

    @property
    def protocol(self) -> type[asyncio.Protocol]:
        """Uvicorn's httptools protocol, with bounds."""


class CannotListen(Exception):
    """An address cannot be had; the message names it and why."""


@dataclass(frozen=True, slots=True)
class Sockets:
    """What the process listens on."""

    public: socket.socket
    ops: socket.socket | None

    def close(self) -> None:
        """Stop listening. Harmless when that was done."""
        for each in (self.public, self.ops):
            if each is not None:
                each.close()


class LateSockets:
    """What the process listens on, each address as soon as it can be had. Any thread."""

    def __init__(self, settings: Settings) -> None:
        server, ops = settings.server, settings.ops.address
        self._wanted = {"public": (server.host, server.port), **({} if ops is None else {"ops": ops})}
        self._backlog = server.backlog
        self._had: dict[str, socket.socket] = {}
        self._lock = threading.Lock()
        self.missing()

    @property
    def public(self) -> socket.socket | None:
        return self._had.get("public")

    @property
    def ops(self) -> socket.socket | None:
        return self._had.get("ops")

    def missing(self) -> str:
        """Try to listen where that was not possible yet: why it still is not, or nothing."""
        why = []
        with self._lock:
            for name in self._wanted.keys() - self._had:
                try:
                    self._had[name] = _listener(self._wanted[name], self._backlog)
                except CannotListen as error:
                    why.append(str(error))
        return "; ".join(sorted(why))

    def close(self) -> None:
        """Stop listening, for good. Harmless when that was done."""
        with self._lock:
            self._wanted = {}
            for each in self._had.values():
                each.close()


def listen(settings: Settings) -> Sockets:
    """Listen on both addresses, or on none. Raises CannotListen."""
    server, ops = settings.server, settings.ops.address
    public = _listener((server.host, server.port), server.backlog)
    try:
        return Sockets(public, None if ops is None else _listener(ops, server.backlog))
    except CannotListen:
        public.close()
        raise


def _listener(wanted: tuple[str, int], backlog: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(*wanted, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(backlog)  # only listening takes the port: two may bind it with SO_REUSEADDR
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise CannotListen(f"cannot listen on {wanted[0]}:{wanted[1]}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


def open_files(wanted: int) -> int:
    """Let the process open `wanted` files, as far as its hard limit goes; returns how many it may open now.

    To be called after mlx-lm was imported, which sets 2048, and for good a hard limit of 4096.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower bound yet, of its kernel
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)


class Server(uvicorn.Server):
    """uvicorn's server on one socket, without its signal handling, which closes the listener first and dies by the
    signal, and without a lifespan: `state` is the application's, to be there when it starts."""

    def __init__(self, config: uvicorn.Config, state: dict[str, Any], *, patience: float) -> None:
        super().__init__(config)
        self._state = state
        self._patience = patience

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but a TLS handshake has `patience` seconds, not a minute."""
        config = self.config
        protocol: Callable[[], asyncio.Protocol] = partial(
            cast("Any", config.http_protocol_class), config, self.server_state, self._state
        )
        self.servers = [
            await asyncio.get_running_loop().create_server(
                protocol,
                sock=listener,
                ssl=config.ssl,
                ssl_handshake_timeout=self._patience if config.ssl else None,
                backlog=config.backlog,
            )
            for listener in sockets or ()
        ]
        self.started = True


class Listeners:
    """An application, served on its sockets. Raises ConfigurationError for a certificate that cannot be used.

    Belongs to the event loop's thread. Takes the sockets over, and raises the limit of open files. A socket that comes
    late is served from then on.
    """

    def __init__(self, settings: Settings, app: Application, sockets: Sockets | LateSockets) -> None:
        self._sockets = sockets
        self._wants_ops = settings.ops.address is not None
        self._state: dict[str, Any] = {}
        most = settings.server.max_connections
        configure = partial(_configure, settings, app.protocol)
        serve = partial(Server, state=self._state, patience=settings.http.head_timeout)
        public = configure(
            app.asgi,
            tls=True,
            connections=max(1, min(most, open_files(most + RESERVED_FILES) - RESERVED_FILES)),
            flush=FLUSH_TIMEOUT,
        )
        # What stays on this machine needs no certificate, and nobody has one for its address.
        ops = configure(
            app.operations, tls=not settings.ops.loopback, connections=OPS_CONNECTIONS, flush=OPS_FLUSH_TIMEOUT
        )
        self._public, self._ops = serve(public), serve(ops)
        self.loop_factory = public.get_loop_factory()

    async def serve(self) -> bool:
        """Answer until `close` is called; False when the application's own start-up failed, which is logged.

        The operator's listener ends last, so that it can tell how the other does.
        """
        lifespan = LifespanOn(self._public.config)
        try:
            await lifespan.startup()
            if lifespan.startup_failed or lifespan.error_occurred:
                return False
            self._state.update(lifespan.state)
            await self._answer()
            await lifespan.shutdown()
        finally:
            self._sockets.close()
        return True

    async def _answer(self) -> None:
        async with asyncio.TaskGroup() as group:
            if self._wants_ops:
                group.create_task(_serve(self._ops, lambda: self._sockets.ops), name="ops-listener")
            try:
                await _serve(self._public, lambda: self._sockets.public)
            finally:
                self._ops.should_exit = True

    @property
    def bound(self) -> bool:
        """Whether every address is had that is wanted."""
        return self._sockets.public is not None and (self._sockets.ops is not None or not self._wants_ops)

    @property
    def closing(self) -> bool:
        return self._public.should_exit

    def close(self) -> None:
        """Begin to end: no new connections, then the last bytes of finished answers, then the lifespan."""
        self._public.should_exit = True


async def _serve(server: Server, find: Callable[[], socket.socket | None]) -> None:
    """Serve on the socket, once there is one, until the server is to exit."""
    while (found := find()) is None:
        if server.should_exit:
            return
        await asyncio.sleep(LATE_POLL)
    await server.serve([found])


def _configure(
    settings: Settings, protocol: type[asyncio.Protocol], asgi: ASGI, *, tls: bool, connections: int, flush: int
) -> uvicorn.Config:
    context = tls_context(settings.server) if tls else None
    return uvicorn.Config(
        asgi,
        interface="asgi3",
        http=protocol,
        ws="none",
        loop="auto",  # uvloop where it is installed
        lifespan="off",  # it is run around both servers
        backlog=settings.server.backlog,
        limit_concurrency=connections,
        timeout_keep_alive=round(settings.http.idle_timeout),
        timeout_graceful_shutdown=flush,
        access_log=False,
        log_config=None,
        log_level="warning",  # its milestones are ours too, and better told
        server_header=False,
        proxy_headers=False,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
    )
