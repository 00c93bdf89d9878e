"""Adapters as PEFT writes them, random ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def write_adapter(
    folder: Path, shapes: dict[str, tuple[int, int]], rank: int = 4, seed: int = 0, **settings: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Updates of linears by prefix, of shapes (N, K), and of an embedding's table, transposed; returns their A and
    B."""
    generator = torch.Generator().manual_seed(seed)
    updates = {
        prefix: (torch.randn(rank, k, generator=generator) * 0.3, torch.randn(n, rank, generator=generator) * 0.3)
        for prefix, (n, k) in shapes.items()
    }
    tensors = {
        f"base_model.model.{prefix}."
        + (f"lora_embedding_{side}" if "embed" in prefix else f"lora_{side}.weight"): matrix
        for prefix, pair in updates.items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
        "use_dora": False, "base_model_name_or_path": "x", "task_type": "CAUSAL_LM", "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return updates
