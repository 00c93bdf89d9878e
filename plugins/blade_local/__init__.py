"""One rank, in the engine thread of this process: the default executor."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blade import EngineConfig, Sampled, Sequence, Step, hookimpl

if TYPE_CHECKING:
    from blade.contracts import BegunStep, Runner


class LocalExecutor:
    """Calls the one runner there is."""

    def __init__(self, make_runner: "Callable[[], Runner]", config: EngineConfig) -> None:
        self.runner = make_runner()

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        return self.runner.run(step)

    def begin(self, step: Step, after: "BegunStep | None" = None) -> "BegunStep | None":
        begin = getattr(self.runner, "begin", None)
        return begin(step, after) if begin else None

    def forget(self, seq: Sequence) -> None:
        self.runner.forget(seq)

    def close(self) -> None:
        del self.runner


@hookimpl
def register_executors(register: Any) -> None:
    register("local", LocalExecutor)
