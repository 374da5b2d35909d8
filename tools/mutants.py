"""Mutation tests: changes one place of megatron_medha/core at a time and asks whether a test fails.

    make mutants ARGS="--seed 3 --count 80"
    python tools/mutants.py --only memory.py --count 40

Mutants are drawn at random: lines first, each as likely as any other, then one change of that line. The changes are
those of mutmut, which itself only mutates the bodies of undecorated functions; this mutates defaults, properties and
constants as well, and adds the changes in OWN. Each mutant lives in the memory of a forked process, so the working copy
stays as it is and several can run at a time. Only tests that execute the mutated line run, the quickest first.
A mutant that no test notices is printed with its difference. Those listed in tools/mutants_survivors.md are not drawn.

Results are kept in build/mutants: an interrupted run goes on where it was, and a run after a change tries first the
test that failed before. Needs the extra "mutants"; not part of `make test`.
"""

from __future__ import annotations

import argparse
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
import hypothesis  # noqa: F401  loaded before the forks, as pytest is
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "megatron_medha" / "core"
TESTS = tuple(ROOT / "tests" / name for name in ("core", "stats", "sim"))  # in the order they are tried
SURVIVORS = ROOT / "tools" / "mutants_survivors.md"
KEPT = ROOT / "build" / "mutants"
# Some mutants never end, or never stop appending. Seconds are of CPU, but the last.
IMPORT_LIMIT_S, LEAST_LIMIT_S, LIMIT_FACTOR, WALL_LIMIT_S = 15.0, 5.0, 5.0, 1800.0
MOST_BYTES = 6 << 30
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"

Operator = tuple[type, Callable[[Any], Iterator[cst.CSTNode]]]


# ---- changes ----


def _one_less(node: cst.Integer | cst.Float) -> Iterator[cst.CSTNode]:
    if node.evaluated_value >= 1:
        yield node.with_changes(value=f"{node.evaluated_value - 1!r}".replace("+", ""))


def _left_out(node: cst.Expr | cst.Raise) -> Iterator[cst.CSTNode]:
    if isinstance(node, cst.Raise) or isinstance(node.value, cst.Call):
        yield cst.Pass()


def _nothing_returned(node: cst.Return) -> Iterator[cst.CSTNode]:
    if node.value is not None and not (isinstance(node.value, cst.Name) and node.value.value == "None"):
        yield node.with_changes(value=cst.Name("None"))


def _min_for_max(node: cst.Call) -> Iterator[cst.CSTNode]:
    other = {"min": "max", "max": "min", "any": "all", "all": "any"}
    if isinstance(node.func, cst.Name) and node.func.value in other:
        yield node.with_changes(func=cst.Name(other[node.func.value]))


