"""compressed-tensors' layouts: which tensors stand for a matrix, what is in them, and what config.json says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from blade_quantize.shards import Planned

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor

    from blade.contracts import Weights
    from blade_quantize.scheme import Scheme

WORD = 32  # bits


def planned(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> dict[str, Planned]:
    """The tensors of a matrix [N, K], by the ends of their names; `dtype`: of scales."""
    groups = k // (scheme.group or k)
    scale = {"weight_scale": Planned(dtype, (n, groups))}
    if scheme.format != "pack-quantized":
        return {"weight": Planned(_code_dtype(scheme), (n, k))} | scale
    per_word = WORD // scheme.bits
    tensors = {"weight_packed": Planned(torch.int32, (n, -(-k // per_word)))} | scale
    if not scheme.symmetric:
        tensors["weight_zero_point"] = Planned(torch.int32, (-(-n // per_word), groups))
    return tensors | {"weight_shape": Planned(torch.int64, (2,))}


def stored(scheme: Scheme, codes: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """The same, but for the scales: codes [N, K] and zeros [N, G] are float32."""
    if scheme.format != "pack-quantized":
        return {"weight": codes.to(_code_dtype(scheme))}
    tensors = {"weight_packed": pack(codes, scheme.bits), "weight_shape": torch.tensor(codes.shape)}
    if not scheme.symmetric:
        tensors["weight_zero_point"] = pack(zeros.T, scheme.bits).T
    return tensors


def _code_dtype(scheme: Scheme) -> torch.dtype:
    return torch.float8_e4m3fn if scheme.kind == "fp8" else torch.int8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, C], -2^(bits - 1) the lowest, to int32 words [R, ceil(C bits / 32)]: counted from the lowest, the first
    of a word in its low bits, 0 where there is none."""
    per_word = WORD // bits
    fields = F.pad(codes.to(torch.int64) + (1 << (bits - 1)), (0, -codes.shape[1] % per_word))
    fields = fields.view(len(codes), -1, per_word)
    shifts = torch.arange(0, WORD, bits, device=codes.device)
    words = (fields << shifts).sum(-1)
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).to(torch.int32)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`, float32."""
    shifts = torch.arange(0, WORD, bits, device=words.device)
    fields = (words.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)
    return fields.flatten(1)[:, :columns].float() - (1 << (bits - 1))


class Dequantized:
    """contracts.Weights over a checkpoint of ours: `quantized` modules have a plain .weight again, in float32."""

    def __init__(self, weights: Weights, scheme: Scheme, quantized: Iterable[str]) -> None:
        self._weights, self._scheme = weights, scheme
        self._quantized = {f"{prefix}.weight": prefix for prefix in quantized}

    def names(self) -> Collection[str]:
        return dict.fromkeys([*self._quantized, *self._weights.names()])

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._quantized or self._scheme.format != "pack-quantized":
            return self._weights.shape(name)
        n, k = self._weights.get(f"{name}_shape").tolist()
        return n, k

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._quantized:
            return self._weights.get(name, dtype)
        codes, zeros = self._codes(self._quantized[name])
        scales = self._weights.get(f"{name}_scale").float()
        grouped = codes.view(len(codes), scales.shape[1], -1)
        weight = ((grouped - zeros[..., None]) * scales[..., None]).view(codes.shape)
        return weight.to(dtype or torch.float32)

    def _codes(self, prefix: str) -> tuple[Tensor, Tensor]:
        """[N, K] and zeros [N, G] or [1, 1]."""
        get, bits = self._weights.get, self._scheme.bits
        if self._scheme.format != "pack-quantized":
            return get(f"{prefix}.weight").float(), torch.zeros(1, 1)
        n, k = get(f"{prefix}.weight_shape").tolist()
        codes = unpack(get(f"{prefix}.weight_packed"), bits, k)
        if self._scheme.symmetric:
            return codes, torch.zeros(1, 1)
        return codes, unpack(get(f"{prefix}.weight_zero_point").T, bits, n).T

    def release(self, names: Iterable[str]) -> None:
        """Nothing is kept here."""


def quantization_config(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    """What config.json says; `ignore` names every linear that stayed plain."""
    kind = "float" if scheme.kind == "fp8" else "int"
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": kind,
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group,
        "dynamic": False,
        "actorder": None,  # whatever order columns were rounded in, groups lie where they did
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    tokens = {"strategy": "token", "group_size": None, "dynamic": True, "symmetric": True, "observer": None}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": weights | tokens if scheme.activations else None,
                "output_activations": None,
                "format": scheme.format,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
