"""What a runtime keeps of each live request besides numbers, and how tokens reach the server in batches."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_medha.core.batch import Output, Preempted, Rejected, TokenOut
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.ports import Delivery, ErrorDelivery, Sink, TokenDelivery
from megatron_medha.core.sampling import Sampling, TokenLogprobs
from megatron_medha.grammar.guidance import GRAMMAR_ERROR_PREFIX


@dataclass(slots=True)
class RequestState:
    """What the scheduler never sees of a request."""

    token_ids: array[int]
    sampling: Sampling
    keys: GranuleKeys | None = None  # of the prompt and all that was sampled
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    output_ids: array[int] = field(default_factory=lambda: array("i"))  # delivered so far


@dataclass(frozen=True, slots=True)
class TokenSample:
    """A token as the world sampled it."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class RequestStates:
    """Streams by request id. add() may be called from any thread, the rest on the engine's."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._streams: dict[str, RequestState] = {}
        self._deliveries: list[Delivery] = []
        self._has_keys = False  # whether any request has had some

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, request_id: str) -> RequestState:
        return self._streams[request_id]

    def get(self, request_id: str) -> RequestState | None:
        """The stream, or None if it has ended."""
        return self._streams.get(request_id)

    def add(self, request_id: str, stream: RequestState) -> None:
        """Keep a stream; before its Arrived event goes out."""
        self._streams[request_id] = stream
        self._has_keys = self._has_keys or stream.keys is not None

    def drop(self, request_id: str) -> None:
        """Forget a stream whose client is gone."""
        self._streams.pop(request_id, None)

    def filled_keys(self, sampled: Mapping[str, TokenSample]) -> tuple[tuple[str, bytes], ...]:
        """Keys of the granules that these tokens fill, by request id; once for each batch, before its emit()."""
        filled: list[tuple[str, bytes]] = []
        for request_id, token in sampled.items() if self._has_keys else ():
            stream = self._streams.get(request_id)
            if stream is not None and stream.keys is not None and (key := stream.keys.append(token.token_id)):
                filled.append((request_id, key))
        return tuple(filled)

    def emit(self, output: Output, sampled: Mapping[str, TokenSample]) -> None:
        """Turn a scheduler's output into a delivery; `sampled` holds the tokens of the batch just completed."""
        match output:
            case TokenOut(request_id, _, finish_reason, num_cached_tokens):
                token = sampled[request_id]
                stream = self._streams[request_id]
                # With the first token only: a prompt whose KV is computed again yields them again.
                prompt_logprobs = None if stream.output_ids else tuple(stream.prompt_logprobs) or None
                stream.prompt_logprobs.clear()
                stream.output_ids.append(token.token_id)
                self._deliveries.append(
                    TokenDelivery(
                        request_id, token.token_id, finish_reason, token.logprobs, prompt_logprobs, num_cached_tokens
                    )
                )
                if finish_reason is not None:
                    del self._streams[request_id]
            case Rejected():
                # The scheduler knows of no grammars; one that turns out to be too much was its client's choice.
                is_client_fault = output.is_client_fault or output.why.startswith(GRAMMAR_ERROR_PREFIX)
                self._deliveries.append(ErrorDelivery(output.request_id, output.why, is_client_fault))
                self.drop(output.request_id)
            case Preempted():
                pass  # the client only sees a pause

    def flush(self) -> None:
        """Hand the deliveries over; once per event, so that the server's thread wakes once."""
        if self._deliveries:
            deliveries, self._deliveries = self._deliveries, []
            self._sink(deliveries)

    def end_all(self, why: str) -> None:
        """Tell every live request that nothing more will come."""
        self._deliveries.extend(ErrorDelivery(request_id, why, False) for request_id in self._streams)
        self._streams.clear()
        self.flush()
