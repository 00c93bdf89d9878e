"""Devices: op sets, attention, and where ranks run. See blade.contracts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from collections.abc import Sequence as Seq

    import torch
    from torch import Tensor

    from blade.contracts.models import Experts, Linear, Model
    from blade.types import (
        Batch,
        CaptureOptions,
        DualChunks,
        GGMLBlocks,
        GroupedWeight,
        KeySelection,
        KVCache,
        KVSpec,
        QuantizedWeight,
        Sampled,
        Sequence,
        Step,
    )


class Ops(Protocol):
    """The op set of one device. Activations are [T, ...] in the model's dtype; every native op has a torch twin."""

    name: str  # what a person reads at start: "cpu, 8 threads"
    device: torch.device
    quantized_dtypes: Collection[torch.dtype]  # of x, which quantized_linear has kernels for; empty: it is never called

    def default_dtype(self) -> torch.dtype: ...

    def available_memory(self) -> int:
        """Bytes of device memory (on a CPU: RAM) free to take now."""
        ...

    def memory_bandwidth(self, num_bytes: int | None = None) -> float | None:
        """Bytes per second that all cores together can read of device memory, measured now, briefly; with `num_bytes`
        those of so many bytes that are read over and over, of which caches may hold some. None: unknown."""
        ...

    def to_device(self, x: Tensor) -> Tensor: ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """weight [N, K] on the CPU, packed into the device's best layout; the caller keeps no reference to it."""
        ...

    def quantized_linear(self, weights: Seq[QuantizedWeight], bias: Tensor | None) -> Linear:
        """The linears over quantised matrices stacked along N, each in its own format, on the CPU; bias [sum of N]. A
        format without a kernel is computed all the same, slower or in more memory, and the log says so."""
        ...

    def blocks_linear(self, blocks: Seq[GGMLBlocks], bias: Tensor | None) -> Linear | None:
        """The same over matrices in GGML's blocks; None where one is of a kind that no kernel takes as it is."""
        ...

    def round_weight(self, weight: Tensor, bits: int, group: int) -> GroupedWeight | None:
        """A plain matrix [N, K] on the device, of any float dtype, rounded to 4, 6 or 8 bits in groups of a row as
        ``--quantize int4`` and ``int8`` do it, faster; None where there is no kernel for that. 6 and 8 bits: symmetric,
        the largest number of a group decides its float16 scale. 4 bits: the scale and minimum of least squared error,
        in 8-bit codes that count a float16 of each row."""
        ...

    def experts(self, gate_up: Seq[Linear], down: Seq[Linear]) -> Experts:
        """A mixture over feed-forward networks, gate_up[e] [2 I, D] and down[e] [D, I], which this op set made."""
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

    def scale_rows(self, x: Tensor, factors: Tensor, rows: Tensor) -> Tensor:
        """x [T, H, D] (whose tokens may lie apart) times factors [N] float32 at rows [T] int64, in float32 inside ->
        [T, H, D]."""
        ...

    def copy_rows(self, x: Tensor, out: Tensor) -> None:
        """out [N, D] = x [N, D], of one dtype; rows of either may lie apart."""
        ...

    def add_rows(self, y: Tensor, rows: Tensor | None, x: Tensor) -> None:
        """y [N, D] += x [R, D] in place at rows [R] int64, all different; None: R is N."""
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

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        """x [T, D] * sigmoid(gate), gate [T, D] or [T, 1] (whose rows may lie apart); may work in place on x."""
        ...

    def route(self, logits: Tensor, k: int, normalize: bool, sigmoid: bool = False) -> tuple[Tensor, Tensor]:
        """A router's choice: logits [T, E] -> ids [T, k] int64 of the k most likely experts, largest first, equal ones
        by id, and their weights [T, k] float32: their softmax over all E, or each one's sigmoid, with `normalize`
        divided by their sum."""
        ...

    def short_conv(self, x: Tensor, weight: Tensor, batch: Batch, state: Tensor) -> Tensor:
        """A causal convolution of each channel along each sequence of the batch, then silu: x [T, C] (whose rows may
        lie apart), weight [C, W] in x's dtype, the newest token's at W - 1 -> [T, C]. state [num_slots, C, W - 1] in
        x's dtype: a sequence's last W - 1 inputs, the newest last, read at its batch.state_in (below 0: zeros) and,
        for the next step, written at its batch.state_out (below 0: a padding row, of which nothing is stored and
        whose output may be anything). No slot is both read and written in one step; others stay as they are."""
        ...

    def gated_delta(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, dt_bias: Tensor, batch: Batch,
        state: Tensor,
    ) -> Tensor:  # fmt: skip
        """The gated delta rule (Yang, Kautz & Hatamizadeh 2024) along each sequence of the batch, in float32 inside.

        q, k [T, HK, DK], v [T, HV, DV] with HK a divisor of HV, a and b [T, HV], all in one dtype; of each, what
        belongs to one token is contiguous, and tokens may lie apart. decay and dt_bias [HV] float32. state [num_slots,
        HV, DK, DV] float32, read and written as short_conv's. Head h of v goes with head h // (HV / HK) of q and k.
        With alpha = exp(decay * softplus(a + dt_bias)), beta = sigmoid(b), and q and k divided by
        sqrt(their sum of squares + 1e-6), for each token in turn

            S = alpha * S;  S = S + k (beta * (v - k^T S));  out = q^T S / sqrt(DK)

        Returns [T, HV, DV] in v's dtype."""
        ...

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        """rms_norm(x) * silu(gate), in float32 inside: x [T, H, D], gate [T, H, D] (whose tokens may lie apart),
        weight [D]."""
        ...

    def keep_index_keys(
        self, k: Tensor, weight: Tensor, eps: float, cos_sin: Tensor, batch: Batch, kept: Tensor, group: int
    ) -> None:
        """What keys are to be chosen by: k [T, D] (whose tokens may lie apart), weight [D], kept [num_blocks,
        block_size, D], all in one dtype; cos_sin [max_context, rotary_dim] float32, rotary_dim at most D. A token's k
        is kept at its slot. The last of `group` tokens of a sequence, counted from its first, keeps in place of it what
        stands for the whole group: rms_norm of the mean of their k, rotated as Attention.rope_and_store does it by the
        group's first position; mean and norm are rounded to the dtype. Tokens that come again are kept again. No draft
        of the batch is a tree."""
        ...

    def select_keys(self, q: Tensor, cos_sin: Tensor, batch: Batch, kept: Tensor, selection: KeySelection) -> Tensor:
        """The slots of the keys that each token sees, in the order of their positions, -1 behind the last: q [T,
        num_heads, D] in kept's dtype (whose tokens may lie apart) -> [T, selection.most_keys] int32. Of the whole
        groups up to its own position a token sees those budget / group for which the sum over heads of max(0, q . the
        group's key) is largest, q rotated at the token's position and sums in float32, the earlier of equal ones; and
        the tokens after these groups, itself included. No draft of the batch is a tree."""
        ...

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [R, V] float32 -> the largest [R] and its id [R] int64, the first of equal ones. Of a row
        that holds NaN or +infinity the value is not finite and the id any."""
        ...

    def draw(
        self, logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """A token of each row: logits [R, V] float32, which may be overwritten -> argmax's values [R] and the ids [R]
        int64 drawn. None: there is no kernel for it, and torch draws.

        All on this device: temperatures [R] float32, 0 for argmax's id; top_k [R] int64, at least 1, V and more keep
        all; top_p [R] float64, above 0, 1 and more keep all; min_p [R] float32; u [R] float64 in [0, 1). Logits are
        divided by the temperature; of what that leaves the top_k most likely are kept, of these for as long as the more
        likely ones have less than a share of top_p, of these the ones at least min_p times as likely as the most likely
        one, and each time those that are as likely as the last of them. Of the kept ones, in the order of ids, that is
        drawn in which u of their sum lies. Of a row whose value is not finite the id is any."""
        ...

    def logprobs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """logits [R, V] float32 -> the log of the sum of each row's exponentials [R] float32, which logits have to be
        lessened by to be log-probabilities; those of the k most likely tokens, descending, and their ids int64, [R, k]
        each, 0 <= k <= V. Which of equal ones come first, or at all, is not said. Of a row that holds NaN or +infinity
        the sum is not finite, and the rest anything."""
        ...


class Attention(Protocol):
    """Paged attention on one device. It alone knows the layout of the KV it allocates. A block that changed hands keeps
    its old content, whatever that is, NaN included: what lies beyond a sequence's context must have no effect.

    A backend that can round KV names what to in an attribute `kv_storages`, strings of its own choosing, and finds what
    ``--kv-cache-quant`` asked for in spec.storage. A token's KV is rounded once, when it is stored. Without the
    attribute it is never asked to. One that knows chunks of positions says so in an attribute `chunked`, True; `attend`
    of no other is given `chunk`. One that knows trees of drafts says so in an attribute `trees`, True; no other is
    given a batch with `ancestors`. Windows and chunks go by positions in a tree as well."""

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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        layer_kv: Any,
        scale: float,
        window: int | None,
        chunk: int | None = None,
    ) -> Tensor:
        """Causal attention of q [T, H, D] over the stored context: [T, H * D]. k and v [T, KV, D] are the step's own
        (already stored), for backends that prefer them. `window` bounds how many last tokens are attended to; with
        `chunk` (Llama 4) they are those whose position // chunk is the query's. Not both."""
        ...


