"""The `medha` command: finds the subcommand, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.system.compiled_core import use_compiled_core
from megatron_medha.system.secret_values import hide_secrets

COMMANDS = {  # and what each does; cli/NAME.py has run(words) -> exit code, and is imported when it is called
    "serve": "serve a checkpoint over the OpenAI API",
    "chat": "chat with a running server in the terminal",
    "fetch-model": "download a small chat model to try the server with",
    "train-tiny": "train a tiny GPT checkpoint to try the server with",
    "profile": "measure step times on this machine, for serve profile=FILE",
    "simulate": "simulate a workload on a modelled cluster; no GPU needed",
    "explain": "explain step by step why a simulated request waited",
    "plan": "find the layout that meets a latency target with the fewest GPUs",
    "bench": "load-test a running server",
    "run-batch": "run a file of requests in OpenAI's batch format",
    "report": "compare finished runs in one report",
    "replay": "check that a decision log replays to the same batches",
    "selftest": "fuzz-test a running server",
    "check-bits": "check that answers have the same bits whatever the traffic and the layout",
    "grafana": "print a Grafana dashboard for the server's metrics",
    "compile": "compile the scheduler to C, for faster decisions",
    "models": "list the families of models that are served",
    "version": "print versions, for a bug report",
}

_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's part of it

EXAMPLES = """\
examples:
  medha fetch-model                                # makes checkpoints/smollm2-135m-instruct
  medha serve checkpoints/smollm2-135m-instruct
  medha serve DIR scheduler=fcfs scheduler.step_budget_s=0.03 server.port=8001
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
    if (command := name.removeprefix("--")) not in COMMANDS:
        from megatron_medha.options.option_errors import nearest

        print(f"medha {name}: unknown command; {nearest(name, list(COMMANDS))}medha --help lists them", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():
        # Written to a log, a progress bar that moves ten times a second buries everything else.
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    use_compiled_core()
    try:
        exit_code: int = importlib.import_module(f"megatron_medha.cli.{command.replace('-', '_')}").run(arguments[1:])
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
    lines = "".join(f"  {name:<12}{summary}\n" for name, summary in COMMANDS.items())
    return f"usage: medha COMMAND [key=value ...]\n\ncommands:\n{lines}\n{EXAMPLES}"
