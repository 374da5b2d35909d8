"""The rotary embedding that a Hugging Face config states, as transformers 5 understands it. The rest is hf_config.py.

Two spellings: rope_parameters (transformers 5), and rope_scaling with rope_theta at the top level (transformers 4).
Where both are there transformers takes rope_scaling, whole: a model card's recipe for long contexts adds it.
"""

from __future__ import annotations

from megatron_medha.core.errors import UnsupportedModelError
from megatron_medha.core.model_spec import RopeScaling
from megatron_medha.models.model_config import MAX_CONTEXT_LEN
from megatron_medha.safe_files.json_fields import JsonFields

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
_DEFAULT_THETA = 10000.0
_PARTIAL = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
# Beyond these, formulas overflow or divide by zero.
_MAX_THETA, _MAX_FACTOR = 1e15, 1e6

# Every field of any rope type: transformers passes over those of the other types. "finetuned" is a note for people.
_KNOWN = frozenset(
    ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast")
    + ("beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "short_factor")
    + ("long_factor", "partial_rotary_factor", "finetuned")
)
# Factors of vLLM that transformers passes over; 1 changes nothing. DeepSeek-R1-0528-Qwen3-8B has attn_factor.
_OF_OTHERS = {
    "attn_factor": "transformers passes over it, vLLM multiplies by it. Delete it for the logits of transformers; for "
    "those of vLLM write attention_factor = attn_factor * (1 + 0.1 * ln(factor)) instead",
    "extrapolation_factor": "transformers passes over it, vLLM does not",
}


def rope_problems(config: JsonFields, *, reads_partial_rotary: bool = False) -> list[str]:
    """Reasons why the rotary embedding cannot be run as transformers would."""
    rope = _stated(config)
    problems = [
        rope.unsupported(key, _OF_OTHERS.get(key, "this field of a rotary embedding is not known here"))
        for key, value in rope.fields.items()
        if value and key not in _KNOWN and not (key in _OF_OTHERS and value == 1.0)
    ]
    if _kind(rope) not in _ROPE_TYPES:
        key = "rope_type" if "rope_type" in rope.fields else "type"
        problems.append(rope.unsupported(key, f"one of {', '.join(_ROPE_TYPES)} is"))
    for fields in (rope, config):
        if fields.fields.get(_PARTIAL) not in (None, 1.0) and not reads_partial_rotary:
            problems.append(fields.unsupported(_PARTIAL, "rotary positions turn whole heads in this family"))
    problems += _lost_theta(config)
    return [str(problem) for problem in problems]


def _lost_theta(config: JsonFields) -> list[UnsupportedModelError]:
    """Against a base in rope_parameters that transformers would pass over, for its default."""
    other = config.within("rope_parameters")
    if not config.fields.get("rope_scaling") or "rope_theta" not in other.fields:
        return []
    if other.number("rope_theta") == rope_theta(config):
        return []
    why = "transformers passes over rope_parameters beside rope_scaling; write rope_theta into rope_scaling"
    return [other.unsupported("rope_theta", why)]


def rope_theta(config: JsonFields) -> float:
    """The base of the frequencies."""
    rope = _stated(config)
    fields = rope if "rope_theta" in rope.fields else config
    theta = fields.number("rope_theta") if "rope_theta" in fields.fields else _DEFAULT_THETA
    if not 1 < theta <= _MAX_THETA:
        raise fields.wrong("rope_theta", f"above 1 and at most {_MAX_THETA:g}")
    return theta


def with_one_rope(config: JsonFields, theta: float, of_local: float) -> JsonFields:
    """A config whose rotary positions come by kind of layer, with those of layers without a window where others have
    them, and the base of layers with one in rope_local_base_freq.

    theta, of_local: the bases where none is given. Raises for what transformers has and is not here.
    """
    stated = config.within("rope_parameters")
    whole, local = stated.within("full_attention"), stated.within("sliding_attention")
    if strange := set(stated.fields) - {"full_attention", "sliding_attention"}:
        raise stated.wrong(min(map(str, strange)), "absent: there are full_attention and sliding_attention")
    if local.fields.get("rope_type", "default") != "default" or set(local.fields) - {"rope_type", "rope_theta"}:
        raise stated.unsupported("sliding_attention", "positions of layers with a window must not be scaled")
    given, given_local = config.fields.get("rope_theta"), config.fields.get("rope_local_base_freq")
    fields = {"rope_theta": theta if given is None else given}
    fields |= {**whole.fields, **config.within("rope_scaling").fields}
    base = local.fields.get("rope_theta", of_local if given_local is None else given_local)
    rest = {key: value for key, value in config.fields.items() if key not in ("rope_scaling", "rope_theta")}
    return JsonFields(config.path, rest | {"rope_parameters": fields, "rope_local_base_freq": base})


def local_theta(config: JsonFields) -> float:
    """The base of layers with a window."""
    theta = config.number("rope_local_base_freq")
    if not 1 < theta <= _MAX_THETA:
        raise config.wrong("rope_local_base_freq", f"above 1 and at most {_MAX_THETA:g}")
    return theta


def rotary_dim(config: JsonFields, head_dim: int) -> int | None:
    """How many of a head's numbers turn; None: all."""
    rope = _stated(config)
    fields = rope if rope.fields.get(_PARTIAL) is not None else config
    factor = fields.number(_PARTIAL, 1.0)
    found = int(head_dim * factor)
    if found < 2 or found % 2 or found > head_dim:
        raise fields.wrong(_PARTIAL, f"a part of head_dim={head_dim} that is even and at least 2")
    return None if found == head_dim else found


def rope_scaling(config: JsonFields) -> RopeScaling:
    """How the frequencies are scaled; rope_problems has found nothing."""
    rope = _stated(config)

    def factor(key: str, default: float | None = None) -> float:
        value = rope.number(key, default)
        if not 1 / _MAX_FACTOR <= value <= _MAX_FACTOR:
            raise rope.wrong(key, f"a number from {1 / _MAX_FACTOR:g} to {_MAX_FACTOR:g}")
        return value

    def optional(key: str) -> float | None:
        return None if rope.fields.get(key) is None else factor(key)

    kind = _kind(rope)
    if kind == "default":
        return RopeScaling()
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind=kind, factor=factor("factor"))
    max_positions = config.integer("max_position_embeddings")
    # At the top level it goes before the one in rope_parameters.
    fields = rope if config.fields.get(_ORIGINAL) is None else config
    original = fields.integer(_ORIGINAL, max_positions)
    if original > MAX_CONTEXT_LEN:
        raise fields.wrong(_ORIGINAL, f"at most {MAX_CONTEXT_LEN}")
    if kind == "llama3":
        low, high = factor("low_freq_factor"), factor("high_freq_factor")
        if low >= high:
            raise rope.wrong("high_freq_factor", f"above low_freq_factor={low}")
        return RopeScaling(
            kind=kind,
            factor=factor("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_context_len=original,
        )
    return RopeScaling(
        kind=kind,
        factor=factor("factor", max_positions / original),
        original_max_context_len=original,
        beta_fast=factor("beta_fast", 32.0),
        beta_slow=factor("beta_slow", 1.0),
        # null is false here, as in transformers
        is_range_rounded="truncate" not in rope.fields or rope.flag("truncate"),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
    )


def _stated(config: JsonFields) -> JsonFields:
    return config.within("rope_scaling" if config.fields.get("rope_scaling") else "rope_parameters")


def _kind(rope: JsonFields) -> str:
    return str(rope.fields.get("rope_type", rope.fields.get("type", "default")))
