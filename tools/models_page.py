"""Prints docs/models.md: which models are served, exact against what, by which layers, and what is refused and why.

    python tools/models_page.py > docs/models.md

Rows are those of the tests that compare logits (tests/model/test_megatron_exactness.py), of models/families and of the
table of arguments (models/known_fields.toml): change those, not the page. A test compares it with what this prints.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_medha.models.families.family_table import FAMILIES
from megatron_medha.models.known_fields import KNOWN_FIELDS
from megatron_medha.models.megatron_args import config_from_args
from tests.model.megatron_models import VOCAB_SIZE, recorded_args
from tests.model.test_megatron_exactness import MODELS

_HEAD = """\
# Models

Made by `python tools/models_page.py` from the tests that compare logits and from the tables of arguments; a test holds
them together. What a checkpoint may look like is in [serving.md](serving.md).

A model is Megatron's: its layers, norms, routers and experts compute as in training. Positions, KV and attention are
this project's. Models whose layers are Llama's (RMSNorm, rotary positions, gated SiLU, no biases but those of q, k and
v) have layers written for inference. On one CPU rank in bf16 a step of these, and of all others that have no sinks, no
attention output gate, no latent attention and no norms of outputs or of all heads, is one call of the native library,
experts and routers included; with windows it is one call for every run of layers that have one, or have none. What is
left takes Megatron's own layers: about 0.3 ms a layer and step more, which a small model's lone decode notices and a
prefill does not. Megatron's own layers have not run on a GPU here yet.

## Models of Megatron

Each row is a random model that megatron-core 0.16.1 builds and saves, from the arguments that Megatron-LM's parser
leaves. Its logits over chunks, decodes and shared batches differ from Megatron's own forward by less than 1e-4 of the
largest in fp32 (seen: at most 8e-6). Windows and latent attention are compared with Megatron's modules around a plain
softmax in fp64, as Megatron's own attention does not compute them on a CPU. In bf16, in one native call or not, the
mean error of a model without experts is that of Megatron's own bf16 forward or less. Of these models twelve are
compared at tp=2 spp=2, at kvp=2 and at tp=2 kvp=2 too (`tests/parallel/test_megatron_models.py`). Of 420 random
combinations of all of it none was wrong (`MEDHA_RANDOM_MODELS=300`,
`tests/model/test_random_megatron_models.py`).

| model | arguments beside Llama's, without sizes | traits | layers |
| --- | --- | --- | --- |
"""

_FAMILIES_HEAD = """
## Families of Hugging Face

Each against transformers, in fp32, by the same bound (`tests/models/test_hf_families.py`,
`tests/models/test_hf_configs.py`). `medha models` prints them with their traits. Norms of the outputs of attention and
MLP (Gemma 2 and 3, OLMo 2 and 3, GLM-4), norms of queries and keys over all heads, capped scores and logits, a rotary
base of its own in layers with a window, and groups of experts by their best one (DeepSeek-V2) are not megatron-core's
and are added to its layers; these are compared at tp=2 spp=2 and at kvp=2 too
(`tests/parallel/test_checkpoints_at_layouts.py`):

"""

_REFUSED_HEAD = """
## Refused arguments of Megatron

An argument that is set and that nobody has classified is refused by its name. These are known, and are refused because
they change what the model computes:

| argument | why |
| --- | --- |
"""

_REST = """
Also refused: `position_embedding_type` other than rope, yarn, learned_absolute and none; a window that sees tokens to
come; clamped or offset gates with `bias_swiglu_fusion`, whose kernel computes without them; a router that Sinkhorn
balances. Layers with a window need `model.attention_backend=native`, `aten` or `triton`; capped scores (Gemma 2) need
`aten`, which is taken by itself on a CPU, or `triton`, on a GPU ([none has run there yet](gpu.md)).
"""
_SIZES = (
    "_rank", "_dim", "_size", "_base", "_groups", "kv_channels", "_positions", "mscale", "_topk", "_beta",
    "embeddings", "group_query",
)  # fmt: skip
_NOT_SIZES = ("window_size", "moe_shared_expert_intermediate_size", "moe_router_num_groups")


def models_page() -> str:
    """The whole page."""
    families = ", ".join(f"`{name}`" for name in sorted(FAMILIES))
    listed = textwrap.fill(f"{families}.", 120)
    return "".join([_HEAD, *_rows(), _FAMILIES_HEAD, listed, "\n", _REFUSED_HEAD, *_refused(), _REST])


def _rows() -> Iterator[str]:
    for name, options in MODELS.items():
        config = config_from_args(
            recorded_args("0.16.0", **options), Path("args"), name=name, dtype="float32", num_embedding_rows=VOCAB_SIZE,
            num_tokenizer_ids=None, stop_token_ids=(),
        )  # fmt: skip
        layers = "Llama's" if config.is_llama_like else "Megatron's"
        yield f"| {name} | {_options(options)} | {', '.join(config.traits)} | {layers} |\n"


def _options(options: dict[str, Any]) -> str:
    """As on a command line; how large a part is does not matter."""
    shown = [
        f"`{key}`" if value is True else f"`{key}={value}`".replace(" ", "")
        for key, value in options.items()
        if value is not None and (key in _NOT_SIZES or not any(part in key for part in _SIZES))
    ]
    return " ".join(shown)


def _refused() -> Iterator[str]:
    known = KNOWN_FIELDS["megatron_lm"]
    for reasons in (known["unset"], known["unset_with_experts"]):
        for reason, names in reasons.items():
            yield f"| {' '.join(f'`{name}`' for name in names.split())} | {reason} |\n"


if __name__ == "__main__":
    print(models_page(), end="")
