"""Opening a checkpoint: a folder as the hub has them, or a GGUF file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from blade.checkpoint.gguf.weights import GGUFWeights
    from blade.checkpoint.safetensors import SafetensorsWeights

ELSEWHERE = {"openvino*.xml": "OpenVINO", "*.onnx": "ONNX"}  # what tells of weights for other programs


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files, opened: nothing but headers has been read."""

    path: Path
    name: str  # of the model: the folder's or file's, or the id on the hub
    format: Literal["safetensors", "gguf"]
    config: dict[str, Any]  # config.json; of a GGUF file what it would say
    generation_config: dict[str, Any]  # generation_config.json, {} without one
    weights: SafetensorsWeights | GGUFWeights
    gguf_metadata: dict[str, Any] | None = None  # tokenizer and chat template are in it

    @property
    def num_bytes(self) -> int:
        """Of all weights as they are stored."""
        return self.weights.num_bytes

    @property
    def blocks(self) -> GGUFWeights | None:
        """The weights, where they are a GGUF file's and some of its matrices are in blocks."""
        from blade.checkpoint.gguf.weights import GGUFWeights

        return self.weights if isinstance(self.weights, GGUFWeights) and self.weights.block_formats else None

    @property
    def num_params(self) -> int:
        """Numbers in all tensors; of formats that pack several into one, packs (see Assembly.num_params)."""
        return self.weights.num_params


def stored_bytes(path: Path) -> int:
    """Of the files that hold a model's weights, about; 0 for what is no model."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointError, one sentence and a remedy, for whatever is not a sound model."""
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    if path.is_dir():
        return _open_folder(path)
    raise CheckpointError(f"{path} is neither a folder nor a .gguf file.")


def _open_gguf(path: Path) -> Checkpoint:
    from blade.checkpoint.gguf import read_gguf_parts
    from blade.checkpoint.gguf.config import check_architecture, make_config, make_generation_config
    from blade.checkpoint.gguf.layouts import layout_of
    from blade.checkpoint.gguf.metadata import Metadata
    from blade.checkpoint.gguf.weights import GGUFWeights

    files = read_gguf_parts(path)
    metadata = Metadata(path, files[0].metadata)
    check_architecture(metadata)
    weights = GGUFWeights(files, layout_of(metadata))
    generation = make_generation_config(metadata)
    return Checkpoint(
        path=path,
        name=re.sub(r"-00001-of-\d{5}$", "", path.stem),
        format="gguf",
        config=make_config(metadata, weights) | generation,
        generation_config=generation,
        weights=weights,
        gguf_metadata=files[0].metadata,
    )


def _open_folder(folder: Path) -> Checkpoint:
    from blade.checkpoint.json_file import read_json
    from blade.checkpoint.safetensors import SafetensorsWeights

    _check_folder(folder)
    generation = folder / "generation_config.json"
    return Checkpoint(
        path=folder,
        name=_folder_name(folder),
        format="safetensors",
        config=_read_config(folder),
        generation_config=read_json(generation) if generation.exists() else {},
        weights=SafetensorsWeights(folder),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json; NVIDIA's Model Optimizer once told of quantisation in a file of its own."""
    from blade.checkpoint.json_file import read_json

    config, beside = read_json(folder / "config.json"), folder / "hf_quant_config.json"
    if "quantization_config" in config or not beside.exists():
        return config
    found = read_json(beside).get("quantization")
    if not isinstance(found, dict):
        raise CheckpointError(f"{beside} has no object quantization.")
    return config | {"quantization_config": {"quant_method": "modelopt", **found}}


def _folder_name(folder: Path) -> str:
    """In the Hugging Face cache, .../models--ORG--NAME/snapshots/COMMIT, the id on the hub."""
    folder = folder.absolute()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return folder.name


def _check_folder(folder: Path) -> None:
    ggufs, pickles = sorted(folder.glob("*.gguf")), sorted([*folder.glob("*.bin"), *folder.glob("*.p[ti]*")])
    if not (folder / "config.json").exists():
        remedy = f"Name the file: {ggufs[0]}" if ggufs else "Give a model's folder, a .gguf file or an id on the hub."
        raise CheckpointError(f"{folder} has no config.json.", remedy)
    if any(folder.glob("*.safetensors*")):
        return
    if made_for := next((name for pattern, name in ELSEWHERE.items() if any(folder.glob(pattern))), None):
        raise CheckpointError(f"{folder} holds a model made for {made_for}.", "Give the one that it was made of.")
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights in {pickles[0].name}: blade reads no pickles, for they can run code.",
            "If you trust them, convert them with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})",
        )
    raise CheckpointError(f"{folder} has no weights: no .safetensors file is in it.", "Fetch the whole model.")
