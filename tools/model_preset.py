"""Writes the sizes of a Hugging Face model as an option of model=, to simulate and plan with.

    python tools/model_preset.py DIR > my_conf/model/NAME.yaml
    medha plan --config-dir my_conf model=NAME hardware=h100_x16 workload.qps=1

Only DIR/config.json is read, as `medha serve` reads it: the weights need not be there.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from megatron_medha.core.errors import MedhaError
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.models.hf_config import read_hf_config

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def preset(directory: Path) -> str:
    """The YAML of the model in directory/config.json. Raises what reading it raises."""
    config = read_hf_config(directory)
    shape = config.shape(_DTYPE_BYTES[config.dtype])
    lines = [f"# {config.name} in {config.dtype}, from its config.json.", "defaults:", "  - auto", "", "shape:"]
    for field in fields(ModelShape):
        if (value := getattr(shape, field.name)) != field.default:
            lines.append(f"  {field.name}: {str(value).lower() if isinstance(value, bool) else value}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(preset(Path(sys.argv[1])), end="")
    except MedhaError as error:
        sys.exit(str(error))
