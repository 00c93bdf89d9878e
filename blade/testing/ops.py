"""The kit for op sets: each op against its formula in float32, over a grid of shapes and dtypes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from blade.contracts import Ops
from blade.testing.draw import check_draw
from blade.testing.logprobs import check_logprobs
from blade.testing.recurrence import check_recurrence
from blade.testing.require import require
from blade.testing.selection import check_selection
from blade.testing.tolerance import require_close
from blade.types import Batch, CaptureOptions, KVCache

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NUM_TOKENS = (1, 2, 7, 33)
_WIDTHS = (16, 64, 96, 576)  # of activations
_EPS = 1e-5


def check_ops(ops: Ops, dtypes: Iterable[torch.dtype] | None = None) -> None:
    """`dtypes` of the activations: float32 and the device's default, unless told otherwise."""
    import torch

    require(bool(ops.name), "an op set needs a name")
    require(ops.available_memory() > 0, "available_memory() must be a positive number of bytes")
    require(ops.to_device(torch.zeros(2)).device.type == ops.device.type, "to_device() does not move to ops.device")
    for dtype in sorted(dtypes or {torch.float32, ops.default_dtype()}, key=str):
        generator = torch.Generator().manual_seed(0)
        for width in _WIDTHS:
            for num_tokens in _NUM_TOKENS:
                x = torch.randn(num_tokens, width, generator=generator).to(dtype)
                _check_linear(ops, x, generator)
                _check_norms(ops, x, generator)
                _check_silu_mul(ops, x)
                _check_sigmoid_mul(ops, x)
            _check_embedding(ops, torch.randn(50, width, generator=generator).to(dtype))
        _check_rows(ops, torch.randn(50, 96, generator=generator).to(dtype))
        _check_norms(ops, torch.randn(5, 4, 64, generator=generator).to(dtype), generator)  # per head: [T, H, D]
        _check_norms(ops, torch.full((3, 64), 1e4, dtype=dtype), generator)  # squares beyond float16
        _check_norms(ops, torch.full((3, 64), 1e-4, dtype=dtype), generator)  # where eps counts
        _check_capture(ops, torch.randn(40, 64, generator=generator).to(dtype))
        _check_experts(ops, dtype, generator)
        check_recurrence(ops, dtype, generator)
        check_selection(ops, dtype, generator)
    _check_argmax(ops)
    check_draw(ops)
    check_logprobs(ops)
    _check_route(ops)


def _check_linear(ops: Ops, x: Tensor, generator: torch.Generator) -> None:
    import torch

    for num_out, with_bias in ((8, False), (80, True), (200, False)):
        weight = torch.randn(num_out, x.shape[1], generator=generator).to(x.dtype)
        bias = torch.randn(num_out, generator=generator).to(x.dtype) if with_bias else None
        expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
        linear = ops.linear(weight.clone(), bias if bias is None else bias.clone())
        require_close("linear", linear(ops.to_device(x)), expected, x.dtype)
        logits = linear(ops.to_device(x), torch.float32)
        require(logits.dtype == torch.float32, f"linear with out_dtype float32 gives {logits.dtype}")
        require_close("linear", logits.to(x.dtype), expected, x.dtype)


def _check_embedding(ops: Ops, weight: Tensor) -> None:
    import torch

    ids = torch.tensor([0, 49, 7, 7])
    require_close("embedding", ops.embedding(weight.clone())(ops.to_device(ids)), weight[ids].float(), weight.dtype)
    if tied := ops.embedding_of(ops.linear(weight.clone(), None), weight.dtype):
        require_close("embedding_of", tied(ops.to_device(ids)), weight[ids].float(), weight.dtype)


def _check_norms(ops: Ops, x: Tensor, generator: torch.Generator) -> None:
    import torch

    residual = torch.randn(x.shape, generator=generator).to(x.dtype)
    weight = torch.randn(x.shape[-1], generator=generator).to(x.dtype)
    on_device = ops.to_device(x.clone())
    normed = ops.rms_norm(on_device, ops.to_device(weight), _EPS)
    require(torch.equal(on_device.cpu(), x), "rms_norm changed its input")
    require_close("rms_norm", normed, _rms_norm(x.float(), weight), x.dtype)
    added = (x.float() + residual.float()).to(x.dtype)  # the sum lives on in the model's dtype
    normed, total = ops.add_rms_norm(
        ops.to_device(x.clone()), ops.to_device(residual.clone()), ops.to_device(weight), _EPS
    )
    require_close("add_rms_norm, the sum", total, added.float(), x.dtype)
    require_close("add_rms_norm", normed, _rms_norm(added.float(), weight), x.dtype, factor=2)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + _EPS).rsqrt() * weight.float()


