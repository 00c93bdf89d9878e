"""LoRA adapters by the names that requests know them by; loading and unloading them while the server runs."""

from __future__ import annotations

import asyncio
import re
import reprlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from blade.api.http import HTTPError, JSONResponse
from blade.api.wire import parse
from blade.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blade.api.context import ServerContext
    from blade.api.http import HTTPRequest

_NAME = re.compile(r"[A-Za-z0-9][\w.:/-]{0,127}", re.ASCII)


class LoadAdapter(msgspec.Struct, frozen=True):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str


class UnloadAdapter(msgspec.Struct, frozen=True):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str


class AdapterTable:
    """What is loaded. A request keeps the adapter it began with, whatever becomes of the name."""

    def __init__(
        self, model_name: str = "", read: Callable[[str, Path], Any] | None = None, folder: Path | None = None
    ) -> None:
        """read(name, folder) makes an adapter, or raises CheckpointError; None: there are none, and there will be none.
        `folder`: whose subfolders may be loaded on request; None: none."""
        self.folder = folder
        self._model_name = model_name
        self._read = read
        self._adapters: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def get(self, name: str) -> Any:
        return self._adapters.get(name)

    def load(self, name: str, folder: Path) -> None:
        """Raises CheckpointError, for a name that is taken or odd too."""
        if self._read is None:
            raise CheckpointError("The model was loaded without adapters.", "Start with --lora or --lora-dir.")
        if name == self._model_name or name in self._adapters:
            raise self._taken(name)
        if not _NAME.fullmatch(name):
            raise CheckpointError(
                f"An adapter cannot be named {reprlib.repr(name)}.", "Take letters, digits and . : / _ - for it."
            )
        made = self._read(name, folder)
        if self._adapters.setdefault(name, made) is not made:  # another request was faster
            raise self._taken(name)

    def _taken(self, name: str) -> CheckpointError:
        what = "the model" if name == self._model_name else "an adapter"
        return CheckpointError(f"The name {name!r} is taken by {what}.", "Choose another one.")

    def unload(self, name: str) -> None:
        if self._adapters.pop(name, None) is None:
            raise RequestError(f"There is no adapter {reprlib.repr(name)}.", param="lora_name")

    def inside(self, path: str) -> Path:
        """A folder within `folder`. Raises RequestError for any other."""
        if self.folder is None:
            raise HTTPError(403, "Adapters cannot be loaded on request: the server was started without --lora-dir.")
        root = self.folder.resolve()
        with suppress(OSError, ValueError, RuntimeError):  # of names too long, of NUL, of links in a circle
            found = (root / path).resolve()
            if found.is_relative_to(root) and found.is_dir():
                return found
        raise RequestError(f"lora_path: there is no folder {reprlib.repr(path)} in --lora-dir.", param="lora_path")


async def load_adapter(server: ServerContext, http: HTTPRequest) -> JSONResponse:
    """Answers when the adapter can be asked for."""
    request = parse(await http.body(), LoadAdapter)
    table = server.adapters
    folder = table.inside(request.lora_path)
    try:
        await asyncio.to_thread(table.load, request.lora_name, folder)
    except CheckpointError as error:
        raise RequestError(error.message.replace(str(folder), request.lora_path), "lora_path", error.remedy) from None
    return JSONResponse({"object": "model", "id": request.lora_name})


async def unload_adapter(server: ServerContext, http: HTTPRequest) -> JSONResponse:
    """Requests under way keep it; new ones find no model of the name."""
    request = parse(await http.body(), UnloadAdapter)
    if server.adapters.folder is None:
        raise HTTPError(403, "Adapters cannot be unloaded on request: the server was started without --lora-dir.")
    server.adapters.unload(request.lora_name)
    return JSONResponse({"object": "model", "id": request.lora_name, "deleted": True})
