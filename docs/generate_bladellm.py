"""Write docs/bladellm.md from the tables of blade/compat.py and compat_quantize.py: run it after changing an option."""

from __future__ import annotations

from pathlib import Path

from blade import compat_quantize
from blade.compat import OPTIONS, Option, shown

PAGE = Path(__file__).with_name("bladellm.md")
HEADER = """\
<!-- Made from blade/compat.py and compat_quantize.py by docs/generate_bladellm.py: change those, then run it. -->

# BladeLLM's command line

`blade_llm_server` takes BladeLLM's own options (`--opt value` or `--opt=value`, underscores, dotted groups, `-tp`), and
runs `blade serve` with the equivalent ones. What follows a lone `--` goes to `blade serve` as it is:

    blade_llm_server --model ./Qwen3-0.6B --port 8081 --ragged_flash_max_batch_tokens 4096 -- --dry-run

* **mapped**: passed on as the option named;
* **accepted**: the values listed ask for what blade does, and change nothing; other values are refused;
* **refused**: the start ends with exit status 2 and a sentence that names the option.

Errors of `blade serve` name options as they were typed, in BladeLLM's words.

`blade_llm_quantize` is translated into `blade quantize` in the same way; its options are the last table.

An option that BladeLLM does not have is refused with the closest one that it has. Where blade's default differs from
BladeLLM's, or BladeLLM's is not documented, blade's holds; `blade serve --help` lists them.
"""


def render() -> str:
    """The whole page."""
    parts = [HEADER]
    for title, options in (OPTIONS | compat_quantize.OPTIONS).items():
        rows = "\n".join(map(describe, options))
        parts.append(f"## {title}\n\n| option | | accepted values, default | |\n|---|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def describe(option: Option) -> str:
    alias = ", `-tp`" if option.name == "tensor_parallel_size" else ""
    return f"| `--{option.name}`{alias} | {option.verdict} | {values(option)} | {option.why} |"


def values(option: Option) -> str:
    if option.default is not None:
        return f"default {shown(option.default)}"
    if option.verdict == "accepted":
        return "any" if option.only is None else ", ".join(f"`{shown(value)}`" for value in option.only)
    return ""


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
