"""4-bit numbers nested in 8-bit ones: w = unit * (c * q - m), with a unit for 128 numbers of a row and whole c and m
for each group of these.

That is the progressive group quantisation of QServe (Lin et al. 2024), with units for less than a row: kernels turn
such numbers into bytes and multiply those, without a scale for each group. The integer fits a signed byte whatever q
is.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 15  # of q
MOST_SCALE = 16  # of 4 bits, and 15 * 16 is less than a byte holds
BLOCK = 128  # numbers of a row that share a unit, at most
SHARES = tuple(1 + 0.03 * i for i in range(9))  # of the least unit: other ones may suit the scales better
ROUNDS = 3  # of rounding and fitting the minimum, for each of two scales


def nest(x: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [group, .., G] float32, G groups of a block, with the scale and the minimum [.., G] that would be best for each
    group -> its q, like x; c and m [.., G]; unit [.., 1] float16; and the squared errors [.., G]."""
    unit = unit_of(scale, minimum)
    inverse = torch.where(unit > 0, 1 / unit.float(), 0)
    x, scale = x * inverse, scale * inverse
    error = best_c = best_m = torch.full_like(scale, torch.inf)
    for add in (0, 1):
        c = (scale.floor() + add).clamp_(1, MOST_SCALE)
        m = (minimum * -inverse).round_()
        for _ in range(ROUNDS):
            m = torch.maximum(m, LEVELS * c - 127).clamp_(0, 128)
            off = c * round_to(x, c, m) - x
            new_error = (off - m).square_().sum(dim=0)
            better = new_error < error
            error = torch.where(better, new_error, error)
            best_c, best_m = torch.where(better, c, best_c), torch.where(better, m, best_m)
            m = (off.sum(dim=0) / len(x)).round_()
    return round_to(x, best_c, best_m), best_c, best_m, unit, error * unit.float().square()


def unit_of(scale: Tensor, minimum: Tensor) -> Tensor:
    """[.., G] each -> the unit [.., 1] float16 by whole multiples of which the scales are met best, of those that leave
    no group without the range it wants."""
    least = torch.maximum(minimum / -128, (LEVELS * scale + minimum) / 127)
    least = torch.maximum(least, scale / MOST_SCALE).amax(dim=-1, keepdim=True)
    unit = least.half()
    error = torch.full_like(least, torch.inf)
    for share in SHARES:
        new_unit = (least * share).half()
        c = (scale / new_unit.float()).round_().clamp_(1, MOST_SCALE)
        new_error = (c * new_unit.float() - scale).square_().sum(dim=-1, keepdim=True)
        unit = torch.where(new_error < error, new_unit, unit)
        error = torch.minimum(new_error, error)  # NaN where all are zeros: the unit is 0
    return unit


def block_of(k: int, group: int) -> int:
    """Numbers that share a unit, whole groups that divide rows of K."""
    block = group
    while 2 * block <= BLOCK and k % (2 * block) == 0:
        block *= 2
    return block


def round_to(x: Tensor, c: Tensor, m: Tensor) -> Tensor:
    """The q of x, in units: float32 in 0..15."""
    return torch.mul(x + m, 1 / c).round_().clamp_(0, LEVELS)
