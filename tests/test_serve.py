"""`blade serve` as its user meets it: a real process on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BLADE = [sys.executable, "-c", "from blade.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "BLADE_API_KEY": "", "BLADE_PLUGINS": "", "HF_HUB_OFFLINE": "1"}


class Server:
    """A running `blade serve`."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [*BLADE, "serve", "--port", "0", "--dtype", "float32", *args],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        self.printed = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if found := re.search(r"^ready .* at (http://\S+)", line):
                self.url = found[1]
            if line.startswith("     -d "):  # the last line of the banner
                return
        raise AssertionError(f"blade ended with {self.process.wait()}: {self.printed}")

    def request(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[Server]:
    started = Server("--model", str(tiny_llama), "--served-model-name", "tiny")
    yield started
    assert started.stop() == 0


def test_the_banner_says_what_is_served_and_its_curl_line_works(server: Server) -> None:
    assert re.search(r"^model   tiny: LlamaForCausalLM by plugin 'llama'", server.printed, re.M)
    assert re.search(
        r"^memory  KV cache of .*: [\d,]+ tokens, [\d.]+ requests of the full context", server.printed, re.M
    )
    command = server.printed[server.printed.index("curl ") :].strip()
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True).stdout
    frames = [line.removeprefix("data: ") for line in found.splitlines() if line]
    assert frames[-1] == "[DONE]"
    assert json.loads(frames[-2])["usage"]["completion_tokens"] <= 48


def test_the_same_seed_gives_the_same_text_alone_and_in_company(server: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 20, "seed": 7, "temperature": 1.0}
    status, alone = server.request("/v1/completions", body)
    assert status == 200
    _, company = server.request("/v1/completions", {**body, "prompt": ["xyz", "abc", "q"]})
    text = json.loads(alone)["choices"][0]["text"]
    assert json.loads(company)["choices"][1]["text"] == text
    _, other = server.request("/v1/completions", {**body, "seed": 8})
    assert json.loads(other)["choices"][0]["text"] != text


def test_bad_input_names_the_field_and_the_next_request_is_served(server: Server) -> None:
    for field, value in [("temperature", -1), ("max_tokens", 10**9), ("prompt", [5000]), ("top_p", "x"), ("n", 0)]:
        status, body = server.request("/v1/completions", {"prompt": "a", field: value})
        assert (status, field in body) == (400, True), body
        assert server.request("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_metrics_and_health_tell_the_truth(server: Server) -> None:
    server.request("/v1/completions", {"prompt": "count me", "max_tokens": 3, "ignore_eos": True})
    status, text = server.request("/metrics")
    assert status == 200
    generated = re.search(r"^blade_generated_tokens_total(?:\{.*\})? (\S+)", text, re.M)
    assert generated is not None
    assert float(generated[1]) >= 3
    assert server.request("/health")[0] == 200


def test_sigterm_lets_a_stream_finish_and_ctrl_c_stops_as_well(tiny_llama: Path) -> None:
    server = Server("--model", str(tiny_llama))
    body = json.dumps({"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
    request = urllib.request.Request(server.url + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as stream:
        stream.readline()
        server.process.send_signal(signal.SIGTERM)
        rest = stream.read().decode()
    assert rest.rstrip().endswith("data: [DONE]")
    assert '"completion_tokens":400' in rest
    assert server.wait() == 0
    assert Server("--model", str(tiny_llama)).stop(signal.SIGINT) == 0


def test_a_drain_that_takes_too_long_ends_with_a_proper_last_chunk(tiny_llama: Path) -> None:
    server = Server("--model", str(tiny_llama), "--drain-seconds", "0")
    body = json.dumps({"prompt": "a", "max_tokens": 2000, "stream": True, "ignore_eos": True}).encode()
    request = urllib.request.Request(server.url + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as stream:
        stream.readline()
        server.process.send_signal(signal.SIGTERM)
        frames = [line for line in stream.read().decode().splitlines() if line]
    assert frames[-1] == "data: [DONE]"
    assert json.loads(frames[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
    assert server.wait() == 0


def run_blade(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BLADE, *args], capture_output=True, text=True, timeout=60, env=ENVIRONMENT | environment)


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
def test_a_broken_model_is_one_sentence_and_exit_2(broken: Path, damage: Any, says: str) -> None:
    damage(broken)
    done = run_blade("serve", "--model", str(broken), "--port", "0")
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
    args: tuple[str, ...], says: str, tiny_llama: Path
) -> None:
    if "--scheduler" in args or "--kv-cache-quant" in args:
        args = ("--model", str(tiny_llama), *args[2:])
    done = run_blade("serve", *args)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_too_small_a_kv_cache_names_the_setting_that_works(tiny_llama: Path) -> None:
    done = run_blade("serve", "--model", str(tiny_llama), "--kv-cache-memory", "100000", "--dry-run")
    assert done.returncode == 2
    found = re.search(r"--kv-cache-memory (\d+)", done.stderr)
    assert found is not None
    again = run_blade("serve", "--model", str(tiny_llama), "--kv-cache-memory", found[1], "--dry-run")
    assert again.returncode == 0, again.stderr


def test_dry_run_prints_the_plan_and_an_equivalent_command(tiny_llama: Path) -> None:
    args = ("serve", "--model", str(tiny_llama), "--no-prefix-cache", "--max-model-len", "512", "--api-key", "secret")
    done = run_blade(*args, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "full context of 512" in done.stdout
    command = done.stdout.strip().splitlines()[-1]
    assert "--no-prefix-cache" in command
    assert "secret" not in done.stdout
    assert run_blade(*command.split()[1:], "--dry-run").stdout == done.stdout


def test_a_rounded_kv_cache_holds_more_tokens(tiny_llama: Path) -> None:
    def num_tokens(quant: str) -> int:
        args = ("--kv-cache-memory", str(1 << 24), "--kv-cache-quant", quant, "--dtype", "bfloat16", "--dry-run")
        done = run_blade("serve", "--model", str(tiny_llama), *args)
        assert done.returncode == 0, done.stderr
        named = "" if quant == "none" else f" in {quant}"
        found = re.search(rf"KV cache of 1[56]\.\d MiB{named}: ([\d,]+) tokens", done.stdout)
        assert found, done.stdout
        return int(found[1].replace(",", ""))

    assert num_tokens("int8") > 1.3 * num_tokens("none")  # heads are small here, so that scales count


def test_plugins_lists_what_is_installed() -> None:
    done = run_blade("plugins")
    assert done.returncode == 0
    rows = {line.split("\t")[0]: line.split("\t") for line in done.stdout.splitlines()}
    assert rows["qwen"][2:] == ["built-in", "register_models"]


def test_a_draft_model_changes_nothing_of_the_text(tiny_llama: Path, tiny_draft: Path) -> None:
    body = {"prompt": "abcabc", "max_tokens": 60, "temperature": 0.8, "seed": 4, "ignore_eos": True}
    plain = Server("--model", str(tiny_llama), "--kv-cache-memory", "4194304")
    expected = json.loads(plain.request("/v1/completions", body)[1])["choices"][0]["text"]
    plain.stop()
    drafted = Server(
        "--model", str(tiny_llama), "--kv-cache-memory", "4194304", "--dialect", "openai",
        "--draft.model", str(tiny_draft), "--draft.dtype", "float32", "--no-adaptive-drafts",
        "--served-model-name", "x",
    )  # fmt: skip
    assert re.search(r"^drafts +by 'model', up to 8 tokens, always; draft model tiny-draft", drafted.printed, re.M)
    answer = json.loads(drafted.request("/v1/completions", {**body, "model": "x"})[1])
    metrics = drafted.request("/metrics")[1]
    drafted.stop()
    assert answer["choices"][0]["text"] == expected
    details = answer["usage"]["completion_tokens_details"]
    assert details["rejected_prediction_tokens"] > 0
    for name, count in (("verified", sum(details.values())), ("accepted", details["accepted_prediction_tokens"])):
        assert f'blade_drafter_tokens_{name}_total{{drafter="model"}} {float(count)}' in metrics


def test_a_draft_model_of_another_vocabulary_stops_the_start(
    tiny_llama: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_draft, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = run_blade("serve", "--model", str(tiny_llama), "--draft.model", str(other), "--kv-cache-memory", "4194304")
    assert done.returncode == 2
    assert re.search(r"--draft.model other has another vocabulary than tiny-llama0?: token \d+ is", done.stderr)


def test_what_cannot_fit_is_refused_before_it_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**9}))
    done = run_blade("serve", "--model", str(folder))
    assert done.returncode == 2
    assert re.search(r"fewer than the context of 1000000000\. .*--max-model-len \d+", done.stderr), done.stderr
