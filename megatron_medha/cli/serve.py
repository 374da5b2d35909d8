"""`medha serve`: composes the configuration, starts engine and HTTP server, and ends both in order."""

from __future__ import annotations

import _thread
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_medha.cli.parts.arguments import FLAGS
from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.core.ports import EnginePhase
from megatron_medha.system.log_lines import set_up_logging
from megatron_medha.system.memory_trim import TRIM_INTERVAL_S, malloc_trim, set_mmap_threshold

if TYPE_CHECKING:
    from megatron_medha.options.serve_options import ServeConfig, ServeOptions
    from megatron_medha.server.server_config import ServerConfig

USAGE = f"""\
usage: medha serve checkpoint=DIR [group=option] [key=value ...]

Serves one model behind the OpenAI API. DIR is a Megatron torch_dist checkpoint, a Hugging Face model (Llama, Mistral,
Qwen2, Qwen3; safetensors) or one of DeepSpeed's ZeRO; which of them is recognised. Options are written as in Hydra.

examples:
  medha serve checkpoint=checkpoints/tiny
  medha serve checkpoint=DIR server.port=8001 server.served_model_names=[my-model]
  medha serve checkpoint=DIR scheduler=fcfs scheduler.step_budget_s=0.03
  medha serve checkpoint=DIR model.kv_memory_gib=4 tracking=jsonl
  medha serve checkpoint=DIR parallel.spp=2 parallel.tp=2 recovery=none
  medha serve checkpoint=DIR parallel.tp=8 parallel.dp=2 launch=attach model.kv_memory_gib=40
  medha serve runtime=sim model=llama3_8b hardware=h100 tokenizer=DIR    # no model runs; steps take predicted time

flags:
{FLAGS}"""

_PROGRESS_INTERVAL_S = 5.0
_FORCED_STOP_S = 1.0
_HARD_EXIT_S = 5.0      # after the second signal, where stopping at once does not work
_EXIT_CODE_SIGNALLED = 130        # exit code
_TRACKING_STOP_S = 30.0  # W&B may have logs to send
# A rank that refuses what the user asked for reports the name of the error first.
_USER_ERRORS = ("ConfigError: ", "CheckpointError: ", "UnsupportedModelError: ", "DependencyError: ")


