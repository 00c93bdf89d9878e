"""The part of the kit for op sets that is about recurrent layers: ragged batches over slots, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blade.testing.require import require
from blade.testing.tolerance import require_close
from blade.types import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blade.contracts import Ops

_NUM_SLOTS = 9
_BATCHES = [  # per sequence: (tokens, state_in, state_out)
    [(1, 3, 5)],
    [(1, -1, 0), (1, 8, 2), (1, 4, -1), (1, 1, 6)],
    [(2, 7, 0), (5, -1, 3), (1, 1, 8), (3, 2, 4)],
    [(70, -1, 8), (1, 6, 0), (67, 2, 1)],
]
_HEADS = [(2, 4, 32, 48), (1, 1, 64, 32)]  # HK, HV, DK, DV
_LARGE_HEADS = (2, 6, 128, 128)  # as of real models; once, for they take their time


def check_recurrence(ops: Ops, dtype: torch.dtype, generator: torch.Generator) -> None:
    for sequences in _BATCHES:
        for channels, window in ((32, 4), (80, 2), (48, 3)):
            _check_short_conv(ops, sequences, channels, window, dtype, generator)
        for heads in _HEADS:
            _check_gated_delta(ops, sequences, heads, dtype, generator)
    _check_gated_delta(ops, _BATCHES[2], _LARGE_HEADS, dtype, generator)
    _check_gated_rms_norm(ops, dtype, generator)


def _check_short_conv(
    ops: Ops,
    sequences: list[tuple[int, int, int]],
    channels: int,
    window: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    import torch

    num_tokens = sum(length for length, _, _ in sequences)
    wide = torch.randn(num_tokens, channels + 16, generator=generator).to(dtype)
    weight = torch.randn(channels, window, generator=generator).to(dtype)
    state = torch.randn(_NUM_SLOTS, channels, window - 1, generator=generator).to(dtype)
    x, after, expected = wide[:, :channels], state.clone(), []
    for rows, slot_in, slot_out in _spans(sequences):
        held = torch.zeros_like(state[0]) if slot_in < 0 else state[slot_in]
        inputs = torch.cat((held, x[rows].T), dim=1)
        for i in range(inputs.shape[1] - window + 1):
            mixed = (inputs[:, i : i + window].float() * weight.float()).sum(1)
            expected.append(mixed * mixed.sigmoid())
        if slot_out >= 0:
            after[slot_out] = inputs[:, inputs.shape[1] - window + 1 :]
    on_device = ops.to_device(state.clone())
    found = ops.short_conv(ops.to_device(wide)[:, :channels], ops.to_device(weight), _batch(ops, sequences), on_device)
    kept = _kept_rows(sequences)
    require_close("short_conv", found[kept], torch.stack(expected)[kept], dtype)
    require(torch.equal(on_device.cpu(), after), "short_conv: the state is not the last inputs, or lies elsewhere")


def _check_gated_delta(
    ops: Ops,
    sequences: list[tuple[int, int, int]],
    heads: tuple[int, int, int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    import torch

    num_k_heads, num_heads, key_dim, value_dim = heads
    num_tokens = sum(length for length, _, _ in sequences)
    widths = (num_k_heads * key_dim, num_k_heads * key_dim, num_heads * value_dim)
    mixed = torch.randn(num_tokens, sum(widths), generator=generator).to(dtype)
    gates = torch.randn(num_tokens, 2 * num_heads, generator=generator).mul(2).to(dtype)
    decay = -torch.rand(num_heads, generator=generator)
    dt_bias = torch.randn(num_heads, generator=generator)
    state = torch.randn(_NUM_SLOTS, num_heads, key_dim, value_dim, generator=generator)

    def parts(mixed: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v = torch.split_with_sizes(mixed, widths, dim=1)
        a, b = torch.split_with_sizes(gates, [num_heads, num_heads], dim=1)
        q, k = (x.view(num_tokens, num_k_heads, key_dim) for x in (q, k))
        return q, k, v.view(num_tokens, num_heads, value_dim), a, b

    after, expected = state.clone(), torch.empty(num_tokens, num_heads, value_dim)
    inputs = [x.float() for x in parts(mixed, gates)]
    for rows, slot_in, slot_out in _spans(sequences):
        held = torch.zeros_like(state[0]) if slot_in < 0 else state[slot_in]
        for row in range(rows.start, rows.stop):
            held, expected[row] = _delta(held, [x[row] for x in inputs], decay, dt_bias)
        if slot_out >= 0:
            after[slot_out] = held
    on_device = ops.to_device(state.clone())
    found = ops.gated_delta(
        *parts(ops.to_device(mixed), ops.to_device(gates)),
        ops.to_device(decay),
        ops.to_device(dt_bias),
        _batch(ops, sequences),
        on_device,
    )
    kept = _kept_rows(sequences)
    require_close("gated_delta", found[kept], expected[kept], dtype, factor=2)
    untouched = [slot for slot in range(_NUM_SLOTS) if slot not in {out for _, _, out in sequences}]
    require(torch.equal(on_device.cpu()[untouched], state[untouched]), "gated_delta writes to another's slot")
    require_close("gated_delta, the state", on_device, after, torch.float32, factor=4)


def _delta(held: Tensor, token: list[Tensor], decay: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The state [HV, DK, DV] after a token, and its output [HV, DV]."""
    import torch

    q, k, v, a, b = token
    groups = len(v) // len(k)
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(groups, dim=0) for x in (q, k))
    held = held * torch.exp(decay * torch.nn.functional.softplus(a + dt_bias))[:, None, None]
    read = torch.einsum("hkv,hk->hv", held, k)
    held = held + torch.einsum("hk,hv->hkv", k, (v - read) * b.sigmoid()[:, None])
    return held, torch.einsum("hkv,hk->hv", held, q) * q.shape[-1] ** -0.5


