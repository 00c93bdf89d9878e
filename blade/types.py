"""Every noun of blade on one page. It imports nothing of ours, and torch only for the type checker.

Who fills a field is said beside it. Ids are token ids; texts live in the loop thread and never come here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]
KVCache: TypeAlias = "Seq[Any]"
"""One entry per layer of the model. Of attention it is opaque: only the backend that allocated it knows the layout. Of
a recurrent layer it is the tensors of its StateSpec, [num_slots, ...] each."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the next token. Validated by the front end; the engine trusts it.

    `stop_token_ids` holds everything that ends the sequence, the model's end-of-sequence ids included (unless the
    request ignores them). The stop token is delivered and counted, but it has no text.
    """

    max_tokens: int
    min_tokens: int = 0  # stop tokens cannot be sampled before this many output tokens
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # in (0, 1]; 1 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # in [0, 1]; 0 is off
    repetition_penalty: float = 1.0  # over prompt and output, as in CTRL (Keskar et al. 2019)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int | None = None  # None: the engine draws one
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: none; k: the chosen token's and those of the k most likely
    processors: tuple[Any, ...] = ()  # contracts.LogitsProcessor objects made for this request


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt on its way to one completion.

    tokens = prompt + output + draft. The KV of tokens[:computed] is in `blocks`; the rest is *owed*. Chunked prefill,
    prefix-cache hits (computed starts above 0), preemption (computed goes back to 0) and verification of drafts are
    all this one rule.
    """

    id: int  # unique in this process
    prompt_ids: list[int]
    params: SamplingParams
    index: int = 0  # which choice of its request this is
    namespace: bytes = b""  # prefix-cache namespace: only sequences of the same one share blocks
    priority: int = 0  # lower runs earlier, where the scheduler looks at it
    arrival: float = field(default_factory=time.monotonic)  # seconds, monotonic clock; `submit` sets it anew
    prediction_ids: list[int] = field(
        default_factory=list
    )  # what the client expects the output to be like: for drafters
    adapter: Any = None  # the LoRA adapter, as the runner's own table has it; None: the model as it is

    # The engine fills these.
    output_ids: list[int] = field(default_factory=list)
    draft_ids: list[int] = field(default_factory=list)  # proposed by a drafter, not yet verified
    draft_parents: list[int] | None = None  # Draft.parents of draft_ids, which may have been cut since
    computed: int = 0
    blocks: list[int] = field(default_factory=list)  # block table: block of token i is blocks[i // block_size]
    state: int = -1  # slot of the recurrent layers' state after tokens[:computed], where the model has such; -1: none
    next_state: int = -1  # slot that the next step writes its state to
    block_hashes: list[bytes] = field(default_factory=list)  # chained hashes of the full blocks known so far
    awaited: tuple[bytes, int] | None = None  # hash of a block that it waits for, and whose id computes it
    num_committed: int = 0  # full blocks already offered to the prefix cache
    num_cached: int = 0  # prompt tokens whose KV was found in the prefix cache at first admission
    num_preemptions: int = 0
    first_scheduled: float | None = None  # seconds, monotonic clock
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + len(self.draft_ids)

    @property
    def num_owed(self) -> int:
        return self.num_tokens - self.computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Ids of tokens[start:stop] over prompt, output and draft, without joining the whole."""
        num_prompt = len(self.prompt_ids)
        if stop <= num_prompt:
            return self.prompt_ids[start:stop]
        tail = self.output_ids + self.draft_ids if self.draft_ids else self.output_ids
        if start >= num_prompt:
            return tail[start - num_prompt : stop - num_prompt]
        return self.prompt_ids[start:] + tail[: stop - num_prompt]


@dataclass(slots=True, frozen=True)
class Draft:
    """What a drafter proposes to follow one sequence."""

    ids: list[int] = field(default_factory=list)  # in order; empty: nothing
    evidence: int = 0  # how good it is, in grades from 0 to 15 of the drafter's own; blade learns what each is worth
    source: str = ""  # the drafter's name; the engine fills it
    # Of a tree: parents[i] is the place in ids of the one that ids[i] follows, which comes before it; -1: it follows
    # the sequence. At most 63 ids, of a contracts.TreeDrafter alone. None: a chain.
    parents: list[int] | None = None


@dataclass(slots=True)
class Step:
    """A scheduler's decision: run num_tokens[i] owed tokens of seqs[i] together in one forward pass."""

    seqs: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        self.seqs.append(seq)
        self.num_tokens.append(num_tokens)

    def __len__(self) -> int:
        return len(self.seqs)


