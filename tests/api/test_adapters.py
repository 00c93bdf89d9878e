"""Adapters by their names in requests, and loading them while the server runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blade.api.adapters import AdapterTable
from blade.errors import CheckpointError

from .fakes import Client, run
from .rsgi import Answer

PROMPT = {"prompt": "x", "max_tokens": 3}


@dataclass
class Adapter:
    name: str
    namespace: bytes


def read(name: str, folder: Path) -> Any:
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} has no adapter_config.json.")
    return Adapter(name, folder.name.encode())


def post(client: Client, path: str, body: Any) -> Answer:
    return run(client.post(path, body))


def get(client: Client, path: str) -> Answer:
    return run(client.request("GET", path))


@pytest.fixture
def client(tmp_path: Path) -> Client:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    client = Client(dialect="openai")
    client.server.adapters = AdapterTable(client.server.model_name, read, tmp_path)
    client.server.adapters.load("first", tmp_path / "one")
    return client


def test_the_model_field_chooses(client: Client) -> None:
    answer = post(client, "/v1/completions", PROMPT | {"model": "first"})
    assert answer.json["model"] == "first"
    post(client, "/v1/completions", PROMPT)
    post(client, "/v1/completions", PROMPT | {"model": client.server.model_name})
    seqs = client.engine.seqs
    assert [seq.adapter and seq.adapter.name for seq in seqs] == ["first", None, None]
    assert seqs[0].namespace != seqs[1].namespace == seqs[2].namespace
    assert client.summaries[0].model == "first"


def test_another_model_is_not_served(client: Client) -> None:
    answer = post(client, "/v1/completions", PROMPT | {"model": "second"})
    assert answer.status == 404
    assert "The model 'second' is not served here; 'tiny' and 'first' are." in answer.json["error"]["message"]


def test_the_list_of_models(client: Client) -> None:
    models = get(client, "/v1/models").json["data"]
    assert [(model["id"], model.get("parent")) for model in models] == [
        (client.server.model_name, None),
        ("first", client.server.model_name),
    ]
    assert get(client, "/v1/models/first").json["parent"] == client.server.model_name
    assert get(client, "/v1/models/other").status == 404


def test_loading_and_unloading(client: Client) -> None:
    loaded = post(client, "/v1/load_lora_adapter", {"lora_name": "second", "lora_path": "two"})
    assert (loaded.status, loaded.json["id"]) == (200, "second")
    post(client, "/v1/completions", PROMPT | {"model": "second"})
    assert client.engine.seqs[-1].adapter.name == "second"
    assert post(client, "/v1/unload_lora_adapter", {"lora_name": "second"}).status == 200
    assert post(client, "/v1/completions", PROMPT | {"model": "second"}).status == 404
    assert post(client, "/v1/unload_lora_adapter", {"lora_name": "second"}).status == 400


def test_of_two_that_load_one_name_the_first_stays(tmp_path: Path) -> None:
    def read_slowly(name: str, folder: Path) -> Any:
        if folder.name == "slow":  # meanwhile
            table.load(name, tmp_path / "fast")
        return folder.name

    table = AdapterTable("model", read_slowly)
    with pytest.raises(CheckpointError, match="The name 'x' is taken by an adapter"):
        table.load("x", tmp_path / "slow")
    assert table.get("x") == "fast"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"lora_name": "x", "lora_path": "../one"}, "there is no folder '../one' in --lora-dir"),
        ({"lora_name": "x", "lora_path": "/etc"}, "there is no folder '/etc' in --lora-dir"),
        ({"lora_name": "x", "lora_path": "three"}, "there is no folder 'three' in --lora-dir"),
        ({"lora_name": "x", "lora_path": "\0"}, r"there is no folder '\x00' in --lora-dir"),
        ({"lora_name": "x", "lora_path": "y" * 5000}, "yyy' in --lora-dir"),
        ({"lora_name": "x", "lora_path": "loop"}, "there is no folder 'loop' in --lora-dir"),
        ({"lora_name": "x", "lora_path": "empty"}, "empty has no adapter_config.json"),
        ({"lora_name": "first", "lora_path": "two"}, "The name 'first' is taken by an adapter. Choose another one."),
        ({"lora_name": "a b", "lora_path": "two"}, "An adapter cannot be named 'a b'"),
        ({"lora_name": "x"}, "lora_path: Field required"),
        ({"lora_name": 1, "lora_path": "two"}, "lora_name: Input should be a valid string"),
    ],
)
def test_what_cannot_be_loaded(client: Client, tmp_path: Path, body: dict[str, Any], message: str) -> None:
    answer = post(client, "/v1/load_lora_adapter", body)
    assert answer.status == 400
    assert message in answer.json["error"]["message"]
    assert str(tmp_path) not in answer.body.decode()


def test_without_a_folder_nothing_is_loaded_on_request(client: Client) -> None:
    client.server.adapters.folder = None
    for action, body in (
        ("load", {"lora_name": "x", "lora_path": "two"}),
        ("unload", {"lora_name": "first"}),
    ):
        answer = post(client, f"/v1/{action}_lora_adapter", body)
        assert answer.status == 403
        assert "--lora-dir" in answer.body.decode()
    assert json.loads(get(client, "/v1/models").body)["data"][1]["id"] == "first"
