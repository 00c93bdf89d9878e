"""Captured steps: what a forward pass asks of the kernels is noted once per batch shape, then replayed in one call.

The idea is that of CUDA graphs. A decode of a small model is hundreds of kernel calls of tens of microseconds, and each
costs five more through Python; replayed they follow each other in C++. A capture is an ordinary pass that is watched:
it holds the calls, their arguments, and which of these point into activations. Activations are then laid into an arena,
where buffers share memory once nobody reads them any more, so that a small step stays in cache.

A pass that does anything else with tensors than the kernels and views, or that looks at what the batch holds on the
host, is never replayed: it runs as it is.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blade import Batch
from blade_native.simd.arena import Arenas, Buffer, Use
from blade_native.simd.library import Kernel, Library, check_status

log = logging.getLogger("blade.native")

Forward = Callable[[Batch], Tensor]
Shape = tuple[int, int, int]  # tokens, rows of logits, sequences
Tape = list[tuple[Kernel, ctypes.Structure]]

MAX_TOKENS = 64  # of a step worth capturing: beyond it the calls are nothing beside their work
MAX_CAPTURES = 64  # shapes; the one that was not used for longest makes room
MAX_MISSED = 4096  # shapes that are counted
EVICTING = 8  # times that a shape has come, when another one's capture has to make room for its own
INPUTS = ("input_ids", "logits_rows", "positions")  # of a batch, that calls may point into

aten = torch.ops.aten
ALLOCATIONS = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}


class Uncapturable(Exception):
    """The pass does what a replay would not."""


class Hidden(list[int]):
    """The batch's lengths on the host, which change from step to step: a captured pass must not depend on them."""

    def _refuse(self, *_: object) -> NoReturn:
        raise Uncapturable("it reads the batch's lengths")

    __iter__ = __getitem__ = __len__ = _refuse


class Seen:
    """What torch itself was asked to do: allocations and views are fine."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []  # kept, so that no two of them have the same address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.buffers.append(result)
        elif not is_view(func, args, result):
            raise Uncapturable(f"it calls {func}")
        return result


class Watch(Seen, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Seen as a mode. It does not define __torch_dispatch__ itself, or torch would wrap it in what imports its
    compiler: two seconds, in the middle of the first request."""


def is_view(func: Any, args: Any, result: Any) -> bool:
    tensors = result if isinstance(result, list | tuple) else [result]
    if func._schema.is_mutable or not args or not isinstance(args[0], Tensor):
        return False
    where = args[0].untyped_storage().data_ptr()
    return all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == where for x in tensors)


class Instruction(ctypes.Structure):
    """`Instruction` of replay.cpp."""

    _fields_ = (("kernel", ctypes.c_void_p), ("call", ctypes.c_void_p))


class Program:
    """Kernel calls in order, run without returning to Python in between."""

    def __init__(self, library: Library, tape: Tape) -> None:
        self.tape = tape  # the instructions point at its calls
        self._instructions = (Instruction * len(tape))(
            *(Instruction(kernel.address, ctypes.addressof(call)) for kernel, call in tape)
        )
        self._replay = library.replay
        self._address = ctypes.addressof(self._instructions)

    def run(self) -> None:
        check_status(self._replay(self._address, len(self.tape)))

    def run_one(self, index: int) -> None:
        """One of the calls alone, for measurements."""
        check_status(self._replay(self._address + index * ctypes.sizeof(Instruction), 1))


class Capture:
    """A pass over one shape of batch, ready to be replayed. `uses`: all pointers among its calls' arguments."""

    def __init__(self, program: Program, batch: Batch, uses: list[Use], steps: list[Any], logits: Tensor) -> None:
        self.program = program
        self._steps = steps
        self._logits = logits
        found = ((field, _pointers(getattr(batch, field), uses)) for field in INPUTS)
        self._inputs = [(field, pointers) for field, pointers in found if pointers]

    def replay(self, batch: Batch) -> Tensor:
        """The logits, good until the next replay of any capture."""
        for name, pointers in self._inputs:
            address = getattr(batch, name).data_ptr()
            for call, field, offset in pointers:
                setattr(call, field, address + offset)
        for step in self._steps:
            step.update(batch)
        self.program.run()
        return self._logits


def _pointers(x: Tensor, uses: list[Use]) -> list[tuple[ctypes.Structure, str, int]]:
    """Where the calls point into x, and how many bytes after its start."""
    start, size = x.data_ptr(), x.numel() * x.itemsize
    return [
        (use.call, use.field, use.address - start)
        for use in uses
        if use.address is not None and 0 <= use.address - start < size
    ]


class CapturedForward:
    """The same function as `forward`, which is captured when a shape comes for the second time. While all places are
    taken it has to come more often: a capture costs a few plain passes, and is to be worth one that is there."""

    def __init__(self, forward: Forward, library: Library) -> None:
        self._forward = forward
        self._library = library
        self._arenas = Arenas()
        self._captures: OrderedDict[Shape, Capture] = OrderedDict()
        self._missed: Counter[Shape] = Counter()
        self._enabled = True

    @property
    def captures(self) -> Mapping[Shape, Capture]:
        return self._captures

    def __call__(self, batch: Batch) -> Tensor:
        shape = (len(batch.input_ids), len(batch.logits_rows), len(batch.context_lens))
        capture = self._captures.get(shape)
        if capture is not None:
            self._captures.move_to_end(shape)
            return capture.replay(batch)
        if not self._is_worth_it(shape):
            return self._forward(batch)
        try:
            return self._capture(shape, batch)
        except Uncapturable as reason:
            log.info("steps of this model are not captured: %s", reason)
            self._enabled = False
            return self._forward(batch)

    def _is_worth_it(self, shape: Shape) -> bool:
        num_tokens, num_rows, _ = shape
        if not self._enabled or num_tokens > MAX_TOKENS or num_rows == 0:
            return False
        if len(self._missed) == MAX_MISSED:
            self._missed.clear()
        self._missed[shape] += 1
        return self._missed[shape] >= (2 if len(self._captures) < MAX_CAPTURES else EVICTING)

    def _capture(self, shape: Shape, batch: Batch) -> Tensor:
        inputs: dict[str, Any] = {field: getattr(batch, field).clone() for field in INPUTS}
        static = replace(batch, **inputs, query_lens=Hidden(), kv_lens=Hidden())
        recording = self._library.recording
        tape: Tape = []
        recording.tape, recording.steps = tape, []
        try:
            with Watch() as watch:
                logits = self._forward(static)
        finally:
            steps, recording.tape, recording.steps = recording.steps, None, []
        buffers = [Buffer(x.data_ptr(), x.untyped_storage().nbytes()) for x in watch.buffers]
        uses = [
            Use(index, call, field, getattr(call, field))
            for index, (kernel, call) in enumerate(tape)
            for field in kernel.pointers
        ]
        kept = self._arenas.place(buffers, uses, logits)
        if kept is None:
            raise Uncapturable("no kernel makes its result")
        del self._missed[shape]
        if len(self._captures) == MAX_CAPTURES:
            self._captures.popitem(last=False)
        self._captures[shape] = Capture(Program(self._library, tape), static, uses, steps, kept)
        return logits
