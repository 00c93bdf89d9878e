"""4 bits with a minimum: w = scale * q + minimum, 8-bit codes for the groups' scales and minima, 4.5 bits per weight.

How a group is rounded depends on its range, and the best range on how it is rounded. So the two are found in turns, as
in k-means (Lloyd 1982): round, take the scale and minimum of least squared error for that, round by them. The best of
all turns is kept. llama.cpp's make_qkx2_quants takes one turn from each of many ranges; two ranges and three turns come
closer than fourteen ranges do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blade import GroupedWeight
from blade.nn import in_chunks
from blade_rtn.nested import block_of, nest

CHUNK = 1 << 19  # numbers that go through all operations together: fewer, and Python would outweigh them
LEVELS = 15
SHARES = (1.0, 0.85)  # of a group's own range: where the search starts
ROUNDS = 3  # of rounding and fitting from each start
NESTED_ERROR = 1.5  # times the least squared error of the groups; more where weights had groups of 4 bits before


def quantize_int4(weight: Tensor, group: int) -> GroupedWeight:
    """weight [N, K] of any float dtype, K a multiple of `group`, on any device. Minima are at most 0."""
    (n, k), device = weight.shape, weight.device
    q = torch.empty(n, k, dtype=torch.uint8, device=device)
    scales, minima = torch.empty(2, n, k // group, dtype=torch.uint8, device=device)
    block_scales, block_minima = torch.empty(2, n, 1, dtype=torch.float16, device=device)

    def work(x: Tensor, q: Tensor, scales: Tensor, minima: Tensor, block_scales: Tensor, block_minima: Tensor) -> None:
        groups = groups_of(x, group)
        scale, minimum, _ = (values.view(scales.shape) for values in fit(groups))
        scale, minimum = encode(scale, scales, block_scales), encode(minimum, minima, block_minima)
        q.view(-1, group).copy_(round_to(groups, scale.view(-1), minimum.view(-1)).T)

    in_chunks(work, max(1, CHUNK // k), weight, q, scales, minima, block_scales, block_minima)
    return GroupedWeight(
        4, group, q, scales=scales, minima=minima, block_scales=block_scales, block_minima=block_minima
    )


def nest_int4(weight: Tensor, group: int) -> GroupedWeight:
    """The same, nested in bytes (nested.py) unless that is far off: for kernels that multiply bytes."""
    (n, k), device = weight.shape, weight.device
    block = block_of(k, group)
    q = torch.empty(n, k, dtype=torch.uint8, device=device)
    scales, minima = torch.empty(2, n, k // group, dtype=torch.uint8, device=device)
    units = torch.empty(n, k // block, dtype=torch.float16, device=device)
    errors = torch.empty(2, n, k // group, device=device)

    def work(x: Tensor, q: Tensor, scales: Tensor, minima: Tensor, units: Tensor, error: Tensor, least: Tensor) -> None:
        groups, blocks = groups_of(x, group), (len(x), k // block, block // group)
        scale, minimum, best = fit(groups)
        least.copy_((best + groups.square().sum(dim=0)).view(least.shape))
        numbers, c, m, unit, off = nest(groups.view(group, *blocks), scale.view(blocks), minimum.view(blocks))
        q.view(-1, group).copy_(numbers.view(group, -1).T)
        for values, into in ((c, scales), (m, minima), (unit, units), (off, error)):
            into.copy_(values.view(into.shape))

    in_chunks(work, max(1, CHUNK // k), weight, q, scales, minima, units, *errors)
    error, least = errors.double().sum(dim=(1, 2)).tolist()
    if error > NESTED_ERROR * least:
        return quantize_int4(weight, group)
    return GroupedWeight(4, group, q, scales=scales, minima=minima, block_scales=units, block_minima=-units)


def groups_of(x: Tensor, group: int) -> Tensor:
    """[R, K] -> [group, R * K / group] float32: sums over a group are sums of rows."""
    return x.view(-1, group).T.float().contiguous()


def fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [group, M] -> scale and minimum of each of M groups, [M], such that its numbers have the least squared error of
    all candidates once they are rounded; and that error less the sum of x^2."""
    low, high = x.amin(dim=0).clamp_(max=0), x.amax(dim=0)
    total = x.sum(dim=0)
    error = scale = minimum = torch.full_like(total, torch.inf)
    for share in SHARES:
        margin = (high - low) * ((1 - share) / 2)
        new_scale, new_minimum = (high - low) * (share / LEVELS), (low + margin).clamp_(max=0)
        for _ in range(ROUNDS):
            new_error, new_scale, new_minimum = least_squares(x, total, new_scale, new_minimum)
            better = new_error < error
            error = torch.where(better, new_error, error)
            scale = torch.where(better, new_scale, scale)
            minimum = torch.where(better, new_minimum, minimum)
    return scale, minimum, error


def round_to(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The integers of x [group, M], float32 in 0..15."""
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return torch.addcmul(-minimum * inverse, x, inverse).round_().clamp_(0, LEVELS)


def least_squares(x: Tensor, total: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round x [group, M], whose groups sum to `total`, by scale and minimum; the scale and the minimum (at most 0) of
    least squared error for the result, and that error less the sum of x^2. The given ones where a group is all
    alike."""
    n, q = len(x), round_to(x, scale, minimum)
    sum_xq, sum_q, sum_qq = (x * q).sum(dim=0), q.sum(dim=0), q.square_().sum(dim=0)
    determinant = n * sum_qq - sum_q.square()
    best_minimum = (sum_qq * total - sum_q * sum_xq) / determinant
    best_scale = torch.where(best_minimum > 0, sum_xq / sum_qq, (n * sum_xq - total * sum_q) / determinant)
    solved = (determinant > 0) & (best_scale > 0)
    s, m = torch.where(solved, best_scale, scale), torch.where(solved, best_minimum.clamp_(max=0), minimum)
    return s * (s * sum_qq - 2 * sum_xq + 2 * m * sum_q) + m * (n * m - 2 * total), s, m


def encode(values: Tensor, codes: Tensor, block: Tensor) -> Tensor:
    """Fill codes [R, G] and block [R, 1] so that codes * block come close to the values [R, G], all of one sign; return
    what they stand for."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    block.copy_(torch.where(low < 0, low, high) / 255)
    unit = block.float()
    codes.copy_((values / unit).nan_to_num_().round_().clamp_(0, 255))
    return codes * unit
