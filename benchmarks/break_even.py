"""When a draft model pays: ``python benchmarks/break_even.py --model BIG --draft SMALL``.

Measured are a step of the large model by its tokens and a token of the small one. From these follows, for drafts of n
tokens each right with chance p, the speed-up (Leviathan et al. 2023, theorem 3.8, with the step's real cost):
(1 + p + ... + p^n) / (cost of n + 1 tokens + n draft tokens), in steps of one token. Where it is 1 they break even.
Ends in one JSON line; --plot draws it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blade import Config, DraftOptions, EngineConfig, ModelOptions
from blade.assembly import build_engine, choose, load_draft, load_model
from blade.engine.costs import StepCosts
from blade.engine.drafting import GuardedDrafter
from blade.engine.engine import Engine
from blade.engine.warm_up import measure_costs
from blade.plugins import load

LENGTHS = range(1, 9)  # of drafts, tokens
CHANCES = tuple(i / 20 for i in range(21))  # of a draft token to be right


def measure(options: argparse.Namespace) -> tuple[str, StepCosts, float]:
    """The models' names, the large one's costs, and the small one's seconds a token."""
    config = Config(
        model=ModelOptions(model=options.model, quantize=options.quantize, dtype=options.dtype, max_model_len=4096),
        draft=DraftOptions(model=options.draft, quantize=options.draft_quantize),
        engine=EngineConfig(threads=options.threads, kv_cache_memory=1 << 29),
    )
    assembly = choose(config, load())
    if assembly.draft is None:
        sys.exit("Name the small model with --draft.")
    model = load_model(assembly)
    engine = build_engine(assembly, model, assembly.plan_memory(), load_draft(assembly, model))
    best = [_costs(engine) for _ in range(options.rounds)]
    costs = StepCosts({num: min(round_[num] for round_ in best) for num in best[0]})
    return f"{assembly.model_name} + {assembly.draft.model_name}", costs, _drafter(engine).price.per_depth


def _costs(engine: Engine) -> dict[int, float]:
    return measure_costs(engine.executor, engine.blocks, engine.limits, engine.config.max_batch_tokens).seconds


def _drafter(engine: Engine) -> GuardedDrafter:
    """As it was rehearsed when the engine was built."""
    if engine.speculator is None:
        sys.exit("The engine drafts nothing.")
    return next(iter(engine.speculator.drafters))


def speedup(costs: StepCosts, per_draft_token: float, length: int, chance: float) -> float:
    step = costs.seconds(length + 1) + length * per_draft_token
    tokens = sum(chance**i for i in range(length + 1))
    return tokens * costs.seconds(1) / step


def break_even(costs: StepCosts, per_draft_token: float, length: int) -> float | None:
    """The chance from which on drafts of this length are a gain, to 0.001; None: they never are."""
    return next((p / 1000 for p in range(1001) if speedup(costs, per_draft_token, length, p / 1000) >= 1), None)


def draw(rows: dict[int, list[float]], file: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for length in (1, 2, 4, 8):
        axes.plot(CHANCES, rows[length], label=f"{length} tokens")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("chance of a draft token to be right")
    axes.set_ylabel("times as fast as without drafts")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, title="draft", title_fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or a .gguf file")
    parser.add_argument("--draft", required=True, help="the same of a smaller model")
    parser.add_argument("--quantize", help="as blade serve --quantize")
    parser.add_argument("--draft-quantize", help="as blade serve --draft.quantize")
    parser.add_argument("--dtype", default="auto", help="as blade serve --dtype")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=2, help="of measuring; the quickest counts")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    options = parser.parse_args()
    names, costs, per_draft_token = measure(options)
    one = costs.seconds(1)
    rows = {n: [round(speedup(costs, per_draft_token, n, p), 3) for p in CHANCES] for n in LENGTHS}
    if options.plot:
        draw(rows, options.plot, names)
    result: dict[str, Any] = {
        "models": names,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "seconds_of_a_step": round(one, 5),
        "cost_of_a_draft_token": round(per_draft_token / one, 3),
        "cost_of_verifying": {n: round(costs.seconds(n + 1) / one, 3) for n in LENGTHS},
        "break_even_chance": {n: break_even(costs, per_draft_token, n) for n in LENGTHS},
        "speedup": {n: dict(zip(CHANCES, row, strict=True)) for n, row in rows.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
