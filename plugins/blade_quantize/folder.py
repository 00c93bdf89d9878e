"""The new folder: made under another name, complete once it has its own."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blade import ConfigError
from blade_quantize.layout import Dequantized, quantization_config

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    import torch
    from torch import Tensor

    from blade.contracts import OpenedModel, Weights
    from blade_quantize.scheme import Scheme

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}


@contextmanager
def unfinished(out: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside `out` which becomes `out` if all goes well, and is removed if not. Raises ConfigError where the
    disk cannot take `num_bytes`."""
    free = shutil.disk_usage(out.absolute().parent).free
    if num_bytes > free:
        raise ConfigError(f"{out} would take {num_bytes / 1e9:.2f} GB; the disk has {free / 1e9:.2f} GB left.")
    folder = out.absolute().with_name(f".{out.name}.unfinished-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            raise ConfigError(f"{out} has come into being meanwhile.", "Name another folder.")
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def finish_folder(folder: Path, opened: OpenedModel, scheme: Scheme, ignore: list[str]) -> None:
    """config.json, and copies of all files that hold no weights."""
    for path in sorted(opened.path.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = dict(opened.config) | {"quantization_config": quantization_config(scheme, ignore)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_back(folder: Path, scheme: Scheme, quantized: Iterable[str]) -> Weights:
    """What was written, as plain numbers."""
    return Dequantized(FileWeights(folder), scheme, quantized)


class FileWeights:
    """contracts.Weights of a folder that was just written, through the safetensors library."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._places = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no dict)

    def names(self) -> Collection[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._places[name].get_slice(name).get_shape())

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor if dtype is None else tensor.to(dtype)

    def release(self, names: Iterable[str]) -> None:
        """The library maps the file: nothing of it is kept here."""
