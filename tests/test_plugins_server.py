"""What plugins do outside registries: commands, lifespans, observation."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import cyclopts
import pytest
from plugin_modules import plugins

from blade import PluginError, RequestSummary, hookimpl
from blade.plugins import Plugins

SUMMARY = RequestSummary("r", "/v1/completions", "m", 1, 2, 0, 3, ("stop",), 0.1, 0.2, 0.3, 200)


def command(name: str) -> dict[str, Callable[..., Any]]:
    return {"register_commands": hookimpl(lambda cli: cli.command(lambda: None, name=name))}


def test_commands_are_added() -> None:
    cli = cyclopts.App()
    plugins(a=command("greet"), b=command("wave")).register_commands(cli)
    assert {"greet", "wave"} <= set(cli)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"a": command("greet"), "b": command("greet")}, "'greet' is registered by plugin 'b' and by plugin 'a'"),
        ({"a": command("serve")}, "'serve' is registered by plugin 'a' and by blade itself"),
    ],
)
def test_a_command_registered_twice_names_both(modules: Any, said: str) -> None:
    cli = cyclopts.App()
    cli.command(lambda: None, name="serve")
    with pytest.raises(PluginError, match=said):
        plugins(**modules).register_commands(cli)


def test_a_failing_command_hook_names_its_plugin() -> None:
    with pytest.raises(PluginError, match=r"'a' failed in its hook register_commands: ZeroDivisionError"):
        plugins(a={"register_commands": hookimpl(lambda cli: 1 / 0)}).register_commands(cyclopts.App())


def lifespan(log: list[str], name: str, fail: str = "") -> dict[str, Callable[..., Any]]:
    @asynccontextmanager
    async def context(server: Any) -> Any:
        if fail == "start":
            raise OSError("no port")
        log.append(f"+{name}")
        yield
        log.append(f"-{name}")
        if fail == "stop":
            raise OSError("no port")

    return {"lifespan": hookimpl(lambda server: context(server))}


async def run(loaded: Plugins, log: list[str]) -> None:
    server: Any = object()
    async with loaded.lifespans(server):
        log.append("serving")


def test_lifespans_nest_and_none_is_no_lifespan() -> None:
    log: list[str] = []
    loaded = plugins(a=lifespan(log, "a"), none={"lifespan": hookimpl(lambda server: None)}, b=lifespan(log, "b"))
    asyncio.run(run(loaded, log))
    assert log == ["+a", "+b", "serving", "-b", "-a"]


def test_a_lifespan_that_cannot_start_stops_those_before_it() -> None:
    log: list[str] = []
    with pytest.raises(PluginError, match=r"'b' failed in its hook lifespan: OSError: no port"):
        asyncio.run(run(plugins(a=lifespan(log, "a"), b=lifespan(log, "b", "start")), log))
    assert log == ["+a", "-a"]


def test_a_lifespan_that_fails_to_stop_is_logged_and_the_others_stop(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    asyncio.run(run(plugins(a=lifespan(log, "a"), b=lifespan(log, "b", "stop")), log))
    assert log == ["+a", "+b", "serving", "-b", "-a"]
    assert "Plugin 'b' failed while the server stopped" in caplog.text


def test_an_observer_that_fails_is_logged_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[RequestSummary] = []
    loaded = plugins(
        bad={"request_finished": hookimpl(lambda summary: 1 / 0)},
        good={"request_finished": hookimpl(lambda summary: seen.append(summary))},
    )
    loaded.request_finished(SUMMARY)
    assert seen == [SUMMARY]
    assert [(r.levelno, "'bad'" in r.getMessage()) for r in caplog.records] == [(logging.ERROR, True)]
