"""The request's `priority` first (lower runs earlier), and among equals the one that came first."""

from typing import Any

from blade import OrderedScheduler, Sequence, hookimpl


class PriorityScheduler(OrderedScheduler):
    """Strict priorities: an urgent request also takes the blocks of a less urgent one when they run out."""

    def key(self, seq: Sequence) -> Any:
        return (seq.priority, seq.arrival, seq.id)


@hookimpl
def register_schedulers(register: Any) -> None:
    register("priority", PriorityScheduler)