def _check_silu_mul(ops: Ops, x: Tensor) -> None:
    import torch

    gate_up = torch.cat([x * 30, x.flip(-1)], dim=-1)  # far out, where exp() overflows
    gate, up = gate_up.float().chunk(2, dim=-1)
    require_close("silu_mul", ops.silu_mul(ops.to_device(gate_up)), gate * gate.sigmoid() * up, x.dtype)


def _check_sigmoid_mul(ops: Ops, x: Tensor) -> None:
    for gate in (x.flip(-1) * 30, x[:, -1:]):  # one for each number; one for a row, which lies inside a wider one
        expected = x.float() * gate.float().sigmoid()
        require_close("sigmoid_mul", ops.sigmoid_mul(ops.to_device(x.clone()), ops.to_device(gate)), expected, x.dtype)


def _check_experts(ops: Ops, dtype: torch.dtype, generator: torch.Generator) -> None:
    import torch

    num_experts, width, inner = 6, 64, 96
    gate_up = torch.randn(num_experts, 2 * inner, width, generator=generator).mul(width**-0.5).to(dtype)
    down = torch.randn(num_experts, width, inner, generator=generator).mul(inner**-0.5).to(dtype)
    experts = ops.experts(*([ops.linear(weight.clone(), None) for weight in weights] for weights in (gate_up, down)))
    for num_tokens, k in ((1, 1), (1, 4), (7, 2), (40, 3)):
        x = torch.randn(num_tokens, width, generator=generator).to(dtype)
        ids = torch.stack([torch.randperm(num_experts - 1, generator=generator)[:k] for _ in x])  # the last has no rows
        weights = torch.rand(num_tokens, k, generator=generator)
        expected = torch.zeros(num_tokens, width)
        weighed = torch.zeros(num_tokens, width)  # on their way in
        for row, column in torch.cartesian_prod(torch.arange(num_tokens), torch.arange(k)).tolist():
            expert, share = int(ids[row, column]), weights[row, column]
            matrices = gate_up[expert].float(), down[expert].float()
            expected[row] += share * _feed_forward(x[row].float(), *matrices)
            weighed[row] += _feed_forward((x[row] * share.to(dtype)).float(), *matrices)
        x, ids, weights = map(ops.to_device, (x, ids, weights))
        found = experts(x, ids, weights, weigh_input=True)
        require_close("experts, weigh_input", found, weighed, dtype, factor=4)
        found = experts(x, ids, weights)
        require_close("experts", found, expected, dtype, factor=4)  # what lies between the linears is rounded too
        rows = (slice(i, i + 1) for i in range(len(x)))
        alone = torch.cat([experts(x[row], ids[row], weights[row]) for row in rows])
        require_close("experts, row by row", alone, expected, dtype, factor=4)


def _feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate * gate.sigmoid() * up)


def _check_route(ops: Ops) -> None:
    import torch

    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(0)).mul(2).round()  # many equal values
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    for k in (1, 4, 12):
        shares = logits.softmax(-1).gather(1, order[:, :k])
        for normalize, expected in ((False, shares), (True, shares / shares.sum(-1, keepdim=True))):
            ids, weights = ops.route(ops.to_device(logits), k, normalize)
            require(ids.tolist() == order[:, :k].tolist(), "route: not the largest, or equal ones not by id")
            require_close("route", weights, expected, torch.float32)
        _, weights = ops.route(ops.to_device(logits), k, False, sigmoid=True)
        require_close("route, sigmoid", weights, logits.gather(1, order[:, :k]).sigmoid(), torch.float32)


