"""Start `blade serve` for a measurement, and stop it."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import socket
import sys
import time
from collections.abc import AsyncIterator

import aiohttp

BLADE = (sys.executable, "-c", "from blade.cli import main; main()")
START_SECONDS = 600
STOP_SECONDS = 30


@contextlib.asynccontextmanager
async def serving(arguments: str, command: tuple[str, ...] = BLADE) -> AsyncIterator[tuple[str, float]]:
    """Run `blade serve ARGUMENTS` on a free port; gives its URL and the seconds from start to a true /health."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command, "serve", *shlex.split(arguments), "--port", str(port), stdout=sys.stderr
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            await _until_healthy(url, process)
        yield url, time.perf_counter() - started
    finally:
        await _stop(process)


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
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
