from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from blade.checkpoint.gguf import read_gguf
from blade.errors import CheckpointError
from blade.testing import check_tokenizer
from blade.text.pretokenizers import PRETOKENIZERS
from blade.text.tokenizer import HFTokenizer, load_tokenizer

from .conftest import byte_level_metadata, sentencepiece_metadata

TEXTS = [
    "Hello, world!",
    "naïve café, 你好世界, Привет, שלום, สวัสดี",
    "🙂👩‍👩‍👧 e\u0301 vs \u00e9",
    "   leading,  two   three \t\ttabs\n\n\nlines\r\n",
    "1234567890 3.14 ٣٤ ½",
    "def f(x):\n    return x ** 2  # it's\n",
    "<tool_call>{}</tool_call> <|nothing|>",
]
PATH = Path("tiny.gguf")
UNNAMED = {"token_type": None, "bos_token_id": None, "eos_token_id": None}


def load(metadata: dict[str, Any]) -> HFTokenizer:
    return load_tokenizer(PATH, metadata)


def test_byte_level_merges_in_order(byte_level: HFTokenizer) -> None:
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in byte_level.encode("hello world  7")] == ["hello", "Ġworld", "Ġ", "Ġ", "7"]


def test_tokenizers_pass_the_kit(byte_level: HFTokenizer, sentencepiece: HFTokenizer) -> None:
    check_tokenizer(byte_level)
    check_tokenizer(sentencepiece)


def test_control_tokens_count_in_templates_alone(byte_level: HFTokenizer) -> None:
    end = byte_level.control_tokens["<|im_end|>"]
    assert end not in byte_level.encode("a<|im_end|>b")
    assert byte_level.encode_template("a<|im_end|>b").count(end) == 1
    assert byte_level.decode(byte_level.encode("a<|im_end|>b")) == "a<|im_end|>b"


def test_user_defined_tokens_count_everywhere(byte_level: HFTokenizer) -> None:
    (token_id,) = byte_level.encode("<tool_call>")
    assert byte_level.encode_template("<tool_call>") == [token_id]
    assert byte_level.token_bytes(token_id) == b"<tool_call>"
    assert "<tool_call>" not in byte_level.control_tokens


def test_fillers_have_no_text(byte_level: HFTokenizer) -> None:
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    assert byte_level.token_bytes(tokens.index("[PAD0]")) == b""
    assert byte_level.vocab_size == len(tokens) - 1


def test_every_known_end_token_ends(byte_level: HFTokenizer) -> None:
    named, known = byte_level.control_tokens["<|im_end|>"], byte_level.control_tokens["<|endoftext|>"]
    assert byte_level.eos_token_ids == (named, known)


@pytest.mark.parametrize(
    ("changes", "around"),
    [
        ({"add_bos_token": True}, ("<|endoftext|>", None)),
        ({"add_bos_token": True, "add_eos_token": True}, ("<|endoftext|>", "<|im_end|>")),
        ({"add_bos_token": None, "pre": "llama-bpe"}, ("<|endoftext|>", None)),
        ({"add_bos_token": None, "pre": "qwen2"}, (None, None)),
    ],
)
def test_special_tokens_go_around_as_the_file_says(changes: dict[str, Any], around: tuple[str | None, ...]) -> None:
    tokenizer = load(byte_level_metadata(**changes))
    bos, eos = ([tokenizer.control_tokens[token]] if token else [] for token in around)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == bos + plain + eos


def test_unicode_is_composed_for_qwen(byte_level: HFTokenizer) -> None:
    assert byte_level.encode("e\u0301") == byte_level.encode("\u00e9")
    smollm = load(byte_level_metadata(pre="smollm"))
    assert smollm.encode("e\u0301") != smollm.encode("\u00e9")


def test_whole_words_win_in_llama_3() -> None:
    metadata = byte_level_metadata(pre="llama-bpe")
    metadata["tokenizer.ggml.tokens"][-1] = "world"  # no merges lead to it
    metadata["tokenizer.ggml.token_type"][-1] = 1
    assert load(metadata).encode("world", False) == [len(metadata["tokenizer.ggml.tokens"]) - 1]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert len(load(metadata).encode("world")) > 1


@given(st.text())
def test_smollm_and_gpt2_cut_as_their_own_pretokenizers(text: str) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert PRETOKENIZERS["gpt-2"].build().pre_tokenize_str(text) == gpt2.pre_tokenize_str(text)
    smollm = pre_tokenizers.Sequence([digits, gpt2])
    assert PRETOKENIZERS["smollm"].build().pre_tokenize_str(text) == smollm.pre_tokenize_str(text)


def test_qwen2_encodes_as_transformers(byte_level: HFTokenizer) -> None:
    from transformers import Qwen2Tokenizer

    metadata = byte_level_metadata()
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split()) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = Qwen2Tokenizer(vocab=vocab, merges=merges)
    for text in TEXTS[:-1]:
        assert byte_level.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("pre", PRETOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_every_pretokenizer_keeps_the_text(pre: str, text: str) -> None:
    tokenizer = load(byte_level_metadata(pre=pre))
    composed = text.replace("e\u0301", "\u00e9") if PRETOKENIZERS[pre].nfc else text
    assert tokenizer.decode(tokenizer.encode(text)) == composed


def test_llama_3_groups_digits_by_three() -> None:
    cut = PRETOKENIZERS["llama-bpe"].build().pre_tokenize_str("12345 a")
    assert [word for word, _ in cut] == ["123", "45", "Ġa"]


def naive_sentencepiece(text: str) -> list[str]:
    """SentencePiece's definition, without its queue: always join the adjacent pair with the best score."""
    metadata = sentencepiece_metadata()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    score = dict(zip(tokens[259:], scores[259:], strict=True))
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in score]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [p for s in symbols for p in ([s] if s in score else [f"<0x{byte:02X}>" for byte in s.encode()])]


