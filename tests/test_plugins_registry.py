"""Registries and hook implementations: every conflict names both parties."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from plugin_modules import plugins, registers

from blade import DefaultCheckpoint, PluginError, hookimpl
from blade.plugins import Plugins
from blade.registry import Registry


def test_a_misspelt_hook() -> None:
    with pytest.raises(
        PluginError, match=r"'toy' implements the unknown hook 'register_scheduler'\. Did you mean 'reg"
    ):
        plugins(toy={"register_scheduler": registers("lifo", object)})


def test_a_wrong_hook_argument() -> None:
    with pytest.raises(PluginError, match=r"'toy' .*'register_schedulers'.*'registry'"):
        plugins(toy={"register_schedulers": hookimpl(lambda registry: None)})


def test_an_argument_with_a_default_which_would_never_be_passed() -> None:
    with pytest.raises(PluginError, match=r"'toy' gives register of its hook 'register_schedulers' a default.*Remove"):
        plugins(toy={"register_schedulers": hookimpl(lambda register=None: None)})


def test_a_hook_without_its_decorator() -> None:
    with pytest.raises(PluginError, match=r"'toy' defines lifespan unmarked.*@blade.hookimpl"):
        plugins(toy={"lifespan": lambda server: None})


def test_a_hook_that_raises() -> None:
    toy = plugins(toy={"register_schedulers": hookimpl(lambda register: 1 / 0)})
    with pytest.raises(PluginError, match=r"'toy' failed in its hook register_schedulers: ZeroDivisionError: division"):
        toy.registry("register_schedulers")


def test_a_module_cannot_be_two_plugins() -> None:
    module = ModuleType("twice")
    with pytest.raises(PluginError, match=r"'b' does not fit.*already registered"):
        Plugins({"a": module, "b": module})


def test_a_key_registered_twice_names_both_plugins() -> None:
    both = plugins(
        a={"register_drafters": registers("ngram", object)}, b={"register_drafters": registers("ngram", object)}
    )
    with pytest.raises(
        PluginError, match=r"drafter 'ngram' is registered by plugin 'b' and by plugin 'a'.*Load only one"
    ):
        both.registry("register_drafters")


async def handler(server: Any, request: Any) -> Any: ...


def test_a_reserved_key_belongs_to_blade() -> None:
    toy = plugins(toy={"register_routes": registers("GET /health", handler)})
    with pytest.raises(PluginError, match=r"'GET /health' is registered by plugin 'toy' and by blade itself"):
        toy.registry("register_routes", reserved=["GET /health"])


def test_an_unknown_key_gets_the_closest_match_and_the_plugins_not_loaded() -> None:
    registry = Registry("register_schedulers", unloaded=["toy"])
    registry.add("fcfs", "fcfs", object)
    with pytest.raises(PluginError, match=r"Unknown scheduler 'fcsf'\. Did you mean 'fcfs'\? Known: fcfs\. .*: toy \("):
        registry["fcsf"]


@pytest.mark.parametrize(
    ("hook", "args", "said"),
    [
        ("register_schedulers", ("", object), "non-empty string"),
        ("register_schedulers", (object, object), "non-empty string"),
        ("register_schedulers", ("lifo", "Lifo"), "must be callable, not str"),
        ("register_schedulers", ("lifo", object, DefaultCheckpoint("org/model")), "only architectures"),
        ("register_models", ("LlamaForCausalLM", object, "org/model"), "must be a blade.DefaultCheckpoint, not str"),
        ("register_routes", ("/hello", handler), "'GET /path', not '/hello'"),
        ("register_routes", ("GET hello", handler), "'GET /path', not 'GET hello'"),
        ("register_routes", ("GET /hello", print), "must be an async function"),
    ],
)
def test_the_shape_of_a_registration(hook: str, args: tuple[Any, ...], said: str) -> None:
    with pytest.raises(PluginError, match=rf"Plugin 'toy' registers no valid .*{said}"):
        plugins(toy={hook: registers(*args)}).registry(hook)


def test_create_calls_the_factory_and_checks_what_it_made() -> None:
    made = SimpleNamespace(propose=print, forget=print)
    registry = plugins(toy={"register_drafters": registers("good", lambda config: made)}).registry("register_drafters")
    assert registry.create("good", "config") is made
    assert registry.entry("good").plugin == "toy"


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda: None, "Plugin 'toy' could not make its drafter 'bad': TypeError"),
        (lambda config: object(), r"drafter 'bad' of plugin 'toy' lacks propose, forget\..*blade.contracts.Drafter"),
    ],
)
def test_create_names_the_plugin_whose_factory_fails(factory: Any, said: str) -> None:
    registry = plugins(toy={"register_drafters": registers("bad", factory)}).registry("register_drafters")
    with pytest.raises(PluginError, match=said):
        registry.create("bad", "config")


def test_the_default_checkpoint_of_a_plugin() -> None:
    default = DefaultCheckpoint("org/model")
    loaded = plugins(
        a={"register_models": registers("A", object, default=default)}, b={"register_models": registers("B", object)}
    )
    assert (loaded.default_checkpoint("a"), loaded.default_checkpoint("b")) == (default, None)


def test_two_default_checkpoints_in_one_plugin() -> None:
    @hookimpl
    def register_models(register: Any) -> None:
        register("A", object, default=DefaultCheckpoint("org/a"))
        register("B", object, default=DefaultCheckpoint("org/b"))

    with pytest.raises(PluginError, match=r"'toy' has several default checkpoints: A, B. Pass --model"):
        plugins(toy={"register_models": register_models}).default_checkpoint("toy")


def test_only_quantizations_are_made_of_plain_weights() -> None:
    registry = Registry("register_quantizations")
    registry.add("toy", "a", object)
    registry.add("toy", "b", object, plain=True)
    assert (registry.entry("a").plain, registry.entry("b").plain) == (False, True)
    with pytest.raises(PluginError, match="'lifo' says plain=True, which only quantizations may"):
        Registry("register_schedulers").add("toy", "lifo", object, plain=True)
