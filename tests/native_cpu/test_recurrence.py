"""Ops of recurrent layers against their torch twins, and against themselves: chunk by chunk, alone, captured."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from blade import Batch
from blade.nn import DefaultOps
from blade_native.simd import capture
from blade_native.simd.ops import SimdOps

from .batches import ragged

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}
LENGTHS = [[1], [2], [7, 1], [33, 1, 200], [1] * 5]
HEADS = [(1, 1, 16, 16), (2, 4, 20, 48), (1, 3, 33, 80), (2, 4, 128, 128)]  # HK, HV, DK, DV
NUM_SLOTS = 12


def slotted(lengths: list[int], state_in: list[int], state_out: list[int]) -> Batch:
    batch = ragged(lengths, lengths, 16)
    batch.input_ids = torch.randint(50, (sum(lengths),))
    batch.state_in, batch.state_out = (torch.tensor(x, dtype=torch.int32) for x in (state_in, state_out))
    return batch


def some_slots(lengths: list[int]) -> Batch:
    """Sequences that begin and that go on, each with slots of its own."""
    state_in = [-1 if i % 3 == 1 else 2 * i + 1 for i in range(len(lengths))]
    return slotted(lengths, state_in, [2 * i for i in range(len(lengths))])


class Delta(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    decay: Tensor
    dt_bias: Tensor

    def rows(self, start: int, stop: int) -> Delta:
        return Delta(*(x[start:stop] for x in self[:5]), self.decay, self.dt_bias)  # type: ignore[arg-type]


def delta_inputs(num_tokens: int, heads: tuple[int, int, int, int], dtype: torch.dtype) -> Delta:
    """Slices of fused projections."""
    hk, hv, dk, dv = heads
    mixed = torch.randn(num_tokens, 2 * hk * dk + hv * dv + 5).to(dtype)
    gates = torch.randn(num_tokens, 2 * hv).mul(3).to(dtype)
    q, k, v, _ = mixed.split_with_sizes((hk * dk, hk * dk, hv * dv, 5), dim=1)
    q, k = (x.unflatten(1, (hk, dk)) for x in (q, k))
    a, b = gates.chunk(2, dim=1)
    return Delta(q, k, v.unflatten(1, (hv, dv)), a, b, -4 * torch.rand(hv), torch.randn(hv))


def require_close(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype is want.dtype
    torch.testing.assert_close(found, want, rtol=0, atol=TOLERANCE[dtype] * max(1e-3, float(want.abs().max())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 100, 7, 130])
@pytest.mark.parametrize("window", [2, 3, 4, 5])  # 5 has no kernel
def test_short_conv(ops: SimdOps, window: int, channels: int, dtype: torch.dtype) -> None:
    weight = torch.randn(channels, window).to(dtype)
    for lengths in LENGTHS:
        batch = some_slots(lengths)
        x = torch.randn(sum(lengths), channels + 3).to(dtype)[:, :channels]
        states = torch.randn(2, NUM_SLOTS, channels, window - 1).to(dtype)
        states[1] = states[0]
        y, want = (each.short_conv(x, weight, batch, states[i]) for i, each in enumerate((ops, DefaultOps())))
        require_close(y, want, dtype)
        assert torch.equal(*states)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_gated_delta(ops: SimdOps, heads: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    _, hv, dk, dv = heads
    for lengths in LENGTHS:
        batch, inputs = some_slots(lengths), delta_inputs(sum(lengths), heads, dtype)
        states = torch.randn(2, NUM_SLOTS, hv, dk, dv)
        states[1] = states[0]
        before = states[0].clone()
        y, want = (each.gated_delta(*inputs, batch, states[i]) for i, each in enumerate((ops, DefaultOps())))
        require_close(y, want, dtype)
        require_close(*states, torch.float32)
        others = [slot for slot in range(NUM_SLOTS) if slot not in batch.state_out.tolist()]  # type: ignore[union-attr]
        assert torch.equal(states[0][others], before[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_rows_store_nothing(ops: SimdOps, dtype: torch.dtype) -> None:
    batch = slotted([1, 3], [4, 5], [-1, -1])
    state = torch.randn(NUM_SLOTS, 2, 16, 32)
    before = state.clone()
    ops.gated_delta(*delta_inputs(4, (1, 2, 16, 32), dtype), batch, state)
    assert torch.equal(state, before)
    held = torch.randn(NUM_SLOTS, 40, 3).to(dtype)
    kept = held.clone()
    ops.short_conv(torch.randn(4, 40).to(dtype), torch.randn(40, 4).to(dtype), batch, held)
    assert torch.equal(held, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [[50], [1] * 50, [2, 3, 44, 1], [48, 2]], ids=str)
def test_chunks_and_company_change_no_bit(ops: SimdOps, cuts: list[int], dtype: torch.dtype) -> None:
    heads, channels = (2, 4, 24, 48), 70
    inputs, weight = delta_inputs(50, heads, dtype), torch.randn(channels, 4).to(dtype)
    x = torch.randn(50, channels).to(dtype)
    state, held = torch.randn(NUM_SLOTS, 4, 24, 48), torch.randn(NUM_SLOTS, channels, 3).to(dtype)
    state[5], held[5] = state[4], held[4]
    company = delta_inputs(9, heads, dtype)
    both = Delta(*(torch.cat(pair) for pair in zip(company[:5], inputs[:5], strict=True)), *inputs[5:])  # type: ignore[arg-type]
    batch = slotted([8, 1, 50], [1, -1, 4], [2, 3, 0])
    want = ops.gated_delta(*both, batch, state)[9:]
    want_conv = ops.short_conv(torch.cat((torch.randn(9, channels).to(dtype), x)), weight, batch, held)[9:]
    start, slots = 0, (5, 6)
    for length in cuts:
        batch = slotted([length], [slots[0]], [slots[1]])
        y = ops.gated_delta(*inputs.rows(start, start + length), batch, state)
        assert torch.equal(y, want[start : start + length])
        y = ops.short_conv(x[start : start + length], weight, batch, held)
        assert torch.equal(y, want_conv[start : start + length])
        start, slots = start + length, (slots[1], slots[0])
    assert torch.equal(state[slots[0]], state[0])
    assert torch.equal(held[slots[0]], held[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 64), (7, 3, 100), (33, 1, 7), (200, 4, 128)], ids=str)
def test_gated_rms_norm(ops: SimdOps, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, heads, d = shape
    x, weight = torch.randn(shape).to(dtype), torch.randn(d).to(dtype)
    gate = (10 * torch.randn(tokens, 2 * heads * d)).to(dtype)[:, : heads * d].unflatten(1, (heads, d))
    require_close(ops.gated_rms_norm(x, gate, weight, 1e-6), DefaultOps().gated_rms_norm(x, gate, weight, 1e-6), dtype)


def test_extreme_gates(ops: SimdOps) -> None:
    """What overflows an exponential is a decay to nothing, or none."""
    inputs = delta_inputs(2, (1, 1, 16, 16), torch.float32)
    for a, b in ((1e30, 1e30), (-1e30, -1e30), (100.0, -100.0)):
        inputs.a[:], inputs.b[:] = a, b
        states = torch.randn(1, NUM_SLOTS, 1, 16, 16).repeat(2, 1, 1, 1, 1)
        y, want = (
            each.gated_delta(*inputs, slotted([2], [1], [0]), states[i]) for i, each in enumerate((ops, DefaultOps()))
        )
        assert y.isfinite().all()
        require_close(y, want, torch.float32)
        require_close(*states, torch.float32)


def test_recurrent_steps_are_captured_with_their_slots(ops: SimdOps) -> None:
    embed, heads = ops.embedding(torch.randn(50, 64)), (2, 4, 16, 16)
    mix, gates = ops.linear(torch.randn(128, 64), None), ops.linear(torch.randn(8, 64), None)
    conv, norm = torch.randn(128, 4), torch.ones(16)
    decay, dt_bias = -torch.rand(4), torch.randn(4)
    states = torch.randn(2, NUM_SLOTS, 4, 16, 16), torch.randn(2, NUM_SLOTS, 128, 3)
    for state in states:
        state[1] = state[0]
    calls = 0

    def forward(batch: Batch, kind: int) -> Tensor:
        nonlocal calls
        calls += 1
        x = embed(batch.input_ids)
        mixed = ops.short_conv(mix(x), conv, batch, states[1][kind])
        q, k, v = mixed.split_with_sizes((32, 32, 64), dim=1)
        q, k = (y.unflatten(1, (heads[0], heads[2])) for y in (q, k))
        v = v.unflatten(1, (heads[1], heads[3]))
        a, b = gates(x).split_with_sizes((4, 4), dim=1)
        y = ops.gated_delta(q, k, v, a, b, decay, dt_bias, batch, states[0][kind])
        return ops.take_rows(ops.gated_rms_norm(y, v, norm, 1e-6).flatten(1), batch.logits_rows)

    captured = capture.CapturedForward(lambda batch: forward(batch, 1), ops.library)
    for turn in range(7):
        lengths = [1, 2] if turn % 2 else [1]
        slots = [-1, 3] if turn % 3 == 0 else [2 + turn % 4, 1]
        batch = slotted(lengths, slots[: len(lengths)], [10 - turn, 11][: len(lengths)])
        want = forward(batch, 0)
        assert torch.equal(captured(batch), want)
    assert calls == 7 + 2 * 2
    assert all(torch.equal(state[0], state[1]) for state in states)


def test_wrong_input_is_refused(ops: SimdOps) -> None:
    batch, inputs = slotted([3], [0], [1]), delta_inputs(3, (1, 2, 16, 16), torch.float32)
    state = torch.zeros(4, 2, 16, 16)
    with pytest.raises(TypeError, match="state is"):
        ops.gated_delta(*inputs, batch, state.bfloat16())
    with pytest.raises(ValueError, match="state has shape"):
        ops.gated_delta(*inputs, batch, state[:, :1])
    with pytest.raises(TypeError, match="q is"):
        ops.gated_delta(*inputs._replace(q=inputs.q.bfloat16()), batch, state)
    with pytest.raises(ValueError, match="side by side"):
        ops.gated_delta(*inputs._replace(a=torch.zeros(2, 3).T), batch, state)
    with pytest.raises(ValueError, match="do not divide"):
        ops.gated_delta(*delta_inputs(3, (2, 3, 16, 16), torch.float32), batch, torch.zeros(4, 3, 16, 16))
    batch.state_in = None
    with pytest.raises(ValueError, match="slots of states"):
        ops.short_conv(torch.zeros(3, 8), torch.zeros(8, 4), batch, torch.zeros(4, 8, 3))
