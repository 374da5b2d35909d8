"""`medha serve`: composes the configuration, starts engine and HTTP server, and ends both in order."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_medha.cli.parts.arguments import FLAGS
from megatron_medha.cli.parts.checkpoint_process import begin_check
from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.cli.parts.hub_models import hub_name, local_directory
from megatron_medha.cli.parts.status_printer import StatusPrinter, print_line
from megatron_medha.cli.parts.stop_signals import EXIT_CODE_SIGNALLED, StopSignals
from megatron_medha.cluster.launch_config import LaunchKind
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import CheckpointError, ConfigError, MedhaError, UnsupportedModelError
from megatron_medha.options.serve_options import (
    RuntimeKind,
    ServeConfig,
    ServeOptions,
    TokenizerMissingError,
    serve_config,
)
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.system.libc import set_mmap_threshold
from megatron_medha.system.log_lines import set_up_logging

USAGE = f"""\
usage: medha serve DIR_OR_HUB_NAME [group=option] [key=value ...]

Serves one model over the OpenAI API. DIR is a Megatron torch_dist checkpoint, a Hugging Face model (safetensors) or a
DeepSpeed ZeRO checkpoint; the format is detected. ORG/NAME, or ORG/NAME@REVISION, is downloaded from the Hugging Face
hub and cached. Options are written as in Hydra; common flags of vLLM and SGLang work too (docs/from_vllm.md).

examples:
  medha serve checkpoints/tiny
  medha serve Qwen/Qwen3-0.6B
  medha serve DIR server.port=8001 server.served_model_names=[my-model]
  medha serve DIR --port 8001 --served-model-name my-model
  medha serve DIR scheduler=fcfs scheduler.step_budget_s=0.03
  medha serve DIR model.kv_memory_gib=4 tracking=jsonl
  medha serve DIR parallel.spp=2 parallel.tp=2 recovery=none
  medha serve DIR parallel.tp=8 parallel.dp=2 launch=attach model.kv_memory_gib=40
  medha serve runtime=sim model=llama3_8b hardware=h100 tokenizer=DIR    # no model runs; steps take predicted time
  medha serve --check DIR parallel.tp=2                                  # what it is and whether it fits; loads nothing

