# What a contributor runs. `just` alone lists it.

fault_suites := "tests/native_cuda/test_faults.py:MATMUL tests/native_cuda/test_attention_faults.py:DECODE tests/native_cuda/test_attention_faults.py:PREFILL tests/native_cuda/test_attention_faults.py:TREES tests/native_cuda/test_attention_faults.py:STORE tests/native_cuda/test_attention_dual_chunk_faults.py:DECODE tests/native_cuda/test_attention_dual_chunk_faults.py:PREFILL tests/native_cuda/test_attention_dual_chunk_faults.py:STORE tests/native_cuda/test_attention_mode_faults.py:PAGES tests/native_cuda/test_attention_mode_faults.py:CODES tests/native_cuda/test_attention_mode_faults.py:OUTPUTS tests/native_cuda/test_faults_ops.py:ROWS tests/native_cuda/test_faults_ops.py:LINEAR tests/native_cuda/test_faults_ops.py:SELECT tests/native_cuda/test_faults_ops.py:DELTA"
sanitized := "-m pytest tests/native_cuda -k 'not fault and not nvrtc' -p no:cacheprovider --capture=sys -o timeout=3600"

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

# Tests, on a few cores at a time (arguments go to pytest)
test *args:
    pytest -n auto --maxprocesses 4 --dist worksteal {{ args }}

# Rewrite files in the project's style
format:
    ruff format .
    ruff check --fix .

# Regenerate the pages of docs/ that are made from the code
docs:
    python docs/generate_hooks.py
    python docs/generate_bladellm.py

# The AVX-512 kernels on a machine without AVX-512, through SIMDe (many minutes; Debian: libsimde-dev)
avx512-check:
    python -m blade_native.simd.emulated avx512bf16 avx512vnni avx512
    BLADE_CPU_EMULATE=1 pytest tests/native_cpu -k avx512 -o timeout=3600

# The AMX kernels on a machine without AMX, whose instructions plain C++ stands in for (minutes; without AVX-512 as above)
amx-check:
    python -m blade_native.simd.emulated amx
    BLADE_CPU_EMULATE=1 pytest tests/native_cpu -k amx -o timeout=3600

# The CUDA kernels without a device: limits on all architectures, sanitizers, injected faults (many minutes)
cuda-check:
    python -m blade_native.emulator.nvrtc --sass
    python -m blade_native.emulator.sanitizer address {{ sanitized }}
    python -m blade_native.emulator.sanitizer undefined {{ sanitized }}
    python -m blade_native.emulator.sanitizer thread {{ sanitized }}
    python -m blade_native.emulator.faults {{ fault_suites }}

# The CUDA kernels on a device: tests, then GB/s beside what the memory allows
gpu *args:
    pytest tests/native tests/test_kits_builtin.py tests/models/test_decoders.py -k cuda
    BLADE_CUDA_TESTS=device pytest tests/native_cuda
    python benchmarks/gpu_kernels.py {{ args }}

# Broken checkpoints of every weight format, thousands of each: none may do worse than be refused in a sentence
fuzz num="2000" *cases:
    PYTHONPATH=tests python tests/formats/mutations.py {{ num }} {{ cases }}

# Broken GGUF files, likewise
fuzz-gguf num="2000" *cases:
    PYTHONPATH=tests python tests/models/gguf_mutations.py {{ num }} {{ cases }}

# The same of the files beside the weights (config.json, tokenizer, index, ...) and of adapters
fuzz-files num="2000" *cases:
    PYTHONPATH=tests python tests/formats/file_mutations.py {{ num }} {{ cases }}

# GGUF files, and JSON files beside the weights, with each key at odd values (all of them; num: every so manieth)
fuzz-values num="1":
    PYTHONPATH=tests python tests/models/gguf_values.py {{ num }}
    PYTHONPATH=tests python tests/formats/file_values.py {{ num }}

# Load a running or freshly started server: `just bench --serve "--plugin qwen"`
bench *args:
    python benchmarks/load.py {{ args }}
