"""Quantised weights for the packed linears: which formats the kernels cover, and repacking them without loss."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from blade import GroupedWeight, QuantizedWeight
from blade_native.simd.library import CFormat, CGrouped, CLinear, Library
from blade_native.simd.linear import Matrix

GROUPS = {4: (16, 32, 64, 128), 5: (32, 64, 128), 6: (16, 32, 64, 128), 8: (16, 32, 64, 128)}  # by bits
VALUES_GROUPS = (16, 32, 64, 128)
VALUES, NESTED = 1, 3  # `Coding` of api.h
NONE, HALF, ZEROS = 0, 1, 4  # `Numbers` of api.h
FLOATS = {torch.float16: HALF, torch.bfloat16: 5, torch.float32: 6}
CODES = {torch.uint8: 2, torch.int8: 3}


def covers(weight: GroupedWeight) -> bool:
    """Whether the kernels multiply by this weight as it is."""
    return problem(weight) is None and has_kernel(weight)


def has_kernel(weight: GroupedWeight) -> bool:
    """Whether kernels compute on such weights, if they are sound."""
    groups = GROUPS.get(weight.bits, ()) if weight.values is None else VALUES_GROUPS
    return weight.group in groups and (weight.values is None or weight.bits == 4)


def problem(weight: GroupedWeight) -> str | None:
    """What is not as it should be, beginning with the field's name."""
    if not 1 <= weight.bits <= 8:
        return f"bits is {weight.bits}, not in 1..8"
    if weight.q.dtype is not torch.uint8 or weight.q.dim() != 2:
        return f"q is {weight.q.dtype} {list(weight.q.shape)}, not torch.uint8 [N, K]"
    if weight.group < 1 or weight.q.shape[1] % weight.group:
        return f"group of {weight.group} does not divide K = {weight.q.shape[1]}"
    problems = (_problem_of_numbers, _problem_of_blocks, _problem_of_values, _problem_of_order)
    return next((found for each in problems if (found := each(weight))), None)


_PLAIN = {"scales": list(FLOATS), "minima": [torch.float16], "zeros": [torch.uint8]}


