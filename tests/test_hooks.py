"""Every hook, exercised once through a plugin: what it registers is found where the server looks for it."""

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cyclopts import App
from plugin_modules import plugins, registers

from blade import RequestSummary, hookimpl
from blade.plugins import HOOKS
from blade.registry import KINDS, members

FACTORIES = tuple(hook for hook in KINDS if hook != "register_routes")


def made_to_fit(hook: str) -> Any:
    """An object with all members that its contract asks for."""
    _, protocol = KINDS[hook]
    return type("Made", (), dict.fromkeys(members(protocol), "member"))()


@pytest.mark.parametrize("hook", FACTORIES)
def test_a_registered_factory_is_selected_by_its_name(hook: str) -> None:
    made = made_to_fit(hook)
    registry = plugins(toy={hook: registers("mine", lambda *args: (made, args))}).registry(hook)
    assert registry["mine"]("a", "b") == (made, ("a", "b"))
    assert registry.entry("mine").plugin == "toy"


@pytest.mark.parametrize("hook", [hook for hook in FACTORIES if KINDS[hook][1]])
def test_what_a_factory_makes_is_held_to_its_contract(hook: str) -> None:
    made = made_to_fit(hook)
    assert plugins(toy={hook: registers("mine", lambda: made)}).registry(hook).create("mine") is made


def test_register_routes() -> None:
    async def hello(server: Any, request: Any) -> str:
        return f"hello {request}"

    registry = plugins(toy={"register_routes": registers("GET /hello", hello)}).registry("register_routes")
    assert asyncio.run(registry["GET /hello"](None, "you")) == "hello you"


def test_register_commands(capsys: pytest.CaptureFixture[str]) -> None:
    @hookimpl
    def register_commands(cli: App) -> None:
        @cli.command
        def greet(name: str) -> None:
            print("hello", name)

    cli = App(result_action="return_value")
    plugins(toy={"register_commands": register_commands}).register_commands(cli)
    cli(["greet", "you"])
    assert capsys.readouterr().out == "hello you\n"


def test_lifespan() -> None:
    log: list[str] = []

    @asynccontextmanager
    async def context(server: str) -> Any:
        log.append(f"start {server}")
        yield
        log.append("stop")

    async def serve() -> None:
        server: Any = "server"
        async with plugins(toy={"lifespan": hookimpl(lambda server: context(server))}).lifespans(server):
            log.append("serve")

    asyncio.run(serve())
    assert log == ["start server", "serve", "stop"]


def test_request_finished() -> None:
    seen: list[RequestSummary] = []
    toy = plugins(toy={"request_finished": hookimpl(lambda summary: seen.append(summary))})
    summary = RequestSummary("id", "/v1/completions", "m", 1, 2, 0, 3, ("stop",), 0.1, 0.2, 0.3, 200)
    toy.request_finished(summary)
    assert seen == [summary]


def test_no_hook_is_left_out() -> None:
    assert [hook for hook in HOOKS if hook not in FACTORIES and f"test_{hook}" not in globals()] == []
