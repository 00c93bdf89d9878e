"""Dual chunk attention, which transformers does not have, against its definition written out: a score for each pair of
tokens, turned by the pair's relative position (An et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import YARN, Reference
from stepper import Stepper, all_together, one_by_one

from blade.testing import TensorWeights
from blade_native import cpu_ops
from blade_native.reference import TorchOps
from blade_native.simd.ops import SimdOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from blade.contracts import Ops

CHUNKS = {"chunk_size": 64, "local_size": 16}  # so positions begin anew every 48 tokens
SHARPENED = CHUNKS | {"original_max_position_embeddings": 90}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (CHUNKS, {}),
    "sharpened": (SHARPENED, {}),
    "yarn": (SHARPENED, {"rope_parameters": YARN | {"factor": 16.0}}),
    "nothing is clamped": ({"chunk_size": 64, "local_size": 51}, {}),
    "nothing is local": ({"chunk_size": 33, "local_size": 0}, {"num_key_value_heads": 1}),
}
LENGTHS = (300, 23, 1, 140, 97)
OPS = [pytest.param(lambda: cpu_ops(None), id="cpu"), pytest.param(TorchOps, id="torch")]


def make_model(case: str) -> tuple[Any, dict[str, int]]:
    """A transformers model, and the chunks that its attention is to have."""
    import transformers

    chunks, settings = CASES[case]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 199} | settings
    config = transformers.Qwen2Config(**sizes, **more, architectures=["Qwen2ForCausalLM"])
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model, chunks


def make_reference(case: str, lengths: tuple[int, ...] = LENGTHS) -> Reference:
    model, chunks = make_model(case)
    prompts = [torch.randint(199, (length,)).tolist() for length in lengths]
    config = model.config.to_dict() | {"dual_chunk_attention_config": chunks}
    logits = [forward(model, prompt, chunks) for prompt in prompts]
    return Reference(config, TensorWeights(dict(model.state_dict())), prompts, logits)


@torch.inference_mode()
def forward(model: Any, prompt: list[int], chunks: dict[str, int]) -> Tensor:
    """[L, vocab_size]. All but attention is transformers'."""
    x = model.model.embed_tokens(torch.tensor(prompt))
    for layer in model.model.layers:
        x = x + attend(model, layer.self_attn, layer.input_layernorm(x), chunks)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.lm_head(model.model.norm(x))
    return logits


def attend(model: Any, layer: Any, x: Tensor, chunks: dict[str, int]) -> Tensor:
    rope, length = model.model.rotary_emb, len(x)
    q, k, v = (linear(x).unflatten(-1, (-1, layer.head_dim)) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
    q, k = (torch.complex(*y.double().chunk(2, dim=-1)) for y in (q, k))  # [L, H, D / 2]
    positions = relative_positions(length, chunks["chunk_size"], chunks["local_size"])
    angles = positions[..., None] * rope.inv_freq.double()
    turns = torch.polar(torch.ones_like(angles), angles)
    scores = torch.einsum("qhd,khd,qkd->hqk", q, k.conj(), turns).real
    scores *= layer.scaling * rope.attention_scaling**2
    lengths = torch.arange(1, length + 1).double()
    stretch = (lengths / chunks.get("original_max_position_embeddings", length)).clamp(min=1)
    scores *= ((0.1 * stretch.log() + 1) ** 2)[:, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(dim=-1)
    return layer.o_proj(torch.einsum("hqk,khd->qhd", weights, v.double()).flatten(1).float())


@cache
def relative_positions(length: int, size: int, local: int) -> Tensor:
    """[L, L] float64: of keys to queries, the paper's M. Within a chunk they are what they are; in the chunk before as
    well, as far as chunk_size, where all others that are farther are too; all before count from there."""
    found, chunk = torch.zeros(length, length, dtype=torch.float64), size - local
    for i in range(length):
        for j in range(i + 1):
            if i // chunk == j // chunk:
                found[i, j] = i - j
            elif i // chunk == j // chunk + 1:
                found[i, j] = min(i % chunk + chunk, size) - j % chunk
            else:
                found[i, j] = min(2 * chunk - 1, size) - j % chunk
    return found


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return make_reference(request.param)


def error(found: list[Tensor], reference: Reference) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, reference.logits, strict=True))


@pytest.mark.parametrize("make_ops", OPS)
def test_logits_are_those_of_the_definition(reference: Reference, make_ops: Callable[[], Ops]) -> None:
    """Whole prompts, in chunks, token by token, alone and together."""
    assert 0.5 < float(reference.logits[0].std()) < 50
    for steps in (
        one_by_one(list(LENGTHS), chunk=1000),
        one_by_one(list(LENGTHS), chunk=7),
        one_by_one(list(LENGTHS), chunk=1),
        all_together(list(LENGTHS), seed=0),
    ):
        assert error(Stepper(reference, ops=make_ops()).run(steps), reference) < 1e-4


def test_replayed_steps_give_the_same(reference: Reference) -> None:
    """A step of a shape that was captured in the first chunk is replayed far behind it."""
    stepper = Stepper(reference, captured=True)
    assert error(stepper.run(one_by_one(list(LENGTHS), chunk=7)), reference) < 1e-4
    assert error(stepper.run(one_by_one(list(LENGTHS), chunk=1)), reference) < 1e-4
    assert stepper.forward.captures or not isinstance(stepper.ops, SimdOps)


@pytest.mark.parametrize("make_ops", OPS)
def test_within_chunk_size_it_is_attention_as_usual(make_ops: Callable[[], Ops]) -> None:
    reference = make_reference("plain", (65, 20))
    usual = replace(reference, config=reference.config | {"dual_chunk_attention_config": None})
    steps = one_by_one([65, 20], chunk=11)
    assert error(Stepper(usual, ops=make_ops()).run(steps), reference) < 1e-4
    assert error(Stepper(reference, ops=make_ops()).run(steps), reference) < 1e-4
    longer = make_reference("plain", (80,))
    usual = replace(longer, config=usual.config)
    assert error(Stepper(usual, ops=make_ops()).run([{0: (0, 80)}]), longer) > 1e-2  # and beyond it is not


@pytest.mark.parametrize(("storage", "share"), [("int8", 0.03), ("fp8_e4m3", 0.15), ("mix_i8i4", 0.25)])
@pytest.mark.parametrize("make_ops", OPS)
def test_a_rounded_kv_cache_comes_close_however_steps_are_cut(
    make_ops: Callable[[], Ops], storage: str, share: float
) -> None:
    """Keys are kept relative to their sequence's first one, which queries for other chunks meet at another angle."""
    reference = make_reference("sharpened")
    exact = torch.cat(reference.logits)
    runs = [
        torch.cat(Stepper(reference, ops=make_ops(), storage=storage).run(steps))
        for steps in (one_by_one(list(LENGTHS), chunk=7), all_together(list(LENGTHS), seed=5))
    ]
    for logits in runs:
        assert 1e-4 < float((logits - exact).std() / exact.std()) < share
    if isinstance(make_ops(), SimdOps):
        assert torch.equal(*runs)


def test_bfloat16_comes_close() -> None:
    reference = make_reference("sharpened")
    logits = Stepper(reference, torch.bfloat16).run(all_together(list(LENGTHS), seed=4))
    assert 1e-4 < error(logits, reference) < float(reference.logits[0].std()) / 2
