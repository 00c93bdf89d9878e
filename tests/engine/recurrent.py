"""A fake model with a recurrent layer, and an engine over it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from blade import (
    Batch,
    CaptureOptions,
    Draft,
    EngineConfig,
    KVCache,
    Limits,
    ModelConfig,
    Sampled,
    SamplingParams,
    Sequence,
    StateSpec,
    StateTensor,
    Step,
)  # fmt: skip
from blade.engine.blocks import BlockPool
from blade.engine.drafting import GuardedDrafter
from blade.engine.engine import Engine
from blade.engine.runner import ModelRunner
from blade.engine.scheduler import OrderedScheduler
from blade.engine.speculation import Speculator
from blade.engine.state_cache import with_states
from blade.engine.states import StatePool
from blade.testing import FakeModel
from blade_native.reference import TorchOps

BLOCK_SIZE = 4
counter = itertools.count()


class RecurrentModel(FakeModel):
    """FakeModel, whose logits are turned round by a state that hashes all ids so far, in their order."""

    def __init__(self) -> None:
        super().__init__(vocab_size=97)
        state = StateSpec(layers=(1,), tensors=(StateTensor((1,), "int64"),))
        self.config = ModelConfig("FakeForCausalLM", 97, 4096, 2, 1, 1, 1, state=state)
        self.num_tokens = 0  # that were computed

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        assert batch.state_in is not None
        assert batch.state_out is not None
        (states,), turns, row = kv[1], [], 0
        self.num_tokens += len(batch.input_ids)
        for length, slot_in, slot_out in zip(
            batch.query_lens, batch.state_in.tolist(), batch.state_out.tolist(), strict=True
        ):
            held = 0 if slot_in < 0 else int(states[slot_in])
            for token_id in batch.input_ids[row : row + length].tolist():
                held = after(held, token_id)
                turns.append(held)
            states[slot_out] = held
            row += length
        logits = super().forward(batch, kv[:1])
        rolled = [torch.roll(logits[i], turns[row] % 97) for i, row in enumerate(batch.logits_rows.tolist())]
        return torch.stack(rolled) if rolled else logits

    def generate(self, prompt_ids: Seq[int], num_tokens: int) -> list[int]:
        ids = list(prompt_ids)
        for _ in range(num_tokens):
            held = 0
            for token_id in ids:
                held = after(held, token_id)
            logits = torch.roll(self.logits(torch.tensor([ids]), torch.tensor([len(ids)]))[0], held % 97)
            ids.append(int(logits.argmax()))
        return ids[len(prompt_ids) :]


def after(held: int, token_id: int) -> int:
    return (held * 31 + token_id + 7) % 1_000_003


class LocalExecutor:
    """Its runner in this process; now and then a step fails after the model has run."""

    def __init__(self, model: RecurrentModel, runner: ModelRunner, fails: Callable[[], bool]) -> None:
        self.model, self.runner, self._fails = model, runner, fails

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        results = self.runner.run(step)
        if len(step) > 1 and self._fails():
            raise RuntimeError("a step fails")
        return results

    def forget(self, seq: Sequence) -> None:
        self.runner.forget(seq)

    def close(self) -> None:
        """Nothing is open."""


class Guesses:
    """contracts.Drafter: what the model will say, but for every third id."""

    def __init__(self, model: RecurrentModel) -> None:
        self._model, self._count = model, 0

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        return [Draft(self._guess(seq, limit)) for seq, limit in zip(seqs, limits, strict=True)]

    def _guess(self, seq: Sequence, limit: int) -> list[int]:
        ids = self._model.generate(seq.tokens(0, seq.num_tokens), limit)
        self._count += 1
        return [(i + 1) % 97 if self._count % 3 == 0 and place == 1 else i for place, i in enumerate(ids)]

    def forget(self, seq: Sequence) -> None:
        """Nothing is kept."""


def make_seq(prompt: list[int], max_tokens: int = 8) -> Sequence:
    return Sequence(next(counter), prompt, SamplingParams(max_tokens=max_tokens, temperature=0))


def make_engine(
    model: RecurrentModel,
    num_blocks: int = 400,
    num_slots: int = 24,
    fails: Callable[[], bool] = lambda: False,
    drafts: bool = False,
    **config: Any,
) -> Engine:
    settings = EngineConfig(block_size=BLOCK_SIZE, **{"max_batch_tokens": 48, "max_num_seqs": 8, **config})
    blocks = BlockPool(num_blocks, BLOCK_SIZE, settings.prefix_cache, StatePool(num_slots))
    kv = with_states(
        model.allocate(num_blocks, BLOCK_SIZE), model.config, num_slots, torch.float32, torch.device("cpu")
    )
    runner = ModelRunner(model, kv, TorchOps(), CaptureOptions(block_size=BLOCK_SIZE))
    limits = Limits(97, 512, settings.max_num_seqs)
    speculator = None
    if drafts:
        speculator = Speculator([GuardedDrafter("guesses", Guesses(RecurrentModel()), 97)], None, 3, 512)
    scheduler = OrderedScheduler(blocks, settings)
    return Engine(LocalExecutor(model, runner, fails), scheduler, blocks, settings, limits, speculator)


def serve(engine: Engine, scenario: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
    """Run the scenario against the started engine, and look at the books after every step."""
    step = engine._step

    def checked() -> Any:
        outputs = step()
        engine.blocks.check(engine._seqs.values())
        return outputs

    engine._step = checked  # type: ignore[method-assign]

    async def main() -> None:
        engine.start(asyncio.get_running_loop())
        try:
            await asyncio.wait_for(scenario(engine), 60)
        finally:
            engine.stop()
            assert await asyncio.to_thread(engine.join, 5)

    asyncio.run(main())
    engine.blocks.check()
    assert engine.blocks.num_used == 0


async def collect(engine: Engine, seqs: list[Sequence]) -> dict[int, list[int]]:
    """What each sequence said."""
    said: dict[int, list[int]] = {seq.id: [] for seq in seqs}
    async for outputs in engine.submit(seqs):
        for output in outputs:
            assert output.error is None, output.error
            said[output.seq_id] += [token.token_id for token in output.sampled]
    return said
