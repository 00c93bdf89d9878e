"""What turns text into ids and messages into text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from blade.assembly.chosen import Assembly
    from blade.text.chat_template import ChatTemplate
    from blade.text.tokenizer import HFTokenizer


def load_text(assembly: Assembly) -> tuple[HFTokenizer, ChatTemplate | None]:
    """The tokenizer, whose vocabulary a draft model must share, and the chat template. Raises ConfigError or
    CheckpointError."""
    from blade.text.chat_template import load_chat_template
    from blade.text.tokenizer import load_tokenizer

    folder, metadata = _text_files(assembly)
    tokenizer = load_tokenizer(folder, metadata)
    if assembly.draft is not None and assembly.draft.head is None:  # a head has no tokenizer, and says what it is for
        other = load_tokenizer(*_text_files(assembly.draft))
        if (difference := tokenizer.difference(other)) is not None:
            raise ConfigError(
                f"--draft.model {assembly.draft.model_name} has another vocabulary than {assembly.model_name}: "
                f"token {difference}.",
                "Choose a draft model of the same family and generation.",
            )
    return tokenizer, load_chat_template(folder, metadata, assembly.config.model.chat_template)


def tokenizer_source(assembly: Assembly) -> str | None:
    """The files that the tokenizer is read from, for a person; None where there are none."""
    from blade.text.tokenizer_files import tokenizer_names

    folder, metadata = _text_files(assembly)
    if metadata is not None:
        return "the file's metadata"
    names = tokenizer_names(folder)
    elsewhere = f" in {folder}" if assembly.config.model.tokenizer_dir is not None else ""
    return f"{' and '.join(names)}{elsewhere}" if names else None


def _text_files(assembly: Assembly) -> tuple[Path, dict[str, Any] | None]:
    """Where the tokenizer is: a folder, or a GGUF file with its metadata."""
    options = assembly.config.model
    if options.tokenizer_dir is not None:
        return options.tokenizer_dir, None
    return assembly.checkpoint.path, assembly.checkpoint.gguf_metadata
