"""Captured passes give what the pass gives, and passes that cannot be captured are left as they are."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blade import Batch
from blade.nn.grouped import SideBySide
from blade_native.attention import PagedAttention
from blade_native.simd import capture
from blade_native.simd.arena import Buffer, Use, pack
from blade_native.simd.attention import SimdAttention
from blade_native.simd.ops import SimdOps

from .batches import ragged, spec

D, HEADS, KV_HEADS, VOCAB = 64, 4, 2, 50


class Model:
    """One layer of everything."""

    def __init__(self, ops: SimdOps) -> None:
        self.ops = ops
        self.attention = SimdAttention(PagedAttention(torch.device("cpu")), ops.library, ops.threads)
        self.kv = self.attention.allocate(spec(HEADS, KV_HEADS, D // HEADS, "float32"), 40)[0]
        self.cos_sin, self.sharpness = torch.randn(200, D // HEADS), torch.rand(200)
        self.norm = torch.ones(D)
        self.head = ops.linear(torch.randn(VOCAB, D), None)
        self.embed = ops.embedding_of(self.head, torch.float32)
        self.qkv = ops.linear(torch.randn(2 * D, D), None)
        self.gate_up, self.down = ops.linear(torch.randn(4 * D, D), None), ops.linear(torch.randn(D, 2 * D), None)
        self.num_calls = 0

    def __call__(self, batch: Batch) -> Tensor:
        self.num_calls += 1
        residual = self.embed(batch.input_ids)
        heads = self.qkv(self.ops.rms_norm(residual, self.norm, 1e-6)).view(len(residual), -1, D // HEADS)
        q, k, v = heads.split_with_sizes((HEADS, KV_HEADS, KV_HEADS), dim=1)
        q = self.ops.scale_rows(q, self.sharpness, batch.positions)
        q, k = self.attention.rope_and_store(q, k, v, self.cos_sin, batch, self.kv)
        x = self.attention.attend(q, k, v, batch, self.kv, 0.25, None)
        x, residual = self.ops.add_rms_norm(x, residual, self.norm, 1e-6)
        x = self.down(self.ops.silu_mul(self.gate_up(x)))
        x, _ = self.ops.add_rms_norm(x, residual, self.norm, 1e-6)
        return self.head(self.ops.take_rows(x, batch.logits_rows), torch.float32)


def step(query_lens: list[int], kv_lens: list[int]) -> Batch:
    batch = ragged(query_lens, kv_lens, 16)
    batch.input_ids = torch.randint(VOCAB, (sum(query_lens),))
    return batch


@pytest.fixture
def model(ops: SimdOps) -> Model:
    return Model(ops)


def test_replays_are_the_pass_to_the_last_bit(model: Model) -> None:
    """Shapes take turns, contexts and tables change; the cache holds whatever the passes before stored."""
    captured = capture.CapturedForward(model, model.ops.library)
    for length in range(20, 32):
        for query_lens, kv_lens in (([1], [length]), ([1, 1], [length, 90]), ([3, 1], [length, 5])):
            batch = step(query_lens, kv_lens)
            want = model(batch).clone()
            assert torch.equal(captured(batch), want)
    assert model.num_calls == 36 + 2 * 3  # a shape runs twice, the second time it is captured


def test_a_replay_sees_the_trees_of_its_own_step(model: Model) -> None:
    captured = capture.CapturedForward(model, model.ops.library)
    for turn, ancestors in enumerate((None, None, [1, 3, 5, 0], [1, 3, 7, 0], None, [1, 3, 5, 0])):
        batch = step([3, 1], [20 + turn, 5])
        if ancestors:
            batch.ancestors = torch.tensor(ancestors)
            batch.positions[1:3] = batch.positions[0] + torch.tensor([1, 1 + (ancestors[2] == 7)])
        want = model(batch).clone()
        assert torch.equal(captured(batch), want)
    assert len(captured.captures) == 1


def test_linears_in_several_formats_are_captured_too(model: Model) -> None:
    parts = [model.ops.linear(torch.randn(n, D), None) for n in (D, D // 2, D // 2)]
    model.qkv = SideBySide(parts, model.ops)
    x = torch.randn(3, D)
    torch.testing.assert_close(model.qkv(x), torch.cat([part(x) for part in parts], dim=1))
    captured = capture.CapturedForward(model, model.ops.library)
    for length in (20, 21, 22):
        batch = step([1, 1], [length, 90])
        assert torch.equal(captured(batch), model(batch))
    assert len(captured.captures) == 1


def test_results_of_one_shape_survive_until_the_next_call(model: Model) -> None:
    captured = capture.CapturedForward(model, model.ops.library)
    batches = [step([1], [40]) for _ in range(3)]
    results = [captured(batch) for batch in batches[:2]]
    want = model(batches[2]).clone()
    assert torch.equal(captured(batches[2]), want)
    assert not torch.equal(results[0], results[1])  # those of plain passes and of the capture itself are their own


@pytest.mark.parametrize("foreign", ["arithmetic", "indexing", "lengths", "in place"])
def test_what_a_replay_would_miss_is_never_captured(model: Model, foreign: str) -> None:
    def forward(batch: Batch) -> Tensor:
        logits = model(batch)
        if foreign == "arithmetic":
            return logits * len(model.norm)
        if foreign == "indexing":
            return logits[torch.zeros(1, dtype=torch.int64)]
        if foreign == "lengths":
            return logits[:, : sum(batch.kv_lens)]
        return logits.add_(1)

    captured = capture.CapturedForward(forward, model.ops.library)
    for length in (3, 4, 5):
        batch = step([1], [length])
        want = forward(batch).clone()
        assert torch.equal(captured(batch), want)
    assert model.ops.library.recording.tape is None


def test_long_steps_and_steps_without_logits_run_as_they_are(model: Model) -> None:
    captured = capture.CapturedForward(model, model.ops.library)
    for _ in range(4):
        captured(step([capture.MAX_TOKENS + 1], [80]))
        assert len(captured(replace(step([4], [40]), logits_rows=torch.zeros(0, dtype=torch.int64)))) == 0
    assert model.num_calls == 8


def test_an_error_inside_a_capture_leaves_no_tape(model: Model) -> None:
    def forward(batch: Batch) -> Tensor:
        model(batch)
        raise ZeroDivisionError

    captured = capture.CapturedForward(forward, model.ops.library)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            captured(step([1], [4]))
    assert model.ops.library.recording.tape is None


def test_the_shape_that_waited_longest_makes_room(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_CAPTURES", 2)
    monkeypatch.setattr(capture, "EVICTING", 4)
    captured = capture.CapturedForward(model, model.ops.library)
    shapes = {num_seqs: (num_seqs, num_seqs, num_seqs) for num_seqs in (1, 2, 3)}
    for num_seqs in (1, 1, 2, 2, 1, 3, 3, 3):
        captured(step([1] * num_seqs, [9] * num_seqs))
    assert list(captured.captures) == [shapes[2], shapes[1]]  # what comes now and then takes nobody's place
    captured(step([1] * 3, [9] * 3))
    assert list(captured.captures) == [shapes[1], shapes[3]]
    calls = model.num_calls
    for _ in range(3):  # what has lost its place is a newcomer again
        captured(step([1, 1], [9, 9]))
    assert (list(captured.captures), model.num_calls) == ([shapes[1], shapes[3]], calls + 3)


@pytest.mark.parametrize("foreign", ["constant", "an input"])
def test_a_result_that_no_kernel_makes_is_never_captured(model: Model, foreign: str) -> None:
    constant = torch.ones(1, 3)

    def forward(batch: Batch) -> Tensor:
        model(batch)
        return constant if foreign == "constant" else batch.positions.view(1, -1)

    captured = capture.CapturedForward(forward, model.ops.library)
    for length in (3, 4, 5):
        batch = step([1], [length])
        assert torch.equal(captured(batch), forward(batch))
    assert not captured.captures


def test_a_part_of_what_a_kernel_made_is_captured(model: Model) -> None:
    """As of a vocabulary that was padded."""

    def forward(batch: Batch) -> Tensor:
        return model(batch)[:, 1:-2]

    captured = capture.CapturedForward(forward, model.ops.library)
    for length in (3, 4, 5):
        batch = step([1] * 3, [length, 9, 2])
        want = forward(batch).clone()
        assert torch.equal(captured(batch), want)
    assert captured.captures


def test_buffers_that_live_at_once_lie_apart() -> None:
    rng = random.Random(0)
    for _ in range(50):
        buffers = []
        for i in range(20):
            since = rng.randrange(30)
            buffer = Buffer(i * 10_000, rng.randrange(1, 5_000), [Use(since, None, "x", None)])  # type: ignore[arg-type]
            buffer.until = since + rng.randrange(8)
            buffers.append(buffer)
        total = pack(buffers)
        assert total == max(buffer.end for buffer in buffers)
        for a in buffers:
            assert a.offset % 64 == 0
            for b in buffers:
                if a is not b and a.since <= b.until and b.since <= a.until:
                    assert a.end <= b.offset or b.end <= a.offset


def test_watching_does_not_import_torch_s_compiler() -> None:
    """Two seconds of the first request: torch wraps what a mode defines itself."""
    assert capture.Watch.__torch_dispatch__ is capture.Seen.__torch_dispatch__
