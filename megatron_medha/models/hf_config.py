"""Reading a Hugging Face config.json into a ModelConfig, or saying why its model cannot run. No weights here.

A field means what it means to transformers 5, absent ones included: the logits are those of transformers, or the
checkpoint is refused. The rotary embedding is read in hf_rope.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import UnsupportedModelError
from megatron_medha.models.families.family import ACTIVATIONS, Family, Rule, TensorRow
from megatron_medha.models.families.family_table import FAMILIES, NOT_SERVED
from megatron_medha.models.hf_quantisation import Quantisation, quantisation_problems, read_quantisation
from megatron_medha.models.hf_rope import rope_problems, rope_scaling, rope_theta, rotary_dim
from megatron_medha.models.known_fields import KNOWN_FIELDS, names_of
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.models.tokenizer_facts import end_ids, generation_end_ids, tokenizer_facts
from megatron_medha.safe_files.checkpoint_files import listed
from megatron_medha.safe_files.json_fields import JsonFields, read_json

_KNOWN = KNOWN_FIELDS["hugging_face"]
_NAMED = names_of("hugging_face", "read") | names_of("hugging_face", "harmless")
_HARMLESS_PREFIXES = tuple(names_of("hugging_face", "harmless_prefixes"))
_HARMLESS_SUFFIXES = tuple(names_of("hugging_face", "harmless_suffixes"))
_MAX_LAYERS = 1 << 20  # lists of layers are made before what the weights say is looked at
_DTYPES = ("float32", "bfloat16", "float16")
_GENERATING = ("ForCausalLM", "LMHeadModel")  # the second of GPT-2
_RULES = {
    "hidden_act": Rule(("silu", "swish"), "the MLP must be gated SiLU"),
    "is_causal": Rule((True,), "every token must see only those before it"),  # transformers takes null for false
}
_UNKNOWN = (
    "this field is not known here, and may change what the model computes. If the model computes the same without it, "
    "delete it"
)


def read_hf_config(directory: Path) -> ModelConfig:
    """The architecture in directory/config.json.

    Raises CheckpointError for fields that are missing or of the wrong type, UnsupportedModelError with all the
    reasons for a model this package cannot run exactly.
    """
    family, config = _family_and_config(directory)
    return config_of_family(family, config, directory.resolve().name, lambda: _stop_token_ids(directory, config))


def config_of_family(
    family: Family, config: JsonFields, name: str, stop_token_ids: Callable[[], tuple[int, ...]]
) -> ModelConfig:
    """The architecture that those fields describe, of whatever file; raises as read_hf_config.

    stop_token_ids: called last, when the rest is found right.
    """
    if config.integer("num_hidden_layers") > _MAX_LAYERS:
        raise config.wrong("num_hidden_layers", f"at most {_MAX_LAYERS}")
    _refuse_unsupported(config, family)
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    hidden_size = config.integer("hidden_size")
    if config.fields.get("head_dim") is None and hidden_size % num_heads:
        raise config.wrong("hidden_size", f"a multiple of num_attention_heads={num_heads}, or head_dim be given")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2 or head_dim < 4:
        raise config.wrong("head_dim", f"even and at least 4, for rotary positions; it is {head_dim}")
    traits = dict(family.traits(config))
    family.tensors(config)  # the errors of what it reads
    fields: dict[str, Any] = {
        "name": name,
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": traits.get("ffn_hidden_size") or config.integer("intermediate_size"),
        "activation": ACTIVATIONS[config.fields.get("hidden_act", "silu")],
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": config.integer("vocab_size"),
        "max_context_len": _max_context_len(config),
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "rope_theta": rope_theta(config),
        "rope_scaling": rope_scaling(config),
        "rotary_dim": rotary_dim(config, head_dim) if family.reads_partial_rotary else None,
        **_window(config, family),
        "has_tied_embeddings": config.flag("tie_word_embeddings"),
        "dtype": _dtype(config),
        "stop_token_ids": stop_token_ids(),
    }
    experts = traits.get("experts")
    if experts is not None and experts.num_per_token > experts.num_experts:
        raise config.wrong("num_experts_per_tok", f"at most the number of experts, {experts.num_experts}")
    return ModelConfig(**(fields | traits))


def hf_tensor_rows(directory: Path) -> Sequence[TensorRow]:
    """The tensors that a checkpoint of this family holds. Raises what read_hf_config raises."""
    family, config = _family_and_config(directory)
    return family.tensors(config)


def hf_unread_keys(directory: Path) -> str:
    """A pattern of the names of tensors that a checkpoint of this family may hold and the model does not need."""
    family, config = _family_and_config(directory)
    return family.unread_keys(config)


def hf_quantisation(directory: Path) -> Quantisation | None:
    """How the weights are quantised; None: they are not. Raises what read_hf_config raises."""
    return read_quantisation(_family_and_config(directory)[1])


def _family_and_config(directory: Path) -> tuple[Family, JsonFields]:
    """The family in directory/config.json, and its fields with what transformers takes for absent ones."""
    config = read_json(directory / "config.json")
    model_type = config.fields.get("model_type")
    if isinstance(model_type, str) and model_type in NOT_SERVED:
        raise config.unsupported("model_type", f"it has {NOT_SERVED[model_type]}. medha models lists what is served")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise config.unsupported("model_type", f"one of {', '.join(FAMILIES)} is")
    family = FAMILIES[model_type]
    fields = {family.renamed.get(key, key): value for key, value in config.fields.items()}
    return family, family.spelled(JsonFields(config.path, {**family.defaults, **fields}))


def _max_context_len(config: JsonFields) -> int:
    length = config.integer("max_position_embeddings")
    scaling = rope_scaling(config)
    if scaling.kind == "yarn":
        # Qwen's recipe leaves max_position_embeddings at the length before scaling.
        return max(length, round(scaling.original_max_context_len * scaling.factor))
    return length


def _refuse_unsupported(config: JsonFields, family: Family) -> None:
    """Raise one UnsupportedModelError with every reason."""
    problems = [str(problem) for problem in _unsupported_fields(config, family)]
    problems += rope_problems(config, reads_partial_rotary=family.reads_partial_rotary)
    if problems := problems or _layer_type_problems(config):
        raise UnsupportedModelError(listed(problems))


def _unsupported_fields(config: JsonFields, family: Family) -> list[UnsupportedModelError]:
    read = frozenset(family.reads.split())
    problems = [
        config.unsupported(key, _UNKNOWN)
        for key, value in config.fields.items()
        if value and key not in read and not _is_known(key, value)
    ]
    architectures = config.fields.get("architectures") or []
    if not isinstance(architectures, list):
        problems.append(config.unsupported("architectures", "it must be a list of names"))
    elif architectures and not any(str(name).endswith(_GENERATING) for name in architectures):
        problems.append(config.unsupported("architectures", "only language models (...ForCausalLM) generate text"))
    problems += quantisation_problems(config)
    problems += [
        config.unsupported(key, rule.reason)
        for key, rule in (_RULES | dict(family.rules)).items()
        if key in config.fields and not _is_among(config.fields[key], rule.values)
    ]
    return problems


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of them; 1 is not true."""
    return any(type(value) is type(each) and value == each for each in values)