class DualChunkAttention(Attention, Protocol):
    """What an attention has beside that knows dual chunks. With another such a model's context is one chunk."""

    def attend_dual_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        batch: Batch,
        layer_kv: Any,
        scale: float,
        chunks: DualChunks,
    ) -> Tensor:
        """In place of rope_and_store and attend, with the same arguments: a query sees all of its context, but meets
        keys by their distance in chunks (see DualChunks). What is stored is one key per token, as ever. cos_sin has
        chunks.num_undivided rows at least. Returns [T, H * D]."""
        ...


class SlotAttention(Attention, Protocol):
    """What an attention has beside whose queries can see some keys alone. With another the context of a model that
    chooses them (KeySelection) ends where they would be fewer than all."""

    def attend_slots(self, q: Tensor, batch: Batch, layer_kv: Any, scale: float, slots: Tensor) -> Tensor:
        """In place of attend, after rope_and_store: each query of q [T, H, D] sees the keys stored at its slots [T, N]
        int32, one at least, all of its own sequence, -1 behind the last of them, and no others. Nobody else's KV has
        an effect, whatever it is. layer_kv was allocated for a spec that said `selected`. Returns [T, H * D]."""
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


class BegunStep(Protocol):
    """A step that was begun, and that nobody has waited for."""

    wrong: set[int]  # once `results` has been called: ids of the sequences that steps after this one took for others

    def results(self) -> list[list[Sampled] | Exception]:
        """As those of Runner.run. Waits; raises what the device raises."""
        ...


