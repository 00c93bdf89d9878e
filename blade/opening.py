"""A model opened for a plugin's command: its files, its family and a device, with nothing loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from blade.config import Config, EngineConfig, ModelOptions
from blade.contracts import OpenedModel
from blade.plugins import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from blade.contracts import Architecture


def opener(plugins: tuple[str, ...]) -> Callable[..., OpenedModel]:
    """What a command is given as `open_model`; `plugins` are the ones that were named."""

    def open_model(model: str, dtype: str = "auto", device: str = "auto", threads: int | None = None) -> OpenedModel:
        """A folder, a .gguf file or a hub id. Raises ConfigError, CheckpointError or PluginError, with a remedy."""
        from blade.assembly import choose
        from blade.text.tokenizer import load_tokenizer

        options = ModelOptions(model=model, dtype=dtype)  # type: ignore[arg-type]
        engine = EngineConfig(device=device, threads=threads)
        assembly = choose(Config(plugins=plugins, model=options, engine=engine), load(plugins))
        checkpoint = assembly.checkpoint
        return OpenedModel(
            name=checkpoint.name,
            path=checkpoint.path,
            config=checkpoint.config,
            architecture=cast("Architecture", assembly.architecture),  # of no head: none was chosen to draft
            model_config=assembly.model_config,
            weights=getattr(assembly, "weights", checkpoint.weights),
            stored=checkpoint.weights,
            ops=assembly.ops,
            dtype=assembly.dtype,
            tokenizer=load_tokenizer(checkpoint.path, checkpoint.gguf_metadata),
        )

    return open_model
