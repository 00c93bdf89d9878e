"""Text models of checkpoints that see or hear as well: config.json has them in a section, and their tensors have longer
names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from blade.nn.config import DecoderConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blade.contracts import Loader
    from blade.nn.keys import Keys

Config = TypeVar("Config", bound=DecoderConfig)


def text_model(whole: Keys) -> tuple[Keys, dict[str, Any]]:
    """The keys that describe the text model, which are all there are where it has no section; and fields of
    DecoderConfig that may be said outside of it."""
    keys = whole.of_text()
    tied = [each.flag("tie_word_embeddings", False) for each in (whole, keys)]
    return keys, {"architecture": whole.texts("architectures")[0], "tied": any(tied)}


def located(config: Config, loader: Loader, places: Mapping[str, str]) -> Config:
    """With the names that the checkpoint has: `places` are those that it may have, `prefix` and `head`. Without any of
    them as it is."""
    for prefix, head in places.items():
        if loader.has(f"{prefix}.norm.weight"):
            return replace(config, prefix=prefix, head=head)
    return config