def _check_rows(ops: Ops, x: Tensor) -> None:
    import torch

    for rows in (torch.tensor([3, 49, 0, 3]), torch.tensor([], dtype=torch.int64)):
        found = ops.take_rows(ops.to_device(x), ops.to_device(rows))
        require(torch.equal(found.cpu(), x[rows]), "take_rows does not give the rows as they are")
    heads, factors, picked = x.view(len(x), -1, 16)[:, 1:4], torch.rand(7) + 1, torch.arange(len(x)) % 7
    scaled = ops.scale_rows(*map(ops.to_device, (heads, factors, picked)))
    require_close("scale_rows", scaled, heads.float() * factors[picked][:, None, None], x.dtype)
    for start in (0, 32):  # a row by itself, and one that lies inside a wider one
        out, expected = (torch.zeros(len(x), x.shape[1] + start, dtype=x.dtype) for _ in range(2))
        expected[:, start:] = x
        out = ops.to_device(out)
        ops.copy_rows(ops.to_device(x), out[:, start:])
        require(torch.equal(out.cpu(), expected), "copy_rows does not copy the rows as they are")
    for at in (None, torch.tensor([3, 49, 0])):
        expected, added = x.clone(), x.flip(0)[: len(x) if at is None else len(at)].contiguous()
        expected[slice(None) if at is None else at] += added
        y = ops.to_device(x.clone())
        ops.add_rows(y, None if at is None else ops.to_device(at), ops.to_device(added))
        require_close("add_rows", y, expected.float(), x.dtype)


def _check_argmax(ops: Ops) -> None:
    import torch

    logits = torch.randn(5, 1003, generator=torch.Generator().manual_seed(0)).mul(3).round()  # many equal values
    logits[1, 1:] = -torch.inf
    values, ids = ops.argmax(ops.to_device(logits.clone()))
    require(values.tolist() == logits.amax(-1).tolist(), "argmax: these are not the largest values")
    require(ids.tolist() == logits.argmax(-1).tolist(), "argmax: these are not the first ids of the largest values")
    for place, bad in ((3, torch.nan), (700, torch.inf), (1002, torch.nan)):
        spoilt = logits.clone()
        spoilt[2, place] = bad
        values, _ = ops.argmax(ops.to_device(spoilt))
        finite = values.isfinite().tolist()
        require(finite == [True, True, False, True, True], f"argmax: {bad} in a row must show in its value alone")


class _OneLayer:
    """contracts.Model without attention."""

    def __init__(self, ops: Ops, table: Tensor) -> None:
        import torch

        self.config: Any = None
        self.ops = ops
        self.embed, self.head = ops.embedding(table.clone()), ops.linear(table.clone(), None)
        self.weight = ops.to_device(torch.ones(table.shape[1], dtype=table.dtype))

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        import torch

        x = self.embed(batch.input_ids)
        normed, x = self.ops.add_rms_norm(self.ops.rms_norm(x, self.weight, _EPS), x, self.weight, _EPS)
        return self.head(self.ops.take_rows(normed, batch.logits_rows), torch.float32)


def _check_capture(ops: Ops, table: Tensor) -> None:
    """Steps of changing lengths and contents, each shape several times."""
    import torch

    model = _OneLayer(ops, table)
    captured = ops.capture(model, [], CaptureOptions(batch_sizes=(1, 2), max_context=16))
    for turn in range(8):
        batch = _batch(ops, num_tokens=1 + turn % 3, start=turn)
        expected = model.forward(batch, []).clone()
        require(torch.equal(captured(batch), expected), "capture: not what forward gives for the same batch")


def _batch(ops: Ops, num_tokens: int, start: int) -> Batch:
    """One sequence with `num_tokens` tokens."""
    import torch

    at = torch.arange(num_tokens)
    return Batch(
        input_ids=ops.to_device(at + 3 * start),
        positions=ops.to_device(at),
        slots=ops.to_device(at),
        cu_seqlens=ops.to_device(torch.tensor([0, num_tokens], dtype=torch.int32)),
        context_lens=ops.to_device(torch.tensor([num_tokens], dtype=torch.int32)),
        block_tables=ops.to_device(torch.zeros(1, 1, dtype=torch.int32)),
        logits_rows=ops.to_device(at.flip(0)[:1]),
        query_lens=[num_tokens],
        kv_lens=[num_tokens],
    )
