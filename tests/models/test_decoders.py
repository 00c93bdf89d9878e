"""The families against transformers, however the tokens are cut into steps and blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from checkpoints import make_reference
from stepper import Stepper, all_together, one_by_one

from blade import CheckpointError
from blade_native import cpu_ops, cuda_ops
from blade_native.cpu import CpuOps
from blade_native.reference import TorchOps
from blade_native.simd.ops import SimdOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpoints import Reference
    from torch import Tensor

    from blade.contracts import Ops


CPU = pytest.param(lambda: cpu_ops(None), id="cpu")
CUDA = pytest.param(
    lambda: cuda_ops(None),
    id="cuda",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)


def lengths(reference: Reference) -> list[int]:
    return [len(prompt) for prompt in reference.prompts]


def error(found: list[Tensor], reference: Reference) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, reference.logits, strict=True))


@pytest.mark.parametrize("make_ops", [CPU, pytest.param(CpuOps, id="onednn"), pytest.param(TorchOps, id="torch"), CUDA])
def test_logits_equal_those_of_transformers(reference: Reference, make_ops: Callable[[], Ops]) -> None:
    assert 0.5 < float(reference.logits[0].std()) < 50  # they say something
    for steps in (
        one_by_one(lengths(reference), chunk=1000),
        one_by_one(lengths(reference), chunk=7),
        all_together(lengths(reference), seed=0),
        all_together(lengths(reference), seed=1),
    ):
        assert error(Stepper(reference, ops=make_ops()).run(steps), reference) < 1e-4


@pytest.mark.parametrize("make_ops", [CPU, CUDA])
def test_replayed_steps_give_the_same(reference: Reference, make_ops: Callable[[], Ops]) -> None:
    stepper = Stepper(reference, ops=make_ops(), captured=True)
    assert error(stepper.run(one_by_one(lengths(reference), chunk=7)), reference) < 1e-4
    assert error(stepper.run(one_by_one(lengths(reference), chunk=1)), reference) < 1e-4
    if isinstance(stepper.ops, SimdOps) and not stepper.model.config.state:  # states of 24 columns have no kernel
        assert stepper.forward.captures


def test_more_layers_than_config_json_says_are_not_dropped(qwen3_reference: Reference) -> None:
    fewer = replace(qwen3_reference, config=qwen3_reference.config | {"num_hidden_layers": 2, "layer_types": None})
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 2, but there is a tensor model\.layers\.2\."):
        Stepper(fewer)


def test_layers_that_are_skipped_are_counted() -> None:
    reference = make_reference("llama vision")
    text = reference.config["text_config"] | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 3, but there is a tensor language_model.*\.3\."):
        Stepper(replace(reference, config=reference.config | {"text_config": text}))


@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_block_size_does_not_matter(qwen3_reference: Reference, block_size: int) -> None:
    steps = all_together(lengths(qwen3_reference), seed=2)
    assert error(Stepper(qwen3_reference, block_size=block_size).run(steps), qwen3_reference) < 1e-4


def test_only_the_wanted_rows_get_logits(qwen3_reference: Reference) -> None:
    stepper = Stepper(qwen3_reference)
    spans = {0: (0, 60), 1: (0, 23), 3: (0, 41)}
    everything = stepper.step(spans)
    torch.testing.assert_close(stepper.step(spans, rows=[82, 59]), everything[[82, 59]])
    assert stepper.step(spans, rows=[]).shape == (0, 199)
    torch.testing.assert_close(stepper.step({1: (22, 23)})[0], everything[82])  # the KV of all tokens is there


def test_running_a_step_again_is_harmless(qwen3_reference: Reference) -> None:
    stepper = Stepper(qwen3_reference)
    for step in all_together(lengths(qwen3_reference), seed=3):
        torch.testing.assert_close(stepper.step(step), stepper.step(step), rtol=0, atol=0)


def test_bfloat16_comes_close(qwen3_reference: Reference) -> None:
    logits = Stepper(qwen3_reference, torch.bfloat16).run(all_together(lengths(qwen3_reference), seed=4))
    assert all(part.dtype == torch.float32 for part in logits)
    spread = float(qwen3_reference.logits[0].std())
    assert 1e-4 < error(logits, qwen3_reference) < spread / 4


@pytest.mark.parametrize(
    ("storage", "share"), [("int8", 0.02), ("fp8_e4m3", 0.1), ("mix_i8i4", 0.2), ("int4_affine", 0.25)]
)
@pytest.mark.parametrize("make_ops", [lambda: cpu_ops(None), TorchOps], ids=["cpu", "torch"])
def test_a_rounded_kv_cache_comes_close_however_steps_are_cut(
    qwen3_reference: Reference, make_ops: Callable[[], Ops], storage: str, share: float
) -> None:
    """Within a share of what logits differ by anyway; random models feel rounding more than trained ones."""
    exact = torch.cat(qwen3_reference.logits)
    runs = [
        torch.cat(Stepper(qwen3_reference, ops=make_ops(), storage=storage).run(steps))
        for steps in (one_by_one(lengths(qwen3_reference), chunk=7), all_together(lengths(qwen3_reference), seed=5))
    ]
    for logits in runs:
        assert 1e-4 < float((logits - exact).std() / exact.std()) < share
    if isinstance(make_ops(), SimdOps):
        assert torch.equal(*runs)


class Routed(TorchOps):
    """Tells tokens which experts they go to, and notes it down; or what was noted before is `told` again."""

    def __init__(self, told: list[tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__()
        self.told = iter(told or [])
        self.noted: list[tuple[Tensor, Tensor]] = []

    def route(self, logits: Tensor, k: int, normalize: bool, sigmoid: bool = False) -> tuple[Tensor, Tensor]:
        self.noted.append(next(self.told, None) or super().route(logits, k, normalize, sigmoid))
        return self.noted[-1]


@pytest.mark.parametrize("case", ["llama4", "llama4 chunks", "llama4 sharpened", "qwen3 moe", "qwen3.5"])
def test_a_rounded_kv_cache_of_other_families(case: str) -> None:
    """With layers without positions, in chunks, with sharpened queries. What is left where experts stay the same: that
    a token near the border of two goes to the other one may change as much as all rounding together."""
    reference = make_reference(case)
    steps, routed = all_together(lengths(reference), seed=0), Routed()
    exact = torch.cat(Stepper(reference, ops=routed).run(steps))
    logits = torch.cat(Stepper(reference, ops=Routed(routed.noted), storage="int8").run(steps))
    assert 1e-4 < float((logits - exact).norm() / exact.norm()) < 0.025
