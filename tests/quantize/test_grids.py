"""Numbers rounded as the formulas say, and words packed as compressed-tensors reads them."""

from __future__ import annotations

import re
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch

from blade_quantize import grids, layout
from blade_quantize.grids import Float8Grid, IntGrid
from blade_quantize.scheme import Algo, Kind, Mode, Scheme

GROUP = 32


def matrix(n: int = 5, k: int = 96) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, k) * torch.rand(n, 1) + 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_integers(bits: int) -> None:
    w, grid = matrix(), IntGrid(bits, True, torch.float32)
    scales, zeros = grids.fit(w, GROUP, grid)
    codes = grids.round_matrix(w, scales, zeros, grid)
    groups = w.numpy().reshape(5, 3, GROUP)
    scale = np.abs(groups).max(2) / ((2**bits - 1) / 2)
    wanted = np.clip(np.round(groups / scale[..., None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    np.testing.assert_allclose(scales.numpy(), scale, rtol=1e-6)
    np.testing.assert_array_equal(codes.numpy(), wanted.reshape(5, 96))
    assert not zeros.any()


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_with_zero_points(bits: int) -> None:
    w, grid = matrix().abs() - 0.05, IntGrid(bits, False, torch.float32)
    scales, zeros = grids.fit(w, GROUP, grid)
    codes = grids.round_matrix(w, scales, zeros, grid)
    groups = w.numpy().reshape(5, 3, GROUP)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-(2 ** (bits - 1)) - low / scale)
    wanted = np.clip(np.round(groups / scale[..., None] + zero[..., None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    np.testing.assert_array_equal(zeros.numpy(), zero)
    assert (np.abs(codes.numpy() - wanted.reshape(5, 96)) <= 1).all()  # halves, by other divisions
    error = grids.values(codes, scales, zeros).sub(w).abs().view(5, 3, GROUP)
    assert (error <= scales[..., None] * 1.01).all()


def test_8_bit_floats() -> None:
    w, grid = matrix(), Float8Grid(torch.float32)
    scales, zeros = grids.fit(w, 96, grid)
    codes = grids.round_matrix(w, scales, zeros, grid)
    assert torch.equal(codes, (w * (448 / w.abs().amax(1, keepdim=True))).to(torch.float8_e4m3fn).float())
    assert grids.values(codes, scales, zeros).sub_(w).abs().le(w.abs() / 16 + scales * 2**-9).all()


def test_scales_are_ones_that_can_be_stored() -> None:
    w, grid = matrix(), IntGrid(4, True, torch.bfloat16)
    w[2, :GROUP] = 0
    scales, zeros = grids.fit(w, GROUP, grid)
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    codes = grids.round_matrix(w, scales, zeros, grid)
    assert grids.values(codes, scales, zeros)[2, :GROUP].eq(0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_weighed_errors_are_smaller_with_the_scale_that_was_found(symmetric: bool) -> None:
    w, grid = matrix(20), IntGrid(4, symmetric, torch.float32)
    importance = torch.rand(96) ** 4

    def error(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rounded = grids.values(grids.round_matrix(w, *found, grid), *found)
        return ((rounded - w).square() * importance).view(20, 3, GROUP).sum(-1)

    whole, found = error(grids.fit(w, GROUP, grid)), error(grids.fit(w, GROUP, grid, importance))
    assert (found <= whole * (1 + 1e-5)).all()
    assert found.sum() < 0.9 * whole.sum()


@pytest.mark.parametrize(("bits", "columns"), [(4, 16), (4, 21), (8, 8), (8, 6)])
def test_words_hold_codes_from_the_low_bits_up(bits: int, columns: int) -> None:
    torch.manual_seed(0)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (3, columns)).float()
    words = layout.pack(codes, bits)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum((int(code) - low) << (bits * i) for i, code in enumerate(row))
        assert [word % 2**32 for word in packed] == [(number >> 32 * i) % 2**32 for i in range(len(packed))]
    assert words.dtype == torch.int32
    assert torch.equal(layout.unpack(words, bits, columns), codes)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"bits": 4, "kind": "fp8"}, "--type fp8 has 8 bits"),
    ({"kind": "fp8", "group": 64}, "one scale for each row"),
    ({"kind": "fp8", "symmetric": False}, "no zero points"),
    ({"kind": "fp8", "algo": "awq"}, "--algo awq balances"),
    ({"mode": "weight-and-activation", "bits": 4}, "is for 8 bits"),
    ({"mode": "weight-and-activation", "group": 32}, "one scale for each row"),
    ({"mode": "weight-and-activation", "symmetric": False}, "no zero points"),
    ({"mode": "weight-and-activation", "algo": "awq"}, "weights alone"),
    ({"algo": "smoothquant"}, "--algo smoothquant moves the outliers"),
    ({"algo": "smoothquant+gptq", "bits": 4}, r"--algo smoothquant\+gptq moves the outliers"),
]


@pytest.mark.parametrize(("options", "message"), CASES)
def test_schemes_that_no_server_runs(options: dict[str, Any], message: str) -> None:
    from blade import ConfigError

    with pytest.raises(ConfigError, match=message):
        Scheme(**options)


def test_every_combination_is_taken_or_refused_by_the_name_of_an_option() -> None:
    from blade import ConfigError

    combinations = product(get_args(Algo), (8, 4), get_args(Kind), get_args(Mode), (None, 32), (True, False))
    taken, refused = [], []
    for algo, bits, kind, mode, group, symmetric in combinations:
        try:
            taken.append(str(Scheme(algo, bits, kind, mode, group, symmetric)))
        except ConfigError as error:
            refused.append(str(error))
    assert all(re.match(r"--(algo|bits|type|mode|group|symmetric) .+(Use|Leave|Add) --", words) for words in refused)
    integers, floats, both = 3 * 2 * 2 * 2, 2, 2 * 4
    assert len(set(taken)) == len(taken) == integers + floats + both
