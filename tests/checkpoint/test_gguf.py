"""Sound files are read as the gguf package reads them; damaged ones give a CheckpointError and nothing else."""

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blade.checkpoint.gguf import read_gguf, read_gguf_parts
from blade.checkpoint.open import open_checkpoint
from blade.errors import CheckpointError

from .writers import TOKENS, tensors, write_gguf

U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
MANY = 2**63


def text(value: str) -> bytes:
    return U64(len(value)) + value.encode()


def header(num_tensors: int = 0, num_pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + U32(version) + U64(num_tensors) + U64(num_pairs)


def info(name: str = "a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + U32(len(shape)) + b"".join(map(U64, shape)) + U32(kind) + U64(offset)


def padded(data: bytes, num_bytes: int) -> bytes:
    return data + bytes(-len(data) % 32) + bytes(num_bytes)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + U32(kind) + value


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantised = {"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q8_0}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "sound.gguf", quantised=quantised)


def test_reads_what_the_package_reads(sound: Path) -> None:
    found, expected = read_gguf(sound), gguf.GGUFReader(sound)
    fields = {key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    assert found.metadata == fields
    assert found.metadata["tokenizer.ggml.tokens"] == TOKENS
    assert list(found.tensors) == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        mine = found.tensors[tensor.name]
        assert (mine.kind, mine.shape) == (tensor.tensor_type, tuple(map(int, tensor.shape[::-1])))
        assert (mine.offset, mine.num_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_writing_to_the_mapping_spares_the_file(sound: Path) -> None:
    before = sound.read_bytes()
    read_gguf(sound).memory[-1] ^= 255
    assert sound.read_bytes() == before


def test_nested_arrays(tmp_path: Path) -> None:
    inner = U32(4) + U64(2) + U32(7) + U32(8)
    file = tmp_path / "nested.gguf"
    file.write_bytes(header(0, 1) + pair("a", 9, U32(9) + U64(2) + inner + inner))
    assert read_gguf(file).metadata == {"a": [[7, 8], [7, 8]]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"GGML" + bytes(40), "does not begin with 'GGUF'"),
        (b"GG", "does not begin with 'GGUF'"),
        (b"GGUF" + U32(3), "truncated"),
        (header(version=1), "version is 1"),
        (header(version=0x03000000), "version is 50331648"),
        (header(0, MANY), "truncated"),
        (header(MANY, 0), "truncated"),
        (header(0, 1) + U64(MANY), "truncated"),
        (header(0, 1) + U64(2**64 - 1) + bytes(64), "truncated"),
        (header(0, 1) + pair("a", 8, U64(5) + b"abcd"), "truncated"),
        (header(0, 1) + pair("a", 8, U64(2) + b"\xff\xff"), "not UTF-8"),
        (header(0, 1) + pair("a", 99, b""), "unknown type 99"),
        (header(0, 1) + pair("a", 9, U32(4) + U64(MANY)), "truncated"),
        (header(0, 1) + pair("a", 9, U32(8) + U64(MANY)), "truncated"),
        (header(0, 1) + pair("a", 9, (U32(9) + U64(1)) * 2000), "nested more than 4"),
        (header(0, 2) + pair("a", 4, U32(1)) * 2, "'a' comes twice"),
        (header(0, 1) + pair("general.alignment", 4, U32(0)), "general.alignment is 0"),
        (header(0, 1) + pair("general.alignment", 4, U32(12)), "general.alignment is 12"),
        (header(0, 1) + pair("general.alignment", 8, text("32")), "general.alignment is '32'"),
        (padded(header(1) + info(), 15), "truncated: the tensor 'a' ends at byte 80 and the file at 79"),
        (padded(header(1) + info(shape=(2**62, 2**62)), 64), "truncated: the tensor 'a'"),
        (padded(header(1) + info(shape=()), 64), "'a' has 0 dimensions"),
        (padded(header(1) + info(shape=(1,) * 5), 64), "'a' has 5 dimensions"),
        (padded(header(1) + info(shape=(4, 0)), 64), "no whole number of F32 blocks"),
        (padded(header(1) + info(shape=(33,), kind=8), 64), "no whole number of Q8_0 blocks"),
        (
            padded(header(1) + info(kind=16), 64),
            "of GGML type IQ2_XXS, which blade does not read: it reads F32, F16, Q4_0",
        ),
        (padded(header(1) + info(kind=99), 64), "of GGML type 99, which blade does not read"),
        (padded(header(1) + info(offset=1), 64), "not aligned to 32 bytes"),
        (padded(header(1) + info(offset=2**64 - 32), 64), "truncated"),
        (padded(header(2) + info() * 2, 64), "'a' comes twice"),
        (padded(header(2) + info() + info("b"), 64), "'a' and 'b' overlap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsound_headers(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "unsound.gguf"
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read_gguf(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def survives(folder: Path, data: bytes) -> None:
    """Reading is allowed to succeed, or to fail with a CheckpointError."""
    file = folder / "mutated.gguf"
    file.write_bytes(data)
    with suppress(CheckpointError):
        weights = open_checkpoint(file).weights
        for name in weights.names():
            weights.get(name)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_truncated_files(sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = sound.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    file = tmp_path_factory.getbasetemp() / "cut.gguf"
    file.write_bytes(whole[:cut])
    with pytest.raises(CheckpointError):
        open_checkpoint(file)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_headers(sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    mutated = bytearray(sound.read_bytes())
    end = min(tensor.offset for tensor in read_gguf(sound).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, end - 1))
        change = data.draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\xff" * 8, bytes(8)]))
        mutated[start : start + len(change)] = change
    survives(tmp_path_factory.getbasetemp(), bytes(mutated))


def split(folder: Path) -> list[Path]:
    arrays = tensors("llama")
    half = len(arrays) // 2
    parts = [dict(list(arrays.items())[:half]), dict(list(arrays.items())[half:])]
    return [
        write_gguf(folder / f"m-0000{i + 1}-of-00002.gguf", changes={"split.no": i, "split.count": 2}, arrays=part)
        for i, part in enumerate(parts)
    ]


def test_split_files_are_joined(tmp_path: Path, sound: Path) -> None:
    first, second = split(tmp_path)
    names = [name for file in read_gguf_parts(first) for name in file.tensors]
    assert sorted(names) == sorted(read_gguf(sound).tensors)
    assert open_checkpoint(first).name == "m"
    with pytest.raises(CheckpointError, match=r"Give the path of the first, NAME-00001-of-00002\.gguf"):
        open_checkpoint(second)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf cannot be read: No such file"):
        open_checkpoint(first)
