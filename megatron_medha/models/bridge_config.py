"""run_config.yaml of Megatron-Bridge and context/model.yaml of NeMo 2, read as arguments of Megatron-LM.

They state a model in the names of megatron-core's TransformerConfig, all fields with their values. Most are names of
arguments too. Which of the others leave the answers alone is listed here; what else is set is refused as an argument.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.models.known_fields import names_of
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.checkpoint_files import read_bytes, shown
from megatron_medha.safe_files.pickle_machine import PickleError, check_extent

RUN_CONFIG_NAME = "run_config.yaml"
NEMO_CONFIG = Path("context") / "model.yaml"  # of NeMo 2, beside the directory with the tensors
# Where each of them says what the model is.
SECTIONS = {RUN_CONFIG_NAME: "model", NEMO_CONFIG.name: "config"}
_MAX_BYTES, _MAX_VISITS = 1 << 20, 100_000  # it has 30 KB and a thousand values

# Classes of megatron.bridge.models that describe a model by their fields alone.
_MODELS = re.compile(
    r"(Bridge)?GPTModel(Provider|Config)|GPTProvider\d+[MB]|MLAModelProvider|(Code)?Llama\d*ModelProvider\w*|"
    r"MistralModelProvider|Qwen(2|25|3)ModelProvider\w*|Qwen3MoEModelProvider\w*|GPTOSSProvider\w*|"
    r"Nemotron[34]?ModelProvider\w*|DeepSeek(V2|V2Lite|V3)?(Model)?Provider|Moonlight(ModelProvider16B|Provider)"
)
_NEMO_MODELS = re.compile(
    r"nemo\.collections\.llm\.gpt\.model\.(base\.GPTConfig\w*|llama\.(Code)?Llama\d*Config\w*|mistral\.Mistral\w*Config\w*|"
    r"mixtral\.MixtralConfig\w*|qwen2\.Qwen2\w*Config\w*|qwen3\.Qwen3\w*Config\w*|nemotron\.Nemotron\d?Config\w*)"
)
_LAYER_SPECS = re.compile(
    r"(megatron\.(bridge\.models\.gpt_provider|core\.models\.gpt\.gpt_layer_specs)|nemo\.collections\.llm\.gpt\.model\.base)\.\w+"
)
# Fields by the name of the argument that says the same.
_RENAMED = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "seq_length": "max_position_embeddings",
}
# Its activation and whether the MLP is gated, by the arguments that say the same. geglu is an argument of forks.
_ACTIVATIONS: dict[tuple[str, Any], dict[str, bool]] = {
    ("silu", True): {"swiglu": True},
    ("quick_gelu", True): {"quick_geglu": True},
    ("gelu", True): {"geglu": True},
    ("gelu", False): {},
    ("squared_relu", False): {"squared_relu": True},
}
_NEEDED = names_of("megatron_bridge", "needed")
_HARMLESS = names_of("megatron_bridge", "harmless")
# Of Llama 3.1 providers, which scale rotary frequencies themselves; megatron-core's scaling has these values only.
_LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}


class MissingFieldsError(CheckpointError):
    """run_config.yaml does not say all that is needed."""

    def __init__(self, message: str, stated: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.stated = stated


class _BridgeYamlLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Plain values only. Merge keys are refused: a few lines of them make gigabytes."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys do not belong in it")


def read_run_config(path: Path) -> argparse.Namespace:
    """The model's arguments, for config_from_args, which refuses what is set and may change the answers.

    Raises CheckpointError naming what is missing, UnsupportedModelError for what no argument can say.
    """
    fields = dict(_model_section(path))
    if missing := sorted(_NEEDED - fields.keys()):
        section = SECTIONS[path.name]
        raise MissingFieldsError(f"{path}: {section}.{f', {section}.'.join(missing)} missing", fields)
    args = _arguments(fields, path)
    for name, value in fields.items():
        if name not in _HARMLESS:
            setattr(args, _RENAMED.get(name, name), value)
    return args


def _model_section(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.load(read_bytes(path, _MAX_BYTES), _BridgeYamlLoader)
        check_extent(content, _MAX_VISITS)  # aliases may double a list at each line
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, PickleError) as error:
        raise CheckpointError(f"{path}: cannot be read as YAML: {error}") from error
    section = SECTIONS[path.name]
    model = content.get(section) if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: holds no {section!r}, from which the architecture is read")
    if section == "config":
        if not _NEMO_MODELS.fullmatch(str(model.get("_target_"))):
            raise UnsupportedModelError(
                f"{path}: config._target_={shown(model.get('_target_'))} is not supported: GPT, Llama, Mistral, "
                "Mixtral, Qwen 2 and 3 and Nemotron of nemo.collections.llm are"
            )
        # The tokenizer's; the embedding's rows where there is none.
        return {"vocab_size": None, **{str(name): value for name, value in model.items()}}
    if isinstance(inner := model.get("transformer"), dict):
        model = {**model, **inner, "_target_": model.get("_target_")}
        del model["transformer"]
    target = model.get("_target_")
    package, _, name = str(target).rpartition(".")
    if target is not None and not (package.startswith("megatron.") and _MODELS.fullmatch(name)):
        raise UnsupportedModelError(
            f"{path}: model._target_={shown(target)} is not supported: models of GPTModelProvider, "
            "MLAModelProvider and of the Llama, Mistral, Qwen2, Qwen3, Qwen3 MoE, gpt-oss, Nemotron, DeepSeek and "
            "Moonlight providers are"
        )
    return {str(name): value for name, value in model.items()}


def _arguments(fields: dict[str, Any], path: Path) -> argparse.Namespace:
    """Arguments for what is named or valued differently; those fields are taken out."""

    def refuse_unless(is_fine: bool, name: str, value: Any, why: str) -> None:
        if not is_fine:
            raise UnsupportedModelError(f"{path}: {SECTIONS[path.name]}.{name}={shown(value)} is not supported: {why}")

    take = fields.pop
    args = argparse.Namespace(group_query_attention=True)
    activation = take("activation_func")
    if isinstance(activation, dict):
        activation = activation.get("_target_")
    kind = (str(activation).rpartition(".")[2], take("gated_linear_unit"))
    refuse_unless(kind in _ACTIVATIONS, "activation_func", activation,
                  f"with gated_linear_unit={shown(kind[1])} it is none of Megatron-LM's")  # fmt: skip
    args.swiglu = False
    vars(args).update(_ACTIVATIONS.get(kind, {}))
    args.bias_gelu_fusion = args.bias_swiglu_fusion = take("bias_activation_fusion", False)
    spec = take("transformer_layer_spec", None)
    if isinstance(spec, dict):
        spec = spec.get("_target_")
    refuse_unless(spec is None or bool(_LAYER_SPECS.fullmatch(str(spec))), "transformer_layer_spec", spec,
                  "layers of the training script's own are not known here")  # fmt: skip
    refuse_unless(not take("qk_l2_norm", False), "qk_l2_norm", True, "Bridge's layer specs compute without it")
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    is_counted = type(heads) is int and type(hidden) is int and heads > 0
    refuse_unless(is_counted, "num_attention_heads", heads, "it must be a positive whole number, as hidden_size")
    args.num_query_groups = take("num_query_groups", None) or heads
    args.kv_channels = take("kv_channels", None) or hidden // heads
    args.ffn_hidden_size = take("ffn_hidden_size") or 4 * hidden
    args.untie_embeddings_and_output_weights = not take("share_embeddings_and_output_weights")
    args.rotary_percent = take("rotary_percent", 1.0)
    if (factor := take("scale_factor", None)) is not None:
        for name, value in _LLAMA31.items():
            refuse_unless((stated := take(name, None)) == value, name, stated, f"it must be {value} with scale_factor")
        args.use_rope_scaling, args.rope_scaling_factor = True, factor
        take("rope_scaling", None), take("rope_scaling_factor", None)
    return args


def fields_of(config: ModelConfig) -> dict[str, Any]:
    """Bridge's fields for what a model's weights and positions follow from."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.norm_epsilon,
        "rotary_base": config.rope_theta,
        "add_qkv_bias": config.has_qkv_bias,
        "qk_layernorm": config.has_qk_norm,
        "share_embeddings_and_output_weights": config.has_tied_embeddings,
    }
