"""What the pages tell people to type works: every command composes, and the reference is what --help says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from megatron_medha.cli.chat import ChatConfig
from megatron_medha.cli.check_bits import CheckBitsOptions
from megatron_medha.cli.medha import COMMANDS
from megatron_medha.cli.parts import model_words
from megatron_medha.cli.parts.arguments import Arguments, parse_arguments
from megatron_medha.cli.parts.hub_models import hub_name
from megatron_medha.cli.plan import words_of_loads
from megatron_medha.cli.run_batch import BatchOptions, with_file_keys
from megatron_medha.cli.selftest import SelftestConfig
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.bench_options import BenchOptions
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.plan_options import PlanOptions
from megatron_medha.options.serve_options import ProfileOptions, ServeOptions, serve_config
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from megatron_medha.system import machine
from megatron_medha.workload.workload import Workload
from tests.docs.commands_in_text import Shown, commands_in
from tests.docs.test_extending import write_files
from tools.cli_reference import reference

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS: dict[str, type] = {
    "serve": ServeOptions,
    "simulate": SimulateOptions,
    "bench": BenchOptions,
    "plan": PlanOptions,
    "profile": ProfileOptions,
    "chat": ChatConfig,
    "selftest": SelftestConfig,
    "run-batch": BatchOptions,
    "check-bits": CheckBitsOptions,
}
NUM_WORDS = {
    "explain": (2, 2), "replay": (1, 1), "version": (0, 0), "grafana": (0, 0), "compile": (0, 1), "models": (0, 1),
}  # fmt: skip
SWEEPS = ("simulate", "bench")
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 101,
    "num_hidden_layers": 2, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
FIRST_TRIED = 4  # of a sweep's combinations


def shown() -> Iterator[tuple[str, Shown]]:
    seen: set[tuple[str, ...]] = set()
    for page in PAGES:
        for command in commands_in(page.read_text(encoding="utf-8")):
            if command.words not in seen:
                seen.add(command.words)
                yield f"{page.name}:{command.line} medha {' '.join(command.words)}", command


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the placeholders of the pages stand for; a machine with room for every example."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    for name in ("tiny", "smollm2-135m-instruct"):
        (tmp_path / "checkpoints" / name).symlink_to(directory)
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\n1,200,20\n")
    (tmp_path / "my_conf" / "scheduler").mkdir(parents=True)
    (tmp_path / "my_conf" / "scheduler" / "mine.yaml").write_text("defaults:\n  - lars\n\nstep_budget_s: 0.03\n")
    (tmp_path / "my_conf" / "model").mkdir(exist_ok=True)
    (tmp_path / "my_conf" / "model" / "mine.yaml").write_text("defaults:\n  - llama3_8b\n")
    write_files(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 1 << 42)
    monkeypatch.setenv("MEDHA_API_KEY", "a-key")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(model_words, "local_file", lambda *_: tmp_path / "hub" / "config.json")
    checkpoints = dict.fromkeys(("DIR", "DIR2", "/models/model"), str(directory))
    return {**checkpoints, "FILE": str(trace), "URL": "http://127.0.0.1:8000"}


@pytest.mark.parametrize("command", [pytest.param(command, id=name) for name, command in shown()])
def test_a_command_that_a_page_shows_composes(command: Shown, world: dict[str, str]) -> None:
    name, *words = command.words
    if name == "COMMAND":
        return
    assert name in COMMANDS, f"there is no `medha {name}`"
    if command.error is not None:
        with pytest.raises(ConfigError) as caught:
            check(name, [placed(word, world) for word in words])
        assert str(caught.value) == command.error
        return
    check(name, [placed(word, world) for word in words])


def test_the_reference_is_what_help_prints_now() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference(), (
        "run python tools/cli_reference.py > docs/cli.md"
    )


def test_every_link_between_the_pages_leads_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def placed(word: str, world: dict[str, str]) -> str:
    """A word with the placeholders filled in."""
    key, equals, value = word.partition("=")
    if not equals:
        return world.get(word, word)
    return key + equals + world.get(value, value)


def check(name: str, words: list[str]) -> None:
    """Everything of a command that can be wrong before it begins to run."""
    if name in NUM_WORDS:
        if words != ["--help"]:
            low, high = NUM_WORDS[name]
            assert low <= len(words) <= high, f"medha {name} takes {low} to {high} words"
        return
    words = with_file_keys(words) if name == "run-batch" else words
    arguments = parse_arguments(words, command=name, can_sweep=name in SWEEPS)
    if name == "report":
        assert arguments.wants_help or any("=" not in word for word in words), "medha report needs a directory"
        assert all("=" not in word or word.startswith(("out=", "x=")) for word in words)
    elif name == "plan":
        for of_load in words_of_loads(words):
            compose_all(name, parse_arguments(of_load, command=name).overrides, arguments)
    elif not arguments.wants_help:
        for overrides in combinations(arguments):
            compose_all(name, overrides, arguments)


def combinations(arguments: Arguments) -> list[tuple[str, ...]]:
    """The jobs of a sweep, the first few of them; Hydra's own words are not ours to check."""
    if not arguments.is_multirun:
        return [arguments.overrides]
    choices: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides([*arguments.overrides]):
        if override.key_or_group.split(".")[0].split("/")[0] == "hydra":
            continue
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif override.is_interval_sweep():
            choices.append([f"{override.key_or_group}={override.value().start}"])
        else:
            choices.append([f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
    return [*itertools.islice(itertools.product(*choices), FIRST_TRIED)]


def compose_all(name: str, overrides: tuple[str, ...], arguments: Arguments) -> None:
    if name in ("train-tiny", "fetch-model"):
        # Their options' classes import torch: names are checked, which is all that can rot.
        assert {word.partition("=")[0] for word in overrides} <= keys_of(name)
        return
    options = freeze(compose(name.replace("-", "_"), OPTIONS[name], overrides, arguments.config_dir), OPTIONS[name])
    if isinstance(options, ServeOptions):
        # A profile is measured; there is none to read here.
        has_files = not any(word.startswith("profile=") for word in overrides)
        is_of_hub = hub_name(options.checkpoint) is not None
        if has_files and not is_of_hub and (options.checkpoint is not None or options.tokenizer is not None):
            serve_config(options)
    elif isinstance(options, SimulateOptions):
        if options.workload.path is None or options.workload.path.exists():
            simulation_config(options)
    elif isinstance(options, PlanOptions):
        assert options.hardware.num_devices > 1, "a plan wants a cluster"
    elif isinstance(options, BenchOptions):
        options.capacity_search()
        if options.workload.path is not None and options.workload.path.exists():
            Workload(options.workload, options.seed)


def keys_of(name: str) -> set[str]:
    text = (ROOT / "conf" / f"{name.replace('-', '_')}.yaml").read_text(encoding="utf-8")
    return set(re.findall(r"^(\w+):", text, re.MULTILINE)) - {"defaults"}
