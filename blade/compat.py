"""`blade_llm_server`: BladeLLM's command line, translated into that of `blade serve`.

One table says of every option whether it is mapped, accepted (what it asks for is what blade does) or refused by name:
none is ignored in silence. docs/bladellm.md is made from the same table.
"""

from __future__ import annotations

import difflib
import re
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from blade.errors import BladeError, ConfigError

BAD_USAGE = 2
DTYPES = {"half": "float16", "float16": "float16", "bfloat16": "bfloat16", "float": "float32", "float32": "float32"}
KV_MODES = "int8 int4 int8_affine int4_affine fp8_e5m2 fp8_e4m3 mix_f852i4 mix_f843i4 mix_i8i4"
KV_CACHE_QUANT = {"no_quant": "none"} | {mode: mode for mode in KV_MODES.split()} | {"mix_i4i4": "int4"}
LOG_LEVELS = {level: level.lower() for level in ("DEBUG", "INFO", "WARNING", "ERROR")}
MIN_BATCH_TOKENS = 256  # of blade's default --max-num-seqs: a step carries at least one token of each sequence


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def one_of(values: Mapping[str, str]) -> Callable[[str], str]:
    """BladeLLM's word for something -> blade's."""

    def convert(text: str) -> str:
        if text not in values:
            raise ArgumentTypeError(f"must be one of {', '.join(values)}, not {text!r}")
        return values[text]

    return convert


@dataclass(frozen=True)
class Option:
    """One option of BladeLLM and what becomes of it."""

    name: str  # in BladeLLM's spelling, without the dashes
    type: Callable[[str], Any] = str
    to: Callable[[Any], list[str]] | None = None  # mapped: value -> arguments of `blade serve`
    only: tuple[Any, ...] | None = ()  # not mapped: values that are accepted; None is any
    why: str = ""  # a sentence: what blade does instead, or already does
    default: Any = None  # passed on when the option is not given; None leaves it to blade
    many: bool = False  # takes any number of values
    spelt: Mapping[str, str] = field(default_factory=dict)  # blade's words for it, as errors have them -> BladeLLM's

    @property
    def verdict(self) -> str:
        return "mapped" if self.to else "refused" if self.only == () else "accepted"


def mapped(
    name: str,
    to: str,
    type: Callable[[str], Any] = str,  # noqa: A002
    default: Any = None,
    why: str = "",
    words: Mapping[str, str] | None = None,
) -> Option:
    """To an option of blade's with one value; `words`: BladeLLM's for it -> blade's, where there are only so many."""
    spelt = {f"--{to}": f"--{name}"}
    for theirs, own in (words or {}).items():
        if own == theirs or own not in (words or {}):
            spelt.setdefault(f"--{to} {own}", f"--{name} {theirs}")
    type = one_of(words) if words else type  # noqa: A001
    to_own = lambda value: [f"--{to}", str(value)]  # noqa: E731
    return Option(name, type, to_own, why=why or f"--{to}", default=default, spelt=spelt)


def accepted(name: str, why: str, *only: Any, type: Callable[[str], Any] = str, many: bool = False) -> Option:  # noqa: A002
    return Option(name, type, only=only or None, why=why, many=many)


def refused(name: str, why: str, many: bool = False) -> Option:
    return Option(name, why=why, many=many)


def _max_batch_tokens(value: int) -> list[str]:
    """Where a step is small, so is the number of sequences in it."""
    fewer = ["--max-num-seqs", str(value)] if value < MIN_BATCH_TOKENS else []
    return ["--max-batch-tokens", str(value), *fewer]


