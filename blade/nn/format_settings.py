"""`quantization_config` of config.json: what a format's reader knows of it, may ignore, and has to refuse."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from blade.errors import CheckpointError
from blade.nn.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

log = logging.getLogger("blade.formats")
PROVENANCE = {  # how a checkpoint was made and what it is to be run by elsewhere: nothing that changes what is in it
    "act_group_aware", "amp", "autoround_version", "backend", "batch_size", "block_name_to_quantize",
    "cache_block_outputs", "damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "do_fuse",
    "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "exllama_config", "fuse_max_seq_len",
    "gradient_accumulate_steps", "hyb_act", "iters", "low_gpu_mem_usage", "lr", "max_input_length", "meta", "minmax_lr",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "modules_to_fuse", "modules_to_not_convert", "mse", "nsamples", "pad_token_id",
    "producer", "provider", "quant_block_list", "quantizer", "scale_dtype", "seqlen", "static_attention_granularity",
    "static_groups", "static_kv_granularity", "super_bits", "super_group_size", "supported_types",
    "to_quant_block_names", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "version",
}  # fmt: skip
REMEDY = "Use a checkpoint without it, or the model's unquantised form."


def read_settings(
    settings: Mapping[str, Any], known: Collection[str], fixed: Mapping[str, Collection[Any]], path: str = ""
) -> Keys:
    """Raises CheckpointError for a key of `fixed` that has none of the values given there (null and absent are always
    among them): it would change what the weights mean. A key that is in neither is named in the log."""
    path = path or "quantization_config."
    for key, values in fixed.items():
        found = settings.get(key)
        if found is not None and found not in values:
            raise unserved(f"{path}{key}", found)
    for key in sorted(map(str, settings.keys() - {"quant_method", *known, *fixed, *PROVENANCE})):
        log.warning("config.json: %s%s is not known to blade, which goes on without it", path, key)
    return Keys(settings, path)


def unserved(key: str, value: object) -> CheckpointError:
    """Of a setting whose meaning is known and not served."""
    return CheckpointError(f"config.json: {key} is {value!r:.60}, which blade does not serve.", REMEDY)


def group_of(keys: Keys, key: str = "group_size") -> int | None:
    """Numbers that share a scale; None for whole rows, which are written -1."""
    group = keys.integer(key, 128, minimum=-1)
    if group == 0:
        keys.refuse(key, "a positive integer, or -1 for whole rows")
    return None if group == -1 else group
