"""Makes the GGUF files in fixtures/ with llama.cpp's own converter, and notes what transformers computes.

    git clone https://github.com/ggml-org/llama.cpp
    python tests/models/make_gguf_fixtures.py llama.cpp

Beside NAME.gguf lies NAME.safetensors: a prompt, the logits after each of its tokens, and the heads that predict
further tokens, under Hugging Face's names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
PROMPT = [3, 1, 4, 15, 9, 26, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]
VOCAB = 40
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
}
DELTA = {
    "rms_norm_eps": 1e-3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
HEAD = {  # of the layer that predicts further tokens: the shapes of what no model of transformers has
    "fc": (32, 64), "pre_fc_norm_embedding": (32,), "pre_fc_norm_hidden": (32,), "norm": (32,),
    "layers.0.input_layernorm": (32,), "layers.0.post_attention_layernorm": (32,),
    "layers.0.self_attn.q_proj": (64, 32), "layers.0.self_attn.k_proj": (16, 32), "layers.0.self_attn.v_proj": (16, 32),
    "layers.0.self_attn.o_proj": (32, 32), "layers.0.self_attn.q_norm": (16,), "layers.0.self_attn.k_norm": (16,),
    "layers.0.mlp.gate_proj": (48, 32), "layers.0.mlp.up_proj": (48, 32), "layers.0.mlp.down_proj": (32, 48),
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen35": ("Qwen3_5", DELTA | {"mtp_num_hidden_layers": 1, "tie_word_embeddings": True}),
    "qwen35moe": ("Qwen3_5Moe", MIXTURE | DELTA),
    "qwen3next": ("Qwen3Next", MIXTURE | DELTA),
    "llama4": ("Llama4", {"num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2}),
}


def make_model(family: str, settings: dict[str, Any]) -> Any:
    text = "" if family == "Qwen3Next" else "Text"
    config = getattr(transformers, f"{family}{text}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        architectures=[f"{family}ForCausalLM"],
        **settings,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        offset = -2.0 if name.endswith("A_log") else float(family == "Llama4" or "linear_attn" in name)
        parameter.data.normal_(mean=offset if parameter.dim() == 1 else 0.0, std=0.15)
        parameter.data = parameter.data.bfloat16().float()  # matrices are written so
    return model


def main(llama_cpp: Path) -> None:
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    for name, (family, settings) in MODELS.items():
        model = make_model(family, settings)
        with torch.inference_mode():
            kept = {"prompt": torch.tensor(PROMPT), "logits": model(torch.tensor([PROMPT])).logits[0].contiguous()}
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model.save_pretrained(folder)
            if settings.get("mtp_num_hidden_layers"):
                kept |= add_head(folder)
            convert(folder, FIXTURES / f"{name}.gguf")
        save_file(kept, FIXTURES / f"{name}.safetensors")


def add_head(folder: Path) -> dict[str, torch.Tensor]:
    head = {f"mtp.{module}.weight": torch.randn(shape).mul(0.15).bfloat16() for module, shape in HEAD.items()}
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: tensor.float() for name, tensor in head.items()}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 1}))
    return head


def convert(folder: Path, path: Path) -> None:
    import gguf
    from conversion import get_model_class

    hparams = json.loads((folder / "config.json").read_text())
    kind = get_model_class(hparams["architectures"][0])
    kind.no_mtp = not hparams.get("mtp_num_hidden_layers")
    kind.set_vocab = write_tokens
    path.unlink(missing_ok=True)
    kind(folder, gguf.LlamaFileType.MOSTLY_BF16, path, hparams=hparams).write()


def write_tokens(model: Any) -> None:
    """A tokenizer of letters: texts are none of these files' matter."""
    model.gguf_writer.add_tokenizer_model("gpt2")
    model.gguf_writer.add_token_list([chr(ord("0") + i) for i in range(VOCAB)])
    model.gguf_writer.add_token_types([1] * VOCAB)  # normal ones


if __name__ == "__main__":
    main(Path(sys.argv[1]))
