"""What ``blade quantize`` writes, read by transformers and compressed-tensors themselves: no test, for both are needed.

    python tests/quantize/elsewhere.py write FOLDER    # with blade
    pip install compressed-tensors==0.19.0 transformers==5.17.0   # in an environment of their own
    python tests/quantize/elsewhere.py read FOLDER

`write` quantises a tiny model in every form and notes what blade takes each matrix for; `read` loads the folders as
transformers does, has compressed-tensors unpack them, and prints for each how far the matrices are apart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FORMS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group": "32"},
    "int4-zeros": {"bits": 4, "group": "64", "symmetric": False},
    "int4-rows": {"bits": 4, "group": "channel"},
    "int8": {"bits": 8, "group": "channel"},
    "int8-groups": {"bits": 8, "group": "32"},
    "w8a8": {"bits": 8, "mode": "weight-and-activation"},
    "fp8": {"bits": 8, "kind": "fp8"},
    "fp8-activations": {"bits": 8, "kind": "fp8", "mode": "weight-and-activation"},
}
SEEN = "blade.safetensors"


def write(folder: Path) -> None:
    sys.path[:0] = [str(Path(__file__).parents[1])]
    from conftest import write_tiny_llama, write_tiny_tokenizer

    from blade.checkpoint.safetensors import SafetensorsWeights
    from blade.opening import opener
    from blade_compressed_tensors.quantization import CompressedTensors
    from blade_quantize.command import quantize

    plain = folder / "plain"
    plain.mkdir(parents=True)
    write_tiny_tokenizer(plain)
    write_tiny_llama(plain)
    for name, options in FORMS.items():
        out = folder / name
        quantize(str(plain), out, device="cpu", algo="minmax", **options, open_model=opener(()))
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        reader, weights = CompressedTensors(settings), SafetensorsWeights(out)
        modules = {key.rpartition(".")[0] for key in weights.names() if key.endswith("_scale")}
        save_file({module: reader.numbers(module, weights, torch.float32) for module in modules}, out / SEEN)


def read(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    for name in FORMS:
        seen = load_file(folder / name / SEEN)
        (folder / name / SEEN).rename(folder / f"{name}.seen")  # or it is taken for the model's
        config = CompressedTensorsConfig(run_compressed=False)
        model = AutoModelForCausalLM.from_pretrained(folder / name, quantization_config=config, dtype=torch.float32)
        (folder / f"{name}.seen").rename(folder / name / SEEN)
        errors = []
        for module, mine in seen.items():
            theirs = model.get_submodule(module).weight.detach().float()
            errors.append(float((mine - theirs).abs().max() / theirs.abs().max()))
        print(f"{name}: {len(seen)} matrices, at most {max(errors):.1e} of the largest number apart", flush=True)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
