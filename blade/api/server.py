"""granian inside our own event loop: where to listen, for how long to drain, and what granian leaves open."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blade.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from granian.server.embed import Server

    from blade.api.app import App
    from blade.config import ServerOptions

BACKLOG = 4096
HEADER_BYTES = 32 << 10  # of granian's read buffer: about twice this passes; it would take 400 KiB
HEADER_SECONDS = 30  # for a request's head to arrive; also how long an idle connection is kept
START_SECONDS = 10.0
LAST_CHUNK_SECONDS = 2.0  # after the drain's deadline, for the last chunks to go out


@dataclass(slots=True, frozen=True)
class Address:
    """Where the server will listen. The socket holds the port, without listening, until granian has it."""

    host: str  # an IP address
    port: int
    holder: socket.socket

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def reserve(options: ServerOptions, has_key: bool) -> Address:
    """Claim host and port before anything slow is loaded; port 0 chooses a free one. Raises ConfigError."""
    family, host = _resolve(options.host)
    if not (ipaddress.ip_address(host).is_loopback or has_key or options.insecure):
        raise ConfigError(
            f"{options.host} can be reached from other machines and there is no API key.",
            "Set --api-key-file or BLADE_API_KEY, or pass --insecure if everybody may use the server.",
        )
    _probe(family, host, options.port)
    holder = socket.socket(family, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _bind(holder, host, options.port)
    return Address(host, holder.getsockname()[1], holder)


async def serve_http(
    app: App,
    options: ServerOptions,
    address: Address,
    stop: asyncio.Event,
    abort_all: Callable[[], None],
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until `stop` is set, then drain: no new connections, running requests have `drain_seconds` to end; after
    that `abort_all` has to end them, and soon this returns whatever they do. `ready` is called once connections are
    taken. Signals are the caller's. Raises ConfigError when the port was taken meanwhile."""
    _probe(socket.AF_INET6 if ":" in address.host else socket.AF_INET, address.host, address.port)
    server = _granian(app, options, address)
    serving = asyncio.create_task(server.serve())
    stopping = asyncio.create_task(stop.wait())
    try:
        await _listening(serving, address)
        ready()
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            raise RuntimeError("the HTTP server has ended by itself")
    finally:
        stopping.cancel()
        server.stop()  # type: ignore[no-untyped-call]
        await _drain(serving, options.drain_seconds, abort_all)
        address.holder.close()


async def _drain(serving: asyncio.Task[None], seconds: float, abort_all: Callable[[], None]) -> None:
    done, _ = await asyncio.wait({serving}, timeout=seconds)
    if not done:
        abort_all()
        done, _ = await asyncio.wait({serving}, timeout=LAST_CHUNK_SECONDS)
    if not done:  # a client that does not read, or a handler that does not end
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


def _granian(app: App, options: ServerOptions, address: Address) -> Server:
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.log import LogLevels
    from granian.server.embed import Server

    return Server(
        app,
        address=address.host,
        port=address.port,
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,  # with "auto" a connection that sends no byte is never closed
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_SECONDS * 1000, max_buffer_size=HEADER_BYTES),
        websockets=False,
        backlog=BACKLOG,
        backpressure=options.max_connections,  # granian's word for the most connections; it defaults to the backlog
        log_level=LogLevels.error,
        # granian configures logging by itself; "incremental" keeps its hands off the handlers there are.
        log_dictconfig={"incremental": True, "formatters": {}, "handlers": {}, "loggers": {"_granian": {}}},
    )


async def _listening(serving: asyncio.Task[None], address: Address) -> None:
    """Wait until a connection is taken: granian binds in a thread of its own and does not say when."""
    async with asyncio.timeout(START_SECONDS):
        while not serving.done():
            try:
                _, writer = await asyncio.open_connection(address.host, address.port)
            except OSError:
                await asyncio.sleep(0.005)
            else:
                writer.close()
                return


def _resolve(host: str) -> tuple[socket.AddressFamily, str]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"The host {host!r} is unknown.", "Pass --host an address of this machine.") from None
    return family, str(address[0])


def _probe(family: socket.AddressFamily, host: str, port: int) -> None:
    """Raises ConfigError when somebody listens there. granian sets SO_REUSEPORT, with which two servers would share
    a port without a word; a plain socket is refused."""
    with socket.socket(family, socket.SOCK_STREAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only against connections in TIME_WAIT
        _bind(plain, host, port)


def _bind(plain: socket.socket, host: str, port: int) -> None:
    try:
        plain.bind((host, port))
    except OverflowError:
        raise ConfigError(f"The port {port} is not in [0, 65535].", "Pass another one: --port.") from None
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "is in use by another program",
            errno.EACCES: "needs the rights of an administrator",
            errno.EADDRNOTAVAIL: "is on an address this machine does not have (--host)",
        }.get(error.errno or 0, "cannot be used")
        raise ConfigError(f"Port {port} on {host} {reason}.", "Pass another one: --port.") from None
