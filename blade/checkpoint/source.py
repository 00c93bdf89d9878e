"""Where the model comes from: --model, or the default of the plugin."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from blade.checkpoint.demo import demo_path
from blade.checkpoint.hub import from_huggingface, from_modelscope
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from blade.checkpoint.progress import Progress
    from blade.config import ModelOptions
    from blade.types import DefaultCheckpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(options: ModelOptions, default: DefaultCheckpoint | None, progress: Progress) -> Path:
    """The folder or .gguf file to open, fetched or joined first where it has to be.

    Without --model it is the default's demo weights if all their packages are installed, else its hub id. Raises
    CheckpointError, one sentence and a remedy.
    """
    if options.model is not None:
        return _named(options.model, options, progress)
    if default is None:
        raise CheckpointError("There is no model to serve.", "Name one with --model, or a plugin that has one.")
    demo = demo_path(default.demo, progress) if default.demo is not None else None
    return demo or _fetch(default.hub_id, options, progress)


def _named(model: str, options: ModelOptions, progress: Progress) -> Path:
    path = os.path.expanduser(model)
    if model and os.path.exists(path):
        return Path(os.path.abspath(path))
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _fetch(model, options, progress)
    raise CheckpointError(
        f"--model {model}: there is no such folder or file.", "It may also be an id on a hub, ORGANISATION/NAME."
    )


def _fetch(repo_id: str, options: ModelOptions, progress: Progress) -> Path:
    fetch = from_modelscope if options.hub == "modelscope" else from_huggingface
    return fetch(repo_id, options.revision, progress)
