"""Start a server for a measurement, and stop it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

BLADE = (sys.executable, "-c", "from blade.cli import main; main()")
START_SECONDS = 600
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """One that runs, the leader of a process group of its own. `start_seconds`: from its start to a true /health."""

    url: str
    group: int
    start_seconds: float

    def freeze(self) -> None:
        """Take it off the processors until `thaw`."""
        os.killpg(self.group, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.group, signal.SIGCONT)


@contextlib.asynccontextmanager
async def serving(arguments: str, command: tuple[str, ...] = BLADE) -> AsyncIterator[tuple[str, float]]:
    """Run `blade serve ARGUMENTS` on a free port; gives its URL and the seconds from start to a true /health."""
    async with running([*command, "serve", *shlex.split(arguments), "--port", "{port}"]) as server:
        yield server.url, server.start_seconds


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str], env: Mapping[str, str] | None = None, log: Path | None = None
) -> AsyncIterator[Server]:
    """Run any server that answers /health, with "{port}" in its command replaced by a free one.

    `env` is added to ours; what it prints goes to `log`, or else to standard error. SystemExit when it does not start.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    with log.open("wb") if log else contextlib.nullcontext(sys.stderr) as out:
        process = await asyncio.create_subprocess_exec(
            *(word.replace("{port}", str(port)) for word in command),
            env=os.environ | dict(env or {}),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(START_SECONDS):
            await _until_healthy(url, process)
        yield Server(url, process.pid, time.perf_counter() - started)
    finally:
        await _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _until_healthy(url: str, process: asyncio.subprocess.Process) -> None:
    async with aiohttp.ClientSession() as session:
        while process.returncode is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.02)
    raise SystemExit(f"The server has ended with exit status {process.returncode}.")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    os.killpg(process.pid, signal.SIGCONT)  # a frozen process would not see the other signal
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
