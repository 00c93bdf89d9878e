# What a contributor runs. `just` alone lists it.

_default:
    @just --list

# Lint, types and tests: what has to pass before a change lands
check: lint types test

# Style and likely mistakes
lint:
    ruff check .
    ruff format --check .

# Static types, strict
types:
    mypy

# Tests (arguments go to pytest)
test *args:
    pytest {{ args }}

# Rewrite files in the project's style
format:
    ruff format .
    ruff check --fix .

# Regenerate the pages of docs/ that are made from the code
docs:
    python docs/generate_hooks.py
    python docs/generate_bladellm.py

# Load a running or freshly started server: `just bench --serve "--plugin qwen"`
bench *args:
    python benchmarks/load.py {{ args }}
