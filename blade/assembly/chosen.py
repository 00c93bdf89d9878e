"""What was chosen: every part by name, with the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from blade.types import CaptureOptions, KVSpec

if TYPE_CHECKING:
    import torch

    from blade.checkpoint.open import Checkpoint
    from blade.config import Config
    from blade.contracts import Architecture, Attention, HeadArchitecture, Ops, Weights
    from blade.engine.memory import MemoryPlan
    from blade.plugins import Plugins
    from blade.quantization import WeightForm
    from blade.types import ModelConfig

DRAFT_MODEL = "model"  # the drafter that --draft.model implies


@dataclass(frozen=True)
class Assembly:
    """Everything chosen, nothing heavy loaded yet."""

    config: Config
    plugins: Plugins
    checkpoint: Checkpoint
    weights: Weights  # the checkpoint's, as the architecture sees them
    architecture: Architecture | HeadArchitecture
    family: str  # the plugin that brought the architecture
    form: WeightForm
    model_config: ModelConfig
    model_name: str
    max_context: int  # tokens
    ops: Ops
    attention: Attention
    dtype: torch.dtype
    draft: Assembly | None = None  # of the draft model or head; ops and attention are the same

    @property
    def kv_spec(self) -> KVSpec:
        model = self.model_config
        return KVSpec(
            num_layers=model.num_kv_layers,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=str(self.dtype).removeprefix("torch."),
            block_size=self.config.engine.block_size,
            storage=None if self.config.engine.kv_cache_quant == "none" else self.config.engine.kv_cache_quant,
            trees=self.drafts_trees,
            dual_chunks=model.dual_chunks is not None and self.max_context > model.dual_chunks.num_undivided,
            selected=model.key_selection is not None,
        )

    @property
    def drafts_trees(self) -> bool:
        registry = self.plugins.registry("register_drafters")
        return any(getattr(registry[name], "trees", False) for name in self.config.engine.drafter)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights once loaded, the draft model's included; a tied embedding counts once."""
        from blade.nn.tensors import loaded_bytes

        weights, quantization = self.weights, self.form.quantization
        own = sum(loaded_bytes(name, weights, self.ops, self.dtype, quantization) for name in weights.names())
        return own + (self.draft.weight_bytes if self.draft else 0)

    @property
    def num_params(self) -> int:
        """Numbers in the checkpoint's tensors, or a head's, however they are packed; without the draft model's."""
        from blade.nn.tensors import num_params

        weights = self.checkpoint.weights if self.head is None else self.weights
        return num_params(weights, self.form.quantization)

    @property
    def head(self) -> HeadArchitecture | None:
        """How it is loaded, where it is no model by itself."""
        return cast("HeadArchitecture", self.architecture) if hasattr(self.architecture, "drafter") else None

    @property
    def drafter(self) -> str:
        """The drafter that it is for, as a draft model."""
        return self.head.drafter if self.head else DRAFT_MODEL

    @property
    def block_bytes(self) -> int:
        """Of a block of the KV cache over all layers, with the keys that others are chosen by; the draft model has as
        many blocks of its own."""
        from blade.engine.state_cache import index_bytes

        index = self.config.engine.block_size * index_bytes(self.model_config, self.dtype)
        return self.attention.block_bytes(self.kv_spec) + index + (self.draft.block_bytes if self.draft else 0)

    @property
    def state_bytes(self) -> int:
        """Of one state of all recurrent layers; 0 where there are none."""
        from blade.engine.state_cache import state_bytes

        return state_bytes(self.model_config, self.dtype)

    @property
    def drafters(self) -> tuple[str, ...]:
        """Names, in the order in which they are asked."""
        named = tuple(dict.fromkeys(self.config.engine.drafter))
        return named or ((self.draft.drafter,) if self.draft else ())

    @property
    def capture(self) -> CaptureOptions:
        config = self.config.engine
        sizes = [size for size in config.cuda_graph_batch_sizes if size <= config.max_num_seqs]
        return CaptureOptions(
            enabled=not config.disable_cuda_graph,
            batch_sizes=tuple(sizes),
            block_size=config.block_size,
            max_context=self.max_context,
        )

    def plan_memory(self, reserved: int = 0) -> MemoryPlan:
        """Size the KV cache from the memory free now, less `reserved` bytes (of weights not loaded yet)."""
        from blade.engine.memory import plan_memory

        available = max(0, self.ops.available_memory() - reserved)
        on_cpu = self.ops.device.type == "cpu"
        sizes = self.block_bytes, self.max_context, on_cpu, self.state_bytes
        return plan_memory(self.config.engine, available, *sizes)