@settings(max_examples=300)
@given(st.text(alphabet="abchintedx é你", min_size=1))
@example("the abc in  the aaaa")
def test_scores_merge_as_sentencepiece(sentencepiece: HFTokenizer, text: str) -> None:
    tokens = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in sentencepiece.encode(text, add_special_tokens=False)] == naive_sentencepiece(text)
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_sentencepiece_adds_bos_and_a_space_unless_told() -> None:
    ids = load(sentencepiece_metadata()).encode("the")
    bare = load(sentencepiece_metadata(add_bos_token=False, add_space_prefix=False))
    tokens = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in ids] == ["<s>", "▁the"]
    assert bare.decode(bare.encode(" the")) == " the"
    assert [tokens[i] for i in bare.encode("the")] == ["t", "he"]


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        (byte_level_metadata(pre="klingon"), "tokenizer.ggml.pre 'klingon'"),
        (byte_level_metadata(model="wordpiece"), "tokenizer.ggml.model 'wordpiece'"),
        (byte_level_metadata(pre=["qwen2"]), r"tokenizer.ggml.pre \['qwen2'\]"),
        (byte_level_metadata(model=["gpt2"]), r"tokenizer.ggml.model \['gpt2'\]"),
        (byte_level_metadata(tokens=None), "tokenizer.ggml.tokens"),
        (byte_level_metadata(merges=None), "tokenizer.ggml.merges"),
        (byte_level_metadata(merges=["a b c"]), "tokenizer.ggml.merges has 'a b c'"),
        (byte_level_metadata(merges=["nosuch token"]), "tokenizer.ggml.merges has 'nosuch token'"),
        (byte_level_metadata(merges=["h i"]), "tokenizer.ggml.merges has 'h i'"),
        (byte_level_metadata(merges=[7]), "no list tokenizer.ggml.merges of str"),
        (byte_level_metadata(token_type=[0.5]), "no list tokenizer.ggml.token_type of int"),
        (byte_level_metadata(token_type=[99] * 275), "token_type has a token of the type 99"),
        (byte_level_metadata(tokens=["a", "b"] * 130, **UNNAMED), "tokenizer.ggml.tokens has 'a' twice"),
        (byte_level_metadata(tokens=["a", "b"], merges=[], **UNNAMED), "tokenizer.ggml.tokens lacks"),
        (byte_level_metadata(bos_token_id=True), "bos_token_id True"),
        (byte_level_metadata(add_bos_token="no"), "add_bos_token is 'no'"),
        (byte_level_metadata(add_eos_token=float("nan")), "add_eos_token is nan"),
        (sentencepiece_metadata(add_space_prefix=[]), r"add_space_prefix is \[\]"),
        (sentencepiece_metadata(scores=[float("nan")] * 284), "scores has one that is no finite number"),
        (byte_level_metadata(token_type=[1, 2]), "token_type"),
        (byte_level_metadata(eos_token_id=10**9), "eos_token_id"),
        (byte_level_metadata(bos_token_id="1"), "bos_token_id"),
        (sentencepiece_metadata(scores=[0.0]), "tokenizer.ggml.scores has 1 items"),
        (sentencepiece_metadata(scores=None), "tokenizer.ggml.scores"),
    ],
)
def test_bad_metadata_is_named(metadata: dict[str, Any], names: str) -> None:
    with pytest.raises(CheckpointError, match=names):
        load(metadata)


def test_tokens_that_would_take_minutes_to_cut_are_refused() -> None:
    tokens = ["<unk>", *("a" * n for n in range(1, 1000))]
    metadata = sentencepiece_metadata(
        tokens=tokens, token_type=[2] + [1] * 999, scores=[0.0] * 1000, bos_token_id=None, eos_token_id=None
    )
    with pytest.raises(CheckpointError, match=r"tokens of up to 999 characters.*--tokenizer-dir"):
        load(metadata)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> HFTokenizer:
    return load(read_gguf(smollm2_gguf).metadata)


@pytest.fixture(scope="module")
def qwen(qwen_gguf: Path) -> HFTokenizer:
    return load(read_gguf(qwen_gguf).metadata)


@pytest.mark.demo
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
    ],
)
def test_smollm2_encodes_as_published(smollm2: HFTokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids


@pytest.mark.demo
def test_qwen_encodes_as_published(qwen: HFTokenizer) -> None:
    assert qwen.encode("Hello world! 123 你好") == [9707, 1879, 0, 220, 16, 17, 18, 220, 108386]
    assert qwen.encode_template("<|im_start|>user\n") == [151644, 872, 198]
    assert qwen.eos_token_ids == (151645, 151643)


@pytest.mark.demo
@pytest.mark.parametrize("text", TEXTS)
def test_real_tokenizers_keep_the_text(smollm2: HFTokenizer, qwen: HFTokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text
    assert qwen.decode(qwen.encode(text)) == text.replace("e\u0301", "\u00e9")
    check_tokenizer(smollm2)
    check_tokenizer(qwen)
