"""What is made of which matrices: the command's options, held against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from blade import ConfigError

Algo: TypeAlias = Literal["minmax", "gptq", "awq", "smoothquant", "smoothquant+gptq"]
Mode: TypeAlias = Literal["weight-only", "weight-and-activation"]
Kind: TypeAlias = Literal["int", "fp8"]
Group: TypeAlias = Literal["32", "64", "128", "channel"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How matrices are rounded. Raises ConfigError for what no checkpoint can hold or no server runs."""

    algo: Algo = "minmax"
    bits: Literal[8, 4] = 8
    kind: Kind = "int"
    mode: Mode = "weight-only"
    group: int | None = None  # numbers of a row that share a scale; None: the whole row
    symmetric: bool = True  # no zero points
    ignore: tuple[str, ...] = ()  # shell patterns of modules that stay plain

    def __post_init__(self) -> None:
        if self.kind == "fp8":
            self._check_fp8()
        if self.activations:
            self._check_activations()
        elif self.smooths == "smoothquant":
            raise ConfigError(
                f"--algo {self.algo} moves the outliers of activations into the weights, which pays where both are "
                "rounded.",
                "Add --mode weight-and-activation, or use --algo awq.",
            )

    def _check_fp8(self) -> None:
        if self.bits == 4:
            raise ConfigError("--type fp8 has 8 bits.", "Leave --bits out, or use --type int.")
        if self.group is not None:
            raise ConfigError("--type fp8 has one scale for each row.", "Use --group channel.")
        if not self.symmetric:
            raise ConfigError("--type fp8 has no zero points.", "Use --symmetric.")
        if self.algo == "awq":
            raise ConfigError(
                "--algo awq balances the steps of integers; those of --type fp8 grow with the numbers.",
                "Use --algo gptq, or --type int.",
            )

    def _check_activations(self) -> None:
        if self.bits == 4:
            raise ConfigError("--mode weight-and-activation is for 8 bits.", "Use --bits 8, or --mode weight-only.")
        if self.group is not None:
            raise ConfigError("--mode weight-and-activation has one scale for each row.", "Use --group channel.")
        if not self.symmetric:
            raise ConfigError("--mode weight-and-activation has no zero points.", "Use --symmetric.")
        if self.algo == "awq":
            raise ConfigError("--algo awq is for weights alone.", "Use --algo smoothquant, or --mode weight-only.")

    @property
    def activations(self) -> bool:
        """Whether activations are rounded too, each token's by a scale of its own."""
        return self.mode == "weight-and-activation"

    @property
    def calibrated(self) -> bool:
        """Whether the algorithm looks at activations."""
        return self.algo != "minmax"

    @property
    def smooths(self) -> Literal["awq", "smoothquant"] | None:
        """Which algorithm scales channels."""
        if self.algo == "awq":
            return "awq"
        return "smoothquant" if self.algo.startswith("smoothquant") else None

    @property
    def solves(self) -> bool:
        """Whether columns make up for the rounding of those before them."""
        return self.algo in ("gptq", "smoothquant+gptq")

    @property
    def format(self) -> str:
        """compressed-tensors' name of the layout."""
        if self.kind == "fp8":
            return "float-quantized"
        return "int-quantized" if self.activations else "pack-quantized"

    def __str__(self) -> str:
        """ "int4 weights in groups of 128, by gptq"."""
        what = "fp8" if self.kind == "fp8" else f"int{self.bits}"
        where = f"in groups of {self.group}" if self.group else "by row"
        zeros = "" if self.symmetric else ", with zero points"
        both = " and activations" if self.activations else ""
        return f"{what} weights{both} {where}{zeros}, by {self.algo}"


def numbers_per_scale(group: Group | None, bits: int, kind: Kind, mode: Mode) -> int | None:
    """Of --group; where it is not given, 128 for 4 bits and the whole row for 8."""
    if group is None:
        return 128 if bits == 4 and kind == "int" and mode == "weight-only" else None
    return None if group == "channel" else int(group)
