"""Per-layer embeddings of n-grams (Qwen4-Exp): what a layer adds to the residual streams before all else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blade_qwen.hyper_connection import StreamNorm, StreamsConfig
from blade_qwen.ngrams import NgramTable

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch
    from blade.contracts import Loader
    from blade.nn import DecoderConfig
    from blade_qwen.ngram_config import NgramConfig

SMALLEST = 1e-6  # that a stream's fit is taken to be, whatever its sign


class NgramEmbedding:
    """Each stream takes of a token's n-grams as much as fits it, and a convolution of that along the text."""

    def __init__(
        self, name: str, index: int, ngrams: NgramConfig, streams: StreamsConfig, config: DecoderConfig, loader: Loader
    ) -> None:
        """`index`: of the layer, among those that have a table."""
        self.ops = loader.ops
        self.scale: float = config.hidden_size**-0.5
        num_channels = streams.num * config.hidden_size
        self.table = NgramTable(f"{name}.ple_embedding", ngrams, index, loader)
        self.key = loader.linear(f"{name}.key_proj", shapes=[(num_channels, ngrams.width)])
        self.value = loader.linear(f"{name}.value_proj", shapes=[(config.hidden_size, ngrams.width)])
        self.key_norm, self.query_norm, self.conv_norm = (
            StreamNorm(f"{name}.norm_{part}", streams, config, loader) for part in ("key", "query", "conv")
        )
        weight = loader.tensor(f"{name}.conv1d.weight", (num_channels, 1, ngrams.window))
        self.conv = weight.new_zeros(num_channels, ngrams.reach + 1)  # as a convolution of neighbours
        self.conv[:, :: ngrams.length] = weight.squeeze(1)

    def __call__(self, streams: Tensor, batch: Batch, inputs: Tensor, ids: Tensor) -> Tensor:
        """What is to be added to the streams, [T, num, hidden_size]; inputs and ids as NgramConfig.state says."""
        found = self.table(batch, ids)  # [T, width]
        keys = self.key_norm(self.key(found).view(streams.shape))
        fit = (keys * self.query_norm(streams)).sum(dim=2, keepdim=True) * self.scale
        fit = fit.abs().clamp(min=SMALLEST).sqrt() * fit.sign()
        taken = fit.sigmoid() * self.value(found).unsqueeze(1)  # [T, num, hidden_size]
        mixed = self.ops.short_conv(self.conv_norm(taken).flatten(1), self.conv, batch, inputs)
        return taken + mixed.view(streams.shape)
