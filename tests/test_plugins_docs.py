"""Every example of docs/plugins.md works: it is cut out, imported, and held to its contract."""

import asyncio
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cyclopts import App

from blade import RequestError, RequestSummary, SamplingParams, Sequence
from blade import testing as kits
from blade.plugins import HOOKS, Plugins
from blade.testing.attention import make_batch
from blade.testing.plugin import HEAVY, imported, is_public
from blade_native.reference import TorchOps

PAGE = Path(__file__).parent.parent / "docs" / "plugins.md"
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py.*?\n(.*?)```", PAGE.read_text(), re.DOTALL))
MODULES = [name for name in EXAMPLES if not name.startswith("test_")]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("examples")
    for name, source in EXAMPLES.items():
        (folder / f"{name}.py").write_text(source)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def example(name: str) -> tuple[ModuleType, Plugins]:
    module = importlib.import_module(name)
    return module, Plugins({name: module})


def test_every_hook_has_an_example() -> None:
    implemented = {hook for name in MODULES for hook in HOOKS if hasattr(example(name)[0], hook)}
    assert implemented == set(HOOKS)


def test_the_examples_obey_the_law(folder: Path) -> None:
    assert [name for path in folder.glob("*.py") for name in imported(path) if not is_public(name)] == []
    code = f"import sys, {', '.join(MODULES)}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True).strip() == "[]"


def test_the_pyproject_announces_the_module() -> None:
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert tomllib.loads(toml)["project"]["entry-points"]["blade"] == {"lifo": "blade_lifo"}
    assert len(toml.splitlines()) == 6


def test_the_test() -> None:
    importlib.import_module("test_lifo").test_lifo()


def test_drafter() -> None:
    _, plugins = example("repeat")
    kits.check_drafter(plugins.registry("register_drafters")["repeat"])


def test_drafter_that_reads_hidden_states() -> None:
    module, plugins = example("alike")
    kits.check_drafter(plugins.registry("register_drafters")["alike"], hidden_size=8)
    drafter, seq = module.Alike(), Sequence(1, [5, 6, 7, 8, 9], SamplingParams(max_tokens=9), output_ids=[6])
    hidden = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0], [0, 1]])
    drafter.observe([seq], [range(5)], [0], hidden)
    assert drafter.propose([seq], [3])[0].ids == [7, 8, 9]  # as after 5, 6


def test_logits_processor() -> None:
    _, plugins = example("ban")
    ban = plugins.registry("register_logits_processors")["ban"]
    kits.check_logits_processor(ban, [3, 5], kits.ByteTokenizer())
    with pytest.raises(RequestError, match="list of token ids"):
        ban([1000], kits.ByteTokenizer())


def test_route() -> None:
    _, plugins = example("occupancy")
    server = SimpleNamespace(engine=SimpleNamespace(stats=lambda: SimpleNamespace(num_running=2, num_waiting=1)))
    response = asyncio.run(plugins.registry("register_routes")["GET /load"](server, None))
    assert (response.status, response.body) == (200, b'{"running":2,"waiting":1}')


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli = App(result_action="return_value")
    example("greet")[1].register_commands(cli)
    cli(["greet", "you", "--times", "2"])
    assert capsys.readouterr().out == "hello you\nhello you\n"


def test_lifespan_and_request_finished(capsys: pytest.CaptureFixture[str]) -> None:
    _, plugins = example("ledger")
    server: Any = SimpleNamespace(model_name="m")

    async def serve() -> None:
        async with plugins.lifespans(server):
            plugins.request_finished(RequestSummary("r", "/", "m", 1, 2, 0, 3, ("stop",), None, None, 0.3, 200))

    asyncio.run(serve())
    assert capsys.readouterr().out == "m generated 3 tokens\n"


def test_reasoning_parser() -> None:
    think = example("think")[1].registry("register_reasoning_parsers")["think"]
    results = kits.check_reasoning_parser(think, ["so <b></think>yes </think>", "no end </thi", ""])
    assert results == [("so <b>", "yes </think>"), ("no end </thi", ""), ("", "")]


def test_tool_parser() -> None:
    bang = example("bang")[1].registry("register_tool_parsers")["bang"]
    results = kits.check_tool_parser(bang, ['Two\nlines.\n!add {"a": 1}\n!now', "no call"])
    assert results == [("Two\nlines.\n", [("add", '{"a": 1}'), ("now", "{}")]), ("no call", [])]


def test_model() -> None:
    architecture = example("bigram")[1].registry("register_models").create("BigramForCausalLM")
    table = torch.randn(7, 7)
    loader = SimpleNamespace(tensor=lambda name, shape: {"bigram.weight": table}[name].view(shape))
    model = architecture.build(architecture.configure({"vocab_size": 7}), loader)
    batch = make_batch([[0], [1]], [(0, 3), (0, 1)], 4, TorchOps())
    batch.input_ids = torch.tensor([1, 2, 3, 4])
    assert torch.equal(model.forward(batch, []), table[[3, 4]])


def test_weight_format() -> None:
    quantization = example("int8")[1].registry("register_quantizations").create("int8-rows", {})
    tensors = {"a.weight": torch.tensor([[2, -4]], dtype=torch.int8), "a.weight_scale": torch.tensor([[0.5]])}
    weights = SimpleNamespace(names=lambda: tensors, get=tensors.__getitem__)
    linear = quantization.linear(["a"], [None], weights, TorchOps(), torch.float32)
    assert linear(torch.tensor([[1.0, 1.0]])).tolist() == [[-1.0]]
    assert quantization.linear(["b"], [None], weights, TorchOps(), torch.float32) is None
    assert quantization.num_bytes("a.weight", weights, TorchOps(), torch.float32) is None


class GroupedOps(TorchOps):
    quantized_dtypes = (torch.float32,)


def test_weight_format_made_of_plain_weights() -> None:
    registry = example("ternary")[1].registry("register_quantizations")
    assert registry.entry("ternary").plain
    quantization = registry.create("ternary", {})
    row = torch.tensor([[0.5, -2.0, 0.0, -0.5] * 32])
    tensors = {"model.layers.0.a.weight": row, "norm.weight": row[0]}
    weights = SimpleNamespace(
        names=lambda: tensors, get=lambda name, dtype: tensors[name].to(dtype), shape=lambda name: tensors[name].shape
    )
    linear = quantization.linear(["model.layers.0.a"], [(1, 128)], weights, GroupedOps(), torch.float32)
    assert linear(torch.eye(128)[:4]).tolist() == [[0.75], [-0.75], [0.0], [-0.75]]
    assert quantization.num_bytes("model.layers.0.a.weight", weights, GroupedOps(), torch.float32) == 66
    assert quantization.num_bytes("norm.weight", weights, GroupedOps(), torch.float32) is None


def test_executor(capsys: pytest.CaptureFixture[str]) -> None:
    runner = SimpleNamespace(run=lambda step: [[] for _ in step], forget=print)
    executor = example("timed")[1].registry("register_executors").create("timed", lambda: runner, None)
    assert executor.run(["seq"]) == [[]]
    executor.close()
    assert capsys.readouterr().out.startswith("1 sequences, ")


def test_device() -> None:
    kits.check_ops(example("plain")[1].registry("register_backends").create("plain", None))


def test_attention() -> None:
    kits.check_attention(example("plain_attention")[1].registry("register_attention")["plain"], TorchOps())