def _lora_modules(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--lora", value)]


MAX_BATCH_TOKENS = f"--max-batch-tokens, and --max-num-seqs where it is below {MIN_BATCH_TOKENS}"
ONE_DEVICE = "blade runs a model on one device"
ONE_NODE = "blade runs on one machine"
DRAFT_TEXT = "a draft model gets token ids and needs no chat template"
DRAFT_AS_MODEL = "the draft model runs as the model does"
NO_DISAGGREGATION = "blade prefills and decodes in one engine"
NO_REMOTE = "blade has no remote workers; `blade serve --device` chooses the device"
ONE_OF_TWO = "--cuda_graph_batch_sizes names the sizes"
NO_LLUMNIX = "blade has no Llumnix layer"
DRAFT_KV = "the draft model's KV cache is kept as the model's: --kv_cache_quant"
SPECIAL_TOKENS = "blade takes special tokens from the tokenizer's files alone"
NO_MLA = "blade serves no MLA models yet"
TEXT_ALONE = "blade serves text alone"
DRAFTERS = {"normal": [], "sps": ["--drafter", "model"], "look_ahead": ["--drafter", "lookahead"]}
DISAGG_OPTIONS = "inst_id inst_role disagg_transfer_type token_port"
SEMI_PD_OPTIONS = "inst_id transfer_type prefill_server_port"

OPTIONS: dict[str, tuple[Option, ...]] = {
    "Parallelism": (
        accepted("tensor_parallel_size", ONE_DEVICE, 1, type=int),
        accepted("pipeline_parallel_size", ONE_DEVICE, 1, type=int),
        accepted("pipeline_micro_batch", "there is one stage, so one batch is in flight", 1, type=int),
        accepted("attention_dp_size", ONE_DEVICE, 1, type=int),
        refused("dist_init_addr", ONE_NODE),
        accepted("nnodes", ONE_NODE, 1, type=int),
        accepted("node_rank", ONE_NODE, 0, type=int),
        accepted("enable_custom_allreduce", "one device has nothing to reduce", type=boolean),
        refused("enable_remote_worker", NO_REMOTE, many=True),
        refused("server_ip", NO_REMOTE),
        refused("rank", NO_REMOTE),
        refused("device", NO_REMOTE),
    ),
    "Service": (
        mapped("host", "host", why="--host; 127.0.0.1 by default, a public address needs BLADE_API_KEY or --insecure"),
        mapped("port", "port", int, default=8081),
        accepted("worker_socket_path", "there are no workers, so no socket is made"),
        mapped("log_level", "log-level", words=LOG_LEVELS),
        accepted("metric_exporters", "metrics are always at /metrics, whoever collects them", many=True),
        accepted("metric_export_interval_sec", "/metrics is always current", type=float),
        refused("serving_observability_options", "blade exports no OpenTelemetry traces yet"),
        mapped("max_queue_time", "max-queue-time", int),
        accepted("decoding_parallelism", "text is decoded in one thread", 1, type=int),
        accepted("disable_frontend_multiprocessing", "blade is one process", True, type=boolean),
        accepted("disable_signal_handler", "blade ends its requests on SIGTERM", False, type=boolean),
        accepted("enable_json_warmup", "blade has no guided decoding yet", False, type=boolean),
        refused("generation_configs", "blade takes generation defaults from requests alone"),
        accepted("enable_llumnix", NO_LLUMNIX, False, type=boolean),
        refused("llumnix_config", NO_LLUMNIX),
    ),
    "Scheduler, memory, cache": (
        mapped("max_gpu_memory_utilization", "max-gpu-memory-utilization", float, default=0.85),
        Option(
            "ragged_flash_max_batch_tokens",
            int,
            _max_batch_tokens,
            why=MAX_BATCH_TOKENS,
            default=2048,
            spelt={"--max-batch-tokens": "--ragged_flash_max_batch_tokens"},
        ),
        accepted("preempt_strategy", "blade preempts by recomputing", "AUTO", "RECOMPUTE"),
        Option(
            "disable_prompt_cache",
            boolean,
            lambda off: ["--no-prefix-cache"] if off else [],
            why="--no-prefix-cache",
            spelt={"--no-prefix-cache": "--disable_prompt_cache", "--prefix-cache": "--disable_prompt_cache false"},
        ),
        accepted("prompt_cache_enable_swap", "blade's prompt cache stays on the device", False, type=boolean),
        accepted("attn_cls", "blade's attention is paged, with prompts cut into chunks", "ragged_flash", "paged"),
        mapped(
            "kv_cache_quant",
            "kv-cache-quant",
            words=KV_CACHE_QUANT,
            why="--kv-cache-quant; mix_i4i4 is int4; what a device lacks is refused, not replaced",
        ),
        accepted("kv_cache_quant_sub_heads", "a mode has its groups", 1, type=int),
    ),
    "Model": (
        mapped("model", "model"),
        mapped("tokenizer_dir", "tokenizer-dir"),
        mapped("chat_template", "chat-template", why="--chat-template; the path of a Jinja file"),
        mapped("dtype", "dtype", words=DTYPES),
        refused("tokenizer_special_tokens", SPECIAL_TOKENS, many=True),
        accepted("enable_triton_mla", NO_MLA, False, type=boolean),
        Option(
            "disable_cuda_graph",
            boolean,
            lambda off: ["--disable-cuda-graph"] if off else [],
            why="--disable-cuda-graph",
            spelt={"--disable-cuda-graph": "--disable_cuda_graph"},
        ),
        refused("cuda_graph_max_batch_size", ONE_OF_TWO),
        Option(
            "cuda_graph_batch_sizes",
            int,
            lambda sizes: [part for size in sizes for part in ("--cuda-graph-batch-sizes", str(size))],
            why="--cuda-graph-batch-sizes",
            many=True,
            spelt={"--cuda-graph-batch-sizes": "--cuda_graph_batch_sizes"},
        ),
        accepted("with_visual", TEXT_ALONE, False, type=boolean),
    ),
    "Speculation": (
        Option(
            "decode_algo",
            one_of({name: name for name in DRAFTERS}),
            DRAFTERS.__getitem__,
            why="sps: --drafter model; look_ahead: --drafter lookahead",
            spelt={"--drafter model": "--decode_algo sps", "--drafter lookahead": "--decode_algo look_ahead"},
        ),
        mapped("gamma", "num-draft-tokens", int, why="--num-draft-tokens: the most; as many as pay are verified"),
        Option(
            "use_sps",
            boolean,
            lambda on: DRAFTERS["sps"] if on else [],
            why="--drafter model",
            spelt={"--drafter model": "--use_sps"},
        ),
        Option(
            "use_lookahead",
            boolean,
            lambda on: DRAFTERS["look_ahead"] if on else [],
            why="--drafter lookahead",
            spelt={"--drafter lookahead": "--use_lookahead"},
        ),
        mapped("look_ahead_window_size", "lookahead-window-size", int),
        mapped("look_ahead_gram_size", "lookahead-ngram-size", int),
        mapped("guess_set_size", "lookahead-guess-set-size", int),
        mapped("draft.model", "draft.model"),
        mapped("draft.tokenizer_dir", "draft.tokenizer-dir"),
        accepted("draft.chat_template", DRAFT_TEXT),
        mapped("draft.dtype", "draft.dtype", words=DTYPES),
        accepted("draft.kv_cache_quant", DRAFT_KV, "no_quant"),
        accepted("draft.kv_cache_quant_sub_heads", DRAFT_KV, 1, type=int),
        accepted("draft.attn_cls", "blade's attention is paged", "ragged_flash", "paged"),
        refused("draft.tokenizer_special_tokens", SPECIAL_TOKENS, many=True),
        accepted("draft.enable_triton_mla", NO_MLA, False, type=boolean),
        accepted("draft.disable_cuda_graph", f"{DRAFT_AS_MODEL}: --disable_cuda_graph", False, type=boolean),
        refused("draft.cuda_graph_max_batch_size", DRAFT_AS_MODEL),
        refused("draft.cuda_graph_batch_sizes", DRAFT_AS_MODEL, many=True),
        accepted("draft.with_visual", TEXT_ALONE, False, type=boolean),
    ),
    "LoRA": (
        accepted("enable_lora", "implied by --lora_modules", type=boolean),
        Option(
            "lora_modules",
            to=_lora_modules,
            why="--lora NAME=DIR, once for each",
            many=True,
            spelt={"--lora": "--lora_modules"},
        ),
    ),
    "Disaggregation": (
        accepted("enable_disagg", NO_DISAGGREGATION, False, type=boolean),
        *(refused(f"disagg_pd.{name}", NO_DISAGGREGATION) for name in DISAGG_OPTIONS.split()),
        refused("naming_url", NO_DISAGGREGATION),
        refused("select_decode_policy", NO_DISAGGREGATION),
        accepted("enable_semi_pd_mode", NO_DISAGGREGATION, False, type=boolean),
        *(refused(f"semi_pd.{name}", NO_DISAGGREGATION) for name in SEMI_PD_OPTIONS.split()),
        refused("elastic_attn_cluster", NO_DISAGGREGATION),
    ),
}


def by_name(options: Mapping[str, Sequence[Option]]) -> dict[str, Option]:
    return {option.name: option for group in options.values() for option in group}


BY_NAME = by_name(OPTIONS)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")


def make_parser(program: str, command: str, options: Mapping[str, Sequence[Option]]) -> ArgumentParser:
    """Of `program`, which is translated into `command`; what is not given is not in its namespace."""
    parser = _Parser(
        program,
        description=f"BladeLLM's command line for blade. What follows a lone -- goes to `{command}` as it is.",
        allow_abbrev=False,
        argument_default=SUPPRESS,
    )
    for title, members in options.items():
        group = parser.add_argument_group(title)
        for option in members:
            spellings = [f"--{option.name}", *(["-tp"] if option.name == "tensor_parallel_size" else [])]
            help_text = f"{option.verdict}: {option.why}".replace("%", "%%")
            settings: dict[str, Any] = {"type": option.type, "dest": option.name, "help": help_text}
            if option.type is boolean:
                settings |= {"nargs": "?", "const": True}
            elif option.many:
                settings |= {"nargs": "*"}
            group.add_argument(*spellings, metavar=option.name.rpartition(".")[2].upper(), **settings)
    return parser


def translate(argv: list[str]) -> list[str]:
    """BladeLLM's arguments -> those of the `blade` command. Raises ConfigError naming the option that is unknown, has a
    bad value, or asks for what blade cannot do."""
    given, rest = parse(argv, make_parser("blade_llm_server", "blade serve", OPTIONS), BY_NAME)
    if "model" not in given:
        raise ConfigError("--model is missing.", "Name a model folder, a .gguf file or a hub id.")
    args = ["serve"]
    for name, value in given.items():
        args += arguments(BY_NAME[name], value)
    return args + rest


def parse(argv: list[str], parser: ArgumentParser, options: Mapping[str, Option]) -> tuple[dict[str, Any], list[str]]:
    """The values by option, defaults included, and what follows a lone --. Raises ConfigError."""
    end = argv.index("--") if "--" in argv else len(argv)
    namespace, unknown = parser.parse_known_args(argv[:end])
    if unknown:
        raise _unknown(unknown[0], options)
    defaults = {name: option.default for name, option in options.items() if option.default is not None}
    return defaults | vars(namespace), argv[end + 1 :]


def arguments(option: Option, value: Any) -> list[str]:
    if option.to is not None:
        return option.to(value)
    if option.only is not None and value not in option.only:
        asked = f"--{option.name} {shown(value)}" if option.only else f"--{option.name}"
        remedy = f"Accepted is {' or '.join(map(shown, option.only))}." if option.only else "Leave it out."
        raise ConfigError(f"{asked} is not supported: {option.why}.", remedy)
    return []


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(argument: str, options: Mapping[str, Option]) -> ConfigError:
    if not argument.startswith("-"):
        return ConfigError(f"{argument!r} belongs to no option.")
    option = argument.partition("=")[0]
    close = difflib.get_close_matches(option.lstrip("-").replace("-", "_"), options, 1)
    return ConfigError(f"BladeLLM has no option {option}.", f"Did you mean --{close[0]}?" if close else "")


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit status as of `blade`: 2 with one sentence for what the user can mend."""
    run("blade_llm_server", translate, argv, BY_NAME)


def run(
    program: str,
    translate: Callable[[list[str]], list[str]],
    argv: list[str] | None,
    options: Mapping[str, Option],
) -> None:
    """Run `blade` with what the program's arguments are translated into. What it refuses is named as it was typed."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = translate(argv)
    except BladeError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(BAD_USAGE)
    from blade.cli import main as blade_main

    blade_main(args, program, lambda text: respelt(text, argv, options))


def respelt(text: str, argv: Sequence[str], options: Mapping[str, Option]) -> str:
    """An error of blade's in BladeLLM's words, but for the options of blade's own that `argv` has."""
    given = {word.partition("=")[0] for word in argv}
    ordered = sorted(options.values(), key=lambda option: f"--{option.name}" in given)  # the last one counts
    words = {own: theirs for option in ordered for own, theirs in option.spelt.items()}
    known = sorted((own for own in words if own.partition(" ")[0] not in given), key=len, reverse=True)
    pattern = rf"(?<![\w-])(?:{'|'.join(map(re.escape, known))})(?![\w-])"
    return re.sub(pattern, lambda match: words[match[0]], text)
