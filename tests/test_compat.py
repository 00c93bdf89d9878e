"""BladeLLM's command line, option by option."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from blade import Config, ConfigError, DraftOptions, EngineConfig, ModelOptions, ServerOptions, compat
from blade.compat import BY_NAME, translate

DOCS = Path(__file__).parent.parent / "docs"
DEFAULTS = ["--port", "8081", "--max-gpu-memory-utilization", "0.85", "--max-batch-tokens", "2048"]

MAPPED = {
    "host": ("0.0.0.0", ["--host", "0.0.0.0"]),
    "port": ("8001", ["--port", "8001"]),
    "log_level": ("WARNING", ["--log-level", "warning"]),
    "max_queue_time": ("30", ["--max-queue-time", "30"]),
    "kv_cache_quant": ("mix_i4i4", ["--kv-cache-quant", "int4"]),
    "max_gpu_memory_utilization": ("0.5", ["--max-gpu-memory-utilization", "0.5"]),
    "ragged_flash_max_batch_tokens": ("4096", ["--max-batch-tokens", "4096"]),
    "disable_prompt_cache": ("true", ["--no-prefix-cache"]),
    "model": ("dir", ["--model", "dir"]),
    "tokenizer_dir": ("tok", ["--tokenizer-dir", "tok"]),
    "chat_template": ("chat.jinja", ["--chat-template", "chat.jinja"]),
    "dtype": ("half", ["--dtype", "float16"]),
    "disable_cuda_graph": ("true", ["--disable-cuda-graph"]),
    "cuda_graph_batch_sizes": ("4", ["--cuda-graph-batch-sizes", "4"]),
    "decode_algo": ("sps", ["--drafter", "model"]),
    "use_sps": ("true", ["--drafter", "model"]),
    "use_lookahead": ("true", ["--drafter", "lookahead"]),
    "look_ahead_window_size": ("3", ["--lookahead-window-size", "3"]),
    "look_ahead_gram_size": ("5", ["--lookahead-ngram-size", "5"]),
    "guess_set_size": ("6", ["--lookahead-guess-set-size", "6"]),
    "gamma": ("2", ["--num-draft-tokens", "2"]),
    "draft.model": ("small", ["--draft.model", "small"]),
    "draft.tokenizer_dir": ("tok", ["--draft.tokenizer-dir", "tok"]),
    "draft.dtype": ("half", ["--draft.dtype", "float16"]),
    "lora_modules": ("a=/x", ["--lora", "a=/x"]),
}
ACCEPTED = {
    "tensor_parallel_size": ("1", "2"),
    "pipeline_parallel_size": ("1", "2"),
    "pipeline_micro_batch": ("1", "4"),
    "attention_dp_size": ("1", "8"),
    "nnodes": ("1", "2"),
    "node_rank": ("0", "1"),
    "enable_custom_allreduce": ("true", None),
    "worker_socket_path": ("/tmp/w", None),
    "metric_exporters": ("logging", None),
    "metric_export_interval_sec": ("5", None),
    "decoding_parallelism": ("1", "2"),
    "disable_frontend_multiprocessing": ("true", "false"),
    "disable_signal_handler": ("false", "true"),
    "enable_json_warmup": ("false", "true"),
    "enable_llumnix": ("false", "true"),
    "preempt_strategy": ("AUTO", "SWAP"),
    "prompt_cache_enable_swap": ("false", "true"),
    "attn_cls": ("ragged_flash", "outofplace"),
    "kv_cache_quant_sub_heads": ("1", "2"),
    "enable_triton_mla": ("false", "true"),
    "with_visual": ("false", "true"),
    "draft.chat_template": ("x", None),
    "draft.kv_cache_quant": ("no_quant", "int8"),
    "draft.kv_cache_quant_sub_heads": ("1", "2"),
    "draft.attn_cls": ("paged", "outofplace"),
    "draft.enable_triton_mla": ("false", "true"),
    "draft.disable_cuda_graph": ("false", "true"),
    "draft.with_visual": ("false", "true"),
    "enable_lora": ("true", None),
    "enable_disagg": ("false", "true"),
    "enable_semi_pd_mode": ("false", "true"),
}
REFUSED = {
    "dist_init_addr": "host:1",
    "enable_remote_worker": "true",
    "server_ip": "1.2.3.4",
    "rank": "0",
    "device": "cuda",
    "serving_observability_options": "x",
    "generation_configs": "x",
    "llumnix_config": "x.yml",
    "tokenizer_special_tokens": "<a>",
    "cuda_graph_max_batch_size": "64",
    "draft.tokenizer_special_tokens": "<a>",
    "draft.cuda_graph_max_batch_size": "1",
    "draft.cuda_graph_batch_sizes": "1",
    "disagg_pd.inst_id": "a",
    "disagg_pd.inst_role": "prefill",
    "disagg_pd.disagg_transfer_type": "rdma",
    "disagg_pd.token_port": "1",
    "naming_url": "file:/x",
    "select_decode_policy": "EXTERNAL_ROUTE",
    "semi_pd.inst_id": "a",
    "semi_pd.transfer_type": "rdma",
    "semi_pd.prefill_server_port": "1",
    "elastic_attn_cluster": "x",
}


def joined(*argv: str) -> str:
    return " ".join(translate(["--model", "m", *argv]))


def test_every_option_has_its_case() -> None:
    assert sorted([*MAPPED, *ACCEPTED, *REFUSED]) == sorted(BY_NAME)


def test_defaults() -> None:
    assert translate(["--model", "m"]) == ["serve", *DEFAULTS, "--model", "m"]


@pytest.mark.parametrize("name", MAPPED)
def test_mapped(name: str) -> None:
    value, expected = MAPPED[name]
    assert " ".join(expected) in joined(f"--{name}", value)
    assert " ".join(expected) in joined(f"--{name}={value}")


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    value, other = ACCEPTED[name]
    assert translate([f"--{name}", value, "--model", "m"]) == ["serve", *DEFAULTS, "--model", "m"]
    if other is not None:
        with pytest.raises(ConfigError, match=f"^--{name} {other} is not supported: .*Accepted is .*{value}"):
            translate([f"--{name}={other}", "--model", "m"])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^--{name} is not supported: .*Leave it out"):
        translate([f"--{name}", REFUSED[name], "--model", "m"])


def test_the_defaults_are_blades_own() -> None:
    assert (ServerOptions().port, EngineConfig().max_gpu_memory_utilization) == (8081, 0.85)
    assert (EngineConfig().max_batch_tokens, EngineConfig().max_num_seqs) == (2048, compat.MIN_BATCH_TOKENS)


def test_the_command_line_is_one_that_blade_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr("blade.serve.run", seen.append)
    argv = [part for name, (value, _) in MAPPED.items() for part in (f"--{name}", value)]
    with pytest.raises(SystemExit) as exit_info:
        compat.main([*argv, "--ragged_flash_max_batch_tokens", "64", "--", "--insecure"])
    assert exit_info.value.code == 0
    (config,) = seen
    assert config.model == ModelOptions(
        model="dir", tokenizer_dir=Path("tok"), chat_template=Path("chat.jinja"), dtype="float16", lora=("a=/x",)
    )
    assert config.engine == EngineConfig(
        max_queue_time=30,
        max_gpu_memory_utilization=0.5,
        max_batch_tokens=64,
        max_num_seqs=64,
        kv_cache_quant="int4",
        prefix_cache=False,
        cuda_graph_batch_sizes=(4,),
        disable_cuda_graph=True,
        num_draft_tokens=2,
        drafter=("model", "model", "lookahead"),
        lookahead_window_size=3,
        lookahead_ngram_size=5,
        lookahead_guess_set_size=6,
    )
    assert config.draft == DraftOptions(model="small", tokenizer_dir=Path("tok"), dtype="float16")
    assert config.server == ServerOptions(host="0.0.0.0", port=8001, log_level="warning", insecure=True)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("half", "float16"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float", "float32"),
        ("float32", "float32"),
    ],
)
def test_dtypes(given: str, dtype: str) -> None:
    assert f"--dtype {dtype}" in joined("--dtype", given)


def test_flags_need_no_value_and_take_one() -> None:
    assert "--no-prefix-cache" in joined("--disable_prompt_cache")
    assert "--no-prefix-cache" not in joined("--disable_prompt_cache", "false")
    assert "--drafter" not in joined("--use_lookahead", "false", "--decode_algo", "normal")
    assert "--drafter lookahead" in joined("--decode_algo", "look_ahead")
    assert "--disable-cuda-graph" not in joined("--disable_cuda_graph", "false")
    sizes = joined("--cuda_graph_batch_sizes", "1", "8")
    assert "--cuda-graph-batch-sizes 1 --cuda-graph-batch-sizes 8" in sizes
    joined("--disable_cuda_graph", "--metric_exporters", "a", "b", "-tp", "1", "-tp=1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "1"], "--model is missing. Name"),
        (["--model"], "argument --model: expected one argument."),
        (["--model", "m", "--port", "x"], "argument --port: invalid int value: 'x'."),
        (["--model", "m", "--dtype", "int8"], "argument --dtype: must be one of half,"),
        (
            ["--model", "m", "--kv_cache_quant", "int3"],
            "argument --kv_cache_quant: must be one of no_quant, int8, int4, int8_affine,",
        ),
        (["--model", "m", "--log_level", "LOUD"], "argument --log_level: must be one of DEBUG,"),
        (["--model", "m", "--use_sps", "maybe"], "argument --use_sps: must be true or false, not 'maybe'"),
        (
            ["--model", "m", "--tensor-parallel-size=1"],
            "no option --tensor-parallel-size. Did you mean --tensor_parallel_size?",
        ),
        (["--model", "m", "--zzz"], "BladeLLM has no option --zzz."),
        (["--model", "m", "stray"], "'stray' belongs to no option."),
        (["--model", "m", "-tp", "2"], "--tensor_parallel_size 2 is not supported: blade runs a model on one device."),
    ],
)
def test_bad_usage_ends_with_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        compat.main(argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("blade_llm_server: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gamma", "-1"], "--gamma must be at least 1, not -1."),
        (["--decode_algo", "sps"], "--decode_algo sps has no model to draft with."),
        (["--use_sps"], "--use_sps has no model to draft with."),
        (["--", "--drafter", "model"], "--drafter model has no model to draft with."),
        (["--lora_modules", "x"], "--lora_modules x is not of the form NAME=DIR."),
    ],
)
def test_what_blade_refuses_is_named_as_it_was_typed(
    argv: list[str], message: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compat.main(["--model", str(tiny_llama), *argv, *([] if "--" in argv else ["--"]), "--dry-run"])
    assert capsys.readouterr().err.startswith(f"blade_llm_server: {message}")


def test_blades_words_in_bladellms() -> None:
    text = "--kv-cache-quant none, --kv-cache-quant int4; --log-level warning; --lora-dir; --num-draft-tokens-x"
    wanted = "--kv_cache_quant no_quant, --kv_cache_quant int4; --log_level WARNING; --lora-dir; --num-draft-tokens-x"
    assert compat.respelt(text, [], BY_NAME) == wanted
    assert compat.respelt(text, ["--kv-cache-quant=int4", "--log-level"], BY_NAME) == text


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        compat.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in BY_NAME)


def test_the_page_is_up_to_date() -> None:
    rendered = runpy.run_path(str(DOCS / "generate_bladellm.py"))["render"]()
    assert (DOCS / "bladellm.md").read_text() == rendered, "run docs/generate_bladellm.py"
