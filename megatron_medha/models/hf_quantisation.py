"""How the weights of a Hugging Face checkpoint are quantised, by quantization_config of its config.json. No weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_medha.core.errors import UnsupportedModelError
from megatron_medha.safe_files.json_fields import JsonFields

_METHODS = ("fp8", "mxfp4", "compressed-tensors")
_STRATEGIES = ("tensor", "channel", "block")
# What is not quantised shows in the files: it has no scales. Activations are computed in the model's dtype.
_KNOWN = frozenset(
    ("quant_method", "fmt", "weight_block_size", "activation_scheme", "modules_to_not_convert", "ignored_layers")
    + ("scale_fmt", "dequantize", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status")
    + ("global_compression_ratio", "sparsity_config", "transform_config", "version", "is_dynamic", "target_modules")
)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Weights that are dequantised when they are loaded."""

    has_fp4_blocks: bool     # MXFP4: 32 numbers of 4 bits with a power of two; else 8-bit floats
    scale_name: str = ""     # what a scale's name adds to its weight's
    block: tuple[int, int] | None = None  # of outputs and inputs that share a scale; None: each output's, or all


def read_quantisation(config: JsonFields) -> Quantisation | None:
    """None where there is no quantization_config. Raises UnsupportedModelError for one that cannot be undone here."""
    if config.fields.get("quantization_config") is None:
        return None
    fields = config.within("quantization_config")
    method = fields.fields.get("quant_method")
    if method not in _METHODS:
        why = f"weights must be float32, bfloat16 or float16, or quant_method one of {', '.join(_METHODS)}"
        raise config.unsupported("quantization_config", why)
    for key, value in fields.fields.items():
        if value and key not in _KNOWN:
            raise fields.unsupported(key, "this field is not known here, and may change what the weights are")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if fields.fields.get(key):
            raise fields.unsupported(key, "only weights that are quantised one by one are read")
    if method == "mxfp4":
        return Quantisation(has_fp4_blocks=True)
    if method == "fp8":
        if fields.fields.get("fmt", "e4m3") != "e4m3":
            raise fields.unsupported("fmt", "weights must be e4m3")
        return Quantisation(False, "_scale_inv", _block(fields, "weight_block_size"))
    return _compressed(fields)


def quantisation_problems(config: JsonFields) -> list[UnsupportedModelError]:
    """Why the weights cannot be read, if they cannot."""
    try:
        read_quantisation(config)
    except UnsupportedModelError as error:
        return [error]
    return []


def _compressed(fields: JsonFields) -> Quantisation:
    """compressed-tensors: groups of modules, all of one kind."""
    if fields.fields.get("format") != "float-quantized":
        raise fields.unsupported("format", "float-quantized is")
    groups = fields.within("config_groups")
    found = set()
    for name in groups.fields:
        weights = groups.within(name).within("weights")
        if weights.fields.get("type") != "float" or weights.fields.get("num_bits") != 8:
            raise weights.unsupported("num_bits", "weights must be floats of 8 bits")
        if weights.fields.get("strategy") not in _STRATEGIES:
            raise weights.unsupported("strategy", f"one of {', '.join(_STRATEGIES)} is")
        is_block = weights.fields["strategy"] == "block"
        found.add(_block(weights, "block_structure") if is_block else None)
    if len(found) != 1:
        raise fields.unsupported("config_groups", "there must be one kind of scales")
    return Quantisation(False, "_scale", found.pop())


def _block(fields: JsonFields, key: str) -> tuple[int, int] | None:
    sizes: Any = fields.fields.get(key)
    if sizes is None:
        return None
    is_pair = isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    if not is_pair:
        raise fields.unsupported(key, "it must be two numbers: of outputs and of inputs")
    return sizes[0], sizes[1]
