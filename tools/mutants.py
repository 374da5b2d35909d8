"""Mutation tests: changes one place of megatron_medha/core at a time, and lists the changes that no test notices.

    make mutants ARGS="--seed 3 --count 80"
    make mutants ARGS="--only kv_memory.py --count 40 --jobs 2"

Lines are drawn at random, each as likely as any other, and of each line one change. The changes are those of mutmut,
which itself mutates the bodies of undecorated functions alone, and those in OPERATORS below; here properties, defaults
and constants are changed too. A mutant lives in the memory of a forked process: the working copy stays as it is. Only
tests that execute the mutated function run, quick ones and those of core first, each as long as it takes without a
mutant and a few seconds more. What tools/mutants_survivors.md lists is not drawn.

Everything is kept in build/mutants. A run that was interrupted goes on where it was; after a change of core or of its
tests, all mutants run again, each beginning with the test that killed it last.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import coverage
import hypothesis
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "megatron_medha" / "core"
TESTS = [ROOT / "tests" / name for name in ("core", "stats", "sim")]  # in the order they are tried
SURVIVORS = ROOT / "tools" / "mutants_survivors.md"
KEPT = ROOT / "build" / "mutants"
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"
# Some mutants never end, and some never stop appending. Seconds of CPU: of all imports, and of a test beyond those that
# it takes without a mutant, times a factor. The last is of the clock, for those that sleep.
IMPORT_LIMIT_S, TEST_LIMIT_S, TEST_LIMIT_FACTOR, CLOCK_LIMIT_S = 15.0, 5.0, 5.0, 1800.0
QUICK_S = 0.2  # of a test
MEMORY_LIMIT_BYTES = 6 << 30
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:timeout", "-m", "not slow", "--rootdir", str(ROOT)]


# ---- changes ----


def _one_less(node: cst.Integer | cst.Float) -> Iterator[cst.CSTNode]:
    if node.evaluated_value >= 1:
        yield node.with_changes(value=repr(node.evaluated_value - 1).replace("+", ""))


def _left_out(node: cst.Expr | cst.Raise) -> Iterator[cst.CSTNode]:
    if isinstance(node, cst.Raise) or isinstance(node.value, cst.Call):
        yield cst.Pass()


def _nothing_returned(node: cst.Return) -> Iterator[cst.CSTNode]:
    if node.value is not None and not (isinstance(node.value, cst.Name) and node.value.value == "None"):
        yield node.with_changes(value=cst.Name("None"))


def _opposite_function(node: cst.Call) -> Iterator[cst.CSTNode]:
    opposite = {"min": "max", "max": "min", "any": "all", "all": "any"}
    if isinstance(node.func, cst.Name) and node.func.value in opposite:
        yield node.with_changes(func=cst.Name(opposite[node.func.value]))


def _opposite_condition(node: cst.If) -> Iterator[cst.CSTNode]:
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


OPERATORS: list[tuple[type, Callable[[Any], Any]]] = [
    *mutation_operators,
    (cst.Integer, _one_less), (cst.Float, _one_less), (cst.Expr, _left_out), (cst.Raise, _left_out),
    (cst.Return, _nothing_returned), (cst.Call, _opposite_function), (cst.If, _opposite_condition),
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A module with one place changed."""

    path: Path
    line: int
    function: str         # the outermost one it is in, with its class; "": it runs on import
    source: str
    old: tuple[str, ...]  # lines that go, and those that come
    new: tuple[str, ...]

    @property
    def key(self) -> str:
        """The same for the same change, wherever the module and its lines move."""
        return _key(self.path.name, self.old, self.new)

    @property
    def place(self) -> str:
        """File, line and function."""
        return f"{self.path.relative_to(ROOT)}:{self.line} {self.function}"

    @property
    def difference(self) -> str:
        """As in tools/mutants_survivors.md."""
        return "\n".join(["```diff", *(f"- {line}" for line in self.old), *(f"+ {line}" for line in self.new), "```"])


def _key(name: str, old: Sequence[str], new: Sequence[str]) -> str:
    return "\n".join([name, *(f"- {line}" for line in old), *(f"+ {line}" for line in new)])


class _Changes(cst.CSTVisitor):
    """All changes of a module: the node and what comes in its place, by line."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.of_line: dict[int, list[tuple[cst.CSTNode, cst.CSTNode]]] = defaultdict(list)

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom)) or _is_inert(node):
            return False
        place = self.get_metadata(PositionProvider, node, None)
        if place is not None:
            for kind, operator in OPERATORS:
                if isinstance(node, kind):
                    self.of_line[place.start.line] += [(node, changed) for changed in operator(node)]
        return True


def _is_inert(node: cst.CSTNode) -> bool:
    """Docstrings, slots, type aliases and zip's strict: nothing depends on them that is not a bug already."""
    match node:
        case cst.Arg(keyword=cst.Name(value="strict")):
            return True
        case cst.Expr(value=cst.SimpleString() | cst.ConcatenatedString()):
            return True
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value="__slots__"))]):
            return True
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))], value=cst.Subscript() | cst.Name()):
            return name[0].isupper() and not name.isupper()
    return False


