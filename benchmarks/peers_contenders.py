"""Who runs what: the command of each contender for a model and a precision.

A model is a folder with the same weights in each contender's format; README.md tells how to make one:

    hf/                              Hugging Face folder, bfloat16
    bf16.gguf q8_0.gguf q4_0.gguf    made from it
    model.gguf                       a published file, which blade and llama.cpp both read as it is
    openvino-fp16/ -int8/ -int4/     made from hf/
    w8a8/                            made from hf/, for vLLM
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from load_server import BLADE

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 16


@dataclass(frozen=True)
class Precision:
    """`blade`: arguments of `blade serve`; the others: the file or folder of the model. None where it has none."""

    blade: str
    gguf: str
    openvino: str | None = None
    vllm: str | None = None


PRECISIONS = {
    "bf16": Precision("--model {model}/hf", "bf16.gguf", "openvino-fp16", "hf"),
    "int8": Precision("--model {model}/hf --quantize int8", "q8_0.gguf", "openvino-int8", "w8a8"),
    "int4": Precision("--model {model}/hf --quantize int4", "q4_0.gguf", "openvino-int4"),
    "gguf": Precision("--model {model}/model.gguf", "model.gguf"),
}


@dataclass(frozen=True)
class Programs:
    """How each contender is started; None for a peer that is not here."""

    blade: tuple[str, ...] = BLADE
    blade_options: str = ""
    llama_server: str | None = field(default_factory=lambda: _find("LLAMA_SERVER", "llama-server"))
    openvino_python: str | None = field(default_factory=lambda: _find("OPENVINO_PYTHON"))
    vllm: str | None = field(default_factory=lambda: _find("VLLM", "vllm"))


@dataclass(frozen=True)
class Contender:
    """`missing` says why it cannot run; it is empty for one that can."""

    name: str
    command: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def contenders(model: Path, precision: Precision, programs: Programs, cpus: list[int]) -> list[Contender]:
    """Blade first, then its peers, each with as many threads as there are `cpus`."""
    return [
        _blade(model, precision, programs, len(cpus)),
        _llama(model / precision.gguf, programs.llama_server, len(cpus)),
        _openvino(model / precision.openvino if precision.openvino else None, programs.openvino_python, len(cpus)),
        _vllm(model / precision.vllm if precision.vllm else None, programs.vllm, cpus),
    ]


def _find(variable: str, program: str | None = None) -> str | None:
    return os.environ.get(variable) or (shutil.which(program) if program else None)


def _blade(model: Path, precision: Precision, programs: Programs, threads: int) -> Contender:
    arguments = shlex.split(precision.blade.format(model=shlex.quote(str(model))))
    shape = ("--max-model-len", str(MAX_MODEL_LEN), "--threads", str(threads))
    words = ("serve", *arguments, *shape, *shlex.split(programs.blade_options), "--port", "{port}")
    return Contender("blade", (*programs.blade, *words), missing=_lacks("", Path(arguments[1])))


def _llama(file: Path, program: str | None, threads: int) -> Contender:
    """Its context is shared out to its slots. The copies of old prompts that it would make in memory are switched off:
    no workload asks for them, and making them takes time."""
    slots = ("-np", str(MAX_NUM_SEQS), "-c", str(MAX_NUM_SEQS * MAX_MODEL_LEN), "--cache-ram", "0")
    command = (str(program), "-m", str(file), "-t", str(threads), "-tb", str(threads), *slots)
    missing = _lacks("" if program else "no llama-server: use --llama-server or LLAMA_SERVER", file)
    return Contender("llama.cpp", (*command, "--host", "127.0.0.1", "--port", "{port}"), missing=missing)


def _openvino(folder: Path | None, python: str | None, threads: int) -> Contender:
    script = str(Path(__file__).with_name("openvino_server.py"))
    command = (str(python), script, "--model", str(folder), "--threads", str(threads), "--port", "{port}")
    missing = "" if python else "no Python with openvino-genai: use --openvino-python or OPENVINO_PYTHON"
    return Contender("OpenVINO", command, missing=_lacks(missing, folder))


def _vllm(folder: Path | None, program: str | None, cpus: list[int]) -> Contender:
    shape = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS), "--dtype", "bfloat16")
    env = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus))}
    command = (str(program), "serve", str(folder), *shape, "--host", "127.0.0.1", "--port", "{port}")
    return Contender("vLLM", command, env, _lacks("" if program else "no vllm: use --vllm or VLLM", folder))


def _lacks(missing: str, needed: Path | None) -> str:
    if needed is None:
        return "not in this precision"
    return missing or ("" if needed.exists() else f"{needed} does not exist")
