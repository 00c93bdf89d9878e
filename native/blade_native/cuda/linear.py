"""Linears over packed weights: linear.cu for few rows, the dequantised matrix and torch's GEMM for many."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from blade_native.cuda.launch import CUDA_NAMES
from blade_native.cuda.packing import TILE_K, TILE_N, Format
from blade_native.reference import TorchLinear

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade_native.cuda.launch import Kernel, Launcher, Module
    from blade_native.cuda.packing import Packed

DTYPES = (torch.bfloat16, torch.float16)
COLUMNS = (1, 2, 4, 8)  # how many times 8 rows a block takes
MAX_ROWS = 128  # beyond, the cores that multiply have more to do than writing the weights out in 16 bits costs
MAX_MATRIX_BYTES = 128 << 20  # of weights written out at once
MIN_SLICE = 512  # numbers of K for one block
SLICE_COST = 384  # what filling a block's ring and adding its slice to the others costs, in numbers of K
ALONE_COST = 1.4  # of a block that has an SM to itself, to half of what two take side by side
MIN_WARPS, MAX_WARPS = 4, 10  # of a block for 8 rows; one for more has 4

Key = tuple[Format, torch.dtype]


@dataclass(frozen=True)
class Device:
    """What the cutting of matrices into blocks goes by."""

    num_sms: int = 132  # these are an H100's
    shared_bytes: int = (227 << 10) - 128  # of a launch's block, at most


class LinearKernels:
    """The kernels of the formats that were asked for, in one dtype of activations each."""

    def __init__(self, launcher: Launcher, device: Device) -> None:
        self.launcher = launcher
        self.device = device
        self._modules: dict[Key, Module] = {}
        self._ready: dict[Key, FormatKernels] = {}

    def add(self, keys: Iterable[Key]) -> None:
        """Announce formats with the dtype of x; they share a compilation, at the first `get` of one of them."""
        new = [key for key in dict.fromkeys(keys) if key not in self._modules]
        names = [name for key in new for name in (*few_names(*key).values(), rows_name(*key))]
        if new:
            self._modules.update(dict.fromkeys(new, self.launcher.load("linear.cu", names)))

    def get(self, chosen: Format, dtype: torch.dtype) -> FormatKernels:
        """Compiles where that has not been done: call it while loading."""
        key = (chosen, dtype)
        if key not in self._ready:
            self.add([key])
            self._ready[key] = FormatKernels(self._modules[key], *key)
        return self._ready[key]

    def slice_of(self, packed: Packed) -> int:
        """How many numbers of K a block takes. It follows from the matrix and the device alone, so that sums are the
        same for any number of rows."""
        num_blocks = -(-packed.num_out // (TILE_N * MIN_WARPS * tiles_of_warp(COLUMNS[-1])))

        def cost(length: int) -> float:
            """What the SM with the most blocks does, two of them at a time, for many rows."""
            pairs, alone = divmod(-(-num_blocks * -(-packed.num_in // length) // self.device.num_sms), 2)
            return (2 * pairs + ALONE_COST * alone) * (length + SLICE_COST)

        whole = -(-packed.num_in // 128) * 128
        return min(range(whole, min(MIN_SLICE, whole) - 1, -128), key=cost)

    def columns_of(self, parts: Seq[Packed]) -> tuple[int, ...]:
        """Those for which there are kernels for all parts, and the device has shared memory."""

        def fits(chosen: Format, columns: int) -> bool:
            room = shared_bytes(chosen, columns, MIN_WARPS) <= self.device.shared_bytes
            return room and columns in few_names(chosen, DTYPES[0])

        return tuple(columns for columns in COLUMNS if all(fits(part.format, columns) for part in parts))

    def warps_of(self, packed: Packed, columns: int) -> int:
        """Of a block: for 8 rows so many that no SM has much more to do than another one."""
        num_tiles, num_slices = -(-packed.num_out // TILE_N), -(-packed.num_in // self.slice_of(packed))

        def share(warps: int) -> int:
            """The tiles that the SM with the most of them gets."""
            num_blocks = -(-num_tiles // warps) * num_slices
            return -(-num_blocks // self.device.num_sms) * warps

        most = MAX_WARPS if columns == 1 else MIN_WARPS
        fitting = [
            warps
            for warps in range(most, MIN_WARPS - 1, -1)
            if shared_bytes(packed.format, columns, warps) <= self.device.shared_bytes
        ]
        return min(fitting, key=share)


def tiles_of_warp(columns: int) -> int:
    return 1 if columns == 1 else 2


def shared_bytes(chosen: Format, columns: int, warps: int) -> int:
    """Ring of linear.cu: the stages of weights of each warp, those of x, and two stages' sums of x."""
    stage = 256 if chosen.bits == 4 and columns == 1 else 128
    num_stages = 3 if columns == 8 or (chosen.bits == 8 and columns > 1) else 4
    weights = warps * tiles_of_warp(columns) * stage // TILE_K * chosen.bytes_of_64
    totals = 2 * stage // chosen.group * 8 * columns * 4 if chosen.kind == "MINIMA" and columns > 1 else 0
    return num_stages * (weights + 8 * columns * (stage + 8) * 2) + totals