class Overlapping(Protocol):
    """What a runner or an executor has beside `run` where the device works while the host does something else. So the
    next step is begun before the last one's tokens are on the host."""

    def begin(self, step: Step, after: BegunStep | None = None) -> BegunStep | None:
        """Begin a step in which every sequence has all that it owes. With `after`, a step that was begun and is not
        booked yet, it is one more token of some of the same sequences, whose ids only the device knows: a sequence is
        as `after` found it, and has a block for that token. None where a step cannot be begun without waiting, because
        somebody wants to look at its logits or tokens first; it has to be run then."""
        ...


class DraftRunner(Runner, Protocol):
    """The runner of a draft model, which can draw several tokens before anybody on the host knows the first."""

    def draft(self, step: Step, limits: Seq[int]) -> list[list[int]]:
        """Forward the step, which has all that its sequences owe, and go on from what is drawn: limits[i] ids that may
        follow seqs[i], no limit larger than the one before it, the last 1 at least. The ids are guesses: of a sequence
        that nothing can be sampled for they are any. All blocks are there, for limits[i] - 1 tokens beside those owed;
        the sequences are left as they are, and KV is stored of all but the last id. No sequence has an adapter or a
        draft."""
        ...


class Executor(Protocol):
    """Where the ranks run: in this process, in local processes, on other machines. One may be Overlapping as well."""

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        """As Runner.run, of the rank that samples. Running the same step again must be harmless."""
        ...

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended: drop what is kept for it."""
        ...

    def close(self) -> None: ...