@dataclass(slots=True)
class Batch:
    """One ragged step as the model sees it: B sequences, T tokens laid end to end, R rows whose logits are wanted.

    All tensors are on the model's device. Token t of sequence b attends to the first positions[t] + 1 tokens of b,
    unless it is in a tree of drafts (`ancestors`).
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block * block_size + offset, where the token's KV is stored
    cu_seqlens: Tensor  # [B + 1] int32: where each sequence's tokens start in T
    context_lens: Tensor  # [B] int32: tokens of the sequence with KV once this step's are stored
    block_tables: Tensor  # [B, max_blocks] int32, padded with 0
    logits_rows: Tensor  # [R] int64, indices into T
    # The same on the host, for launch code that must not wait for the device.
    query_lens: list[int]  # [B]
    kv_lens: list[int]  # [B], equals context_lens
    # Of a model with recurrent layers, whose states of all sequences lie in slots. A step reads one slot of a sequence
    # and writes another, so that running it again is harmless.
    state_in: Tensor | None = None  # [B] int32: slot of the state before this step; below 0: there is none yet, zeros
    state_out: Tensor | None = None  # [B] int32: slot for the state after it; below 0: a padding row
    # Where a draft of the step is a tree; else None. A token of one lies in the cache where its turn in the step puts
    # it, and its position follows from its depth. It sees what was there before the step and, of its sequence's tokens
    # in the step, those whose bits are set: bit i is the i-th, its own is the highest.
    ancestors: Tensor | None = None  # [T] int64; 0: a token of no tree

    @property
    def max_query_len(self) -> int:
        return max(self.query_lens)


@dataclass(slots=True, frozen=True)
class TokenLogprob:
    """Natural-log probability under the model's raw distribution (before temperature, penalties and truncation)."""

    token_id: int
    logprob: float


@dataclass(slots=True)
class Sampled:
    """What sampling gave one row: the id, and with `SamplingParams.logprobs` its logprob and the k most likely."""

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Output:
    """What one step brought one sequence. It crosses from the engine thread to the loop thread."""

    seq_id: int
    index: int
    sampled: list[Sampled] = field(default_factory=list)  # in order; several under speculation
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    error: Exception | None = None  # with finish_reason "error" only; errors.Overloaded or a closed-set message
    num_drafted: int = 0  # draft tokens verified in this step
    num_accepted: int = 0  # of these, the ones among `sampled`


@dataclass(slots=True, frozen=True)
class KVSpec:
    """What a model asks of a paged KV cache. bytes per token = 2 * num_layers * num_kv_heads * head_dim * itemsize,
    where `storage` is None."""

    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int
    head_dim: int
    dtype: str  # torch's name: "float32", "bfloat16", "float16"
    block_size: int = 16  # tokens per block
    storage: str | None = None  # what K and V are rounded to: one of the attention's kv_storages. None: kept in dtype
    trees: bool = False  # whether steps over it may have drafts that are trees
    dual_chunks: bool = False  # whether all that attends to it does so in dual chunks
    selected: bool = False  # whether queries may see some of the keys alone (contracts.SlotAttention)


@dataclass(slots=True, frozen=True)
class StateTensor:
    """One of the tensors that a recurrent layer keeps of each sequence."""

    shape: tuple[int, ...]
    dtype: str | None = None  # torch's name; None: that of the run