flags:
{FLAGS}  --check              print what the checkpoint is, what it takes here, and which layouts divide it; then exit
"""

_FORCED_STOP_S = 1.0
_TRACKING_STOP_S = 30.0  # W&B may have logs to send
# A rank that refuses what the user asked for reports the name of the error first.
_USER_ERRORS = ("ConfigError: ", "CheckpointError: ", "UnsupportedModelError: ", "DependencyError: ")


def run(words: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    options = read_options("serve", words, USAGE, lambda: ServeOptions)
    if options is None:
        return 0
    options = with_local_model(options)
    if "--check" in words:
        return _check(_config(options))

    def read_server_config() -> ServerConfig:
        """What the files and the environment say now, for a reload."""
        from megatron_medha.server.run_server import check_private_files

        now = read_options("serve", words, USAGE, lambda: ServeOptions)
        assert now is not None
        check_private_files(now.server)
        return _named_after_hub(now).server

    return _serve(_config(options), read_server_config)


def _config(options: ServeOptions) -> ServeConfig:
    """serve_config(); where the tokenizer is missing, what is wrong with the checkpoint is said first."""
    try:
        return serve_config(options)
    except TokenizerMissingError as missing:
        if options.tokenizer is not None or options.runtime is RuntimeKind.SIM or options.checkpoint is None:
            raise
        _ignore_warnings_of_imports()
        from megatron_medha.checkpoints.detect import read_model_config

        try:
            read_model_config(options.checkpoint.expanduser())
        except MedhaError as error:
            raise ConfigError(f"checkpoint={error}\n{missing}") from None
        raise


def with_local_model(options: ServeOptions) -> ServeOptions:
    """With directories where names of the Hugging Face hub were given. ConfigError for what is wrong with them."""
    named = _named_after_hub(options)
    checkpoint = local_directory("checkpoint", options.checkpoint)
    tokenizer = local_directory("tokenizer", options.tokenizer, has_weights=False)
    if options.runtime is RuntimeKind.RANKS and checkpoint is not None and checkpoint.expanduser().is_dir():
        from megatron_medha.worker.startup.early_check import check_checkpoint

        _ignore_warnings_of_imports()
        try:
            check_checkpoint(checkpoint.expanduser())
        except (CheckpointError, UnsupportedModelError) as error:  # before the server listens, and as wrong as a key
            raise ConfigError(str(error)) from None
    return replace(named, checkpoint=checkpoint, tokenizer=tokenizer)


def _named_after_hub(options: ServeOptions) -> ServeOptions:
    """A model of the hub is served under its name there, not that of a folder of the cache."""
    name = hub_name(options.checkpoint)
    if name is None or options.server.served_model_names:
        return options
    return replace(options, server=replace(options.server, served_model_names=(name.partition("@")[0],)))


def _ignore_warnings_of_imports() -> None:
    # Megatron-core tells of every optional package that is missing; none is needed here.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")


def _check(config: ServeConfig) -> int:
    if not isinstance(config.world, RankConfig):
        raise ConfigError("--check: reads a checkpoint, and runtime=sim has none")
    _ignore_warnings_of_imports()
    from megatron_medha.worker.startup.checkpoint_check import checkpoint_facts

    for name, fact in checkpoint_facts(config.world):
        print(f"{name:<12}{fact}")
    return 0


def _serve(config: ServeConfig, read_server_config: Callable[[], ServerConfig]) -> int:
    options = config.options
    set_up_logging(options.log_level, is_json=options.log_format.value == "json")
    stops = StopSignals()
    stops.install_early_handlers()
    # What is imported stays for good: collecting among it costs a tenth of the start now, and pauses later.
    gc.disable()
    set_mmap_threshold()
    wait_for_check = _begin_check(config)
    # Imported after the configuration has been found right: errors should come at once.
    from megatron_medha.cli.parts.serve_parts import make_service, model_name_of, public_options
    from megatron_medha.cli.parts.tracking import Tracking
    from megatron_medha.server.app import create_app
    from megatron_medha.server.run_server import run as run_app

    service = make_service(config, read_server_config)
    tracking = Tracking(options.tracking, service.engine, service.metrics, public_options(options))
    printer = StatusPrinter(service, needs_key=options.server.needs_key)

    def on_listening(url: str) -> None:
        gc.freeze()
        gc.enable()
        stops.count(lambda: printer.failure is None, lambda: service.lifecycle.waits_for)
        service.prepare()
        printer.start(url)
        tracking.start()

    try:
        wait_for_check()  # a refusal comes before the server listens
        run_app(create_app(service, model_name_of(config)), options.server, on_listening)
    finally:
        gc.enable()
        printer.end()
        # Where the server was forced to stop, it has not stopped the engine.
        service.engine.stop(_FORCED_STOP_S)
        tracking.stop(_TRACKING_STOP_S)  # last: it keeps the logs, which are complete now
    return _exit_code(printer, stops)


def _begin_check(config: ServeConfig) -> Callable[[], None]:
    """Starts what with_local_model() could not check; call the result to wait for it."""
    # Ranks elsewhere have other devices than this machine.
    if isinstance(config.world, RankConfig) and config.options.launch.kind is not LaunchKind.ATTACH:
        from megatron_medha.worker.startup.early_check import needs_torch

        if needs_torch(Path(config.world.checkpoint)):
            return begin_check(config.world)
    return lambda: None


def _exit_code(printer: StatusPrinter, stops: StopSignals) -> int:
    if printer.failure is not None:
        kind = next((kind for kind in _USER_ERRORS if printer.failure.startswith(kind)), None)
        print(f"medha serve: {printer.failure.removeprefix(kind or '')}", file=sys.stderr)
        return 1 if kind is None else 2
    if stops.num_signals > 1:
        # Threads that tokenize a long prompt would hold us up; the second Ctrl-C means now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE_SIGNALLED)
    if not printer.has_listened:
        return EXIT_CODE_SIGNALLED if stops.is_early else 1
    print_line("stopped")
    return 0
