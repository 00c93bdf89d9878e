"""Protocols of two to four methods over the nouns of `blade.types`: all that the parts of blade know of each other.

An object fits by having the methods; nothing needs to inherit. `blade.testing` has a `check_*` kit for most of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from blade.types import (
    Batch,
    CaptureOptions,
    Draft,
    EngineStats,
    GGMLBlocks,
    GroupedWeight,
    KVCache,
    KVSpec,
    Limits,
    ModelConfig,
    Output,
    Sampled,
    Sequence,
    Step,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# ---------------------------------------------------------------------------------------------- models and weights


class Model(Protocol):
    """A loaded decoder."""

    config: ModelConfig

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Store the KV of the batch's T tokens and return logits, [R, vocab_size] float32, of batch.logits_rows; the
        caller may overwrite them."""
        ...


class Architecture(Protocol):
    """One entry of config.json's `architectures`: what `register_models` registers a factory of."""

    def configure(self, config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json's content; raise CheckpointError naming the key that cannot be served."""
        ...

    def build(self, config: Any, loader: Loader) -> Model:
        """Load the weights through `loader` and return the model, ready to run. `config` is what `configure` returned,
        with max_context as it was asked for."""
        ...


class Weights(Protocol):
    """The named tensors of a checkpoint, under their Hugging Face names whatever the file format."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU, dequantised where the file holds blocks; in its own dtype unless one is asked for."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """The caller keeps nothing that it was given of these tensors: they need not stay in memory."""
        ...


class Linear(Protocol):
    """y = x W^T + b, however W is kept: [..., K] -> [..., N]."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """In x's dtype, or in `out_dtype`: logits are wanted in float32, where sums are kept anyway."""
        ...


class Loader(Protocol):
    """How a model gets its parts: weights in the run's dtype on the run's device, linears and embeddings in the
    checkpoint's format, or in the one that was asked for."""

    ops: Ops
    attention: Attention
    dtype: torch.dtype

    def has(self, name: str) -> bool: ...

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Raises CheckpointError when it is missing or has another shape than the model expects."""
        ...

    def linear(self, *prefixes: str, shapes: Seq[tuple[int, int]] | None = None) -> Linear:
        """One linear over the tensors under `prefixes` (each with .weight and maybe .bias), stacked along N; `shapes`
        are the (N, K) expected under each. Raises CheckpointError as `tensor` does."""
        ...

    def embedding(
        self, prefix: str, shape: tuple[int, int] | None = None, tied: Linear | None = None
    ) -> Callable[[Tensor], Tensor]:
        """ids [T] int64 -> [T, D] over the tensor `prefix`.weight, [V, D] = `shape`. Where the op set can, from the
        memory of `tied`, the linear over the same tensor; else in a quantised format if the tensor has one."""
        ...


class Quantization(Protocol):
    """A weight format, chosen by the checkpoint's `quantization_config.quant_method`, or made of plain weights as
    ``--quantize NAME`` asks; it swaps Linear."""

    def linear(
        self, prefixes: Seq[str], shapes: Seq[tuple[int, int] | None], weights: Weights, ops: Ops, dtype: torch.dtype
    ) -> Linear | None:
        """The linear over the quantised tensors under `prefixes`, stacked along N, with their biases; None where it is
        to be plain. `shapes` are the (N, K) that the model expects under each, where it says so: raise CheckpointError
        for others."""
        ...

    def num_bytes(self, name: str, weights: Weights, ops: Ops, dtype: torch.dtype) -> int | None:
        """Bytes of memory that the tensor takes once `linear` has loaded it; None where it is plain."""
        ...


# ---------------------------------------------------------------------------------------------- devices


class Ops(Protocol):
    """The op set of one device. Activations are [T, ...] in the model's dtype; every native op has a torch twin."""

    name: str  # what a person reads at start: "cpu, 8 threads"
    device: torch.device
    grouped_dtypes: Collection[torch.dtype]  # of x, for which grouped_linear has a kernel; empty: it is never called

    def default_dtype(self) -> torch.dtype: ...

    def available_memory(self) -> int:
        """Bytes of device memory (on a CPU: RAM) free to take now."""
        ...

    def to_device(self, x: Tensor) -> Tensor: ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """weight [N, K] on the CPU, packed into the device's best layout; the caller keeps no reference to it."""
        ...

    def grouped_linear(self, weights: Seq[GroupedWeight], bias: Tensor | None) -> Linear:
        """The linears over quantised matrices stacked along N, each in its own format, on the CPU; bias [sum of N]."""
        ...

    def blocks_linear(self, blocks: Seq[GGMLBlocks], bias: Tensor | None) -> Linear | None:
        """The same over matrices in GGML's blocks; None where one is of a kind that no kernel takes as it is."""
        ...

    def embedding(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """ids [T] int64 -> [T, D]."""
        ...

    def embedding_of(self, linear: Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """The embedding tied to a linear that this op set made, from the same memory; None where its layout cannot be
        read back in `dtype`, and the embedding has to be loaded by itself."""
        ...

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [N, D], rows [R] int64 -> [R, D]."""
        ...

    def capture(self, model: Model, kv: KVCache, options: CaptureOptions) -> Callable[[Batch], Tensor]:
        """The model's forward on this cache, or what does the same faster: it may note down what forward does with a
        batch and repeat that for other batches of the same shapes, if nothing but ops, attention and views took part.
        The logits may live in memory that the next call overwrites."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 inside."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); may work in place on residual."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] -> [T, I]: silu(first half) * second half."""
        ...

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [R, V] float32 -> the largest [R] and its id [R] int64, the first of equal ones. Of a row
        that holds NaN or +infinity the value is not finite and the id any."""
        ...


class Attention(Protocol):
    """Paged attention on one device. It alone knows the layout of the KV it allocates. A block that changed hands keeps
    its old content, whatever that is, NaN included: what lies beyond a sequence's context must have no effect.

    A backend that can round KV names what to in an attribute `kv_storages`, strings of its own choosing, and finds what
    ``--kv-cache-quant`` asked for in spec.storage. A token's KV is rounded once, when it is stored. Without the
    attribute it is never asked to."""

    def block_bytes(self, spec: KVSpec) -> int:
        """Bytes of one block over all layers."""
        ...

    def allocate(self, spec: KVSpec, num_blocks: int) -> KVCache: ...

    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: Any
    ) -> tuple[Tensor, Tensor]:
        """Rotate q [T, H, D] and k [T, KV, D] by cos_sin [max_context, rotary_dim] float32 at batch.positions (cos in
        the first half of a row, sin in the second; halves of the head pair up, as in GPT-NeoX), write k and v
        [T, KV, D] to batch.slots, return the rotated (q, k), with a storage as `attend` wants them; may work in place
        on q and k."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer_kv: Any, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention of q [T, H, D] over the stored context: [T, H * D]. k and v [T, KV, D] are the step's own
        (already stored), for backends that prefer them. `window` bounds how many last tokens are attended to."""
        ...


class Runner(Protocol):
    """One rank: owns the model, its KV cache and the sampler."""

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        """Forward the step; for each sequence the sampled tokens: none while its prompt is not through, else one,
        and under speculation one more per accepted draft. Or the exception that is this sequence's alone."""
        ...

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended: drop what is kept for it."""
        ...


class Executor(Protocol):
    """Where the ranks run: in this process, in local processes, on other machines."""

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        """As Runner.run, of the rank that samples. Running the same step again must be harmless."""
        ...

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended: drop what is kept for it."""
        ...

    def close(self) -> None: ...


# ---------------------------------------------------------------------------------------------- policies


class Blocks(Protocol):
    """What a scheduler may ask of the paged KV pool."""

    block_size: int

    def attach_prefix(self, seq: Sequence) -> bool:
        """Give a sequence that holds no blocks those of its longest cached prefix (seq.computed grows). False: the
        next block of its prefix is being computed by another sequence right now; try again next step."""
        ...

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for tokens[:computed + num_tokens], all or nothing. False: not enough free blocks."""
        ...

    def commit(self, seq: Sequence) -> None:
        """Make the full blocks of tokens[:computed] findable as a prefix. Nothing that is not sure to stay may count as
        computed; of the target's sequences the engine sees to that, schedulers need not."""
        ...

    def release(self, seq: Sequence) -> None:
        """Take all blocks from the sequence (computed becomes 0); full ones stay cached while there is room."""
        ...

    @property
    def num_free(self) -> int:
        """Blocks that grow could hand out: empty ones and cached ones nobody holds."""
        ...


class Scheduler(Protocol):
    """Who runs next. It owns the order and the admission of sequences, never their tokens."""

    waiting: Seq[Sequence]
    running: Seq[Sequence]

    def add(self, seq: Sequence) -> None: ...

    def schedule(self) -> Step:
        """The next step, within the token budget; every seq in it has its blocks. Empty: nothing can run."""
        ...

    def remove(self, seq: Sequence) -> None:
        """Forget a finished or aborted sequence, wherever it is; its blocks are released by the engine."""
        ...


class Drafter(Protocol):
    """Proposes tokens that the model then verifies in one step (speculative decoding, Leviathan et al. 2023). Whatever
    it proposes, the output stays the same; only the speed depends on it."""

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        """For each sequence up to limits[i] ids likely to follow it; Draft([]) proposes nothing. A sequence's prompt
        never changes, its output only grows; it must be left as it is."""
        ...

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended: drop what is kept for it, if anything is."""
        ...


@dataclass(frozen=True)
class DraftModel:
    """The model of ``--draft.model``, loaded: it runs steps of sequences of its own, over a KV cache of its own. A
    sequence with the id and params of one of the target's is sampled with the very random numbers the target will use.
    """

    runner: Runner
    blocks: Blocks
    max_context: int  # tokens


class LogitsProcessor(Protocol):
    """Made for one request by a registered factory; sees one row at a time, before temperature."""

    def __call__(self, output_ids: Seq[int], logits: Tensor) -> None:
        """Change logits [vocab_size] float32 in place. What it does must follow from output_ids alone, and what it
        keeps may only be a cache of them: a position may come again, and with other tokens before it."""
        ...


# ---------------------------------------------------------------------------------------------- text


class Tokenizer(Protocol):
    """The loop thread's view of a tokenizer."""

    eos_token_ids: tuple[int, ...]
    vocab_size: int  # ids that have text; the logits may be wider
    control_tokens: Mapping[str, int]  # text -> id of every token that steers the model

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. With add_special_tokens the tokenizer's own BOS or EOS is added as its files say; the text
        itself never yields a control token."""
        ...

    def encode_template(self, text: str, literals: Mapping[str, str] | None = None) -> list[int]:
        """Ids of a rendered chat template, in which control tokens count and nothing is added. `literals` maps
        stand-in characters of the text to what they stand for: plain text, whatever it looks like."""
        ...

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; b"" for a control token and for an id that is no token."""
        ...


class ToolParser(Protocol):
    """Takes tool calls out of a chat reply while it streams. One object per choice."""

    def push(self, text: str, final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """New text in; (text to show, OpenAI `tool_calls` deltas) out. With final, what is held back is flushed."""
        ...


class ReasoningParser(Protocol):
    """Splits the reasoning from the answer while a chat reply streams. One object per choice."""

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        """New text in; (reasoning, answer) out."""
        ...


# ---------------------------------------------------------------------------------------------- server


class Stream(Protocol):
    """The outputs of the sequences of one submit, as they come; ends when all of them have finished."""

    def __aiter__(self) -> AsyncIterator[list[Output]]:
        """Lists of outputs: all that has come since the last one was taken, oldest first."""
        ...

    def abort(self, seq_id: int | None = None) -> None:
        """Stop one sequence, or all of them, within a step. No further output of theirs comes; their blocks are
        free and their prefix stays cached. Harmless when they have ended."""
        ...


class EngineClient(Protocol):
    """What the loop thread may ask of the engine thread."""

    limits: Limits

    def submit(self, seqs: Seq[Sequence]) -> Stream:
        """Queue sequences, all or none. Raises RequestError when one can never fit, Overloaded when the queue is
        full."""
        ...

    def stats(self) -> EngineStats: ...

    def healthy(self) -> bool:
        """True while the engine is idle or its steps complete."""
        ...


class Request(Protocol):
    """What a route handler sees of an HTTP request."""

    @property
    def method(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def query(self) -> Mapping[str, str]: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""
        ...

    async def body(self) -> bytes: ...

    async def disconnected(self) -> None:
        """Returns when the client has gone."""
        ...


class Response(Protocol):
    """What a route handler returns; `blade.api.http` has JSONResponse, TextResponse and EventStream."""

    status: int


class Server(Protocol):
    """The running server, as lifespan hooks and routes see it."""

    engine: EngineClient
    tokenizer: Tokenizer
    model_name: str
    url: str


RouteHandler = Callable[[Server, Request], Awaitable[Response]]
