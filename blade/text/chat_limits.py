"""What chat templates may take of a server: so long, and texts and lists so large.

Jinja's sandbox keeps a template from what it may not see, and neither from running for ever nor from filling memory.
Here whatever repeats (loops, calls, filters, tests) looks at the clock; whatever makes texts and lists of others
(operators, methods, filters, macros, blocks, slices) looks first at how large they would be, and they count together.
Nothing of that is evaluated when a template is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

from blade.text.chat_sizes import SLOW, TooMuch, check, check_binop, check_filter, check_method, printable, size

ALLOWANCE = "the allowance"  # among the variables of a rendering; no template can name it


@dataclass(slots=True)
class Allowance:
    """Of one rendering, in one thread."""

    deadline: float  # seconds of time.thread_time: a busy machine is not the template's fault
    size: int = 1 << 29  # of all texts and lists that are made

    def take(self, size: int = 0) -> None:
        self.size -= size
        if self.size < 0 or time.thread_time() > self.deadline:
            raise TooMuch


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A rendering without an Allowance among its variables is an error."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, finalize=printable)
        del self.globals["lipsum"]  # makes texts of any length
        filters: Mapping[str, Any] = FILTERS
        tests: Mapping[str, Any] = TESTS
        self.filters = {name: _limited(function, name) for name, function in filters.items()}
        self.tests = {name: _limited(function) for name, function in tests.items()}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _limited(function, name)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Of what a macro or a block emits."""
        pieces = list(pieces)
        check(sum(map(len, pieces)))
        return "".join(pieces)

    @staticmethod
    def joined(*values: Any) -> str:
        """The operator ~."""
        return LimitedEnvironment.concat(str(printable(value)) for value in values)

    @staticmethod
    def same(value: Any = None) -> Any:
        """What has been made, to be counted as the result of a call; or nothing, in a loop."""
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        check_method(function, args, kwargs)
        return _counted(context, super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_binop(operator, left, right)
        return _counted(context, super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Limits().visit(super()._parse(source, name, filename))
        parsed.set_environment(self)
        return parsed


class _Limits(NodeTransformer):
    """What Jinja compiles to plain Python calls the environment instead, or as well."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - Jinja's names
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("same", [], node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _call("same", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:  # noqa: N802
        self.generic_visit(node)
        node.filter = node.filter or nodes.Filter(None, "string", [], [], None, None, lineno=node.lineno)
        return node


def _call(name: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(function, args, [], None, None, lineno=lineno)


def _counted(context: Context, value: Any) -> Any:
    allowance: Allowance = context.parent[ALLOWANCE]
    allowance.take(size(value))
    return value


def _limited(function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """A test, or the filter of a name."""
    wanted = _PassArg.from_obj(function)

    @wraps(function)
    def call(context: Context, *args: Any, **kwargs: Any) -> Any:
        if (name == "join" and size(args[0]) == 0) or (name in SLOW and isinstance(args[0], Iterator)):
            # maybe something that is not there yet
            args = (_collected(context, args[0]), *args[1:])
        if name:
            check_filter(name, args, kwargs)
        given = {None: (), _PassArg.context: (context,), _PassArg.eval_context: (context.eval_ctx,)}
        return _counted(context, function(*given.get(wanted, (context.environment,)), *args, **kwargs))

    return pass_context(call)


def _collected(context: Context, values: Iterable[Any]) -> list[Any]:
    return [_counted(context, value) for value in values]
