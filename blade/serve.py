"""`blade serve`: the composition root, the only file that knows everyone."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from blade import __version__, logs
from blade.api.adapters import AdapterTable
from blade.api.app import App
from blade.api.context import ServerContext
from blade.api.routes import ROUTES
from blade.api.server import Address, reserve, serve_http
from blade.assembly import build_engine, check_shapes, choose, load_draft, load_model, load_text, make_adapters
from blade.banner import command_line, describe, ready
from blade.checkpoint.progress import console_progress
from blade.engine.memory import size
from blade.errors import ConfigError
from blade.plugins import Plugins, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from blade.assembly import Assembly
    from blade.config import Config
    from blade.engine.engine import Engine
    from blade.engine.memory import MemoryPlan
    from blade.nn.lora import Adapters
    from blade.text.chat_template import ChatTemplate
    from blade.text.tokenizer import HFTokenizer

log = logging.getLogger("blade.serve")

SWITCH_SECONDS = 0.0005  # how long a thread may hold the interpreter while another waits; Python's own is 5 ms


def link_torch() -> None:
    """Have the dynamic linker load torch's libraries, a third of a second, in a thread; torch's import finds them.

    It goes around CDLL, which would hold the interpreter meanwhile before Python 3.12. The linker serves one thread at
    a time, so this should come when the other libraries that a start needs, those under this module, are in. Whatever
    fails here will be said by the import.
    """
    spec = importlib.util.find_spec("torch")
    dlopen = getattr(ctypes.CDLL(None), "dlopen", None)
    if dlopen is not None and spec is not None and spec.origin is not None:
        dlopen.restype = ctypes.c_void_p
        library = Path(spec.origin).parent / "lib" / "libtorch_python.so"
        # No daemon, so that an exit waits: the libraries' constructors must not meet their destructors.
        threading.Thread(target=dlopen, args=(os.fsencode(library), os.RTLD_NOW)).start()


def dry_run(config: Config) -> None:
    """Print what `run` would do with this config, without loading weights. What it reads beside them is read, so that
    a folder that is not sound is told of."""
    assembly = choose(config, load(config.plugins))
    adapters = make_adapters(assembly)
    check_shapes(assembly, adapters)
    load_text(assembly)
    _adapter_table(assembly, adapters)
    memory = assembly.plan_memory(reserved=assembly.weight_bytes)
    print("\n".join([*describe(assembly, memory), "", command_line(config)]))


def run(config: Config) -> None:
    """Load the model and serve until SIGTERM or Ctrl-C."""
    started = time.monotonic()
    sys.setswitchinterval(SWITCH_SECONDS)
    logs.set_up(config.server.log_level, config.server.log_format)
    keys = _api_keys(config)
    address = reserve(config.server, has_key=bool(keys))
    with address.holder:  # whatever fails lets the port go
        _load_and_serve(config, keys, address, started)


def _load_and_serve(config: Config, keys: tuple[str, ...], address: Address, started: float) -> None:
    # The threads of torch's own pool spin for milliseconds after each op, on cores that others wait for.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    plugins = load(config.plugins)
    assembly = choose(config, plugins, to_load=True)
    _check_memory(assembly)
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(load_text, assembly)
        engine, memory, adapters = _load_engine(assembly)
        tokenizer, template = text.result()
    context = _context(config, assembly, engine, tokenizer, template, keys, address.url)
    context.adapters = _adapter_table(assembly, adapters)
    gc.freeze()  # what is loaded stays; the collector need not look at it again and again
    gc.enable()

    def announce() -> None:
        for line in [*describe(assembly, memory), *ready(context, time.monotonic() - started)]:
            _say(line, config.server.log_format)

    uvloop.run(_serve(config, plugins, engine, context, address, announce))


async def _serve(
    config: Config,
    plugins: Plugins,
    engine: Engine,
    context: ServerContext,
    address: Address,
    announce: Callable[[], None],
) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop)
    engine.start(loop)
    try:
        async with plugins.lifespans(context):
            await serve_http(App(context), config.server, address, stop, engine.stop, announce)
    finally:
        engine.stop()
        await asyncio.to_thread(engine.join, 5.0)


def _on_signal(stop: asyncio.Event) -> None:
    if stop.is_set():  # a second Ctrl-C: the user does not want to wait for the drain
        os._exit(130)
    log.info("stopping; running requests may finish (again to stop at once)")
    stop.set()


def _api_keys(config: Config) -> tuple[str, ...]:
    """Those of --api-key, --api-key-file (one a line) and BLADE_API_KEY."""
    keys = [config.server.api_key or "", os.environ.get("BLADE_API_KEY", "")]
    path = config.server.api_key_file
    if path is not None:
        try:
            keys += path.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"--api-key-file {path} cannot be read.", "Is it a text file of yours?") from None
        if not any(map(str.strip, keys)):
            raise ConfigError(f"--api-key-file {path} holds no key.", "Write one key a line.")
    return tuple(filter(None, map(str.strip, keys)))


def _check_memory(assembly: Assembly) -> None:
    """Refuse what cannot fit before it is loaded for minutes: the weights, or a context even without them."""
    weights, available = assembly.weight_bytes, assembly.ops.available_memory()
    if weights > available:
        raise ConfigError(
            f"The weights take {size(weights)}, and {size(available)} are free on {assembly.ops.name}.",
            "Use --quantize int4, or a smaller model.",
        )
    try:
        assembly.plan_memory()
    except ConfigError:
        assembly.plan_memory(reserved=weights)  # its remedy is the one that works
        raise


def _load_engine(assembly: Assembly) -> tuple[Engine, MemoryPlan, Adapters | None]:
    total, done = assembly.weight_bytes, 0
    adapters = make_adapters(assembly)
    with console_progress() as show:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            show(f"Loading {assembly.model_name}", min(done, total), total)

        model = load_model(assembly, advance, adapters)
        draft = load_draft(assembly, model, advance)
    memory = assembly.plan_memory()
    return build_engine(assembly, model, memory, draft, adapters), memory, adapters


def _adapter_table(assembly: Assembly, adapters: Adapters | None) -> AdapterTable:
    """With those of --lora loaded."""
    from blade.checkpoint.peft import read_adapter

    if adapters is None:
        return AdapterTable()
    make, options = adapters.make, assembly.config.model
    table = AdapterTable(assembly.model_name, lambda name, path: make(name, read_adapter(path)), options.lora_dir)
    for adapter in options.lora:
        table.load(*_folder_of(adapter))
    return table


def _folder_of(adapter: str) -> tuple[str, Path]:
    """ "NAME=DIR" -> name and folder."""
    name, _, folder = adapter.partition("=")
    return name, Path(folder).expanduser()


def _context(
    config: Config,
    assembly: Assembly,
    engine: Engine,
    tokenizer: HFTokenizer,
    template: ChatTemplate | None,
    keys: tuple[str, ...],
    url: str,
) -> ServerContext:
    plugins, options = assembly.plugins, config.server
    tool_parsers = plugins.registry("register_tool_parsers")
    reasoning_parsers = plugins.registry("register_reasoning_parsers")
    processors = plugins.registry("register_logits_processors")
    routes = plugins.registry("register_routes", reserved=ROUTES)
    return ServerContext(
        engine=engine,
        tokenizer=tokenizer,
        model_name=assembly.model_name,
        url=url,
        version=__version__,
        options=options,
        api_keys=keys,
        chat_template=template,
        tool_parser=tool_parsers[options.tool_parser] if options.tool_parser else None,
        reasoning_parser=reasoning_parsers[options.reasoning_parser] if options.reasoning_parser else None,
        logits_processors={name: processors[name] for name in processors},
        routes={name: routes[name] for name in routes},
        request_finished=plugins.request_finished,
    )


def _say(line: str, log_format: str) -> None:
    """To standard output for people; as a log record for machines."""
    if log_format == "json":
        if line:
            log.info("%s", line)
    else:
        print(line, flush=True)
