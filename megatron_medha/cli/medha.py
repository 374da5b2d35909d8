"""The `medha` command: finds the subcommand, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.system.compiled_core import use_compiled_core
from megatron_medha.system.secret_values import hide_secrets


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: a module with run(arguments) -> exit code, imported only when it is called."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "serve": Command("megatron_medha.cli.serve", "serve a checkpoint over the OpenAI API"),
    "chat": Command("megatron_medha.cli.chat", "chat with a running server in the terminal"),
    "train-tiny": Command("megatron_medha.cli.train_tiny", "train a tiny GPT checkpoint to try the server with"),
    "profile": Command("megatron_medha.cli.profile", "measure step times on this machine, for serve profile=FILE"),
    "simulate": Command("megatron_medha.cli.simulate", "simulate a workload on a modelled cluster; no GPU needed"),
    "explain": Command("megatron_medha.cli.explain", "explain step by step why a simulated request waited"),
    "plan": Command("megatron_medha.cli.plan", "find the layout that meets a latency target with the fewest GPUs"),
    "bench": Command("megatron_medha.cli.bench", "load-test a running server"),
    "run-batch": Command("megatron_medha.cli.run_batch", "run a file of requests in OpenAI's batch format"),
    "report": Command("megatron_medha.cli.report", "compare finished runs in one report"),
    "replay": Command("megatron_medha.cli.replay", "check that a decision log replays to the same batches"),
    "selftest": Command("megatron_medha.cli.selftest", "fuzz-test a running server"),
    "compile": Command("megatron_medha.cli.compile", "compile the scheduler to C, for faster decisions"),
    "version": Command("megatron_medha.cli.version", "print versions, for a bug report"),
}

_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's part of it

EXAMPLES = """\
examples:
  medha train-tiny                                 # makes checkpoints/tiny
  medha serve checkpoint=checkpoints/tiny
  medha serve checkpoint=DIR scheduler=fcfs scheduler.step_budget_s=0.03 server.port=8001
  medha chat
  medha COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0, 1 for a failure, 2 for a user's error, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    command = COMMANDS.get(name.removeprefix("--"))
    if command is None:
        from megatron_medha.options.option_errors import nearest

        print(f"medha {name}: unknown command; {nearest(name, list(COMMANDS))}medha --help lists them", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():
        # Written to a log, a progress bar that moves ten times a second buries everything else.
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    use_compiled_core()
    try:
        exit_code: int = importlib.import_module(command.module).run(arguments[1:])
        sys.stdout.flush()
        return exit_code
    except MedhaError as error:
        is_config = isinstance(error, ConfigError)
        causes = str(error).splitlines() if is_config else [str(error)]
        for cause in causes:
            print(f"medha {name}: {hide_secrets(cause, arguments[1:])}", file=sys.stderr)
        return 2 if is_config else 1
    except BrokenPipeError:
        # The reader of our output has gone (medha serve --help | head); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"medha {name}: {error.filename or 'results'}: {error.strerror}; make room, or write elsewhere",
            file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def usage() -> str:
    """What `medha --help` prints."""
    lines = "".join(f"  {name:<12}{command.summary}\n" for name, command in COMMANDS.items())
    return f"usage: medha COMMAND [key=value ...]\n\ncommands:\n{lines}\n{EXAMPLES}"
