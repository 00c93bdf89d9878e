"""Write docs/hooks.md from blade/hookspecs.py: run it (`just docs`) after changing a hook."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from blade import hookspecs

PAGE = Path(__file__).with_name("hooks.md")
HEADER = "<!-- Made from blade/hookspecs.py by docs/generate_hooks.py: change that file, then run `just docs`. -->"
# A group's heading is a ruled comment; a hook starts at its def, which may be the second line of a decorated function.
LANDMARK = re.compile(r"^# -+ (?P<group>.+)$|^def (?P<hook>\w+)\(", re.MULTILINE)


def render() -> str:
    """The whole page."""
    parts = [HEADER, "# Hooks", inspect.getdoc(hookspecs) or ""]
    for landmark in LANDMARK.finditer(inspect.getsource(hookspecs)):
        if landmark["group"]:
            parts.append(f"## {landmark['group'][0].upper()}{landmark['group'][1:]}")
        else:
            parts.append(describe(landmark["hook"]))
    parts.append("How to write a plugin, with an example of each kind: [plugins.md](plugins.md).")
    return "\n\n".join(parts) + "\n"


def describe(name: str) -> str:
    hook = getattr(hookspecs, name)
    signature = str(inspect.signature(hook)).replace("'", "")
    return f"### {name}\n\n```python\n@hookimpl\ndef {name}{signature}: ...\n```\n\n{inspect.getdoc(hook)}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