def _problem_of_numbers(weight: GroupedWeight) -> str | None:
    shape = (weight.q.shape[0], weight.q.shape[1] // weight.group)
    if weight.zeros is not None and (weight.minima is not None or weight.zeros.dtype is not torch.uint8):
        return "zeros stand beside minima" if weight.minima is not None else f"zeros are {weight.zeros.dtype}"
    for name, blocks in (("scales", weight.block_scales), ("minima", weight.block_minima), ("zeros", None)):
        numbers: Tensor | None = getattr(weight, name)
        if numbers is None:
            continue
        wanted = list(CODES) if blocks is not None else _PLAIN[name]
        if numbers.dtype not in wanted or numbers.shape != shape:
            return f"{name} are {numbers.dtype} {list(numbers.shape)}, not {wanted} {list(shape)}"
    return None


def _problem_of_blocks(weight: GroupedWeight) -> str | None:
    if weight.block_minima is not None and weight.minima is None:
        return "block_minima without minima"
    n, k = weight.q.shape
    for name in ("block_scales", "block_minima"):
        blocks: Tensor | None = getattr(weight, name)
        if blocks is None:
            continue
        if blocks.dtype is not torch.float16 or blocks.dim() != 2 or len(blocks) != n:
            return f"{name} are {blocks.dtype} {list(blocks.shape)}, not torch.float16 [{n}, K / block]"
        if k % blocks.shape[1] or k // blocks.shape[1] % weight.group:
            return f"{name} divide K = {k} into {blocks.shape[1]} blocks, not whole groups of {weight.group}"
    shapes = {blocks.shape for blocks in (weight.block_scales, weight.block_minima) if blocks is not None}
    return "block_minima have another shape than block_scales" if len(shapes) > 1 else None


def _problem_of_values(weight: GroupedWeight) -> str | None:
    if weight.values is None:
        return None
    if len(weight.values) != 2**weight.bits:
        return f"values are {len(weight.values)} for {weight.bits} bits"
    if not all(-127 <= value <= 127 for value in weight.values):
        return f"values are {weight.values}, not all in -127..127"
    return "values stand beside zeros or minima" if weight.zeros is not None or weight.minima is not None else None


def _problem_of_order(weight: GroupedWeight) -> str | None:
    order, k = weight.order, weight.q.shape[1]
    if order is None:
        return None
    if order.dtype is not torch.int64 or order.shape != (k,):
        return f"order is {order.dtype} {list(order.shape)}, not torch.int64 [{k}]"
    return None if order.sort().values.equal(torch.arange(k)) else f"order does not name each of 0..{k - 1} once"


def fill(library: Library, linear: CLinear, weight: GroupedWeight, threads: int) -> None:
    """Put the weights of a sound matrix where the linear has room for them."""
    offsets = weight.zeros if weight.minima is None else weight.minima
    sources = [weight.q, weight.scales, offsets, weight.block_scales, weight.block_minima]
    kept = [None if source is None else source.contiguous() for source in sources]
    pointers = CGrouped(*(None if source is None else source.data_ptr() for source in kept))
    library.pack_grouped(ctypes.byref(linear), ctypes.byref(pointers), threads)


def matrix_of(weight: GroupedWeight) -> Matrix[QuantizedWeight]:
    (n, k), order = weight.q.shape, weight.order
    return Matrix(weight, _format(weight), (n, k), None if order is None else order.to(torch.int32))


def _format(weight: GroupedWeight) -> CFormat:
    blocks = weight.block_scales if weight.block_scales is not None else weight.block_minima
    block = 0 if blocks is None else weight.q.shape[1] // blocks.shape[1]
    scales = (FLOATS | CODES)[weight.scales.dtype]
    offsets = NONE if weight.zeros is None else ZEROS
    if weight.minima is not None:
        offsets = HALF if weight.block_minima is None else CODES[weight.minima.dtype]
    form = CFormat(weight.bits, weight.group, scales, offsets, block)
    if nests(weight):
        form.coding = NESTED
    values = _table(weight)
    return form if values is None else looked_up(form, values)


def nests(weight: GroupedWeight) -> bool:
    """Whether a block's numbers, up to 128, are multiples of one unit by integers that fit a signed byte whatever q is:
    4 bits nested in 8, as in the progressive groups of QServe (Lin et al. 2024)."""
    if weight.bits != 4 or weight.group < 32 or weight.block_scales is None or weight.block_minima is None:
        return False
    scales, minima = weight.scales, weight.minima
    if minima is None or scales.dtype is not torch.uint8 or minima.dtype is not torch.uint8:
        return False
    block = weight.q.shape[1] // weight.block_scales.shape[1]
    if block not in GROUPS[4] or not weight.block_minima.equal(-weight.block_scales):
        return False
    highest = 15 * scales.int() - minima
    return bool(minima.max() <= 128 and scales.min() >= 1 and scales.max() <= 16 and highest.max() <= 127)


def looked_up(form: CFormat, values: Seq[int]) -> CFormat:
    """The format, of 4 bits that are places among 16 values."""
    form.coding, form.zero = VALUES, -min(values)
    form.values[:] = [value + form.zero for value in values]
    return form


def _table(weight: GroupedWeight) -> Seq[int] | None:
    """The values of q, where they are looked up. Those of 4 bits in groups of 16 are, in a table of themselves: sums of
    as few as a table's numbers need fit the kernels' registers, while those of plain 4 bits are made 32 at a time."""
    if weight.values is not None or (weight.bits, weight.group) != (4, 16):
        return weight.values
    return range(-8, 8) if weight.zeros is None and weight.minima is None else range(16)
