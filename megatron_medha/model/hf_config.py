"""Reading a Hugging Face config.json into a ModelConfig, or saying why its model cannot run. No weights here.

Both spellings are read: rope_theta and rope_scaling at the top level (transformers 4), and
rope_parameters (transformers 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.engine.checkpoint_files import read_json_object
from megatron_medha.model.model_config import ModelConfig, RopeScaling

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = ("float32", "bfloat16", "float16")
_ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn", "dynamic": "dynamic"}


class JsonFields:
    """A JSON object whose fields are read with their type; errors name file and key."""

    def __init__(self, path: Path, fields: Mapping[str, Any], where: str = "") -> None:
        self.path = path
        self.fields = fields
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; the default when absent or null."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; the default when absent or null."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.wrong(key, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """The same; None when absent or null."""
        return None if self.fields.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false; the default when absent or null."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def within(self, key: str) -> JsonFields:
        """The object under that key; empty when absent or null."""
        value = self.fields.get(key) or {}
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return JsonFields(self.path, value, f"{self._where}{key}.")

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """The error to raise when that key holds nothing we can read."""
        return CheckpointError(f"{self.path}: {self._where}{key}={self.fields.get(key)!r} must be {wanted}")

    def unsupported(self, key: str, why: str) -> UnsupportedModelError:
        """The error to raise when that key asks for what we cannot run."""
        stated = f"{self._where}{key}={self.fields.get(key)!r}"
        return UnsupportedModelError(f"{self.path}: {stated} is not supported: {why}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.fields.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {self._where}{key} is missing")
        return value


def read_json(path: Path) -> JsonFields:
    """The object in that file. Raises CheckpointError when it cannot be read or is none."""
    return JsonFields(path, read_json_object(path))


def read_hf_config(directory: Path) -> ModelConfig:
    """The architecture in directory/config.json.

    Raises CheckpointError for fields that are missing or of the wrong type, UnsupportedModelError with the
    reason for a model this package cannot run exactly.
    """
    config = read_json(directory / "config.json")
    model_type = config.fields.get("model_type")
    _refuse_unsupported(config, model_type)
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    hidden_size = config.integer("hidden_size")
    if config.fields.get("head_dim") is None and model_type != "qwen3" and hidden_size % num_heads:
        raise config.wrong("hidden_size", f"a multiple of num_attention_heads={num_heads}, or head_dim be given")
    scaling = _rope_scaling(config)
    max_context_len = config.integer("max_position_embeddings", 2048 if model_type == "llama" else None)
    if scaling.kind == "yarn":
        # Qwen's recipe leaves max_position_embeddings at the length before scaling.
        max_context_len = max(max_context_len, round(scaling.original_max_context_len * scaling.factor))
    return ModelConfig(
        name=directory.resolve().name,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.integer("head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads),
        vocab_size=config.integer("vocab_size"),
        max_context_len=max_context_len,
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        rope_theta=config.within("rope_parameters").number("rope_theta", config.number("rope_theta", 10000.0)),
        rope_scaling=scaling,
        has_qkv_bias=model_type == "qwen2",
        has_qk_norm=model_type == "qwen3",
        has_tied_embeddings=config.flag("tie_word_embeddings"),
        dtype=_dtype(config),
        stop_token_ids=_stop_token_ids(directory, config),
    )


def _refuse_unsupported(config: JsonFields, model_type: Any) -> None:
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise config.unsupported("model_type", f"one of {', '.join(SUPPORTED_MODEL_TYPES)} is")
    architectures = config.fields.get("architectures") or []
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise config.unsupported("architectures", "only language models (...ForCausalLM) generate text")
    if config.fields.get("quantization_config") is not None:
        raise config.unsupported("quantization_config", "weights must be float32, bfloat16 or float16")
    if config.fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.unsupported("hidden_act", "the MLP must be gated SiLU")
    if config.flag("attention_bias"):
        raise config.unsupported("attention_bias", "it puts a bias on the attention's output projection")
    if config.flag("mlp_bias"):
        raise config.unsupported("mlp_bias", "the MLP has no biases here")
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise config.unsupported("partial_rotary_factor", "rotary positions turn whole heads here")
    _refuse_sliding_window(config, model_type)


def _refuse_sliding_window(config: JsonFields, model_type: str) -> None:
    """Refuse a window only when some position of the context would really be cut off by it."""
    window_default = 4096 if model_type == "mistral" else None  # absent means the class's default; null means off
    window = config.fields.get("sliding_window", window_default)
    layer_types = config.fields.get("layer_types")
    if isinstance(layer_types, list) and set(layer_types) - {"full_attention", "sliding_attention"}:
        raise config.unsupported("layer_types", "every layer must have full_attention")
    if layer_types:
        has_windowed_layer = "sliding_attention" in layer_types
    elif model_type == "mistral":
        has_windowed_layer = True
    else:
        first_windowed = config.fields.get("max_window_layers", 28)
        has_windowed_layer = config.flag("use_sliding_window") and first_windowed < config.integer("num_hidden_layers")
    if has_windowed_layer and window is not None and window < config.integer("max_position_embeddings"):
        raise UnsupportedModelError(
            f"{config.path}: sliding_window={window} is not supported: it would cut off part of the context of "
            f"max_position_embeddings={config.fields['max_position_embeddings']}. To serve the model up to its "
            f"window, set max_position_embeddings to {window}"
        )


def _rope_scaling(config: JsonFields) -> RopeScaling:
    key = "rope_parameters" if config.fields.get("rope_parameters") else "rope_scaling"
    rope = config.within(key)
    kind_key = "rope_type" if "rope_type" in rope.fields else "type"
    kind = rope.fields.get(kind_key, "default")
    if kind not in _ROPE_TYPES:
        raise rope.unsupported(kind_key, f"one of {', '.join(_ROPE_TYPES)} is")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.unsupported("partial_rotary_factor", "rotary positions turn whole heads here")
    if kind == "default":
        return RopeScaling()
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind=kind, factor=rope.number("factor"))
    max_positions = config.integer("max_position_embeddings")
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_context_len=rope.integer("original_max_position_embeddings", max_positions),
        )
    if not rope.flag("truncate", True):
        raise rope.unsupported("truncate", "YaRN's correction range is rounded to whole dimensions here")
    original = rope.integer("original_max_position_embeddings", max_positions)
    return RopeScaling(
        kind=kind,
        factor=rope.number("factor", max_positions / original),
        original_max_context_len=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
    )


def _dtype(config: JsonFields) -> str:
    key = "dtype" if config.fields.get("dtype") is not None else "torch_dtype"
    dtype = config.fields.get(key) or "float32"
    if dtype not in _DTYPES:
        raise config.unsupported(key, f"one of {', '.join(_DTYPES)} is")
    return str(dtype)


def _stop_token_ids(directory: Path, config: JsonFields) -> tuple[int, ...]:
    """The end tokens of generation_config.json, then those of config.json, each once."""
    found: list[int] = []
    path = directory / "generation_config.json"
    for fields in ([read_json(path)] if path.is_file() else []) + [config]:
        value = fields.fields.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise fields.wrong("eos_token_id", "a token id or a list of them")
        found += ids
    return tuple(dict.fromkeys(found))