@dataclass(slots=True, frozen=True)
class StateSpec:
    """What a model's recurrent layers keep in place of KV: as much of a long sequence as of a short one."""

    layers: tuple[int, ...]  # which of the model's layers they are
    tensors: tuple[StateTensor, ...]  # of each of them


@dataclass(slots=True, frozen=True)
class GroupedWeight:
    """A quantised matrix [N, K]: w = scale * (q - zero) + minimum, with a scale (zero, minimum) per group of a row.

    A group's scale and minimum are float16 themselves, or 8-bit codes that count multiples of a block's: one float16
    for `block` numbers of a row, as in GGUF's K-quants.
    """

    bits: int  # 4, 5, 6 or 8
    group: int  # numbers of a row that share a scale: 16, 32, 64 or 128, a divisor of K
    q: Tensor  # [N, K] uint8, below 2**bits
    scales: Tensor  # [N, K / group] float16, bfloat16 or float32; uint8 or int8 codes with block_scales
    minima: Tensor | None = None  # [N, K / group] float16; codes with block_minima. None: 0
    zeros: Tensor | None = None  # [N, K / group] uint8. None: 2**(bits - 1) without minima, 0 with them
    block_scales: Tensor | None = None  # [N, K / block] float16
    block_minima: Tensor | None = None  # [N, K / block] float16
    values: tuple[int, ...] | None = None  # 2**bits integers, -127..127: w = scale * values[q]; no zeros, no minima
    order: Tensor | None = None  # [K] int64: column i multiplies feature order[i] of x. None: feature i


@dataclass(slots=True, frozen=True)
class Float8Weight:
    """A matrix [N, K] of 8-bit floats: w = scale * q, a scale for each block of `block` rows and columns."""

    q: Tensor  # [N, K] float8_e4m3fn
    scales: Tensor  # [ceil(N / block[0]), ceil(K / block[1])] float32
    block: tuple[int, int]  # (1, K) is a scale per row, (N, K) one for all


QuantizedWeight: TypeAlias = GroupedWeight | Float8Weight


class RankScale(NamedTuple):
    """Of an update, where its matrices do not tell."""

    rank: int
    scale: float


@dataclass(slots=True, frozen=True)
class LowRank:
    """An update of a linear's W [N, K], scale * b a (LoRA, Hu et al. 2021)."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float
    of_table: bool = False  # of an embedding's K rows of N numbers instead
    magnitude: Tensor | None = None  # [N]: what the rows' lengths are to be after the update (DoRA, Liu et al. 2024)
    experts: Mapping[str, RankScale] | None = None  # of all experts' W in one, by its name: see blade.nn.lora_experts


@dataclass(slots=True, frozen=True)
class GGMLBlocks:
    """A quantised matrix [N, K] as a GGUF file stores it, in blocks of K; a GroupedWeight can be made of it."""

    kind: str  # GGML's name: "Q4_0", "Q6_K", "IQ4_XS"
    shape: tuple[int, int]  # N and K
    raw: Tensor  # [N, bytes of a row] uint8, whole blocks
    values: tuple[int, ...] | None = None  # as GroupedWeight.values
    order: Tensor | None = None  # as GroupedWeight.order


@dataclass(slots=True, frozen=True)
class CaptureOptions:
    """What an op set may know of the steps to come when it prepares to replay them (contracts.Ops.capture)."""

    enabled: bool = True  # False: every step is run kernel by kernel
    batch_sizes: tuple[int, ...] = ()  # sequences of the decode steps to prepare for, where that happens at start
    block_size: int = 16  # tokens
    max_context: int = 0  # tokens a sequence may have


class DualChunks(NamedTuple):
    """Dual chunk attention (An et al. 2024): positions begin anew every `length` tokens, so that none is beyond what a
    model was trained on. The key of a token at p turns by position p % length. Its query meets keys that lie d chunks
    before its own, which is p // length, turned by position min(p % length + d * length, farthest)."""

    length: int
    farthest: int  # from length to 2 * length - 1

    @property
    def num_undivided(self) -> int:
        """Tokens within which all that is attention as usual: no position is beyond the farthest."""
        return self.farthest + 1


