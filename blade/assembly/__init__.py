"""From a Config to an engine: what was asked for by name is chosen first, then loaded and put together."""

from blade.assembly.building import build_engine, load_draft, load_model, make_adapters
from blade.assembly.choosing import choose, own_heads
from blade.assembly.chosen import DRAFT_MODEL, Assembly
from blade.assembly.shapes import check_shapes
from blade.assembly.text import load_text, tokenizer_source

__all__ = [
    "DRAFT_MODEL",
    "Assembly",
    "build_engine",
    "check_shapes",
    "choose",
    "load_draft",
    "load_model",
    "load_text",
    "make_adapters",
    "own_heads",
    "tokenizer_source",
]
