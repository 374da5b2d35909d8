"""The house stands: imports go down only, and what must stay light does."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_medha"

# What each floor may import of ours (besides itself), and which foreign packages it may never import.
BELOW = {
    "core": set(),
    "kernels": set(),
    "engine": {"core"},
    "sim": {"core", "engine"},
    "cluster": {"core", "engine"},
    "parallel": {"core", "engine"},
    "model": {"core", "engine", "kernels", "parallel"},
    "worker": {"core", "engine", "kernels", "parallel", "model", "cluster"},
    "server": {"core", "engine"},
    "bench": {"core", "engine"},
    "config": {"core", "engine", "sim", "cluster", "parallel", "model", "worker", "server", "bench", "kernels", "conf"},
    "main": {
        "core", "engine", "sim", "cluster", "parallel", "model", "worker", "server", "bench", "kernels", "conf",
        "config",
    },
}
ONLY_FOREIGN = {"core": set(), "kernels": {"torch", "triton", "numpy", "flash_attn"}}
HEAVY = {"torch", "numpy", "transformers", "megatron", "deepspeed", "triton", "safetensors"}
FRONT = {"core", "engine", "cluster", "server", "sim", "bench"}  # never import anything heavy, at module level or later
ROOF_LAZY = {"config", "main"}                          # may, but inside functions only
FORBIDDEN_SUFFIXES = ("Manager", "Handler", "Helper", "Helpers", "Utils", "Util")


def files() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def floor_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "kernels"
    name = parts[1] if len(parts) > 1 else "main"
    # The roof: what stands directly in the package, and the folders of its commands and options.
    return name if name in BELOW else ("config" if name in {"config", "options"} else "main")


def is_typing_only(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Absolute dotted names imported, their lines, and whether that happens when the module is loaded."""

    def walk(node: ast.AST, at_load: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"line {child.lineno}: relative import"
                assert child.module is not None
                if child.module == PACKAGE:  # from megatron_medha import x
                    yield from ((f"{PACKAGE}.{alias.name}", child.lineno, at_load) for alias in child.names)
                else:
                    yield child.module, child.lineno, at_load
            elif isinstance(child, ast.If) and is_typing_only(child):
                continue
            else:
                is_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_load and not is_later)

    yield from walk(tree, True)


@functools.cache
def parsed() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"), str(path))) for path in files()]


def test_imports_go_down_the_floors_only() -> None:
    wrong = []
    for path, tree in parsed():
        floor = floor_of(path)
        for name, line, _ in imports(tree):
            parts = name.split(".")
            if parts[0] != PACKAGE or len(parts) == 1:
                continue
            target = parts[1] if parts[1] in BELOW else "main"
            roof = {"config", "main"}
            if target != floor and target not in BELOW[floor] and not (floor in roof and target in roof):
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({floor}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_core_needs_the_standard_library_only_and_kernels_little_more() -> None:
    wrong = []
    for path, tree in parsed():
        floor = floor_of(path)
        if floor not in ONLY_FOREIGN:
            continue
        for name, line, _ in imports(tree):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != PACKAGE and top not in ONLY_FOREIGN[floor]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_front_process_never_imports_torch() -> None:
    wrong = []
    for path, tree in parsed():
        floor = floor_of(path)
        for name, line, at_load in imports(tree):
            if name.split(".")[0] not in HEAVY:
                continue
            if floor in FRONT or floor in ROOF_LAZY and at_load:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_init_file_is_empty() -> None:
    filled = [str(path.relative_to(ROOT)) for path in files() if path.name == "__init__.py" and path.read_text()]
    assert not filled


def test_no_class_is_named_for_having_no_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(FORBIDDEN_SUFFIXES)
    ]
    assert not wrong, "\n".join(wrong)


def loaded_by(module: str) -> list[str]:
    """Modules loaded by importing `module` in a fresh interpreter, beyond what the interpreter itself loads."""
    code = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        f"import {module}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    # -S leaves out site-packages: if that suffices, nothing outside the standard library is needed.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    modules: list[str] = json.loads(done.stdout)
    return modules


def test_the_scheduler_loads_nothing_but_itself_and_the_standard_library() -> None:
    modules = loaded_by("megatron_medha.core.scheduling.scheduler")
    foreign = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert foreign == {PACKAGE}
    ours = [name for name in modules if name.startswith(f"{PACKAGE}.")]
    assert all(name.startswith(f"{PACKAGE}.core") for name in ours)
    assert len(ours) <= 22


def test_importing_core_loads_no_more_than_core() -> None:
    assert [name for name in loaded_by("megatron_medha.core") if name.startswith(PACKAGE)] == [
        PACKAGE,
        f"{PACKAGE}.core",
    ]


@pytest.mark.parametrize("floor", sorted(BELOW))
def test_every_floor_of_the_table_is_there(floor: str) -> None:
    assert any(floor_of(path) == floor for path in files())
