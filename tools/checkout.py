"""Makes a working copy importable where it has not been installed: kernels/ stands beside the package, not in it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Put this tree's packages on the import path; does nothing where megatron_medha is installed."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    for name in ("kernels", "conf"):
        full_name = f"megatron_medha.{name}"
        try:
            is_there = importlib.util.find_spec(full_name) is not None
        except ModuleNotFoundError:
            is_there = False
        if is_there:
            continue
        spec = importlib.util.spec_from_file_location(
            full_name, ROOT / name / "__init__.py", submodule_search_locations=[str(ROOT / name)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
