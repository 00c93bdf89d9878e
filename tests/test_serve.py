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


def test_a_start_that_fails_is_one_sentence_and_exit_2(tmp_path: Path) -> None:
    done = subprocess.run([*BLADE, "serve", "--model", str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"blade: .*config\.json.*\n", done.stderr)
