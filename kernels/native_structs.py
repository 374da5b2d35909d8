"""The structures that the C++ library takes, read from its own sources: their fields are written there only."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

from megatron_medha.kernels.native_build import SOURCES

_TYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float, "RunParallel": ctypes.c_void_p}


@functools.cache
def native_struct(name: str) -> Any:
    """The ctypes.Structure for `struct NAME` of the C++ sources; pointers are c_void_p."""
    for path in sorted(SOURCES.iterdir()):
        found = re.search(rf"^struct {name} \{{\n(.*?)^\}};", path.read_text(), re.M | re.S)
        if found is not None:
            break
    else:
        raise AssertionError(f"no C++ source has a struct {name}")
    fields = []
    for declaration in re.sub(r"//[^\n]*", "", found[1]).split(";")[:-1]:
        kind, declared = re.fullmatch(r"\s*(?:const )?(?:struct )?(\w+)\s+(.*)", declaration, re.S).groups()
        plain = ctypes.c_void_p if "*" in declared else _TYPES.get(kind) or native_struct(kind)
        for field in declared.split(","):
            assert ("*" in field) == ("*" in declared), f"{name}: pointers and others in one declaration"
            fields.append((re.findall(r"\w+", field)[-1], plain))
    return type(name, (ctypes.Structure,), {"_fields_": fields})