class FormatKernels:
    """linear.cu for one format and dtype: `few` multiplies, `rows` dequantises."""

    def __init__(self, module: Module, chosen: Format, dtype: torch.dtype) -> None:
        self._module, self._format = module, chosen
        self._names = few_names(chosen, dtype)
        self._few: dict[tuple[int, int], Kernel] = {}
        self.rows = module.kernel(rows_name(chosen, dtype))

    def few(self, columns: int, warps: int) -> Kernel:
        """For blocks of so many warps, each of them for 8 times `columns` rows."""
        key = columns, warps
        if key not in self._few:
            self._few[key] = self._module.kernel(self._names[columns], shared_bytes(self._format, *key))
        return self._few[key]


def few_names(chosen: Format, dtype: torch.dtype) -> dict[int, str]:
    """The multiplying kernel by how many times 8 rows of x a block takes: groups of 16 lack registers for 64 rows."""
    columns_of_group = COLUMNS[:-1] if chosen.group == 16 else COLUMNS
    return {columns: f"grouped_linear<{_types(chosen, dtype)}, {columns}>" for columns in columns_of_group}


def rows_name(chosen: Format, dtype: torch.dtype) -> str:
    return f"dequantized_rows<{_types(chosen, dtype)}>"


def _types(chosen: Format, dtype: torch.dtype) -> str:
    return f"{CUDA_NAMES[dtype]}, {chosen.bits}, {chosen.group}, {chosen.kind}"


