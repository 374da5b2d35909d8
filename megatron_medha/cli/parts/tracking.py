"""Samples of a running server, every few seconds, to a JSON-lines file and to Weights & Biases."""

from __future__ import annotations

import json
import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_medha.cli.parts.wandb_run import check_wandb, save_artifact, start_run
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.ports import EngineClient
from megatron_medha.options.serve_options import TrackingConfig
from megatron_medha.server.observe.metrics import Histogram, Metrics
from megatron_medha.system.checked_files import check_writable

_log = logging.getLogger(__name__)

TrackingSample = dict[str, float]

_COUNTERS = (
    "num_prompt_tokens", "num_output_tokens", "num_ttft_slo_met", "num_ttft_slo_missed", "num_preemptions",
    "num_preempted_tokens", "num_rejected", "num_prefix_queries", "num_prefix_hits",
)
_HISTOGRAMS = ("ttft_s", "inter_token_s", "e2e_s", "queue_s", "step_actual_s", "step_relative_error")


class Tracking:
    """Takes samples on a thread of its own, from start to stop."""

    def __init__(
        self, config: TrackingConfig, engine: EngineClient, metrics: Metrics, options: dict[str, Any]
    ) -> None:
        """options: the composed configuration, kept with the run. Raises DependencyError if wandb is missing, and
        ConfigError for what W&B would refuse or a file that cannot be written: before the model is loaded.
        """
        check_wandb(config)
        for key in ("decision_log", "metrics_log", "timeline"):
            if (path := getattr(config, key)) is not None:
                check_writable(f"tracking.{key}", path)
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._options = options
        self._last_counts: dict[str, list[int]] = {}
        self._last_totals: TrackingSample = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin, if there is anywhere to write to."""
        if self._config.metrics_log is not None or self._config.wandb_project is not None:
            self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Write the last sample and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def sample(self) -> TrackingSample:
        """Counts so far; latencies of what happened since the last sample."""
        load, metrics = self._engine.load, self._metrics
        sample: TrackingSample = {
            "num_waiting": load.num_waiting,
            "num_prefilling": load.num_prefilling,
            "num_decoding": load.num_decoding,
            "num_waiting_tokens": load.num_waiting_tokens,
            "kv_used_share": 1 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0,
            "kv_cached_share": load.num_cached_blocks / load.num_blocks if load.num_blocks else 0.0,
        }
        sample.update({name: getattr(metrics, name) for name in _COUNTERS})
        sample.update({f"num_ended_{reason}": count for reason, count in metrics.num_ended.items()})
        for name in _HISTOGRAMS:
            sample.update(self._since_last(name, getattr(metrics, name)))
        return sample

    def _files(self) -> list[Path]:
        """What the server has written for later, of every replica."""
        logs = [path for path in (self._config.decision_log, self._config.timeline) if path is not None]
        of_replicas = [found for path in logs for found in path.parent.glob(f"{path.stem}.*{path.suffix}")]
        return [*logs, *of_replicas, *([self._config.metrics_log] if self._config.metrics_log is not None else [])]

    def _since_last(self, name: str, histogram: Histogram) -> TrackingSample:
        counts, total = list(histogram.counts), histogram.total
        last_counts = self._last_counts.get(name, [0] * len(counts))
        new = [count - last for count, last in zip(counts, last_counts, strict=True)]
        new_total = total - self._last_totals.get(name, 0.0)
        self._last_counts[name], self._last_totals[name] = counts, total
        if not sum(new):
            return {}
        return {f"{name}_mean": new_total / sum(new)} | {
            f"{name}_p{percent}": quantile(histogram.bounds, new, percent / 100) for percent in (50, 99)
        }

    def _run(self) -> None:
        writers: list[Callable[[TrackingSample], object]] = []
        started_s = time.monotonic()
        try:
            with ExitStack() as stack:
                if self._config.wandb_project is not None:
                    run = start_run(self._config, "serve", self._options, Path())
                    stack.callback(run.finish)
                    stack.callback(lambda: save_artifact(run, "server-logs", self._files()))
                    writers.append(run.log)
                if (path := self._config.metrics_log) is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    stream = stack.enter_context(path.open("w", buffering=1, encoding="utf-8"))
                    writers.append(lambda sample: stream.write(json.dumps(sample) + "\n"))
                is_last = False
                while not is_last:
                    is_last = self._stop.wait(self._config.interval_s)
                    sample = {"time_s": round(time.monotonic() - started_s, 3), **self.sample()}
                    for write in writers:
                        write(sample)
        except ConfigError as error:  # of W&B
            _log.error("tracking_failed", extra={"fields": {"reason": str(error)}})
        except Exception:  # outermost of this thread: whatever a tracker does, requests are served on
            _log.exception("tracking_failed")


def quantile(bounds: tuple[float, ...], counts: list[int], share: float) -> float:
    """An upper bound of a quantile: the bound of the bucket it lies in (of the last one, where that has none)."""
    place = bisect_left(list(accumulate(counts)), share * sum(counts))
    return bounds[min(place, len(bounds) - 1)]
