"""A GGUF file's metadata with every key at values that it must not have, or hardly ever has: each file is refused in
one sentence, or serves model and text as it should.

PYTHONPATH=tests python tests/models/gguf_values.py 1 [CASE ...]   # N: every N-th alone; `just fuzz-values`
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fuzzing
from gguf_mutations import ARCHITECTURES, BROKEN, Content, Raw, content_of, in_blocks, serve, written

from blade.checkpoint.gguf import GGMLType
from blade.checkpoint.open import open_checkpoint
from blade.errors import RequestError
from blade.text.chat_template import load_chat_template
from blade.text.token_bytes import byte_alphabet
from blade.text.tokenizer import load_tokenizer

TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
TEXT = "Hello, wörld! <s> 123\n"
MESSAGES = [{"role": "user", "content": TEXT}]
KINDS = ("byte-level", "sentencepiece")
SMALL = 40  # tokens of the models whose files have no vocabulary of theirs
CASES = [*KINDS, *ARCHITECTURES]


def array(kind: int, items: list[bytes]) -> Raw:
    return Raw(9, struct.pack("<IQ", kind, len(items)) + b"".join(items))


INF, NAN = float("inf"), float("nan")
SCALARS: list[Any] = [
    True, False, 0, 1, -1, 2, 3, 7, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, -(2**63),
    0.0, -0.0, 0.5, 1.0, -1.0, 1e-30, 1e30, INF, -INF, NAN,
    Raw(12, struct.pack("<d", 1e308)), Raw(12, struct.pack("<d", NAN)),
    Raw(0, b"\x03"), Raw(1, b"\xff"), Raw(2, b"\x03\x00"), Raw(5, b"\xff\xff\xff\xff"), Raw(7, b"\x02"),
    "", " ", "x", "llama", "gpt2", "qwen2", "default", "none", "yarn", "linear", "\0",
    "\ud7ff\ufffe", "x" * 5000, "{{", "{% for a in b %}",
    Raw(8, struct.pack("<Q", 2) + b"\xff\xfe"), Raw(8, struct.pack("<Q", 3) + b"\xed\xa0\x80"),
    Raw(8, struct.pack("<Q", 2**63)),
]  # fmt: skip
ARRAYS: list[Any] = [
    [], [True], [False] * 4, [0], [0, 0, 0, 0], [1, 2, 3, 4], [2**63], [-1], [-(2**63)] * 3, [0.5], [NAN] * 4, [INF],
    [""], ["a"],
    ["a", "a"], ["a b"], ["\0"], [[1], [2]], [["a"], ["b"]], [[[[1]]]], [[[[[1]]]]],
    array(4, []), array(8, []), array(9, []),
    array(13, []), array(99, [b"x"]), array(0, [b"\x01"] * 4), array(8, [struct.pack("<Q", 1) + b"\xff"]),
    Raw(9, struct.pack("<IQ", 4, 2**60)), Raw(9, struct.pack("<IQ", 8, 2**60)), Raw(9, struct.pack("<IQ", 9, 2**20)),
    Raw(13, b""), Raw(99, b"x"),
]  # fmt: skip
OPTIONAL = {  # keys that blade reads and these files lack
    "tokenizer.chat_template": "{{ messages[0].content }}", "tokenizer.chat_template.tool_use": "{{ tools }}",
    **{f"tokenizer.ggml.{name}_token_id": 1 for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
    **{f"tokenizer.ggml.{name}": True for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
    "tokenizer.ggml.pre": "qwen2", "general.alignment": 32, "split.count": 1, "split.no": 0, "general.file_type": 1,
}  # fmt: skip
OF_ARCHITECTURES = {
    "attention.key_length": 64, "attention.value_length": 64, "rope.freq_base": 10000.0, "rope.dimension_count": 64,
    "rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 32,
    "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
    "attention.sliding_window": 8192, "vocab_size": 300, "nextn_predict_layers": 0, "expert_count": 4,
    "expert_used_count": 2, "full_attention_interval": 4, "attention.recurrent_layers": [True],
}  # fmt: skip


def with_vocabulary(kind: str) -> Content:
    """A Llama of one layer with a tokenizer of its own."""
    tokens = [*byte_alphabet(), "he", "ll", "hell", "hello", "<s>", "</s>", "<tool>", "[PAD]"]
    types, found = (
        [1] * 260 + [3, 3, 4, 5],
        {"model": "gpt2", "pre": "llama-bpe", "merges": ["h e", "l l", "he ll", "hell o"]},
    )
    if kind == "sentencepiece":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helo", "he", "ll", "hell"]
        types = [2, 3, 3] + [6] * 256 + [1] * 8
        found = {"model": "llama", "scores": [-float(i) for i in range(len(tokens))], "unknown_token_id": 0}
    content = in_blocks(GGMLType.F32, len(tokens))
    bos = tokens.index("<s>")
    found |= {"tokens": tokens, "token_type": types, "bos_token_id": bos, "eos_token_id": bos + 1}
    content.metadata.update({f"tokenizer.ggml.{key}": value for key, value in found.items()})
    return content


def optional(case: str, prefix: str) -> dict[str, Any]:
    """Sound values of keys that the file lacks."""
    of_model = {f"{prefix}.{key}": value for key, value in OF_ARCHITECTURES.items()}
    return {"byte-level": OPTIONAL | of_model, "sentencepiece": OPTIONAL}.get(case, of_model)


def of_vocabulary(value: list[Any]) -> Iterator[Any]:
    """Lists of another length or order than the vocabulary, or with one odd item at either end."""
    yield from (value[:-1], value[:1], value * 2, [*value, value[-1]], value[::-1], [value[0]] * len(value))
    odd: list[Any] = (
        ["", " ", "x", "▁", "\0", "a b c", "nosuch token", "h  e", " he", "he ",
         "<s>", "<0x41>", "x" * 70_000, "é\u0301"]
        if isinstance(value[0], str)
        else [0, -1, 7, 99, 2**31, -(2**31)] if isinstance(value[0], int) else [NAN, INF, -INF, 1e38, 0.0]
    )  # fmt: skip
    for item in odd:
        for place in (0, len(value) // 2, len(value) - 1):
            yield [*value[:place], item, *value[place + 1 :]]
        yield [item] * len(value)


def values_of(value: Any) -> Iterator[Any]:
    yield from SCALARS
    yield from ARRAYS
    if isinstance(value, list):
        yield from of_vocabulary(value)
    if isinstance(value, int):
        yield from (value - 1, value + 1, 2 * value, 1000 * value, 300, 263, 264, 265)


def contradictions(content: Content) -> Iterator[dict[str, Any]]:
    """Keys that contradict each other."""
    ids = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")]
    for token_id in (0, 1, 5, 100, 255, 263):
        yield dict.fromkeys(ids, token_id)
        yield dict.fromkeys(ids, token_id) | {
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": True,
        }
    yield {TOKENS: [], "tokenizer.ggml.token_type": [], MERGES: [], "tokenizer.ggml.scores": []}
    for kind in range(8):
        yield {"tokenizer.ggml.token_type": [kind] * len(content.metadata[TOKENS])}
    long = ["a" * n for n in range(1, 3000)]
    yield {TOKENS: long, "tokenizer.ggml.token_type": [1] * len(long), "tokenizer.ggml.scores": [0.0] * len(long)}
    yield {TOKENS: ["a" * 200_000, "a"], "tokenizer.ggml.token_type": [1, 1], "tokenizer.ggml.scores": [0.0, 0.0]}
    yield {MERGES: ["h e"] * 10_000}
    for template in (
        "x" * 10**6,
        "{{ a }}" * 10**5,
        "{% if a %}" * 5000,
        "{{ " + "[" * 5000,
        "{{ 9**9**9**9 }}",
        "{{ 'x' * 10**9 }}",
    ):
        yield {"tokenizer.chat_template": template}


def changes(case: str, content: Content) -> Iterator[dict[str, Any]]:
    """Of the metadata, one file each."""
    prefix = content.metadata["general.architecture"]
    scaling = {f"{prefix}.rope.scaling.type": "yarn", f"{prefix}.rope.scaling.factor": 2.0}
    for key, sound in {**optional(case, prefix), **content.metadata}.items():
        if case in KINDS or not key.startswith("tokenizer."):
            for value in values_of(sound):
                yield (scaling if ".rope.scaling." in key else {}) | {key: value}
    if case in KINDS:
        yield from contradictions(content)


def start(path: Path) -> None:
    """All that a start does, and a step; the text's part is consistent with the model's."""
    checkpoint = open_checkpoint(path)
    metadata, vocab_size = checkpoint.gguf_metadata, checkpoint.config["vocab_size"]
    if metadata is not None and vocab_size > SMALL:
        tokenizer, template = load_tokenizer(path, metadata), load_chat_template(path, metadata)
        ids = tokenizer.encode(TEXT)
        tokenizer.decode(ids, skip_special_tokens=False)
        tokenizer.token_bytes(tokenizer.vocab_size)
        if template is not None:
            with suppress(RequestError):  # what a template refuses is a client's to hear
                ids += template.render_ids(tokenizer, MESSAGES)
        assert {*ids, *tokenizer.eos_token_ids} <= set(range(vocab_size)), "an id that the model does not have"
    serve(path)


def sweep(case: str, every: int = 1) -> Counter[str]:
    """fuzzing.fuzz of each file, or of every so manieth."""
    content = with_vocabulary(case) if case in KINDS else content_of(case)
    todo = list(changes(case, content))[:: max(every, 1)]
    given = iter(todo)

    def write(folder: Path, _: random.Random) -> None:
        change = next(given)
        (folder / "change.txt").write_text(repr(change)[:2000])
        path = folder / BROKEN
        path.unlink(missing_ok=True)  # it may be mapped
        path.write_bytes(written(Content({**content.metadata, **change}, content.tensors)))

    return fuzzing.fuzz(case, len(todo), 0, write, lambda folder: start(folder / BROKEN))


if __name__ == "__main__":
    fuzzing.main(CASES, sweep)
