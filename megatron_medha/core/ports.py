"""What the loop needs from the world, and what the server needs from the engine. No implementation here."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from megatron_medha.core.batch import Batch, Event, FinishReason, Output
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling, TokenLogprobs


class SchedulerProtocol(Protocol):
    """The scheduler as the loop sees it."""

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """Take note of what happened; return what clients must hear of it."""

    def schedule(self, now_s: float) -> Batch | None:
        """Choose the next batch; None when nothing can run."""


class Runtime(Protocol):
    """A world batches run in: real ranks, or a simulation."""

    def now_s(self) -> float:
        """The world's clock, seconds; monotonic."""

    def next_event(self) -> Event | None:
        """Wait for the next event; None when the world has ended."""

    def has_room(self) -> bool:
        """Whether another batch may be submitted now, be it one that overtakes those in flight."""

    def submit(self, batch: Batch) -> None:
        """Start computing a batch."""

    def emit(self, output: Output) -> None:
        """Pass an output on to the client it concerns."""


class WakingRuntime(Runtime, Protocol):
    """A world that also tells the scheduler when a moment has come (Woken)."""

    wakes_at_s: Callable[[], float]  # set once, before the loop begins: when that is; infinity: never


class Observer(Protocol):
    """Watches the loop without changing it: the decision log, metrics, traces."""

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        """The scheduler has handled this event."""

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """The scheduler has formed this batch; it is about to be submitted."""


@dataclass(frozen=True, slots=True)
class TokenDelivery:
    """One sampled token on its way to the client. The last one carries the finish reason."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # positions 1.., with the first token only
    num_cached_tokens: int = 0  # of the prompt, likewise


@dataclass(frozen=True, slots=True)
class ErrorDelivery:
    """The request ends with an error; nothing follows."""

    request_id: str
    message: str
    is_client_fault: bool


Delivery = TokenDelivery | ErrorDelivery
Sink = Callable[[Sequence[Delivery]], None]


class EnginePhase(Enum):
    """Where the engine as a whole stands."""

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"  # ranks were lost and are coming up again; requests are taken and wait
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Phase, with what a person would want to read beside it."""

    phase: EnginePhase
    detail: str = ""       # what is being loaded, or why it failed
    fraction: float = 0.0  # of loading, 0..1
    num_failures: int = 0    # times that ranks were lost since the start
    num_recoveries: int = 0  # times that they came up again


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What is known once the ranks are ready."""

    shape: ModelShape
    num_blocks: int         # of one KVP rank
    block_size: int
    max_request_tokens: int  # prompt + output that one request may have: min of context and KV memory
    stop_token_ids: tuple[int, ...]
    device: str
    granule_tokens: int | None = None  # of the prefix cache; None: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """A momentary count, for /metrics and admission."""

    num_waiting: int = 0
    num_prefilling: int = 0
    num_decoding: int = 0
    num_free_blocks: int = 0    # free, or cached and used by nobody
    num_cached_blocks: int = 0  # of these, those that hold cached prefixes
    num_blocks: int = 0
    num_waiting_tokens: int = 0  # prompt tokens not computed yet, over all live requests


class ReplicaState(NamedTuple):
    """One of the independent replicas behind an engine."""

    status: EngineStatus
    load: EngineLoad


class EngineClient(Protocol):
    """The engine as the server sees it. Every method may be called from any thread and returns at once."""

    @property
    def status(self) -> EngineStatus:
        """Loading, ready, recovering, failed or stopped."""

    def on_status(self, on_change: Callable[[], None]) -> None:
        """Have this called after every change of status, on the engine's own thread; it must return at once."""

    @property
    def facts(self) -> EngineFacts | None:
        """None until ready."""

    @property
    def load(self) -> EngineLoad:
        """How busy it is."""

    @property
    def replicas(self) -> Sequence[ReplicaState]:
        """The same of each replica; one where there are not several."""

    def now_s(self) -> float:
        """The clock that Request.arrival_s is measured on."""

    def start(self, sink: Sink) -> None:
        """Start; deliveries of all requests go to `sink`, called on the engine's own thread."""

    def submit(
        self, request: Request, token_ids: array[int], sampling: Sampling, keys: GranuleKeys | None = None
    ) -> None:
        """Hand a request over; its deliveries follow through the sink. The id must be new.

        token_ids: of the prompt; not to be changed, as the choices of one request share it.
        keys: of the prompt, to be continued by the output; None: the prefix cache takes and gives nothing.
        """

    def abort(self, request_id: str) -> None:
        """End a request early; nothing more is delivered for it once this has been taken up."""

    def stop(self, timeout_s: float) -> None:
        """End the ranks and the engine's thread; requests still alive get an ErrorDelivery."""