def _condition_reversed(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


OWN: list[Operator] = [
    (cst.Integer, _one_less), (cst.Float, _one_less), (cst.Expr, _left_out), (cst.Raise, _left_out),
    (cst.Return, _nothing_returned), (cst.Call, _min_for_max), (cst.If, _condition_reversed),
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A module with one place changed."""

    path: Path
    line: int
    where: str                # the class and function it is in
    first_line: int           # of the statement it is in, up to the end of the change
    last_line: int
    source: str
    old: tuple[str, ...]      # lines that go, and those that come
    new: tuple[str, ...]

    @property
    def key(self) -> str:
        """The same for the same change, wherever the module and the lines around it move."""
        return "\n".join([self.path.name, *(f"-{line}" for line in self.old), *(f"+{line}" for line in self.new)])


class _PartialPrefillLimits(cst.CSTVisitor):
    """Every change of a module, by line: what is changed, into what, and the statement it is in."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.by_line: dict[int, list[tuple[cst.CSTNode, cst.CSTNode, str, int, int]]] = defaultdict(list)
        self._scopes: list[str] = []
        self._statements: list[int] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Collect the changes of a node; False where there is nothing to be changed below."""
        if isinstance(node, (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom)) or _is_inert(node):
            return False
        if isinstance(node, (cst.ClassDef, cst.FunctionDef)):
            self._scopes.append(node.name.value)
        place = self.get_metadata(PositionProvider, node, None)
        if isinstance(node, (cst.SimpleStatementLine, cst.BaseCompoundStatement)) and place is not None:
            self._statements.append(place.start.line)
        if place is not None:
            for kind, operator in [*mutation_operators, *OWN]:
                if isinstance(node, kind):
                    for changed in operator(node):
                        first = self._statements[-1] if self._statements else place.start.line
                        last = first if isinstance(node, cst.BaseCompoundStatement) else place.end.line
                        entry = (node, changed, ".".join(self._scopes), first, last)
                        self.by_line[place.start.line].append(entry)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        """Keep track of where we are."""
        if isinstance(original_node, (cst.ClassDef, cst.FunctionDef)):
            self._scopes.pop()
        if isinstance(original_node, (cst.SimpleStatementLine, cst.BaseCompoundStatement)):
            self._statements.pop()


def _is_inert(node: cst.CSTNode) -> bool:
    """Docstrings, slots and type aliases: nothing that runs depends on them."""
    match node:
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
        self.text = path.read_text(encoding="utf-8")
        wrapper = MetadataWrapper(cst.parse_module(self.text))
        limits = _PartialPrefillLimits()
        wrapper.visit(limits)
        self._module = wrapper.module
        self._by_line = limits.by_line

    @property
    def lines(self) -> list[int]:
        """Those that can be changed."""
        return sorted(self._by_line)

    def mutants(self, line: int) -> list[Callable[[], Mutant | None]]:
        """Of a line; each is made when called, and None if it is no program or no change."""
        return [lambda entry=entry: self._mutant(line, *entry) for entry in self._by_line[line]]

    def _mutant(
        self, line: int, node: cst.CSTNode, changed: cst.CSTNode, where: str, first: int, last: int
    ) -> Mutant | None:
        replaced = self._module.deep_replace(node, changed)
        text = replaced.code
        try:
            compile(text, str(self.path), "exec")
        except SyntaxError:
            return None
        before, after = self.text.splitlines(), text.splitlines()
        start = next((i for i, (one, other) in enumerate(zip(before, after)) if one != other), 0)  # noqa: B905
        end = next((i for i, (one, other) in enumerate(zip(before[::-1], after[::-1])) if one != other), 0)  # noqa: B905
        end = min(end, len(before) - start, len(after) - start)
        old = tuple(each.strip() for each in before[start : len(before) - end])
        new = tuple(each.strip() for each in after[start : len(after) - end])
        return Mutant(self.path, line, where, first, last, text, old, new) if old != new else None


def known_survivors() -> set[str]:
    """Keys of the mutants in tools/mutants_survivors.md: under a heading with a file's name, differences."""
    keys, name = set(), ""
    text = SURVIVORS.read_text(encoding="utf-8") if SURVIVORS.exists() else ""
    for heading, block in re.findall(r"^#+ .*?(\w+\.py)|^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        name = heading or name
        if block:
            lines = block.splitlines()
            old, new = ([line[1:].strip() for line in lines if line[:1] == sign] for sign in "-+")
            keys.add("\n".join([name, *(f"-{line}" for line in old), *(f"+{line}" for line in new)]))
    return keys


def draw(sources: Sequence[Source], seed: int, count: int, without: set[str]) -> list[Mutant]:
    """So many different mutants, of lines drawn at random."""
    chance = random.Random(seed)
    lines = [(source, line) for source in sources for line in source.lines]
    drawn: list[Mutant] = []
    seen = set(without)
    while lines and len(drawn) < count:
        chance.shuffle(lines)
        left = []
        for source, line in lines:
            makers = source.mutants(line)
            chance.shuffle(makers)
            for make in makers:
                mutant = make()
                if mutant is not None and mutant.key not in seen:
                    seen.add(mutant.key)
                    drawn.append(mutant)
                    left.append((source, line))
                    break
            if len(drawn) == count:
                break
        lines = left
    return drawn


# ---- tests ----


class _Measured:
    """A pytest plugin: how long each test takes, and which lines of core it executes."""

    def __init__(self, cover: coverage.Coverage) -> None:
        self.seconds: dict[str, float] = {}
        self._cover = cover

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

    seconds: of CPU that each test takes by itself. One that takes far longer ends the process with SIGPROF.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.failed = ""
        self._seconds = seconds
        self._order = {node_id: index for index, node_id in enumerate(seconds)}

    def pytest_configure(self) -> None:
        # After tests/conftest.py. A failing case need not become a small one.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        profile = hypothesis.settings.get_profile("same")
        hypothesis.settings.register_profile("mutants", profile, phases=phases, print_blob=False)
        hypothesis.settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid]
        )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_PROF, LEAST_LIMIT_S + LIMIT_FACTOR * self._seconds[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


class _Loader(importlib.abc.InspectLoader):
    """Finds one module in memory, changed."""

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


PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:timeout", "-m", "not slow", "--rootdir", str(ROOT)]


def _fork(log: Path, body: Callable[[], int]) -> int:
    """A process that writes to `log` and ends with the code that body returns."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.chdir(ROOT)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.dont_write_bytecode = True
        code = body()
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, repr(error).encode())
        code = 99
    os._exit(code)


def _hash(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


class Tests:
    """The tests of some folders: seconds of each, and which execute a line of core. Measured once per version."""

    def __init__(self, modules: Sequence[Path]) -> None:
        files = [path for folder in TESTS for path in sorted(folder.rglob("test_*.py"))]
        self._kept = KEPT / "tests.json"
        kept = json.loads(self._kept.read_text()) if self._kept.exists() else {}
        core = _hash(modules)
        versions = {str(path.relative_to(ROOT)): f"{core} {_hash([path])}" for path in files}
        found = {name: kept[name] for name in versions if kept.get(name, {}).get("version") == versions[name]}
        stale = [name for name in versions if name not in found]
        if stale:
            print(f"measuring {len(stale)} of {len(versions)} test files", flush=True)
            measured = self._measure(stale)
            for name in stale:
                found[name] = {**measured[name], "version": versions[name]}
            kept = {**found, "modules": measured["modules"]}
            self._kept.write_text(json.dumps(kept))
        for name in kept["modules"]:
            importlib.import_module(name)  # once, before the forks
        self.seconds: dict[str, float] = {}
        self._of_line: dict[tuple[str, int], set[str]] = defaultdict(set)
        for name in versions:
            for node_id, test in found[name]["tests"].items():
                self.seconds[node_id] = test["seconds"]
                for module, lines in test["lines"].items():
                    for line in lines:
                        self._of_line[module, line].add(node_id)
        folders = [str(folder.relative_to(ROOT)) for folder in TESTS]
        self._order = {
            node_id: (next(index for index, folder in enumerate(folders) if node_id.startswith(folder)), seconds)
            for node_id, seconds in self.seconds.items()
        }

    def of(self, mutant: Mutant) -> list[str]:
        """Those that execute the mutated statement, or all if it runs on import; the quickest of core first."""
        module = mutant.path.name
        chosen: set[str] = set()
        for line in range(mutant.first_line, mutant.last_line + 1):
            chosen |= self._of_line.get((module, line), set())
        return sorted(chosen or self.seconds, key=self._order.__getitem__)

    def _measure(self, names: Sequence[str]) -> dict[str, Any]:
        result = KEPT / "measured.json"
        log = KEPT / "measured.log"

        def body() -> int:
            cover = coverage.Coverage(data_file=None, config_file=False, source=[str(CORE)])
            plugin = _Measured(cover)
            cover.start()
            code = int(pytest.main([*PYTEST, *names], plugins=[plugin]))
            cover.stop()
            data = cover.get_data()
            lines: dict[str, dict[str, list[int]]] = {node_id: {} for node_id in plugin.seconds}
            for path in data.measured_files():
                for line, node_ids in data.contexts_by_lineno(path).items():
                    for node_id in node_ids:
                        if node_id:
                            lines[node_id].setdefault(Path(path).name, []).append(line)
            found: dict[str, Any] = {name: {"tests": {}} for name in names}
            for node_id, seconds in plugin.seconds.items():
                found[node_id.partition("::")[0]]["tests"][node_id] = {"seconds": seconds, "lines": lines[node_id]}
            found["modules"] = sorted(name for name, module in sys.modules.items() if _is_foreign(module))
            result.write_text(json.dumps(found))
            return code

        _, status = os.waitpid(_fork(log, body), 0)
        if status:
            print(log.read_text()[-4000:])
            sys.exit("the tests must pass before mutants are tried")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _is_foreign(module: ModuleType) -> bool:
    """Whether it is of an installed package: neither ours nor a test."""
    return "site-packages" in str(getattr(module, "__file__", "")) and not module.__name__.startswith("__editable__")


# ---- runs ----


def _begin(mutant: Mutant, seconds: Mapping[str, float], log: Path) -> int:
    note = log.with_suffix(".failed")
    note.unlink(missing_ok=True)

    def body() -> int:
        sys.meta_path.insert(0, _Loader(mutant))
        signal.setitimer(signal.ITIMER_PROF, IMPORT_LIMIT_S)
        plugin = _Chosen(seconds)
        files = dict.fromkeys(node_id.partition("::")[0] for node_id in seconds)
        code = int(pytest.main([*PYTEST, "--tb=line", *files], plugins=[plugin]))
        note.write_text(plugin.failed)
        return code

    return _fork(log, body)


def _outcome(status: int, log: Path) -> tuple[str, str]:
    note = log.with_suffix(".failed")
    failed = note.read_text() if note.exists() else ""
    if os.WIFSIGNALED(status):
        return TIMEOUT, ""
    code = os.WEXITSTATUS(status)
    if code == 0:
        return SURVIVED, ""
    if code == 5:
        sys.exit(f"no test was collected: {log.read_text()[-2000:]}")
    return KILLED, failed or "by an error"


def run(mutants: Sequence[Mutant], tests: Tests, jobs: int, version: str) -> dict[str, tuple[str, str]]:
    """Try each mutant; returns outcome and failed test by key."""
    kept_path = KEPT / "results.json"
    kept = json.loads(kept_path.read_text()) if kept_path.exists() else {}
    results = {
        mutant.key: (kept[mutant.key]["outcome"], kept[mutant.key]["by"])
        for mutant in mutants
        if kept.get(mutant.key, {}).get("version") == version
    }
    todo = [mutant for mutant in mutants if mutant.key not in results]
    print(f"{len(mutants)} mutants, {len(results)} of them have run", flush=True)
    running: dict[int, tuple[Mutant, Path, float]] = {}
    free = [KEPT / f"run{index}.log" for index in range(jobs)]
    started_s = time.monotonic()
    while todo or running:
        while todo and free:
            mutant, log = todo.pop(0), free.pop()
            node_ids = tests.of(mutant)
            last = kept.get(mutant.key, {}).get("by", "")
            if last in tests.seconds:
                node_ids = [last, *(each for each in node_ids if each != last)]
            until_s = time.monotonic() + WALL_LIMIT_S
            running[_begin(mutant, {each: tests.seconds[each] for each in node_ids}, log)] = mutant, log, until_s
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            for each, (_, _, until_s) in running.items():
                if time.monotonic() > until_s:  # it sleeps
                    os.kill(each, signal.SIGKILL)
            time.sleep(0.05)
            continue
        mutant, log, _ = running.pop(process)
        free.append(log)
        outcome, by = results[mutant.key] = _outcome(status, log)
        kept[mutant.key] = {
            "version": version, "outcome": outcome, "by": by or kept.get(mutant.key, {}).get("by", ""),
        }  # fmt: skip
        kept_path.with_suffix(".new").write_text(json.dumps(kept))
        kept_path.with_suffix(".new").rename(kept_path)
        place = f"{mutant.path.relative_to(CORE)}:{mutant.line} {mutant.where}"
        print(f"[{len(results):4}/{len(mutants)} {time.monotonic() - started_s:5.0f} s] {outcome:8} {place:60} {by}",
              flush=True)  # fmt: skip
        if outcome == SURVIVED:
            print(difference(mutant), flush=True)
    return results


def difference(mutant: Mutant) -> str:
    """Lines that go and lines that come, as in tools/mutants_survivors.md."""
    return "\n".join(["```diff", *(f"- {line}" for line in mutant.old), *(f"+ {line}" for line in mutant.new), "```"])


def main() -> None:
    """Draw, run, and say what has survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=80, help="how many mutants (80)")
    parser.add_argument("--only", action="append", metavar="NAME.py", help="modules to mutate; all of core by default")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="how many at a time")
    parser.add_argument("--all", action="store_true", help="also draw those listed in tools/mutants_survivors.md")
    options = parser.parse_args()
    os.environ |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MEDHA_COMPILED_CORE": "0"}
    KEPT.mkdir(parents=True, exist_ok=True)
    modules = [path for path in sorted(CORE.rglob("*.py")) if path.stat().st_size]
    tests = Tests(modules)
    tests_files = [path for folder in TESTS for path in sorted(folder.rglob("*.py"))]
    version = _hash([*modules, *tests_files])
    sources = [Source(path) for path in modules if not options.only or path.name in options.only]
    mutants = draw(sources, options.seed, options.count, set() if options.all else known_survivors())
    results = run(mutants, tests, options.jobs, version)
    survivors = [mutant for mutant in mutants if results[mutant.key][0] == SURVIVED]
    print(f"\nseed {options.seed}: {len(mutants)} mutants, {len(mutants) - len(survivors)} killed "
          f"({sum(results[mutant.key][0] == TIMEOUT for mutant in mutants)} of them by a limit), "
          f"{len(survivors)} survived: {1 - len(survivors) / max(1, len(mutants)):.0%}")  # fmt: skip
    for mutant in survivors:
        print(f"\n{mutant.path.relative_to(ROOT)}:{mutant.line} {mutant.where}\n{difference(mutant)}")


if __name__ == "__main__":
    main()
