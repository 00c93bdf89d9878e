"""docs/hooks.md is what its generator makes of today's hookspecs, and leaves no hook out."""

import runpy
from pathlib import Path

from blade.plugins import HOOKS

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_up_to_date() -> None:
    rendered = runpy.run_path(str(DOCS / "generate_hooks.py"))["render"]()
    assert (DOCS / "hooks.md").read_text() == rendered, "run `just docs`"


def test_every_hook_has_its_section() -> None:
    lines = (DOCS / "hooks.md").read_text().splitlines()
    assert [line.removeprefix("### ") for line in lines if line.startswith("### ")] == list(HOOKS)
