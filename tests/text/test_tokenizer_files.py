from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from blade.errors import CheckpointError, RequestError
from blade.testing import check_tokenizer
from blade.text.token_bytes import byte_alphabet
from blade.text.tokenizer import HFTokenizer, load_tokenizer
from blade.text.tokenizer_files import read_special_tokens

from .conftest import MERGES, byte_level_metadata


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def tiny() -> Tokenizer:
    vocab = {token: i for i, token in enumerate([*byte_alphabet(), "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("<|im_end|>", normalized=False)])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"})
    return tmp_path


def test_a_folder_s_tokenizer_passes_the_kit(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer)
    assert tokenizer.vocab_size == 259
    assert read_special_tokens(folder) == {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def test_special_tokens_map_is_read_where_the_config_is_silent(folder: Path) -> None:
    write(folder, special_tokens_map={"bos_token": "<x>", "pad_token": "</s>", "additional_special_tokens": ["<y>"]})
    named = read_special_tokens(folder)
    assert named == {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}


def test_what_ends_a_text_is_a_control_token_even_if_not_marked(folder: Path) -> None:
    with_added = tiny()
    with_added.add_tokens([AddedToken("<|end|>", normalized=False)])
    with_added.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": 259})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_ids == (tokenizer.control_tokens["<|end|>"], tokenizer.control_tokens["</s>"])
    check_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, (258,)),
        ({"generation_config": {"eos_token_id": [257, 256]}}, (257, 256, 258)),
        ({"generation_config": {"eos_token_id": 258}}, (258,)),
        ({"config": {"eos_token_id": 257}}, (258,)),
        ({"config": {"eos_token_id": 257}, "tokenizer_config": {}}, (257,)),
        ({"tokenizer_config": {}}, ()),
    ],
)
def test_end_of_sequence_ids(folder: Path, files: dict[str, Any], ids: tuple[int, ...]) -> None:
    write(folder, **files)
    assert load_tokenizer(folder).eos_token_ids == ids


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ({}, [72]),
        ({"add_bos_token": True}, [256, 72]),
        ({"add_bos_token": True, "add_eos_token": True}, [256, 72, 258]),
    ],
)
def test_flags_of_the_config_decide_what_goes_around(folder: Path, flags: dict[str, bool], ids: list[int]) -> None:
    config = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    write(folder, tokenizer_config=config | flags)
    assert [i if i >= 256 else 72 for i in load_tokenizer(folder).encode("H")] == ids


def test_truncation_of_the_file_is_off(folder: Path) -> None:
    tokenizer = tiny()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("hello")) == 5


def test_half_a_surrogate_pair_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for encode in (tokenizer.encode, tokenizer.encode_template):
        with pytest.raises(RequestError, match="surrogate"):
            encode("\ud83d")


def test_ids_that_are_no_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.token_bytes(i) for i in (-1, 259, 2**31, 2**80)] == [b""] * 4


def test_literals_are_plain_text_in_place(byte_level: HFTokenizer) -> None:
    control = byte_level.control_tokens
    plain = byte_level.encode("hello <|im_end|> world")
    ids = byte_level.encode_template("<|im_start|>hello X world<|im_end|>", {"X": "<|im_end|>"})
    assert ids == [control["<|im_start|>"], *plain, control["<|im_end|>"]]


def test_literals_that_the_template_left_out_change_nothing(byte_level: HFTokenizer) -> None:
    text = "<|im_start|>hello<|im_end|>"
    for stand_in in map(chr, range(0x20000, 0x20003)):
        assert byte_level.encode_template(text, {stand_in: "x"}) == byte_level.encode_template(text)


def test_literals_keep_what_control_tokens_strip() -> None:
    tokenizer = tiny()
    tokenizer.add_special_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True, normalized=False)])
    ours = HFTokenizer(tokenizer, [])
    text = "a  <|end|>  b"
    assert ours.encode_template(text + "X", {"X": "c"}) == ours.encode_template(text + "c")


def test_literals_between_sentencepiece_control_tokens(sentencepiece: HFTokenizer) -> None:
    text = "<s>the in</s>abc"
    assert sentencepiece.encode_template(text + "X", {"X": " he"}) == sentencepiece.encode_template(text + " he")
    ids = sentencepiece.encode_template(text + "X", {"X": "</s>"})
    assert [i for i in ids if i in (1, 2)] == [1, 2]


def test_literals_go_on_where_only_the_first_word_gets_a_space() -> None:
    vocab = {token: i for i, token in enumerate(["<s>", "a", "b", "▁", "▁a"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False)])
    ours = HFTokenizer(tokenizer, [])
    assert ours.encode_template("a<s>aX", {"X": "b"}) == ours.encode_template("a<s>ab") == [4, 0, 1, 2]
    assert ours.decode([4, 0, 1, 2]) == "aab"


def test_vocab_and_merges_are_converted(tmp_path: Path) -> None:
    metadata = byte_level_metadata()
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    write(tmp_path, vocab=vocab, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES))
    tokenizer = load_tokenizer(tmp_path)
    ours = load_tokenizer(Path("tiny.gguf"), metadata)
    text = "hello world, it's 2024 你好 <|im_end|>"
    assert tokenizer.encode(text) == ours.encode(text)
    assert tokenizer.eos_token_ids == ours.eos_token_ids[:1]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, "holds no tokenizer.json"),
        ({"tokenizer.json": "{}"}, "tokenizer.json"),
        ({"tokenizer.model": "x"}, "LlamaTokenizer cannot read"),
    ],
)
def test_unusable_folders_are_named(tmp_path: Path, files: dict[str, str], names: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=names):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", b'{"a": "\xf9"}', "tokenizer_config.json is not a JSON object"),
        ("special_tokens_map.json", "[" * 100_000, "special_tokens_map.json is not a JSON object"),
        ("generation_config.json", "{", "generation_config.json is not a JSON object"),
        ("generation_config.json", '{"eos_token_id": ["7"]}', "generation_config.json: eos_token_id"),
        ("generation_config.json", '{"eos_token_id": 1099511627776}', "generation_config.json: eos_token_id"),
        ("tokenizer_config.json", '{"add_bos_token": "no"}', "tokenizer_config.json: add_bos_token is 'no'"),
        ("tokenizer_config.json", '{"eos_token": ["</s>"]}', "tokenizer_config.json: eos_token is"),
        ("special_tokens_map.json", '{"bos_token": {"content": 7}}', "special_tokens_map.json: bos_token is"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "<none>"}', "'<none>'"),
    ],
)
def test_malformed_files_are_named(folder: Path, name: str, content: str | bytes, names: str) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=names):
        load_tokenizer(folder)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Strip("x", 1, 0)])
def test_other_decoders_are_refused(decoder: decoders.Decoder | None) -> None:
    tokenizer = tiny()
    tokenizer.decoder = decoder
    with pytest.raises(CheckpointError, match="decoder"):
        HFTokenizer(tokenizer, [])


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ),
    ],
)
def test_a_tokenizer_that_no_text_gets_through_is_refused(folder: Path, part: str, value: Any) -> None:
    """The library reads such files, and panics over texts."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {part: value}))
    with pytest.raises(CheckpointError, match=r"tokenizer.*Fetch|tokenizer\.json is no tokenizer"):
        load_tokenizer(folder)


def test_a_control_token_of_a_million_characters_is_refused(folder: Path) -> None:
    """All its parts would be looked for in what requests say."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [{**content["added_tokens"][0], "id": 4000, "content": "x" * 10**6, "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="a control token of 1000000 characters, and blade takes 1024 at most"):
        load_tokenizer(folder)
