"""The rooms of the package: imports go down only, names are given once, and what must stay light does."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_medha"

# What each room may import of ours besides itself, from the ground up. Rooms inside a room have rows of their own, and
# those of core may be imported where core may be.
ROOMS = {
    "core": {"core/kv"},
    "core/kv": {"core"},
    "core/cost": {"core"},
    "core/scheduling": {"core", "core/kv", "core/cost"},
    "system": {"core"},
    "safe_files": {"core"},
    "text": {"core", "system", "safe_files"},
    "grammar": {"core", "system", "text"},
    "stats": {"core", "system"},
    "workload": {"core"},
    "engine": {"core", "grammar", "stats"},
    "sim": {"core", "engine", "stats", "workload", "sim/baselines"},
    "sim/baselines": {"core", "sim"},
    "sim/planning": {"core", "sim", "stats", "workload"},
    "kernels": {"kernels/attention", "kernels/triton"},
    "kernels/attention": {"kernels", "kernels/kv"},
    "kernels/kv": set(),
    "kernels/linear": {"kernels", "kernels/attention"},
    "kernels/triton": {"kernels", "kernels/attention", "kernels/kv"},
    "kernels/flash": {"kernels", "kernels/attention", "kernels/kv", "kernels/triton"},
    "parallel": {"core", "system"},
    "models": {"core", "safe_files", "text", "models/families"},
    "models/families": {"core", "safe_files", "models"},
    "checkpoints": {"core", "safe_files", "models", "models/families", "parallel"},
    "model": {"core", "kernels", "models", "parallel"},
    "cluster": {"core", "system", "stats", "engine", "kernels"},
    "cluster/remote": {"core", "system", "cluster"},
    "worker": {
        "core", "system", "grammar", "kernels", "parallel", "models", "model", "cluster", "cluster/remote",
        "worker/startup",
    },
    "worker/startup": {"core", "system", "kernels", "parallel", "models", "checkpoints", "model", "cluster", "worker"},
    "server": {
        "core", "system", "stats", "text", "grammar", "server/http", "server/tools", "server/observe", "server/routes",
    },
    "server/bodies": {"text"},
    "server/http": {"core", "server"},
    "server/tools": {"core", "system", "text", "grammar", "server", "server/bodies", "server/http"},
    "server/observe": {"core", "stats", "server"},
    "server/openai": {"core", "text", "server", "server/bodies", "server/http", "server/tools"},
    "server/anthropic": {"server", "server/bodies", "server/http", "server/tools", "server/openai"},
    "server/routes": {
        "core", "text", "server", "server/bodies", "server/http", "server/observe", "server/openai", "server/anthropic",
    },
    "bench": {"core", "stats", "workload"},
    "bits": {"core", "cluster", "worker", "worker/startup"},
    "tiny": {"core", "system", "safe_files", "text", "parallel", "models", "checkpoints", "model"},
    "options": {
        "core", "system", "text", "stats", "workload", "engine", "sim", "sim/baselines", "sim/planning", "cluster",
        "server", "bench",
    },
    "cli": {
        "core", "system", "text", "stats", "workload", "engine", "sim", "sim/planning", "cluster", "cluster/remote",
        "models", "checkpoints", "worker", "worker/startup", "server", "server/observe", "bench", "bits", "tiny",
        "options", "kernels",
    },
    "python_api": {"core", "text", "server", "server/bodies", "server/http", "server/openai", "options", "cli"},
}  # fmt: skip
# Importing these loads nothing heavy, at once or later: the API server, the simulator and the clients start fast.
LIGHT = ("core", "system", "text", "grammar", "stats", "workload", "engine", "sim", "cluster", "server", "bench")
LAZY = ("options", "cli", "python_api")  # these may, inside functions only
HEAVY = {"torch", "numpy", "transformers", "megatron", "deepspeed", "triton", "safetensors"}
ONLY_FOREIGN = {"core": set(), "kernels": {"torch", "triton", "numpy", "flash_attn", "flash_attn_interface"}}
FORBIDDEN_SUFFIXES = ("Manager", "Handler", "Helper", "Helpers", "Utils", "Util")
MOST_FILES = 20  # in a folder; about a dozen is better


def files() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_of(path: Path) -> str:
    """Its dotted name below the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "kernels" else parts[1:]
    return ".".join(parts[:-1] if parts and parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The innermost room it lies in; what stands directly in the package belongs to cli."""
    parts = module.split(".")
    inner = "/".join(parts[:2])
    return inner if inner in ROOMS else (parts[0] if parts[0] in ROOMS else "cli")


def floor_of(module: str) -> str:
    return room_of(module).split("/")[0]


class Import(NamedTuple):
    name: str  # absolute and dotted
    line: int
    at_load: bool  # else when a function runs, or for type checkers alone


def imports(tree: ast.Module) -> Iterator[Import]:
    """All of them, those for type checkers included."""

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"line {child.lineno}: relative import"
                assert child.module is not None
                yield from (Import(f"{child.module}.{alias.name}", child.lineno, at_load) for alias in child.names)
            else:
                is_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                yield from walk(child, at_load and not is_later and not is_typing)

    yield from walk(tree, True)


@functools.cache
def parsed() -> dict[str, tuple[Path, ast.Module]]:
    return {
        module_of(path): (path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
        for path in files()
        if path.name != "__init__.py"
    }


def target_of(name: str) -> str | None:
    """Which of our modules an imported name is, or lies in."""
    if not name.startswith(f"{PACKAGE}."):
        return None
    own = name.removeprefix(f"{PACKAGE}.")
    for module in (own, own.rpartition(".")[0]):
        if module in parsed():
            return module
    return None


@functools.cache
def arrows() -> dict[str, frozenset[str]]:
    """module -> the modules of ours that it imports, at whatever time."""
    found = {}
    for module, (_, tree) in parsed().items():
        targets = {target_of(each.name) for each in imports(tree)}
        found[module] = frozenset(target for target in targets if target and target != module)
    return found


def circles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """What is left when everything that imports nothing left is taken away, again and again."""
    left = {module: set(targets) for module, targets in arrows.items()}
    while True:
        free = {module for module, targets in left.items() if not targets & left.keys()}
        if not free:
            break
        left = {module: targets for module, targets in left.items() if module not in free}
    return [[module, *sorted(targets & left.keys())] for module, targets in sorted(left.items())]


def test_a_circle_is_found() -> None:
    assert circles({"a": "b", "b": "c", "c": ""}) == []
    assert circles({"a": "b", "b": "c", "c": "b"}) != []


def test_imports_go_down_the_floors_only() -> None:
    wrong = []
    for module, targets in arrows().items():
        room = room_of(module)
        allowed = ROOMS[room]
        for target in targets:
            there = room_of(target)
            inside_core = there.startswith("core/") and "core" in allowed and not room.startswith("core")
            inside_kernels = there.startswith("kernels/") and "kernels" in allowed and not room.startswith("kernels")
            inside_cli = room == "cli" and floor_of(target) in allowed
            if there != room and there not in allowed and not inside_core and not inside_kernels and not inside_cli:
                wrong.append(f"{module} ({room}) imports {target} ({there})")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle_of_imports() -> None:
    assert not circles(arrows())


def test_no_room_imports_itself_in_a_circle_of_imports() -> None:
    def between(name: Callable[[str], str]) -> list[list[str]]:
        found: dict[str, set[str]] = {}
        for module, targets in arrows().items():
            found.setdefault(name(module), set()).update(name(target) for target in targets)
        return circles({room: targets - {room} for room, targets in found.items()})

    assert not between(floor_of)
    # Inside a room: its folders, and beside them its files.
    assert not between(lambda module: "/".join(module.split(".")[:2]))


def test_core_needs_the_standard_library_only_and_kernels_little_more() -> None:
    wrong = []
    for module, (_, tree) in parsed().items():
        allowed = ONLY_FOREIGN.get(floor_of(module))
        for each in imports(tree) if allowed is not None else ():
            top = each.name.split(".")[0]
            if top not in sys.stdlib_module_names and top != PACKAGE and top not in allowed:
                wrong.append(f"{module}:{each.line} imports {each.name}")
    assert not wrong, "\n".join(wrong)


def reach(module: str) -> set[str]:
    """`module` and all of ours that it imports, directly or not."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {target for each in new for target in arrows()[each]} - found
    return found


def test_the_api_server_process_never_imports_torch() -> None:
    heavy = {
        module: [each for each in imports(tree) if each.name.split(".")[0] in HEAVY]
        for module, (_, tree) in parsed().items()
    }
    wrong = []
    for module in parsed():
        if floor_of(module) in LIGHT:
            wrong += [f"{module} reaches {each}: {heavy[each][0].name}" for each in reach(module) if heavy[each]]
        elif floor_of(module) in LAZY:
            wrong += [f"{module}:{each.line} imports {each.name}" for each in heavy[module] if each.at_load]
    assert not wrong, "\n".join(wrong)


def test_a_module_has_a_name_of_its_own() -> None:
    stems = Counter(module.rpartition(".")[2] for module in parsed())
    assert not [stem for stem, count in stems.items() if count > 1]


def test_a_class_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = {}
    for module, (_, tree) in parsed().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(f"{module}:{node.lineno}")
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_folders_stay_small() -> None:
    folders = Counter(path.parent for path, _ in parsed().values())
    assert not {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > MOST_FILES}


def test_every_init_file_is_empty_but_the_package_s_own() -> None:
    filled = [str(path.relative_to(ROOT)) for path in files() if path.name == "__init__.py" and path.read_text()]
    assert filled == [f"{PACKAGE}/__init__.py"]


def test_importing_the_package_loads_nothing_else() -> None:
    assert loaded_by(PACKAGE) == [PACKAGE]


def test_no_class_is_named_for_having_no_name() -> None:
    wrong = [
        f"{module}:{node.lineno} {node.name}"
        for module, (_, tree) in parsed().items()
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
    assert len(ours) <= 45


def test_importing_core_loads_no_more_than_core() -> None:
    assert [name for name in loaded_by("megatron_medha.core") if name.startswith(PACKAGE)] == [
        PACKAGE,
        f"{PACKAGE}.core",
    ]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_every_room_of_the_table_is_there(room: str) -> None:
    assert any(room_of(module) == room for module in parsed())


def test_nothing_stands_directly_in_the_package_but_its_entrance() -> None:
    assert {module for module in parsed() if "." not in module} == {"__main__"}
