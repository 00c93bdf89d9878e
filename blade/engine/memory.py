"""How many KV blocks, and states of recurrent layers, there is room for: decided once at start, and said in words a
person can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blade.engine.states import PER_SEQUENCE
from blade.errors import ConfigError

if TYPE_CHECKING:
    from blade.config import EngineConfig

GIB = 1 << 30
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
CPU_DEFAULT_BYTES = 4 * GIB  # RAM is everybody's: the share below is not taken of all of it unasked
STATES_SHARE = 0.5  # of the memory for the cache: what states may take of it at most
LEAST_KEPT_STATES = 64  # after prefixes, while there is room; as many as sequences may run, if these are more


@dataclass(slots=True, frozen=True)
class MemoryPlan:
    """The KV cache to allocate."""

    num_blocks: int
    block_size: int  # tokens
    block_bytes: int  # over all layers
    max_context: int  # tokens a sequence may have
    num_states: int = 0  # slots, where the model has recurrent layers
    state_bytes: int = 0  # of one slot, over all of them

    @property
    def num_state_bytes(self) -> int:
        return self.num_states * self.state_bytes

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_full_requests(self) -> float:
        """How many requests of full context length fit at once."""
        return self.num_tokens / self.max_context


def plan_memory(
    config: EngineConfig, available: int, block_bytes: int, max_context: int, on_cpu: bool, state_bytes: int = 0
) -> MemoryPlan:
    """Divide `available` bytes (device memory free once the weights are in) into blocks of `block_bytes` and, where
    there are any, states of `state_bytes`.

    Raises ConfigError with the largest setting that works when not even one sequence of max_context tokens fits.
    """
    share = int(available * config.max_gpu_memory_utilization)
    least_states = PER_SEQUENCE * state_bytes
    needed = -(-max_context // config.block_size) * block_bytes + least_states
    if config.kv_cache_memory is not None:
        num_bytes = config.kv_cache_memory
        if num_bytes > available:
            raise ConfigError(
                f"--kv-cache-memory asks for {num_bytes} bytes, {available} are free.",
                f"The largest setting that would work is --kv-cache-memory {available}.",
            )
    elif on_cpu:
        num_bytes = min(share, max(CPU_DEFAULT_BYTES, needed))
    else:
        num_bytes = share
    num_states = 0
    if state_bytes:
        wanted = PER_SEQUENCE * config.max_num_seqs + max(config.max_num_seqs, LEAST_KEPT_STATES)
        spare = min(int(num_bytes * STATES_SHARE), num_bytes - needed + least_states)
        num_states = max(PER_SEQUENCE, min(wanted, spare // state_bytes))
    num_blocks = max(0, num_bytes - num_states * state_bytes) // block_bytes
    num_tokens = num_blocks * config.block_size
    if num_tokens < max_context:
        raise ConfigError(
            f"The KV cache would hold {num_tokens} tokens, fewer than the context of {max_context}.",
            _remedy(num_tokens, needed, available, config),
        )
    return MemoryPlan(num_blocks, config.block_size, block_bytes, max_context, num_states, state_bytes)


def _remedy(num_tokens: int, needed: int, available: int, config: EngineConfig) -> str:
    shorter = f", or --max-model-len {num_tokens}" if num_tokens >= 2 else ""
    if needed <= available and config.kv_cache_memory is None:
        share = min(1.0, -(-needed * 1000 // available) / 1000)
        return f"Use --max-gpu-memory-utilization {share:g}{shorter}."
    if needed <= available:
        return f"Use --kv-cache-memory {needed}{shorter}."
    if not shorter:
        return "Free some memory, or choose a smaller model."
    return f"The largest context that fits is --max-model-len {num_tokens}."


def size(num_bytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    for unit, name in UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"
