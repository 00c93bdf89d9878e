"""GPTQ against what it is to beat and against its own definition; scales that smooth, against theirs."""

from __future__ import annotations

import pytest
import torch

from blade_quantize import grids
from blade_quantize.gptq import gptq, inverse_factor
from blade_quantize.grids import Float8Grid, Grid, IntGrid
from blade_quantize.smoothing import awq, smooth

N, K, TOKENS, GROUP = 24, 160, 400, 32
GRIDS = [IntGrid(4, True, torch.float32), IntGrid(4, False, torch.float32), Float8Grid(torch.float32)]


def correlated() -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K] and x [TOKENS, K] whose channels depend on each other and differ in size."""
    torch.manual_seed(0)
    mix = torch.randn(K // 4, K) + 0.1 * torch.eye(K)[: K // 4]
    x = torch.randn(TOKENS, K // 4) @ mix + 0.05 * torch.randn(TOKENS, K)
    return torch.randn(N, K), x * torch.logspace(-1, 1, K)


def output_error(w: torch.Tensor, rounded: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (w - rounded).T).square().sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_columns_make_up_for_each_other(grid: Grid) -> None:
    w, x = correlated()
    group = K if isinstance(grid, Float8Grid) else GROUP
    scales, zeros = grids.fit(w, group, grid)
    plain = grids.values(grids.round_matrix(w, scales, zeros, grid), scales, zeros)
    solved = grids.values(gptq(w, x.T @ x, scales, zeros, grid), scales, zeros)
    assert output_error(w, solved, x) < 0.3 * output_error(w, plain, x)


def test_without_correlation_nothing_is_to_be_made_up_for() -> None:
    w, _ = correlated()
    grid = GRIDS[0]
    scales, zeros = grids.fit(w, GROUP, grid)
    hessian = torch.diag(torch.rand(K) + 0.5)
    assert torch.equal(gptq(w, hessian, scales, zeros, grid), grids.round_matrix(w, scales, zeros, grid))


def test_codes_stay_on_the_grid_and_idle_channels_do_no_harm() -> None:
    w, x = correlated()
    x[:, 7] = 0
    x[:, 40:60] = 0
    grid = IntGrid(4, True, torch.float32)
    scales, zeros = grids.fit(w, GROUP, grid)
    codes = gptq(w, x.T @ x, scales, zeros, grid)
    assert torch.equal(codes, codes.round().clamp(-8, 7))


def test_fewer_tokens_than_channels() -> None:
    w, x = correlated()
    grid = GRIDS[0]
    scales, zeros = grids.fit(w, GROUP, grid)
    plain = grids.values(grids.round_matrix(w, scales, zeros, grid), scales, zeros)
    solved = grids.values(gptq(w, x[:5].T @ x[:5], scales, zeros, grid), scales, zeros)
    assert output_error(w, solved, x[:5]) < 0.1 * output_error(w, plain, x[:5])


def test_the_factor_of_the_inverse() -> None:
    _, x = correlated()
    hessian = (x.T @ x).double() / TOKENS + torch.eye(K)
    factor = inverse_factor(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-7)


def test_awq_spares_channels_that_are_active() -> None:
    torch.manual_seed(1)
    w, x = torch.randn(N, K), torch.randn(TOKENS, K)
    x[:, ::20] *= 50
    grid = IntGrid(4, True, torch.float32)
    s = awq(w, x, GROUP, grid)

    def rounded(w: torch.Tensor) -> torch.Tensor:
        found = grids.fit(w, GROUP, grid)
        return grids.values(grids.round_matrix(w, *found, grid), *found)

    assert s[::20].min() > s[1::20].max()
    assert output_error(w, rounded(w * s) / s, x) < 0.7 * output_error(w, rounded(w), x)


def test_smoothquant_balances_what_it_multiplies() -> None:
    w, x = correlated()
    x[:, 3] = 0
    s = smooth(w, x)
    active, weight = (x / s).abs().amax(0), (w * s).abs().amax(0)
    alive = torch.arange(K) != 3
    torch.testing.assert_close(active[alive], weight[alive])
    assert s[3] == 1