class KeySelection(NamedTuple):
    """Attention that chooses the keys a query sees, by small keys and queries of its own (Qwen4-Exp). Tokens are chosen
    in groups of consecutive ones, counted from a sequence's first; those after the last whole group are always seen."""

    num_heads: int  # of the small queries
    head_dim: int  # of the small queries and keys: numbers that are kept per token beside K and V, in the run's dtype
    group: int  # tokens
    budget: int  # tokens of whole groups that are seen, a multiple of `group`

    @property
    def most_keys(self) -> int:
        """That a query sees; all there are within so many tokens."""
        return self.budget + self.group - 1


@dataclass(slots=True, frozen=True)
class ModelConfig:
    """What the core must know of a model before its weights are loaded. Families subclass it with what they need."""

    architecture: str
    vocab_size: int  # width of the logits
    max_context: int  # tokens: prompt and output together
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    state: StateSpec | None = field(default=None, kw_only=True)  # of its recurrent layers; None: all have KV
    attention_chunk: int | None = field(default=None, kw_only=True)  # positions that some layers attend within
    dual_chunks: DualChunks | None = field(default=None, kw_only=True)  # that attention needs beyond the first of them
    key_selection: KeySelection | None = field(default=None, kw_only=True)  # of all layers with KV, beyond `most_keys`

    @property
    def num_kv_layers(self) -> int:
        return self.num_layers - (len(self.state.layers) if self.state else 0)


@dataclass(slots=True, frozen=True)
class Limits:
    """What a request must fit into; the front end validates against it."""

    vocab_size: int  # width of the logits; every id in a request must be below it
    max_context: int  # tokens of prompt and output together
    max_num_seqs: int  # sequences in one step


@dataclass(slots=True, frozen=True)
class DrafterStats:
    """What one drafter has done; all counts grow for ever."""

    name: str
    calls: int = 0
    seconds: float = 0.0  # spent proposing
    tokens_proposed: int = 0
    tokens_verified: int = 0  # of these, worth a place in a step
    tokens_accepted: int = 0
    drafts_verified: int = 0  # tokens_accepted / drafts_verified is the mean accepted length
    enabled: bool = True  # False for good once it has raised, or broken its contract


@dataclass(slots=True, frozen=True)
class EngineStats:
    """One consistent picture of the engine, taken after a step. Counters grow for ever, gauges are of this moment."""

    # gauges
    num_running: int = 0
    num_waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0  # unreferenced, their KV still good
    blocks_used: int = 0
    # counters
    steps: int = 0
    steps_failed: int = 0  # of these, the ones in which every sequence failed
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0  # of these, found in the prefix cache
    generated_tokens: int = 0
    draft_tokens: int = 0
    draft_tokens_accepted: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0
    drafters: tuple[DrafterStats, ...] = ()


@dataclass(slots=True, frozen=True)
class RequestSummary:
    """What observers learn when one request ends; no texts and no ids of tokens. Times in seconds."""

    request_id: str
    endpoint: str  # "/v1/completions", "/v1/chat/completions"
    model: str
    num_choices: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reasons: tuple[str, ...]
    queue_seconds: float | None  # None: never scheduled
    first_token_seconds: float | None
    total_seconds: float
    status: int  # HTTP status; 499 when the client left


@dataclass(slots=True, frozen=True)
class DemoWeights:
    """A real model carried by Python packages. Their data files are read and joined; their code is never imported."""

    name: str  # as shown: "SmolLM2-135M-Instruct"
    filename: str  # of the joined file: "smollm2-135m-instruct.gguf"
    parts: tuple[tuple[str, str], ...]  # (distribution, path of its data file inside site-packages), in order
    size: int  # bytes of the joined file
    sha256: str  # of the joined file


@dataclass(slots=True, frozen=True)
class DefaultCheckpoint:
    """What a model plugin serves when no --model is given: the demo weights when installed, else the hub id."""

    hub_id: str
    demo: DemoWeights | None = None
