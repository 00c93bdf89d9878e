"""What was asked for, as frozen dataclasses. The command line is made from them (names, defaults, help), so each option
is said once; nothing changes them later."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blade.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Dialect = Literal["bladellm", "openai"]
Hub = Literal["huggingface", "modelscope"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
GRAPH_BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BLOCK_SIZES = (4, 8, 16, 32, 64, 128)


def _within(options: Any, name: str, low: float, high: float = float("inf")) -> None:
    """Refuse a value outside [low, high], NaN included; None means not set."""
    value = getattr(options, name)
    if value is not None and not low <= value <= high:
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ConfigError(f"--{name.replace('_', '-')} must be {bounds}, not {value:g}.")


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """A smaller model of the same vocabulary, or a head made for the model, which proposes tokens to it (speculative
    decoding)."""

    model: str | None = None
    """A folder, a .gguf file or a hub id; it implies --drafter model, for an EAGLE-3 head --drafter eagle3. With
    --drafter mtp: where the model's heads are, if not in its own files."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    hub: Hub = "huggingface"
    """Where a hub id is looked up."""
    tokenizer_dir: Path | None = None
    """Folder of the draft model's tokenizer, where it is not the model's."""
    dtype: Dtype = "auto"
    """Type of its weights, activations and KV cache; a head runs in the model's."""
    quantize: str | None = None
    """As --quantize, for the draft model."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how to read it."""

    model: str | None = None
    """A folder, a .gguf file or a hub id. Without it: the default checkpoint of the plugin named with --plugin."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; it applies to every file."""
    hub: Hub = "huggingface"
    """Where a hub id is looked up."""
    tokenizer_dir: Path | None = None
    """Folder of the tokenizer, where it is not the model's."""
    chat_template: Path | None = None
    """A Jinja chat template to use instead of the model's own."""
    served_model_name: str | None = None
    """The model's name in the API; the folder's or file's name by default."""
    dtype: Dtype = "auto"
    """Type of weights, activations and KV cache; auto is bfloat16 where the device is fast in it, else float32."""
    quantize: str | None = None
    """Make this form of the weights at load: int8 (8.25 bits per weight), int4 (4.5), or a plugin's. none: numbers in
    --dtype, also where a GGUF file has blocks. By default weights are served as the checkpoint has them."""
    max_model_len: int | None = None
    """Most tokens of prompt and output together; the checkpoint's own context by default."""
    lora: tuple[str, ...] = ()
    """NAME=DIR: a LoRA adapter in PEFT's format, which requests choose as their `model`. Repeat for more."""
    lora_dir: Path | None = None
    """Folder whose subfolders may be loaded as adapters, and unloaded, while the server runs."""

    def __post_init__(self) -> None:
        _within(self, "max_model_len", 2)
        for adapter in self.lora:
            name, _, folder = adapter.partition("=")
            if not name or not folder:
                raise ConfigError(f"--lora {adapter} is not of the form NAME=DIR.")
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise ConfigError(f"--lora-dir {self.lora_dir} is no folder.")
        if self.served_model_name == "":
            raise ConfigError("--served-model-name must not be empty.")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Device, memory and policy."""

    device: str = "auto"
    """auto, cpu, cuda, or the name of a plugin's backend."""
    attention: str = "paged"
    """Attention backend."""
    scheduler: str = "fcfs"
    """Scheduling policy."""
    executor: str = "local"
    """Where the model runs."""
    drafter: tuple[str, ...] = ()
    """Proposer of draft tokens for speculative decoding, which changes the speed and never the text: suffix, ngram,
    lookahead, model or eagle3 (with --draft.model), mtp (the model's own heads) or a plugin's. Repeat for more: the
    first that has an idea is taken. None by default."""
    num_draft_tokens: int = 8
    """Most draft tokens of a sequence in one step."""
    lookahead_window_size: int = 5
    """Places ahead that --drafter lookahead makes guesses for at the same time."""
    lookahead_ngram_size: int = 4
    """Tokens of the n-grams that it collects, the first of which is known."""
    lookahead_guess_set_size: int = 5
    """Most n-grams that it has verified in one step. With the window no more than 63 tokens."""
    adaptive_drafts: bool = True
    """Verify only as many draft tokens as are expected to pay, by what is measured; else always all."""
    max_batch_tokens: int = 2048
    """Most tokens in one step: the chunk size of chunked prefill."""
    max_step_seconds: float = 0.5
    """Take fewer tokens of prompts into a step if it would take longer, so that nobody waits long for the next token;
    256 it may always have. 0 bounds them by --max-batch-tokens alone."""
    max_num_seqs: int = 256
    """Most sequences running at once."""
    block_size: int = 16
    """Tokens in one block of the KV cache."""
    prefix_cache: bool = True
    """Keep the KV of finished requests for those that begin alike."""
    max_gpu_memory_utilization: float = 0.85
    """Share of the device memory left after the weights that the KV cache takes (on a CPU at most 4 GiB of it)."""
    kv_cache_quant: str = "none"
    """What keys and values are rounded to in the KV cache: int8 halves it, mix_i8i4 (keys in 8 bits, values in 4) takes
    0.4 of it; int4, int4_affine, int8_affine, fp8_e4m3, fp8_e5m2, mix_f843i4 and mix_f852i4 too; or a plugin's. none
    keeps them in --dtype."""
    kv_cache_memory: int | None = None
    """Bytes of the KV cache, instead of a share."""
    max_queue_time: float | None = None
    """Longest time in seconds a request may wait for its first step; then 503. No bound by default."""
    max_queue_size: int = 1024
    """Most sequences waiting; then 429."""
    cuda_graph_batch_sizes: tuple[int, ...] = GRAPH_BATCH_SIZES
    """Numbers of sequences whose decode steps are recorded as CUDA graphs at start, where the device has them; a step
    is padded to the next number. Those beyond --max-num-seqs are left out. Repeat for more."""
    disable_cuda_graph: bool = False
    """Launch every step kernel by kernel."""
    disable_overlap: bool = False
    """On a device that works by itself: begin a step only when the one before it is over."""
    threads: int | None = None
    """CPU threads of the model; all cores this process may use by default."""
    stall_seconds: float = 120.0
    """A step that takes longer than this makes /health false."""

    def __post_init__(self) -> None:
        for name in ("num_draft_tokens", "max_batch_tokens", "max_num_seqs", "max_queue_size", "threads"):
            _within(self, name, 1)
        for name, least in (("window", 1), ("ngram", 2), ("guess_set", 1)):
            _within(self, f"lookahead_{name}_size", least)
        _within(self, "max_gpu_memory_utilization", 0.01, 1)
        _within(self, "kv_cache_memory", 1)
        _within(self, "max_queue_time", 0)
        _within(self, "max_step_seconds", 0)
        _within(self, "stall_seconds", 1)
        if not all(size >= 1 for size in self.cuda_graph_batch_sizes):
            raise ConfigError(f"--cuda-graph-batch-sizes must be at least 1, not {min(self.cuda_graph_batch_sizes)}.")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"--block-size must be one of {BLOCK_SIZES}, not {self.block_size}.")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-batch-tokens {self.max_batch_tokens} cannot carry one token of each of "
                f"--max-num-seqs {self.max_num_seqs} sequences.",
                f"Use --max-num-seqs {self.max_batch_tokens} with it.",
            )


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The HTTP side."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8081
    """Port to listen on; 0 takes a free one."""
    dialect: Dialect = "bladellm"
    """Framing of replies: BladeLLM's or strictly OpenAI's."""
    api_key: str | None = field(default=None, repr=False)
    """Key clients must send. Other users of the machine can see it here: prefer --api-key-file or BLADE_API_KEY."""
    api_key_file: Path | None = None
    """File with the keys clients may send, one a line."""
    insecure: bool = False
    """Allow a public address without a key."""
    drain_seconds: float = 30.0
    """How long running requests may go on after SIGTERM."""
    max_body_bytes: int = 4 << 20
    """Largest request body; beyond it 413."""
    body_seconds: float = 30.0
    """Longest time a request body may take to arrive; then 408."""
    max_connections: int = 65535
    """Most connections at once."""
    tool_parser: str | None = None
    """How tool calls are found in a chat reply."""
    reasoning_parser: str | None = None
    """How reasoning is told from the answer in a chat reply."""
    log_level: LogLevel = "info"
    """Least severe messages to log."""
    log_format: LogFormat = "text"
    """Lines for people or for machines."""
    access_log: bool = False
    """Log every HTTP request."""

    def __post_init__(self) -> None:
        _within(self, "port", 0, 65535)
        _within(self, "drain_seconds", 0)
        _within(self, "max_body_bytes", 1024)
        _within(self, "body_seconds", 0.1)
        _within(self, "max_connections", 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of it."""

    plugins: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    draft: DraftOptions = field(default_factory=DraftOptions)
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerOptions = field(default_factory=ServerOptions)