class PackedLinear:
    """y = x W^T + b over matrices stacked along N, each packed in its own format."""

    def __init__(self, kernels: LinearKernels, parts: Seq[Packed], bias: Tensor | None, dtype: torch.dtype) -> None:
        """`dtype`: of activations whose kernels are compiled here; those of another dtype at the first call with it."""
        self.kernels = kernels
        self.dtype = dtype
        self.parts = parts
        self.bias = bias
        self.num_out = sum(part.num_out for part in parts)
        self.slices = [kernels.slice_of(part) for part in parts]
        self.columns = kernels.columns_of(parts)
        self.warps = [{columns: kernels.warps_of(part, columns) for columns in self.columns} for part in parts]
        device = parts[0].weight.device
        most_blocks = [-(-part.num_out // (TILE_N * MIN_WARPS * 2)) * 4 for part in parts]  # 4: of 32 rows
        self.arrived = [torch.zeros(num, dtype=torch.int32, device=device) for num in most_blocks]
        for part, warps in zip(parts, self.warps, strict=True):
            for each in warps.items():
                kernels.get(part.format, dtype).few(*each)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K] float16 or bfloat16 -> [..., N] in `out_dtype`: that of x or float32."""
        out_dtype = out_dtype or x.dtype
        if x.dtype not in DTYPES or out_dtype not in (x.dtype, torch.float32):
            raise TypeError(f"packed weights take x in float16 or bfloat16, not {x.dtype} -> {out_dtype}")
        rows = x.reshape(-1, x.shape[-1])
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if len(rows) > MAX_ROWS:
            return self._multiply_dense(x, bias, out_dtype)
        y = torch.empty(len(rows), self.num_out, dtype=out_dtype, device=x.device)
        if len(rows):
            self._multiply(_aligned(rows), bias, y)
        return y.view(*x.shape[:-1], self.num_out)

    def _multiply(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        num_rows, first = len(x), 0
        columns = next((columns for columns in self.columns if num_rows <= 8 * columns), self.columns[-1])
        for part, length, warps_of, arrived in zip(self.parts, self.slices, self.warps, self.arrived, strict=True):
            end, warps = first + part.num_out, warps_of[columns]
            num_slices, num_tiles = -(-part.num_in // length), -(-part.num_out // TILE_N)
            shape = (num_slices, num_rows, num_tiles * TILE_N)
            self.kernels.get(part.format, x.dtype).few(columns, warps)(
                (-(-num_rows // (8 * columns)), -(-num_tiles // (warps * tiles_of_warp(columns))), num_slices),
                (32 * warps,),
                **_arguments(part, x, y[:, first:end]),
                bias=None if bias is None else bias[first:end],
                partial=torch.empty(shape, device=x.device) if num_slices > 1 else None,
                arrived=arrived,
                matrices=None,
                slice=length,
            )
            first = end

    def _multiply_dense(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """A piece of the matrix at a time: those of vocabularies have a gigabyte."""
        rows, first = x.reshape(-1, x.shape[-1]), 0
        y = torch.empty(len(rows), self.num_out, dtype=x.dtype, device=x.device)
        for part in self.parts:
            whole_tiles = max(1, MAX_MATRIX_BYTES // (2 * part.num_in * TILE_N)) * TILE_N
            for start in range(0, part.num_out, whole_tiles):
                end = min(start + whole_tiles, part.num_out)
                channels = slice(first + start, first + end)
                transposed, out = self.matrix(part, x.dtype, start, end).t(), y[:, channels]
                if bias is None:
                    torch.mm(rows, transposed, out=out)
                else:
                    torch.addmm(bias[channels].to(x.dtype), rows, transposed, out=out)
            first += part.num_out
        return y.to(out_dtype).view(*x.shape[:-1], self.num_out)

    def matrix(self, part: Packed, dtype: torch.dtype, start: int, end: int) -> Tensor:
        """Rows [start, end) of a part, dequantised: [end - start, K]. start is a multiple of 16."""
        tile = start // TILE_N
        rows = replace(part, weight=part.weight[tile:], params=part.params[tile:])
        out = torch.empty(end - start, part.num_in, dtype=dtype, device=part.weight.device)
        self._dequantize(rows, None, out)
        return out

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Of a single matrix: ids [T] int64 -> [T, K], dequantised."""
        (part,) = self.parts
        out = torch.empty(len(ids), part.num_in, dtype=dtype, device=ids.device)
        if len(ids):
            self._dequantize(part, ids, out)
        return out

    def _dequantize(self, part: Packed, ids: Tensor | None, out: Tensor) -> None:
        self.kernels.get(part.format, out.dtype).rows(
            (len(out), -(-part.num_in // 1024)),
            (256,),
            out=out,
            ids=ids,
            weight=part.weight,
            params=part.params.view(torch.uint8),
            num_in=part.num_in,
        )


class StackedLinear:
    """y[r] = x[r] W[m]^T, where m is the number of the row's own matrix among several that were packed alike."""

    def __init__(self, kernels: LinearKernels, linears: Seq[PackedLinear]) -> None:
        """`linears`: `are_alike`. Their weights lie in one piece from now on."""
        self.kernels = kernels
        self.num_out, self.parts = linears[0].num_out, [_stacked(linears, i) for i in range(len(linears[0].parts))]
        for part in self.parts:
            kernels.get(part.format, linears[0].dtype).few(1, MIN_WARPS)

    def __call__(self, x: Tensor, matrices: Tensor, out_dtype: torch.dtype) -> Tensor:
        """x [R, K], matrices [R] int64 -> [R, N]. Rows of one matrix should follow each other."""
        y, first = torch.empty(len(x), self.num_out, dtype=out_dtype, device=x.device), 0
        for part in self.parts if len(x) else ():
            end = first + part.num_out
            self.kernels.get(part.format, x.dtype).few(1, MIN_WARPS)(
                (len(x), -(-part.num_out // (TILE_N * MIN_WARPS)), 1),
                (32 * MIN_WARPS,),
                **_arguments(part, x, y[:, first:end]),
                bias=None,
                partial=None,
                arrived=None,
                matrices=matrices,
                slice=-(-part.num_in // 128) * 128,
            )
            first = end
        return y


def are_alike(linears: Seq[PackedLinear]) -> bool:
    """Whether they differ in nothing but their numbers, and have no bias."""
    return len({tuple((p.format, p.num_out, p.num_in) for p in linear.parts) for linear in linears}) == 1 and all(
        linear.bias is None for linear in linears
    )


def _stacked(linears: Seq[PackedLinear], i: int) -> Packed:
    """Their i-th parts one behind the other, in which they have theirs from now on."""
    parts = [linear.parts[i] for linear in linears]
    weight, params = torch.stack([part.weight for part in parts]), torch.stack([part.params for part in parts])
    for linear, *own in zip(linears, weight, params, strict=True):
        part = replace(linear.parts[i], weight=own[0], params=own[1])
        linear.parts = [*linear.parts[:i], part, *linear.parts[i + 1 :]]
    return replace(parts[0], weight=weight, params=params)


def _arguments(part: Packed, x: Tensor, y: Tensor) -> dict[str, Any]:
    """What linear.cu's kernels take of a matrix, or of several, and of rows x [M, K] and y [M, N]."""
    return {
        "y": y if y.dtype == x.dtype else None,
        "y_float": y if y.dtype != x.dtype else None,
        "x": x,
        "weight": part.weight,
        "params": part.params.view(torch.uint8),
        "x_stride": x.stride(0),
        "y_stride": y.stride(0),
        "num_rows": len(x),
        "num_in": part.num_in,
        "num_out": part.num_out,
    }


class DenseLinear(TorchLinear):
    """Of dequantised weights. Should x come in another dtype than the device's default, they follow once."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        if x.dtype != self.weight.dtype:
            self.weight = self.weight.to(x.dtype)
            self.bias = None if self.bias is None else self.bias.to(x.dtype)
        return super().__call__(x, out_dtype)


def _aligned(rows: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes, as cp.async wants them."""
    fits = rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0
    return rows if fits else rows.clone(memory_format=torch.contiguous_format)
