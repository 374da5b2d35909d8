"""Writes the sizes of a Hugging Face model as an option of model=, to simulate and plan with.

    python tools/model_preset.py DIR > my_conf/model/NAME.yaml
    medha plan --config-dir my_conf model=NAME hardware=h100_x16 workload.qps=1

Only DIR/config.json is read, as `medha serve` reads it: the weights need not be there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_medha.cli.parts.model_words import set_fields, shape_in
from megatron_medha.core.errors import MedhaError


def preset(directory: Path) -> str:
    """The YAML of the model in directory/config.json. Raises what reading it raises."""
    shape = shape_in(directory)
    lines = [f"# {shape.name}, from its config.json.", "defaults:", "  - auto", "", "shape:"]
    for name, value in set_fields(shape).items():
        lines.append(f"  {name}: {str(value).lower() if isinstance(value, bool) else value}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(preset(Path(sys.argv[1])), end="")
    except MedhaError as error:
        sys.exit(str(error))