def _is_known(name: str, value: Any) -> bool:
    """Whether this field is read, or leaves the logits alone."""
    is_named = name in _NAMED or name.startswith(_HARMLESS_PREFIXES) or name.endswith(_HARMLESS_SUFFIXES)
    is_token = name.endswith("_token") and isinstance(value, str)  # use_cls_token is a switch
    return is_named or is_token or value in _KNOWN["harmless_values"].get(name, ())


def _layer_type_problems(config: JsonFields) -> list[str]:
    """Reasons against layer_types: there must be one for each layer, with attention or windowed attention."""
    num_layers = config.integer("num_hidden_layers")
    layer_types = config.fields.get("layer_types") or []
    if not isinstance(layer_types, list) or not all(isinstance(layer_type, str) for layer_type in layer_types):
        raise config.wrong("layer_types", "a list of names")
    if layer_types and len(layer_types) != num_layers:
        raise config.wrong("layer_types", f"one name for each of num_hidden_layers={num_layers}")
    if set(layer_types) - {"full_attention", "sliding_attention"}:
        return [str(config.unsupported("layer_types", "every layer must have full_attention or sliding_attention"))]
    return []


def _window(config: JsonFields, family: Family) -> dict[str, Any]:
    """Fields of ModelSpec for a window, where some position of the context is really cut off by it."""
    layers, window = family.windowed_layers(config), config.fields.get("sliding_window")
    if window is None or not any(layers) or (isinstance(window, int) and window >= _max_context_len(config)):
        return {}
    if not family.has_windows:
        raise config.unsupported("sliding_window", "transformers passes over it here; delete it for its logits")
    window = config.integer("sliding_window")
    return {"window": window, "window_layers": () if all(layers) else layers}


def _dtype(config: JsonFields) -> str:
    key = "dtype" if config.fields.get("dtype") is not None else "torch_dtype"
    is_quantised = config.fields.get("quantization_config") is not None
    dtype = config.fields.get(key) or ("bfloat16" if is_quantised else "float32")
    if dtype not in _DTYPES:
        raise config.unsupported(key, f"one of {', '.join(_DTYPES)} is")
    return str(dtype)


def _stop_token_ids(directory: Path, config: JsonFields) -> tuple[int, ...]:
    """The end tokens of generation_config.json, of config.json and the tokenizer's own, each once."""
    found = (*generation_end_ids(directory), *end_ids(config), *tokenizer_facts(directory)[1])
    num_ids = config.integer("vocab_size")
    return tuple(token_id for token_id in dict.fromkeys(found) if token_id < num_ids)