class Source:
    """A module of core, and its mutants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._text = path.read_text(encoding="utf-8")
        self._functions = _functions(path)
        wrapper = MetadataWrapper(cst.parse_module(self._text))
        changes = _Changes()
        wrapper.visit(changes)
        self._module = wrapper.module
        self._changes = changes.of_line

    @property
    def lines(self) -> list[int]:
        """Those that can be changed."""
        return sorted(self._changes)

    def draw(self, line: int, chance: random.Random, without: set[str]) -> Mutant | None:
        """A mutant of this line that is none of `without`; None if there is none left."""
        changes = self._changes[line]
        for node, changed in chance.sample(changes, len(changes)):
            mutant = self._mutant(line, node, changed)
            if mutant is not None and mutant.key not in without:
                return mutant
        return None

    def _mutant(self, line: int, node: cst.CSTNode, changed: cst.CSTNode) -> Mutant | None:
        text = self._module.deep_replace(node, changed).code  # type: ignore[attr-defined]
        try:
            compile(text, str(self.path), "exec")
        except SyntaxError:
            return None
        before, after = self._text.splitlines(), text.splitlines()
        start = _num_equal(before, after)
        end = min(_num_equal(before[::-1], after[::-1]), len(before) - start, len(after) - start)
        old = tuple(each.strip() for each in before[start : len(before) - end])
        new = tuple(each.strip() for each in after[start : len(after) - end])
        return Mutant(self.path, line, self._functions.get(line, ""), text, old, new) if old != new else None


def _num_equal(one: Sequence[str], other: Sequence[str]) -> int:
    """Lines at the beginning that are the same."""
    return next((index for index, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))  # noqa: B905


def _functions(path: Path) -> dict[int, str]:
    """The outermost function, or method with its class, that each line is in."""
    found: dict[int, str] = {}

    def visit(body: Sequence[ast.stmt], scope: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{scope}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found.update(dict.fromkeys(range(node.lineno, (node.end_lineno or 0) + 1), scope + node.name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def listed_survivors() -> set[str]:
    """Keys of what tools/mutants_survivors.md lists: differences, under a heading that ends with the file's name."""
    keys, name = set(), ""
    text = SURVIVORS.read_text(encoding="utf-8")
    for heading, block in re.findall(r"^#+ .*?(\w+\.py)$|^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        name = heading or name
        old, new = ([line[2:] for line in block.splitlines() if line.startswith(sign)] for sign in "-+")
        keys.add(_key(name, old, new))
    return keys


def draw(sources: Sequence[Source], seed: int, count: int, without: set[str]) -> list[Mutant]:
    """So many different mutants, of lines drawn at random; a line has a second one when each has had its first."""
    chance, seen, drawn = random.Random(seed), set(without), []
    lines = [(source, line) for source in sources for line in source.lines]
    while lines and len(drawn) < count:
        left = []
        for source, line in chance.sample(lines, len(lines)):
            mutant = source.draw(line, chance, seen) if len(drawn) < count else None
            if mutant is not None:
                seen.add(mutant.key)
                drawn.append(mutant)
                left.append((source, line))
        lines = left
    return drawn


# ---- tests ----


class _Measured:
    """A pytest plugin: how long each test takes, and which lines of core it executes."""

    def __init__(self, cover: coverage.Coverage) -> None:
        self.seconds: dict[str, float] = {}
        self._cover = cover

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        # What a test file does when it is imported, it does for all of its tests.
        self._cover.switch_context(collector.nodeid)
        try:
            return (yield)
        finally:
            self._cover.switch_context("")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._cover.switch_context(item.nodeid)
        started_s = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - started_s
            self._cover.switch_context("")


class _Chosen:
    """A pytest plugin: runs the tests named, in that order, and notes the first that fails.

    seconds: of CPU that each takes without a mutant. One that takes far longer ends the process.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.failed = ""
        self._seconds = seconds
        self._order = {node_id: index for index, node_id in enumerate(seconds)}

    def pytest_configure(self) -> None:
        # After tests/conftest.py. A case that fails need not become a small one.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        profile = hypothesis.settings.get_profile("same")
        hypothesis.settings.register_profile("mutants", profile, phases=phases, print_blob=False)
        hypothesis.settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self._order]
        items[:] = sorted(chosen, key=lambda item: self._order[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_PROF, TEST_LIMIT_S + TEST_LIMIT_FACTOR * self._seconds[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


class _Loader(importlib.abc.InspectLoader):
    """Finds the mutated module in memory."""

    def __init__(self, mutant: Mutant) -> None:
        parts = mutant.path.relative_to(ROOT).with_suffix("").parts
        self._name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self._mutant = mutant

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self._name else None

    def get_source(self, fullname: str) -> str:
        return self._mutant.source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._mutant.source, str(self._mutant.path), "exec")

    def exec_module(self, module: ModuleType) -> None:
        exec(self.get_code(module.__name__), module.__dict__)


class Tests:
    """How long each test takes, and which functions of core it executes. Measured once per version of both."""

    def __init__(self, modules: Sequence[Path], is_stale_fine: bool) -> None:
        path = KEPT / "tests.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        core = "" if is_stale_fine else _hash(modules)
        files = [each for folder in TESTS for each in sorted(folder.rglob("test_*.py"))]
        versions = {str(each.relative_to(ROOT)): _hash([each]) + core for each in files}
        stale = [
            name for name, version in versions.items() if not kept.get(name, {}).get("version", "").startswith(version)
        ]
        if stale:
            print(f"measuring {len(stale)} of {len(versions)} test files", flush=True)
            measured = self._measure(stale)
            kept["modules"] = measured["modules"]
            for name in stale:
                kept[name] = {"version": _hash([ROOT / name]) + _hash(modules), "tests": measured[name]}
            path.write_text(json.dumps(kept))
        for name in kept["modules"]:
            importlib.import_module(name)  # once, before the forks
        self.seconds: dict[str, float] = {}
        self._of_function: dict[tuple[str, str], set[str]] = defaultdict(set)
        for name in versions:
            for node_id, test in kept[name]["tests"].items():
                self.seconds[node_id] = test["seconds"]
                for module, functions in test["functions"].items():
                    for function in functions:
                        self._of_function[module, function].add(node_id)
        folders = [f"{folder.relative_to(ROOT)}/" for folder in TESTS]
        self._rank = {
            node_id: (seconds > QUICK_S, next(i for i, each in enumerate(folders) if node_id.startswith(each)), seconds)
            for node_id, seconds in self.seconds.items()
        }

    def of(self, mutant: Mutant, last_killer: str) -> dict[str, float]:
        """Those that execute the mutated function, or all if it runs on import; quick ones first, and those of core."""
        chosen = self._of_function[mutant.path.name, mutant.function] if mutant.function else set()
        ordered = sorted(chosen or self.seconds, key=lambda each: (each != last_killer, self._rank[each]))
        return {node_id: self.seconds[node_id] for node_id in ordered}

    def _measure(self, names: Sequence[str]) -> dict[str, Any]:
        result, log = KEPT / "measured.json", KEPT / "measured.log"

        def body() -> int:
            cover = coverage.Coverage(data_file=None, config_file=False, source=[str(CORE)])
            plugin = _Measured(cover)
            cover.start()
            code = int(pytest.main([*PYTEST, *names], plugins=[plugin]))
            cover.stop()
            executed: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
            data = cover.get_data()
            for path in map(Path, data.measured_files()):
                functions = _functions(path)
                for line, node_ids in data.contexts_by_lineno(str(path)).items():
                    for node_id in node_ids:
                        executed[node_id][path.name].add(functions.get(line, ""))
            found: dict[str, Any] = {name: {} for name in names}
            for node_id, seconds in plugin.seconds.items():
                name = node_id.partition("::")[0]
                own, of_file = executed[node_id], executed[name]
                by_module = {module: sorted(own[module] | of_file[module]) for module in {*own, *of_file}}
                found[name][node_id] = {"seconds": seconds, "functions": by_module}
            found["modules"] = sorted(name for name, module in sys.modules.items() if _is_installed(module))
            result.write_text(json.dumps(found))
            return code

        _, status = os.waitpid(_fork(log, body), 0)
        if status:
            print(log.read_text()[-4000:])
            sys.exit("the tests must pass before mutants are tried")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _is_installed(module: ModuleType) -> bool:
    """Whether it is of a package that neither we nor the tests are."""
    return "site-packages" in str(getattr(module, "__file__", "")) and not module.__name__.startswith("__editable__")


def _hash(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _fork(log: Path, body: Callable[[], int]) -> int:
    """A process that writes to `log` and ends with the code that body returns."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.chdir(ROOT)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        sys.dont_write_bytecode = True
        code = body()
        sys.stdout.flush()
    finally:
        os._exit(code)


# ---- runs ----


def _begin(mutant: Mutant, seconds: Mapping[str, float], log: Path) -> int:
    killer = log.with_suffix(".killer")
    killer.unlink(missing_ok=True)

    def body() -> int:
        sys.meta_path.insert(0, _Loader(mutant))
        signal.setitimer(signal.ITIMER_PROF, IMPORT_LIMIT_S)
        plugin = _Chosen(seconds)
        files = dict.fromkeys(node_id.partition("::")[0] for node_id in seconds)
        code = int(pytest.main([*PYTEST, "--tb=line", *files], plugins=[plugin]))
        killer.write_text(plugin.failed)
        return code

    return _fork(log, body)


def _outcome(status: int, log: Path) -> tuple[str, str]:
    """What became of a mutant, and the test that killed it."""
    killer = log.with_suffix(".killer")
    if os.WIFSIGNALED(status):
        return TIMEOUT, ""
    match os.WEXITSTATUS(status):
        case 0:
            return SURVIVED, ""
        case 5:
            sys.exit(f"no test was found: {log.read_text()[-2000:]}")
    return KILLED, killer.read_text() if killer.exists() else ""


def run(mutants: Sequence[Mutant], tests: Tests, jobs: int, version: str) -> dict[str, str]:
    """Try each mutant; returns the outcomes by key."""
    path = KEPT / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    outcomes: dict[str, str] = {
        mutant.key: kept[mutant.key]["outcome"]
        for mutant in mutants
        if kept.get(mutant.key, {}).get("version") == version
    }
    todo = [mutant for mutant in mutants if mutant.key not in outcomes]
    print(f"{len(mutants)} mutants, of which {len(outcomes)} have run", flush=True)
    running: dict[int, tuple[Mutant, Path, float]] = {}
    free = [KEPT / f"run{index}.log" for index in range(jobs)]
    while todo or running:
        while todo and free:
            mutant, log = todo.pop(0), free.pop()
            process = _begin(mutant, tests.of(mutant, kept.get(mutant.key, {}).get("by", "")), log)
            running[process] = mutant, log, time.monotonic() + CLOCK_LIMIT_S
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            for each, (_, _, until_s) in running.items():
                if time.monotonic() > until_s:
                    os.kill(each, signal.SIGKILL)
            time.sleep(0.05)
            continue
        mutant, log, _ = running.pop(process)
        free.append(log)
        outcome, by = _outcome(status, log)
        outcomes[mutant.key] = outcome
        kept[mutant.key] = {
            "version": version, "outcome": outcome, "by": by or kept.get(mutant.key, {}).get("by", "")
        }  # fmt: skip
        path.with_suffix(".new").write_text(json.dumps(kept))
        path.with_suffix(".new").rename(path)
        print(f"[{len(outcomes):4}/{len(mutants)}] {outcome:8} {mutant.place}  {by}", flush=True)
        if outcome == SURVIVED:
            print(mutant.difference, flush=True)
    return outcomes


def main() -> None:
    """Draw, run, and list what has survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=80, help="how many mutants")
    parser.add_argument("--only", action="append", metavar="NAME.py", help="modules to mutate; all of core by default")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="how many at a time")
    parser.add_argument("--all", action="store_true", help="also draw those listed in tools/mutants_survivors.md")
    parser.add_argument("--stale", action="store_true", help="believe what tests executed of an older core")
    options = parser.parse_args()
    os.environ |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MEDHA_COMPILED_CORE": "0"}
    KEPT.mkdir(parents=True, exist_ok=True)
    modules = [path for path in sorted(CORE.rglob("*.py")) if path.stat().st_size]
    tests = Tests(modules, options.stale)
    version = _hash([*modules, *(path for folder in TESTS for path in sorted(folder.rglob("*.py")))])
    sources = [Source(path) for path in modules if not options.only or path.name in options.only]
    mutants = draw(sources, options.seed, options.count, set() if options.all else listed_survivors())
    outcomes = run(mutants, tests, options.jobs, version)
    survivors = [mutant for mutant in mutants if outcomes[mutant.key] == SURVIVED]
    for mutant in survivors:
        print(f"\n{mutant.place}\n{mutant.difference}")
    num_killed = len(mutants) - len(survivors)
    num_timeouts = sum(outcomes[mutant.key] == TIMEOUT for mutant in mutants)
    print(
        f"\nseed {options.seed}: {len(mutants)} mutants, {num_killed} killed ({num_timeouts} of them by a limit), "
        f"{len(survivors)} survived: {num_killed / max(1, len(mutants)):.1%}"
    )


if __name__ == "__main__":
    main()
