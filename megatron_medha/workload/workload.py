"""The traffic a system is put under: requests in order of arrival, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import islice
from math import inf
from pathlib import Path
from random import Random

from megatron_medha.core.errors import ConfigError, check_ranges
from megatron_medha.core.request import Request
from megatron_medha.workload.arrivals import ArrivalProcess, arrival_times_s
from megatron_medha.workload.key_chain import KeyChain, spans_of_ids
from megatron_medha.workload.lengths import draw_mix
from megatron_medha.workload.request_feed import OpenLoop, RequestFeed
from megatron_medha.workload.session_file import read_session_rows
from megatron_medha.workload.session_mix import SessionsConfig, draw_sessions
from megatron_medha.workload.session_play import SessionPlay
from megatron_medha.workload.sessions import AgentSession, build_sessions
from megatron_medha.workload.trace_file import TraceFile


class ZeroLengths(Enum):
    """What to do with trace rows that have no prompt or no output tokens."""

    ERROR = "error"
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """Requests from a trace, or drawn from the quantiles of the paper's mix; or sessions, from a file or drawn."""

    path: Path | None = None
    tokens_per_hash_id: int = 512
    zero_lengths: ZeroLengths = ZeroLengths.ERROR
    long_share: float = 0.0488
    long_prompt_scale: float = 1.0
    short_prompt_scale: float = 1.0
    output_scale: float = 1.0
    arrivals: ArrivalProcess = ArrivalProcess.AUTO
    qps: float | None = None
    time_scale: float = 1.0
    duration_s: float | None = None
    num_requests: int | None = None
    cv: float = 2.0
    burst_factor: float = 5.0
    burst_s: float = 30.0
    period_s: float = 300.0
    amplitude: float = 0.8
    sessions: SessionsConfig | None = None  # None: requests that do not wait for each other

    def __post_init__(self) -> None:
        check_ranges("workload", self, 0.0, 1.0, "long_share", "amplitude")
        check_ranges("workload", self, 1e-3, 1e4, "long_prompt_scale", "short_prompt_scale", "output_scale")
        check_ranges("workload", self, 1e-6, 1e6, "qps", "time_scale")
        check_ranges("workload", self, 1e-3, 1e9, "duration_s", "burst_s", "period_s")
        check_ranges("workload", self, 1, 1 << 40, "num_requests", "tokens_per_hash_id")
        check_ranges("workload", self, 0.05, 100.0, "cv")
        check_ranges("workload", self, 1.0, 1e6, "burst_factor")

    @property
    def drawn_arrivals(self) -> ArrivalProcess:
        """How arrivals are drawn where they are not recorded."""
        return ArrivalProcess.POISSON if self.arrivals is ArrivalProcess.AUTO else self.arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadFacts:
    """What one pass over all requests tells."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    max_prompt_tokens: int
    max_request_tokens: int  # prompt and output of one
    last_arrival_s: float    # of sessions, if every turn ended when it came: no turn is later than the last one by less
    num_new_tokens: int      # of all prompt tokens, those that no earlier turn of their session had


class Workload:
    """Every call of requests() gives the same requests, one by one: a simulated day need not be held in memory.

    What comes when is in feed(): of sessions, a turn comes only after others have ended.

    Raises ConfigError, on construction, for options that contradict each other, and for a trace that cannot be read
    to the end of the part that is needed.
    """

    def __init__(self, config: WorkloadConfig, seed: int) -> None:
        self.config = config
        self._seed = seed
        self._stretch = 1.0
        self._is_recorded = False
        self.has_keys = config.sessions is not None  # whether prompts may be found to begin alike
        if config.sessions is not None:
            self._check_sessions()
        elif config.path is None:
            self._check_synthetic()
        else:
            self._look_into(self._trace(config.path))
        self.facts = self._count()

    def feed(self, granule_tokens: int | None) -> RequestFeed:
        """The requests as they come. granule_tokens: of their prefix keys; None: they have none."""
        if self.config.sessions is None:
            return OpenLoop(self.requests(granule_tokens), granule_tokens)
        return self.play(granule_tokens)

    def play(self, granule_tokens: int | None = None) -> SessionPlay:
        """A workload of sessions as they come."""
        config = self.config
        assert config.sessions is not None, "these are no sessions"
        return SessionPlay(
            self.sessions, granule_tokens, config.sessions.max_live,
            inf if config.duration_s is None else config.duration_s, config.sessions.names_sessions,
        )  # fmt: skip

    @cached_property
    def sessions(self) -> list[AgentSession]:
        """All sessions and their subagents."""
        config = self.config
        assert config.sessions is not None, "these are no sessions"
        if config.path is None:
            rows = draw_sessions(config.sessions, self._seed)
        else:
            rows = read_session_rows(config.path.expanduser(), config.tokens_per_hash_id)
        return build_sessions(rows, config.tokens_per_hash_id)

    def requests(self, granule_tokens: int | None = None) -> Iterator[Request]:
        """The requests, in order of arrival; ids r0, r1, ... in that order. Those of a trace with hash ids have keys.

        Of sessions, all turns as if each ended when it came.
        """
        config = self.config
        if config.sessions is not None:
            play = self.play(granule_tokens)
            while play.next_s < inf:
                request = play.pop()
                yield request
                play.ended(request.request_id, request.arrival_s, True)
            return
        for index, (arrival_s, num_prompt_tokens, num_output_tokens, hash_ids) in enumerate(
            islice(self._recorded() if self._is_recorded else self._drawn(), config.num_requests)
        ):
            if config.duration_s is not None and arrival_s >= config.duration_s:
                return
            keys = b""
            if granule_tokens is not None and hash_ids:
                chain = KeyChain(granule_tokens)
                chain.extend(spans_of_ids(hash_ids, num_prompt_tokens, config.tokens_per_hash_id))
                keys = chain.keys
            yield Request(
                request_id=f"r{index}",
                num_prompt_tokens=num_prompt_tokens,
                max_output_tokens=num_output_tokens,
                arrival_s=arrival_s,
                prefix_keys=keys,
            )

    def __str__(self) -> str:
        """Where requests and their arrivals come from, and how much there is of them; for people."""
        config, facts = self.config, self.facts
        if config.sessions is not None:
            return self._sessions_text()
        rate = "" if config.qps is None else f" at {config.qps:g} requests/s"
        if config.path is None or not self._is_recorded:
            arrivals = f"arrivals {config.drawn_arrivals.value}{rate}"
        elif self._stretch == 1.0:
            arrivals = "arrivals as recorded"
        else:
            arrivals = f"arrivals as recorded, {self._stretch:.4g} times as far apart" + (f",{rate}" if rate else "")
        source = "drawn from the mix" if config.path is None else f"of {config.path}"
        return (
            f"{facts.num_requests:,} requests in {facts.last_arrival_s:,.0f} s, {source}, {arrivals}: "
            f"{facts.num_prompt_tokens:,} prompt tokens, the longest {facts.max_prompt_tokens:,}; "
            f"{facts.num_output_tokens:,} output tokens"
        )

    def _sessions_text(self) -> str:
        config, facts, sessions = self.config, self.facts, self.sessions
        assert config.sessions is not None
        num_subagents = sum(one.parent is not None for one in sessions)
        source = "drawn" if config.path is None else f"of {config.path}"
        live = "" if config.sessions.max_live is None else f", {config.sessions.max_live} at a time"
        return (
            f"{len(sessions) - num_subagents:,} sessions with {num_subagents:,} subagents, {source}{live}: "
            f"{facts.num_requests:,} turns with {facts.num_prompt_tokens:,} prompt tokens, of which "
            f"{facts.num_new_tokens / facts.num_prompt_tokens:.1%} are new in their session, the longest prompt "
            f"{facts.max_prompt_tokens:,}; {facts.num_output_tokens:,} output tokens"
        )

    def _trace(self, path: Path) -> TraceFile:
        return TraceFile(
            path=path.expanduser(),
            skips_zero_lengths=self.config.zero_lengths is ZeroLengths.SKIP,
            tokens_per_hash_id=self.config.tokens_per_hash_id,
        )

    def _check_sessions(self) -> None:
        config = self.config
        for key, value, way_out in (
            ("qps", config.qps, "workload.sessions.max_live and workload.sessions.gap_scale set the load"),
            ("num_requests", config.num_requests, "give workload.sessions.num_sessions, or workload.duration_s"),
        ):
            if value is not None:
                raise ConfigError(f"workload.{key}={value:g}: turns of sessions come when earlier ones have ended; "
                    f"leave it null; {way_out}")
        if config.arrivals is not ArrivalProcess.AUTO or config.time_scale != 1.0:
            raise ConfigError(
                f"workload.arrivals={config.arrivals.value} workload.time_scale={config.time_scale:g}: turns of "
                "sessions come when earlier ones have ended; leave both as they are, or use workload=trace"
            )
        sessions = config.sessions
        assert sessions is not None
        if config.path is not None and sessions != SessionsConfig(
            max_live=sessions.max_live, names_sessions=sessions.names_sessions
        ):
            raise ConfigError(
                f"workload.path={config.path}: a file says itself what its sessions are; of workload.sessions only "
                "max_live and names_sessions may be set"
            )

    def _check_synthetic(self) -> None:
        config = self.config
        if config.arrivals is ArrivalProcess.RECORDED:
            raise ConfigError("workload.arrivals=recorded: only a trace has recorded arrivals; give workload.path=FILE")
        if config.qps is None:
            raise ConfigError("workload.path=null and workload.qps=null: name a trace, workload.path=FILE, "
                "or give the synthetic mix a rate in requests per second")
        if config.duration_s is None and config.num_requests is None:
            raise ConfigError("workload.duration_s=null: a synthetic mix has no end of its own; "
                "give seconds, or workload.num_requests")
        if config.time_scale != 1.0:
            raise ConfigError(f"workload.time_scale={config.time_scale:g}: scales recorded arrivals; "
                "for a synthetic mix give workload.qps")

    def _look_into(self, trace: TraceFile) -> None:
        """Decide where arrivals come from, and read as many rows as will be used, so that errors come at the start."""
        config = self.config
        first = next(trace.rows(), None)
        if first is None:
            raise ConfigError(f"workload.path={config.path}: no requests in it; it needs at least one row")
        self.has_keys = bool(first.hash_ids)
        has_times = first.arrival_s is not None
        if config.arrivals is ArrivalProcess.RECORDED and not has_times:
            raise ConfigError(f"workload.arrivals=recorded: {config.path} has no arrival times; "
                "use workload.arrivals=poisson with workload.qps")
        self._is_recorded = has_times and config.arrivals in (ArrivalProcess.AUTO, ArrivalProcess.RECORDED)
        if not self._is_recorded:
            if config.qps is None:
                raise ConfigError(f"workload.qps=null: arrivals for {config.path} have to be drawn; "
                    "give requests per second")
            if config.time_scale != 1.0:
                raise ConfigError(f"workload.time_scale={config.time_scale:g}: scales recorded arrivals; "
                    "these are drawn, give workload.qps")
            return
        self._stretch = config.time_scale
        if config.qps is not None:
            if config.time_scale != 1.0:
                raise ConfigError(f"workload.time_scale={config.time_scale:g}: workload.qps={config.qps:g} scales "
                    "the recorded arrivals too; give one of them")
            num_rows, last_s = 0, 0.0
            for row in trace.rows():
                num_rows += 1
                last_s = row.arrival_s or 0.0
            if not last_s:
                raise ConfigError(f"workload.qps={config.qps:g}: all requests of {config.path} come at once; "
                    "use workload.arrivals=poisson")
            self._stretch = num_rows / last_s / config.qps

    def _recorded(self) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
        """Arrival, prompt and output tokens and hash ids of every row."""
        assert self.config.path is not None
        for row in self._trace(self.config.path).rows():
            assert row.arrival_s is not None
            yield row.arrival_s * self._stretch, *row[1:]

    def _drawn(self) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
        """The same with arrivals that are drawn, and lengths of the trace or the mix.

        Arrivals and lengths have streams of random numbers of their own: another rate or process leaves every
        request's lengths as they were.
        """
        config = self.config
        assert config.qps is not None
        arrivals_s = arrival_times_s(
            config.drawn_arrivals, config.qps, Random(f"arrivals {self._seed}"), cv=config.cv,
            burst_factor=config.burst_factor, burst_s=config.burst_s, period_s=config.period_s,
            amplitude=config.amplitude,
        )  # fmt: skip
        if config.path is not None:
            for arrival_s, row in zip(arrivals_s, self._trace(config.path).rows(), strict=False):
                yield arrival_s, *row[1:]
        else:
            draw = Random(f"lengths {self._seed}")
            for arrival_s in arrivals_s:
                yield arrival_s, *draw_mix(
                    draw, config.long_share, short_scale=config.short_prompt_scale,
                    long_scale=config.long_prompt_scale, output_scale=config.output_scale,
                ), ()  # fmt: skip

    def _count(self) -> WorkloadFacts:
        num_requests = num_prompt_tokens = num_output_tokens = max_prompt = max_request = 0
        last_s = 0.0
        for request in self.requests():
            num_requests += 1
            num_prompt_tokens += request.num_prompt_tokens
            num_output_tokens += request.max_output_tokens
            max_prompt = max(max_prompt, request.num_prompt_tokens)
            max_request = max(max_request, request.num_prompt_tokens + request.max_output_tokens)
            last_s = request.arrival_s
        if not num_requests:
            raise ConfigError(f"workload.duration_s={self.config.duration_s}: no request arrives within it; "
                "give more, or a higher workload.qps")
        return WorkloadFacts(
            num_requests=num_requests,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            max_prompt_tokens=max_prompt,
            max_request_tokens=max_request,
            last_arrival_s=last_s,
            num_new_tokens=num_prompt_tokens if self.config.sessions is None else sum(
                turn.num_new_tokens for one in self.sessions for turn in one.turns
            ),
        )
