"""Tokenizers that strangers wrote, in a process that may be ended: it has so long and so much memory for a text.

What a tokenizer.json asks for runs as native code, which no thread can stop (blade.text.usual_tokenizers). The process
is this module run as a program. It begins with the first text, ends with the server, and where a text was too much for
it another one begins with the next text. Messages are a length in four bytes, then msgpack.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import IO, Any

import msgspec
from tokenizers import Tokenizer

from blade.errors import CheckpointError, RequestError
from blade.text.tokenizer import REMEDY, HFTokenizer

SECONDS = 2  # of computing for a text
CHARACTERS_PER_SECOND = 1_000_000  # that a long one gets besides
MEMORY = 2 << 30  # bytes of address space
_TOO_MUCH = "The text is too much for the model's tokenizer, whose rules take long for it."
_HALF = "The text holds half a surrogate pair, which is no character."


class ProcessTokenizer(HFTokenizer):
    """Encodes in the process, decodes here. Threads may share it; texts are encoded one at a time."""

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: Seq[int], bos_token: str | None, parts: Mapping[str, Any]
    ) -> None:
        """`tokenizer` is without its `parts`, which tokenizer.json has: normalizer and pre_tokenizer. Raises
        CheckpointError for a tokenizer that not even a greeting gets through."""
        super().__init__(tokenizer, eos_token_ids, bos_token)
        state = msgspec.json.encode(msgspec.json.decode(tokenizer.to_str()) | dict(parts)).decode()
        self._setup = msgspec.msgpack.encode([state, list(eos_token_ids), bos_token])
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.encode("Hello, world 1")
        except RequestError as error:
            raise CheckpointError(
                f"The tokenizer cannot encode so much as a greeting: {error.message}", REMEDY
            ) from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As HFTokenizer; RequestError also for a text that takes too long."""
        return self._ask("encode", text, add_special_tokens)

    def encode_template(self, text: str, literals: Mapping[str, str] | None = None) -> list[int]:
        return self._ask("encode_template", text, dict(literals or {}))

    def _ask(self, *call: Any) -> list[int]:
        try:
            message = msgspec.msgpack.encode(call)
        except UnicodeEncodeError:
            raise RequestError(_HALF) from None
        with self._lock:
            answer = self._answer(message)
        if isinstance(answer, str):
            raise RequestError(answer)
        return answer

    def _answer(self, message: bytes) -> list[int] | str:
        """Ids, or a sentence."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._begin()
        try:
            _write(self._process.stdin, message)
            answer = _read(self._process.stdout)
        except OSError:
            answer = None
        if answer is None:  # it has been ended
            self._end()
            return _TOO_MUCH
        found: list[int] | str = msgspec.msgpack.decode(answer)
        return found

    def _begin(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # what is typed at the server's terminal does not end it
        )
        _write(process.stdin, self._setup)
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self._end()


def main() -> None:
    """Answers until its input ends. Where it takes too long or too much memory, the system ends it."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer: HFTokenizer | str | None = None
    while (message := _read(source)) is not None:
        _allow(SECONDS + len(message) // CHARACTERS_PER_SECOND)
        if tokenizer is None:
            tokenizer = _made(*msgspec.msgpack.decode(message))
        else:
            _write(sink, msgspec.msgpack.encode(_answered(tokenizer, *msgspec.msgpack.decode(message))))


def _allow(seconds: int) -> None:
    """From now on; then the process ends."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _made(state: str, eos_token_ids: list[int], bos_token: str | None) -> HFTokenizer | str:
    try:
        return HFTokenizer(Tokenizer.from_str(state), eos_token_ids, bos_token)
    except CheckpointError as error:
        return error.message
    except Exception:  # the library raises nothing more precise
        return "The installed tokenizers library cannot read it."


def _answered(tokenizer: HFTokenizer | str, name: str, text: str, argument: Any) -> list[int] | str:
    if isinstance(tokenizer, str):
        return tokenizer
    try:
        ids: list[int] = getattr(tokenizer, name)(text, argument)
    except RequestError as error:
        return error.message
    except BaseException:  # the library's panics are no Exceptions
        return _TOO_MUCH
    return ids


def _write(stream: IO[bytes] | None, message: bytes) -> None:
    if stream is None:
        raise OSError("not a pipe")
    stream.write(len(message).to_bytes(4, "little") + message)
    stream.flush()


def _read(stream: IO[bytes] | None) -> bytes | None:
    """None where the stream ends."""
    if stream is None:
        return None
    size = int.from_bytes(head, "little") if len(head := stream.read(4)) == 4 else -1
    return message if size >= 0 and len(message := stream.read(size)) == size else None


if __name__ == "__main__":
    main()
