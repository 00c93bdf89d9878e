"""What speculative decoding is measured on: requests that copy much of their prompt, some of it, or nothing.

Made from this project's own files and texts, so that anyone can run them on any chat model.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A short file, and a change to be made in it.
EDITS = (
    ("blade/engine/stream.py", "rename the method `push` to `add_output`"),
    ("blade/checked.py", "add a comment line `# see errors.py` above the first function"),
    ("blade/engine/verify.py", "rename the function `accept` to `keep_agreed`"),
    ("blade/api/auth.py", "make the docstring at the top of the file say `Who may come in.` and nothing else"),
    ("blade/engine/uniforms.py", "rename the function `_mix` to `_scramble`"),
    ("blade/text/detokenizer.py", "rename the class to `TextDecoder`"),
    ("blade/chunks.py", "delete the docstrings of the functions"),
    ("blade/checkpoint/extents.py", "rename the first function to `check_extents`"),
)
SUMMARIES = (
    "Quote the three most important sentences of this text, word for word.",
    "Which sentences of this text say what happened or what is done? Copy them exactly.",
)
CHATS = (
    "Why was Venice built on water?",
    "Explain to a child how a bicycle stays upright.",
    "Write a short poem about the first snow of the year.",
    "What are the arguments for and against remote work?",
    "Describe a day in the life of a lighthouse keeper.",
    "How would you plan a garden that needs little water?",
    "Tell a story about two brothers who find a map.",
    "What should I consider before I adopt a dog?",
)


def tasks() -> dict[str, list[str]]:
    """kind -> what the user says."""
    return {"edit": _edits(), "summary": _summaries(), "chat": list(CHATS)}


def _edits() -> list[str]:
    return [
        f"Here is a file. Please {change}, leave everything else exactly as it is, and show the whole new file.\n\n"
        f"```python\n{(ROOT / path).read_text(encoding='utf-8')}```"
        for path, change in EDITS
    ]


def _summaries() -> list[str]:
    """Over paragraphs of quality.txt and of the documentation."""
    prose = re.split(r"\n{2,}", (ROOT / "benchmarks/quality.txt").read_text(encoding="utf-8"))
    docs = re.split(r"\n{2,}", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    long = [text for text in (*prose, *docs) if len(text) > 350][:8]
    return [f"{SUMMARIES[i % len(SUMMARIES)]}\n\n{text}" for i, text in enumerate(long)]
