"""tools/model_preset.py: what is planned with is what is served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_medha.core.model_shape import ModelShape
from megatron_medha.models.hf_config import read_hf_config

TOOL = Path(__file__).parents[2] / "tools" / "model_preset.py"
SIZES = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 256, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "qwen3_moe", "num_key_value_heads": 2},
        {"model_type": "deepseek_v3", "q_lora_rank": None},
        {"model_type": "gpt2"},
    ],
)
def test_the_option_it_writes_has_the_shape_that_is_served(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | fields))
    written = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True, check=True).stdout
    assert ModelShape(**yaml.safe_load(written)["shape"]) == read_hf_config(tmp_path).shape(2)


def test_a_model_that_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "no_such"}))
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "model_type='no_such'" in done.stderr
