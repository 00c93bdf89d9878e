"""Make the greedy oracle: what transformers says on the demo weights, in float32, 16 prompts x 64 tokens.

    python tests/oracle/make_greedy.py MODEL.gguf OUT.json

The ids are committed beside this script; making them takes minutes, because transformers dequantises in Python (it
needs the `accelerate` package for that, which blade itself does not).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_TOKENS = 64
FACTS = "The sun is a star. Water boils at one hundred degrees. A week has seven days. Paris is a city in France. "
PROMPTS = [
    "def fibonacci(n):",
    "The capital of France is",
    "import numpy as np\n\n",
    "Once upon a time",
    "Q: What is 12 * 12?\nA:",
    "class Stack:\n    def __init__(self):\n",
    "The three laws of robotics are:\n1.",
    "SELECT name, COUNT(*) FROM users",
    "Translate to French: Good morning, my friend.\n",
    "// Binary search in C\nint search(int *a, int n, int key) {\n",
    "In 1969, astronauts landed on the",
    "<html>\n<head>\n<title>",
    FACTS + "Therefore",
    FACTS * 4 + "In short,",
    FACTS * 10 + "To sum up,",
    FACTS * 16 + "The end:",
]


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    cases = []
    for text in PROMPTS:
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            ids = model.generate(
                prompt, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False,
                repetition_penalty=1.0, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        cases.append({"prompt": prompt[0].tolist(), "output": ids[0, prompt.shape[1] :].tolist()})
        print(len(cases), prompt.shape[1], tokenizer.decode(cases[-1]["output"])[:60].replace("\n", "\\n"), flush=True)
    target.write_text(json.dumps(cases) + "\n")


if __name__ == "__main__":
    main()
