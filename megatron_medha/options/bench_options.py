"""The options of `medha bench`, and what they become. Hydra is not needed to read this."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_medha.bench.client import Target, TokenRange
from megatron_medha.bench.session_prompts import PromptForm
from megatron_medha.core.errors import ConfigError, check_range
from megatron_medha.options.option_errors import check_http_url
from megatron_medha.options.serve_options import TrackingConfig
from megatron_medha.options.simulate_options import Plots
from megatron_medha.stats.capacity_search import CapacitySearch
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.summary import LengthClasses
from megatron_medha.workload.workload import WorkloadConfig


class IdleMeasurement(Enum):
    """Where TTFT alone on the server comes from."""

    MEASURE = "measure"
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityOptions:
    """Whether and how the most load under the SLO is searched for."""

    start_qps: float | None = None
    tolerance: float = 0.025
    max_probes: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Everything a user can say, as conf/bench.yaml lays it out."""

    url: str = "http://127.0.0.1:8000"
    serve: str | None = None
    model: str | None = None
    api_key: str | None = None
    out: Path | None = None
    seed: int = 0
    concurrency: int | None = None
    exclude_share: float = 0.1
    idle: IdleMeasurement = IdleMeasurement.MEASURE
    prompts: PromptForm = PromptForm.AUTO
    lowest_token: int = 32
    highest_token: int = 126
    request_timeout_s: float = 3600.0
    max_drain_s: float | None = None
    plots: Plots = Plots.AUTO
    objective: str = "all.goodput_per_s"
    workload: WorkloadConfig
    slo: Slo
    classes: LengthClasses
    capacity: CapacityOptions
    tracking: TrackingConfig

    def __post_init__(self) -> None:
        check_http_url("url", self.url)
        for key, low, high in (
            ("concurrency", 1, 100_000), ("exclude_share", 0.0, 0.49), ("request_timeout_s", 0.1, 1e6),
            ("max_drain_s", 0.0, 1e9),
        ):  # fmt: skip
            check_range(key, getattr(self, key), low, high)
        if self.idle is IdleMeasurement.SKIP and self.slo.ttft_s is None:
            raise ConfigError(
                "idle=skip: first-token deadlines follow from TTFT alone on the server; "
                "give slo.ttft_s, or idle=measure"
            )
        if self.workload.sessions is not None:
            for key, value in (("concurrency", self.concurrency), ("capacity.start_qps", self.capacity.start_qps),
                               ("max_drain_s", self.max_drain_s)):  # fmt: skip
                if value is not None:
                    raise ConfigError(f"{key}={value:g}: turns of sessions come when earlier ones have ended; leave it "
                        "null; workload.sessions.max_live sets how many sessions run at a time")
        if self.capacity.start_qps is not None and self.concurrency is not None:
            raise ConfigError(
                f"capacity.start_qps={self.capacity.start_qps:g}: capacity is a rate of arrivals; "
                f"leave concurrency={self.concurrency} away"
            )
        for key in ("decision_log", "metrics_log", "timeline"):
            if (path := getattr(self.tracking, key)) is not None:
                raise ConfigError(f"tracking.{key}={path}: the server writes that, not its client; "
                    "use tracking=none or tracking=wandb")

    @property
    def target(self) -> Target:
        """The server."""
        url = self.url.rstrip("/").removesuffix("/v1")
        return Target(
            url=url, model=self.model, api_key=self.api_key, request_timeout_s=self.request_timeout_s
        )

    @property
    def tokens(self) -> TokenRange:
        """What prompts are made of."""
        return TokenRange(lowest=self.lowest_token, highest=self.highest_token)

    def capacity_search(self) -> CapacitySearch | None:
        """A search that has not begun, if one is asked for."""
        if self.capacity.start_qps is None:
            return None
        return CapacitySearch(
            start_qps=self.capacity.start_qps,
            attainment=self.slo.attainment,
            tolerance=self.capacity.tolerance,
            max_probes=self.capacity.max_probes,
        )
