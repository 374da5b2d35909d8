"""Loads the directories named in its arguments, one after the other, as the server would; run as a program.

It may use only so much memory, and each directory only so much processor time. It prints a JSON object: for each
directory what came of it, and the names of what had changed in the process afterwards.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import json
import pathlib
import resource
import signal
import sys
import types
from pathlib import Path
from typing import Any

import torch

from megatron_medha.checkpoints.detect import load_weights, read_model_config
from megatron_medha.core.errors import CheckpointError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from megatron_medha.text.tokenizer import Tokenizer

MEMORY_BYTES = 1536 << 20  # beside what the imports take
CASE_S = 20
WATCHED = [
    argparse.Namespace, argparse.ArgumentParser, builtins, collections.OrderedDict, io.BytesIO, pathlib.Path,
    pathlib.PurePath, pathlib.PosixPath, types.SimpleNamespace, torch.Size, torch.Tensor, torch._utils,
    torch._utils._rebuild_tensor, torch._utils._rebuild_tensor_v2, torch.serialization._get_layout,
    torch.distributed.checkpoint.metadata, torch.distributed.checkpoint.metadata.Metadata,
]  # fmt: skip


def load(directory: Path, groups: MedhaPGs) -> None:
    if (directory / "tokenizer_config.json").exists():
        Tokenizer.load(directory).encode("Hello, world")
        return
    config = read_model_config(directory)
    model = build_model(config, dtype=torch.float32, device=torch.device("cpu"), pgs=groups, is_initialized=False)
    load_weights(model, config, directory, lambda what, fraction: None)


def attributes(thing: Any) -> dict[str, Any]:
    """What BUILD could change of it."""
    found = dict(getattr(thing, "__dict__", {}))
    return found | {"defaults": getattr(thing, "__defaults__", None), "code": getattr(thing, "__code__", None)}


class OutOfTime(BaseException):
    """A case did not end."""


def end_case(*_: Any) -> None:
    raise OutOfTime


def outcome(directory: Path, groups: MedhaPGs) -> str:
    # Of the processor, as other work on the machine must not count. What holds the interpreter's lock meets SIGKILL.
    signal.setitimer(signal.ITIMER_PROF, CASE_S)
    used_s = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + 3 * CASE_S, resource.RLIM_INFINITY))
    try:
        load(directory, groups)
        return "loaded"
    except CheckpointError as error:
        return f"refused: {error}"
    except BaseException as error:  # a crash is what this is here to find
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(directories: list[str]) -> int:
    """One line of JSON for each directory: the process may not survive the next."""
    torch.set_num_threads(1)
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))
    groups = build_groups(ParallelLayout())
    signal.signal(signal.SIGPROF, end_case)
    taken_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken_bytes + MEMORY_BYTES, resource.RLIM_INFINITY))
    for directory in map(Path, directories):
        before = [attributes(thing) for thing in WATCHED]
        result = outcome(directory, groups)
        changed = [
            repr(thing) for thing, was in zip(WATCHED, before, strict=True) if attributes(thing).items() != was.items()
        ]
        print(json.dumps({"name": directory.name, "result": result, "changed": changed}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