def _check_gated_rms_norm(ops: Ops, dtype: torch.dtype, generator: torch.Generator) -> None:
    import torch

    for num_tokens, num_heads, width in ((1, 2, 64), (7, 3, 128), (33, 1, 32)):
        x = torch.randn(num_tokens, num_heads, width, generator=generator).to(dtype)
        wide = torch.randn(num_tokens, 2 * num_heads * width, generator=generator).mul(10).to(dtype)
        weight = torch.randn(width, generator=generator).to(dtype)

        def gate(wide: Tensor, x: Tensor = x) -> Tensor:
            return wide[:, : x[0].numel()].view(x.shape)

        normed = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.float()
        expected = normed * torch.nn.functional.silu(gate(wide).float())
        found = ops.gated_rms_norm(ops.to_device(x), gate(ops.to_device(wide)), ops.to_device(weight), 1e-5)
        require_close("gated_rms_norm", found, expected, dtype)


def _spans(sequences: list[tuple[int, int, int]]) -> list[tuple[slice, int, int]]:
    ends = [sum(length for length, _, _ in sequences[: i + 1]) for i in range(len(sequences))]
    return [
        (slice(end - length, end), slot_in, slot_out)
        for end, (length, slot_in, slot_out) in zip(ends, sequences, strict=True)
    ]


def _kept_rows(sequences: list[tuple[int, int, int]]) -> list[int]:
    """Of the tokens that are no padding."""
    return [row for rows, _, slot in _spans(sequences) if slot >= 0 for row in range(rows.start, rows.stop)]


def _batch(ops: Ops, sequences: list[tuple[int, int, int]]) -> Batch:
    import torch

    def ints(values: list[int]) -> Tensor:
        return ops.to_device(torch.tensor(values, dtype=torch.int32))

    lengths, slots_in, slots_out = (list(column) for column in zip(*sequences, strict=True))
    ends = [rows.stop for rows, _, _ in _spans(sequences)]
    places = ops.to_device(torch.cat([torch.arange(length) for length in lengths]))
    return Batch(
        input_ids=places,
        positions=places,
        slots=places,
        cu_seqlens=ints([0, *ends]),
        context_lens=ints(lengths),
        block_tables=ints([0] * len(lengths))[:, None],
        logits_rows=ops.to_device(torch.tensor(ends)) - 1,
        query_lens=lengths,
        kv_lens=lengths,
        state_in=ints(slots_in),
        state_out=ints(slots_out),
    )
