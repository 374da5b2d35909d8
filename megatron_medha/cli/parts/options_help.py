"""Help texts made from conf/: its files say what every key means, in which unit, and why. No Hydra needed."""

from __future__ import annotations

import importlib.resources
import re
import textwrap
from collections.abc import Iterator
from importlib.resources.abc import Traversable

CONF_MODULE = "megatron_medha.conf"

_WIDTH = 120
_MAX_SETTING_WIDTH = 44

_KEY_LINE = re.compile(r"^( {0,2})(\w+): *(.*?) *(?:(?<=\s)# *(.*))?$")
_DEFAULT_LINE = re.compile(r"^  - (\w+): *(\w+)$")


# What most people set; the short help of a command that has many keys shows these alone.
COMMON_KEYS = {
    "serve": (
        "checkpoint", "tokenizer", "server.host", "server.port", "server.api_key", "server.served_model_names",
        "model.dtype", "model.device", "model.max_context_len", "model.kv_memory_gib", "parallel.tp", "parallel.spp",
        "parallel.dp", "scheduler.policy", "scheduler.step_budget_s",
    ),
    "simulate": (
        "model", "hardware", "scheduler", "system", "workload", "parallel.tp", "parallel.spp", "parallel.kvp",
        "workload.qps", "workload.path", "workload.duration_s", "scheduler.step_budget_s", "record", "seed", "out",
    ),
    "plan": (
        "model", "hardware", "workload", "workload.qps", "workload.path", "slo.ttft_s", "slo.attainment", "trial_s",
        "max_kvp", "systems", "schedulers", "gpu_usd_per_h",
    ),
    "bench": (
        "url", "serve", "model", "api_key", "workload", "workload.qps", "workload.duration_s", "concurrency",
        "capacity", "seed", "out",
    ),
}  # fmt: skip


def describe_options(name: str, *, is_short: bool = False) -> str:
    """Groups with their options, and every key with its default and comment, for conf/<name>.yaml.

    is_short: of the command's COMMON_KEYS alone, if it has some.
    """
    conf = importlib.resources.files(CONF_MODULE)
    top = (conf / f"{name}.yaml").read_text(encoding="utf-8")
    defaults = {match[1]: match[2] for line in top.splitlines() if (match := _DEFAULT_LINE.match(line))}
    common = COMMON_KEYS.get(name) if is_short else None
    sections: list[str] = []
    if defaults and common is None:
        sections.append("groups (group=option; * is the default):\n" + "".join(_groups(conf, defaults)))
    own = dict(_keys(top, ""))
    # What the command's own file says of a group's key is in force, not what the option says; it stands with the group.
    rows = {key: said for key, said in own.items() if key.partition(".")[0] not in defaults}
    for group, option in defaults.items():
        rows |= _keys((conf / group / f"{option}.yaml").read_text(encoding="utf-8"), f"{group}.")
        rows |= {key: said for key, said in own.items() if key.startswith(f"{group}.")}
    num_keys = len(rows)
    if common is not None:
        groups = {group: (option, f"one of {_options_of(conf, group)}") for group, option in defaults.items()}
        rows = {key: (groups | rows)[key] for key in common if key in groups or key in rows}
    settings = [(f"{key}={value}", comment) for key, (value, comment) in rows.items()]
    width = min(max(len(setting) for setting, _ in settings), _MAX_SETTING_WIDTH)
    keys = "".join(_wrapped(f"  {setting:<{width}}  ", comment) for setting, comment in settings)
    what = "keys" if common is None else "the commonest keys"
    sections.append(f"{what} (key=value; shown with their defaults):\n{keys}")
    if common is not None:
        sections.append(f"All {num_keys} keys and {len(defaults)} groups: medha {name} --help=all\n")
    return "\n".join(sections)


def _options_of(conf: Traversable, group: str) -> str:
    names = sorted(item.name.removesuffix(".yaml") for item in (conf / group).iterdir() if item.name.endswith(".yaml"))
    return ", ".join(names)


def _groups(conf: Traversable, defaults: dict[str, str]) -> Iterator[str]:
    for group, default in defaults.items():
        files = sorted((item for item in (conf / group).iterdir() if item.name.endswith(".yaml")), key=lambda f: f.name)
        for place, item in enumerate(sorted(files, key=lambda f: f.name != f"{default}.yaml")):
            option = item.name.removesuffix(".yaml")
            mark = "*" if option == default else " "
            label = group if place == 0 else ""
            yield _wrapped(f"  {label:<11} {mark}{option:<19} ", _first_comment(item))


def _wrapped(label: str, text: str) -> str:
    indent = " " * len(label)
    if not text:
        return label.rstrip() + "\n"
    return textwrap.fill(text, _WIDTH, initial_indent=label, subsequent_indent=indent) + "\n"


def _first_comment(item: Traversable) -> str:
    words: list[str] = []
    for line in item.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# "))
    return " ".join(words)


def _keys(text: str, prefix: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Key, and its value with what is said of it."""
    outer = ""
    for line in text.splitlines():
        match = _KEY_LINE.match(line)
        if match and match.group(2) != "defaults":
            indent, key, value, comment = match.groups()
            if not indent:
                outer = "" if value else f"{key}."
            if value:
                yield f"{prefix}{outer if indent else ''}{key}", (value, comment or "")
