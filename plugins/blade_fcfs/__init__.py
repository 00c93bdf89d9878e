"""First come, first served: the default scheduler."""

from typing import Any

from blade import OrderedScheduler, hookimpl


@hookimpl
def register_schedulers(register: Any) -> None:
    register("fcfs", OrderedScheduler)
