"""What `blade` says before it serves: plans, refusals and their remedies. A start is test_serve.py's, in a process."""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from blade import logs
from blade.cli import main

Blade = Callable[..., CompletedProcess[str]]
ADAPTER = Path(__file__).parent / "lora" / "fixtures" / "dora"  # of a model of another width


@pytest.fixture
def blade(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Blade]:
    """`blade ARGS` in this process, which has imported torch; what a start changes of the process is undone."""
    interval = sys.getswitchinterval()
    for name, value in (("BLADE_API_KEY", ""), ("BLADE_PLUGINS", ""), ("GOMP_SPINCOUNT", "5000")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logs, "set_up", lambda *_: None)

    def run(*args: str) -> CompletedProcess[str]:
        capsys.readouterr()
        status: Any = 0
        try:
            main(list(args))
        except SystemExit as error:
            status = error.code
        return CompletedProcess(args, status, *capsys.readouterr())

    yield run
    sys.setswitchinterval(interval)
    gc.enable()


@pytest.fixture
def broken(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama, folder)
    return folder


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MysteryForCausalLM"]}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (unknown_architecture, "MysteryForCausalLM"),
    ],
)
def test_a_broken_model_is_one_sentence_and_exit_2(blade: Blade, broken: Path, damage: Any, says: str) -> None:
    damage(broken)
    done = blade("serve", "--model", str(broken), "--port", "0")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("blade: ")
    assert says in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "--plugin qwen"),
        (("--model", "/nonexistent/model"), "no such folder"),
        (("--plugin", "qwem"), "Did you mean 'qwen'?"),
        (("--plugin", "qwen", "--scheduler", "fcsf"), "Did you mean 'fcfs'?"),
        (("--plugin", "qwen", "--host", "0.0.0.0"), "--insecure"),
        (("--plugin", "qwen", "--max-batch-tokens", "16"), "--max-num-seqs 16"),
        (("--plugin", "qwen", "--max-gpu-memory-utilization", "nan"), "must be between"),
        (("--plugin", "qwen", "--kv-cache-quant", "int3", "--device", "cpu"), "Use none or int8 or int8_affine or"),
        (("--plugin", "qwen", "--prot", "1"), "--port"),
        (("--plugin", "qwen", "--scheduler", "fcfs", "--drafter", "sufix"), "Did you mean 'suffix'?"),
        (("--plugin", "qwen", "--scheduler", "fcfs", "--drafter", "model"), "--draft.model"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_exit_2_with_the_remedy(
    blade: Blade, args: tuple[str, ...], says: str, tiny_llama: Path
) -> None:
    if "--scheduler" in args or "--kv-cache-quant" in args:
        args = ("--model", str(tiny_llama), *args[2:])
    done = blade("serve", "--port", "0", *args)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_too_small_a_kv_cache_names_the_setting_that_works(blade: Blade, tiny_llama: Path) -> None:
    done = blade("serve", "--model", str(tiny_llama), "--kv-cache-memory", "100000", "--dry-run")
    assert done.returncode == 2
    found = re.search(r"--kv-cache-memory (\d+)", done.stderr)
    assert found is not None
    again = blade("serve", "--model", str(tiny_llama), "--kv-cache-memory", found[1], "--dry-run")
    assert again.returncode == 0, again.stderr


def test_dry_run_prints_the_plan_and_an_equivalent_command(blade: Blade, tiny_llama: Path) -> None:
    options = ("--no-prefix-cache", "--max-model-len", "512", "--api-key", "secret", "--kv-cache-memory", str(1 << 24))
    done = blade("serve", "--model", str(tiny_llama), *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "full context of 512" in done.stdout
    command = done.stdout.strip().splitlines()[-1]
    assert "--no-prefix-cache" in command
    assert "secret" not in done.stdout
    assert blade(*command.split()[1:], "--dry-run").stdout == done.stdout


def test_a_dry_run_is_told_what_a_start_would_be(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer.json"))
    for options, words in (
        (("--model", str(folder)), "m holds no tokenizer.json"),
        (("--model", str(tiny_llama), "--lora", f"x={folder}"), "m has no adapter_config.json"),
        (("--model", str(tiny_llama), "--lora", f"x={ADAPTER}"), "has a (32, 32) update of model.layers.0"),
    ):
        with pytest.raises(SystemExit):
            main(["serve", *options, "--dry-run"])
        assert words in capsys.readouterr().err


def test_a_rounded_kv_cache_holds_more_tokens(blade: Blade, tiny_llama: Path) -> None:
    def num_tokens(quant: str) -> int:
        args = ("--kv-cache-memory", str(1 << 24), "--kv-cache-quant", quant, "--dtype", "bfloat16", "--dry-run")
        done = blade("serve", "--model", str(tiny_llama), *args)
        assert done.returncode == 0, done.stderr
        named = "" if quant == "none" else f" in {quant}"
        found = re.search(rf"KV cache of 1[56]\.\d MiB{named}: ([\d,]+) tokens", done.stdout)
        assert found, done.stdout
        return int(found[1].replace(",", ""))

    assert num_tokens("int8") > 1.3 * num_tokens("none")  # heads are small here, so that scales count


def test_plugins_lists_what_is_installed(blade: Blade) -> None:
    done = blade("plugins")
    assert done.returncode == 0
    rows = {line.split("\t")[0]: line.split("\t") for line in done.stdout.splitlines()}
    assert rows["qwen"][2:] == ["built-in", "register_models"]


def test_a_draft_model_of_another_vocabulary_stops_the_start(
    blade: Blade, tiny_llama: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_draft, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = blade(
        "serve", "--model", str(tiny_llama), "--draft.model", str(other), "--kv-cache-memory", "4194304", "--port", "0"
    )
    assert done.returncode == 2
    assert re.search(r"--draft.model other has another vocabulary than tiny-llama0?: token \d+ is", done.stderr)


def test_what_cannot_fit_is_refused_before_it_is_loaded(blade: Blade, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**9}))
    done = blade("serve", "--model", str(folder), "--port", "0")
    assert done.returncode == 2
    assert re.search(r"fewer than the context of 1000000000\. .*--max-model-len \d+", done.stderr), done.stderr