def run(words: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    options = read_options("serve", words, USAGE, _options_class)
    if options is None:
        return 0
    from megatron_medha.options.serve_options import serve_config

    def read_server_config() -> ServerConfig:
        """What the files and the environment say now, for a reload."""
        from megatron_medha.server.run_server import check_private_files

        now = read_options("serve", words, USAGE, _options_class)
        assert now is not None
        check_private_files(now.server)
        return now.server

    return _serve(serve_config(options), options, read_server_config)


def _options_class() -> type[ServeOptions]:
    from megatron_medha.options.serve_options import ServeOptions

    return ServeOptions


def _serve(config: ServeConfig, options: ServeOptions, read_server_config: Callable[[], ServerConfig]) -> int:
    set_up_logging(config.log_level, is_json=config.log_format.value == "json")
    stops = _StopSignals()
    stops.install_early_handlers()
    # What is imported stays for good: collecting among it costs a tenth of the start now, and pauses later.
    gc.disable()
    set_mmap_threshold()
    # Imported after the configuration has been found right: errors should come at once.
    from megatron_medha.cli.parts.serve_parts import make_engine, model_name_of, public_options
    from megatron_medha.cli.parts.tracking import Tracking
    from megatron_medha.server.app import create_app
    from megatron_medha.server.observe.metrics import Metrics
    from megatron_medha.server.observe.request_log import RequestLog
    from megatron_medha.server.observe.tracing import OtelTraces
    from megatron_medha.server.run_server import run as run_app
    from megatron_medha.server.service import Service
    from megatron_medha.text.sampling_defaults import read_sampling_defaults
    from megatron_medha.text.tokenizer import Tokenizer

    metrics = Metrics()
    homes = [directory for directory in (options.checkpoint, config.tokenizer) if directory is not None]
    sampling_defaults = read_sampling_defaults(homes if config.server.generation_config == "auto" else ())
    journal = RequestLog(metrics)
    engine = make_engine(config, journal.watch)
    tokenizer: Future[Tokenizer] = ThreadPoolExecutor(1, "tokenizer").submit(Tokenizer.load, config.tokenizer)
    service = Service(
        engine,
        tokenizer,
        config.server,
        metrics=metrics,
        journal=journal,
        slo=config.slo_classes,
        read_config=read_server_config,
        traces=OtelTraces(config.tracking.otlp_endpoint) if config.tracking.otlp_endpoint is not None else None,
        sampling_defaults=sampling_defaults,
    )
    tracking = Tracking(config.tracking, engine, metrics, public_options(options))
    printer = _StatusPrinter(service, needs_key=config.server.needs_key)

    def on_listening(url: str) -> None:
        gc.freeze()
        gc.enable()
        stops.count(lambda: printer.failure is None)
        service.prepare()
        printer.start(url)
        tracking.start()

    try:
        run_app(create_app(service, model_name_of(config)), config.server, on_listening)
    finally:
        gc.enable()
        printer.end()
        # Where the server was forced to stop, it has not stopped the engine.
        engine.stop(_FORCED_STOP_S)
        tracking.stop(_TRACKING_STOP_S)  # last: it keeps the logs, which are complete now
    return _exit_code(printer, stops)


def _exit_code(printer: _StatusPrinter, stops: _StopSignals) -> int:
    if printer.failure is not None:
        kind = next((kind for kind in _USER_ERRORS if printer.failure.startswith(kind)), None)
        print(f"medha serve: {printer.failure.removeprefix(kind or '')}", file=sys.stderr)
        return 1 if kind is None else 2
    if stops.num_signals > 1:
        # Threads that tokenize a long prompt would hold us up; the second Ctrl-C means now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_EXIT_CODE_SIGNALLED)
    if not printer.has_listened:
        return _EXIT_CODE_SIGNALLED if stops.is_early else 1
    print_line("stopped")
    return 0


class _StopSignals:
    """SIGINT and SIGTERM: before the server listens they end the start, then uvicorn takes them and we count."""

    def __init__(self) -> None:
        self.num_signals = 0
        self.is_early = False
        self._num_ends = 0

    def install_early_handlers(self) -> None:
        """From now on; uvicorn puts these back when it has shut down and raises its signal again."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)

    def count(self, is_asked_for: Callable[[], bool]) -> None:
        """Count, and pass on to whoever has taken the signals meanwhile. We also stop ourselves, unasked."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._counting(signal.getsignal(number), is_asked_for))

    def _counting(
        self, inner: Any, is_asked_for: Callable[[], bool]
    ) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self.num_signals += 1
            if self.num_signals == 1 and is_asked_for():
                print_line("\nstopping; once more to stop at once")
            elif self.num_signals == 2:
                _force_exit()
            elif self.num_signals > 2:
                os._exit(_EXIT_CODE_SIGNALLED)
            inner(number, frame)

        return handle

    def _end(self, number: int, frame: FrameType | None) -> None:
        # Once it comes while the server starts, or from uvicorn after it has stopped; after that, what is left hangs.
        self._num_ends += 1
        if self._num_ends > 1:
            os._exit(_EXIT_CODE_SIGNALLED)
        self.is_early = not self.num_signals
        raise KeyboardInterrupt


def _force_exit() -> None:
    """End within seconds, whatever the event loop and other threads do; ranks end with this process."""
    # A thread of C: where another holds the interpreter's lock, none of Python's runs. It prints where all are.
    faulthandler.dump_traceback_later(_HARD_EXIT_S + 1.0, exit=True)
    # Not threading's: the signal may have come while the main thread held one of its locks.
    _thread.start_new_thread(_schedule_force_exit, ())


def _schedule_force_exit() -> None:
    time.sleep(_HARD_EXIT_S)
    os._exit(_EXIT_CODE_SIGNALLED)


class _StatusPrinter:
    """Prints when the server listens and when the model is ready, and ends the process if the engine fails."""

    def __init__(self, service: Any, needs_key: bool) -> None:
        self.failure: str | None = None
        self.has_listened = False
        self._service = service
        self._needs_key = needs_key
        self._url = ""
        self._changed = threading.Event()  # the status has, or nothing more is to be printed
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self, url: str) -> None:
        """The server listens there."""
        self._url = url
        self.has_listened = True
        print_line(f"listening on {url} after {process_age_s():.2f} s; loading the model")
        self._service.on_status(self._changed.set)
        self._thread.start()

    def end(self) -> None:
        """Print nothing more."""
        self._has_ended = True
        self._changed.set()
        status = self._service.status
        if status.phase is EnginePhase.FAILED and self.failure is None:
            self.failure = status.detail

    def _run(self) -> None:
        is_ready, lost_s, due_s = False, None, time.monotonic() + _PROGRESS_INTERVAL_S
        while not self._has_ended:
            status = self._service.status
            match status.phase:
                case EnginePhase.FAILED:
                    return self._fail(status.detail)
                case EnginePhase.STOPPED:
                    return None
                case EnginePhase.READY if not is_ready:
                    is_ready, due_s = True, time.monotonic() + TRIM_INTERVAL_S
                    self._print_ready()
                case EnginePhase.RECOVERING if is_ready and lost_s is None:
                    lost_s = time.monotonic()
                    print_line(f"recovering: {status.detail}; requests wait")
                case EnginePhase.READY if lost_s is not None:
                    print_line(f"ready again after {time.monotonic() - lost_s:.1f} s")
                    lost_s = None
                case _:
                    pass
            if time.monotonic() >= due_s:
                due_s = time.monotonic() + (TRIM_INTERVAL_S if is_ready else _PROGRESS_INTERVAL_S)
                if is_ready:
                    malloc_trim()
                else:
                    print_line(f"loading: {status.detail}, {100 * status.fraction:.0f}%")
            self._changed.wait(max(0.0, due_s - time.monotonic()))
            self._changed.clear()
        return None

    def _fail(self, detail: str) -> None:
        # A server without an engine can answer nothing but 503: better gone, so that whoever runs it starts it again.
        if not self._has_ended:
            self.failure = detail
            os.kill(os.getpid(), signal.SIGTERM)

    def _print_ready(self) -> None:
        facts = self._service.engine.facts
        num_tokens = facts.num_blocks * facts.block_size
        key = " -H \"Authorization: Bearer $MEDHA_API_KEY\"" if self._needs_key else ""
        print_line(
            f"ready after {process_age_s():.2f} s: {facts.shape.name} on {facts.device}; "
            f"KV for {num_tokens:,} tokens, requests up to {facts.max_request_tokens:,}\n\n"
            # Not greedy: the tiny model would write nothing but spaces.
            f"  curl {self._url}/v1/completions -H 'Content-Type: application/json'{key} \\\n"
            """    -d '{"prompt": "def main():", "max_tokens": 100, "temperature": 0.7, "seed": 1}'\n"""
            f"  medha chat url={self._url}\n"
        )


def print_line(text: str) -> None:
    """Tell whoever reads stdout. A server whose log has lost its reader, or its disk, serves on, and can be stopped."""
    try:
        print(text, flush=True)
    except OSError:
        # Of what is left in the buffer Python would complain again at exit.
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def process_age_s() -> float:
    """Seconds since this process was started, the interpreter's own start included where the system tells."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as stat:
            start_ticks = int(stat.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not on Linux
        return time.perf_counter() - _IMPORTED_S


_IMPORTED_S = time.perf_counter()
