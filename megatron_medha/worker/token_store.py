"""What a rank remembers of each live request: its tokens, its sampling parameters and where its KV lies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from megatron_medha.cluster.messages import NewRequest
from megatron_medha.core.sampling import Sampling
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.staging import Staging
from megatron_medha.model.sampler import has_penalty, is_plain_greedy

if TYPE_CHECKING:
    import llguidance

_MIN_GROWTH_TOKENS = 256


@dataclass(slots=True)
class GrammarState:
    """How far a request's output has got in its grammar."""

    matcher: llguidance.LLMatcher
    num_consumed: int = 0  # output tokens the matcher has seen


class StoredRequest:
    """One request's state on the rank. Tokens are only ever appended."""

    def __init__(self, new: NewRequest, vocab_size: int) -> None:
        """vocab_size: ids outside of it make the request faulty."""
        token_ids = np.frombuffer(new.token_ids, dtype="<i4")
        self.request_id = new.request_id
        self.sampling: Sampling = new.sampling
        self.is_plain_greedy = is_plain_greedy(new.sampling)
        # Whether what may come next depends on which tokens came before.
        self.depends_on_tokens = new.sampling.grammar is not None or has_penalty(new.sampling)
        self.stop_token_ids = frozenset(new.sampling.stop_token_ids)
        self.num_prompt_tokens = new.num_prompt_tokens
        self.num_tokens = len(token_ids)
        self.output_ids: list[int] = token_ids[self.num_prompt_tokens :].tolist()
        self.slot_table: SlotTable | None = None  # where its KV lies on this rank; None: nowhere
        self.guided: GrammarState | None = None  # where tokens are sampled, once one is, of a request with a grammar
        self.fault: str | None = _fault_of(token_ids, new.num_prompt_tokens, vocab_size)
        self._tokens = token_ids  # of any length from num_tokens on; read-only until it is first grown
        self._prompt_ids: Tensor | None = None

    def prompt_ids(self, staging: Staging) -> Tensor | None:
        """Prompt tokens, int32, where they are penalised: copied to the device once."""
        if self._prompt_ids is None and self.sampling.repetition_penalty != 1.0:
            (self._prompt_ids,) = staging.upload([self._tokens[: self.num_prompt_tokens].copy()])
        return self._prompt_ids

    def tokens(self, start: int, num_tokens: int) -> np.ndarray:
        """Tokens [start, start + num_tokens), int32, a view; prompt and output, as far as they exist."""
        end = start + num_tokens
        assert end <= self.num_tokens, f"{self.request_id}: token {end - 1} of {self.num_tokens} is asked for"
        return self._tokens[start:end]

    def token(self, index: int) -> int:
        """One token."""
        assert index < self.num_tokens, f"{self.request_id}: token {index} of {self.num_tokens} is asked for"
        return int(self._tokens[index])

    def append(self, token_id: int) -> None:
        """Add a sampled token."""
        if self.num_tokens == len(self._tokens):
            # By an eighth, so that a million-token prompt is copied a handful of times, not at every token.
            grown = np.empty(self.num_tokens + max(_MIN_GROWTH_TOKENS, self.num_tokens // 8), dtype=np.int32)
            grown[: self.num_tokens] = self._tokens
            self._tokens = grown
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        self.output_ids.append(token_id)


class TokenStore:
    """The live requests of a rank, by id."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._requests: dict[str, StoredRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __getitem__(self, request_id: str) -> StoredRequest:
        assert request_id in self._requests, f"request {request_id} was never announced to this rank"
        return self._requests[request_id]

    def add(self, new_requests: Iterable[NewRequest]) -> None:
        """Take up requests. An id that is known already begins again."""
        for new in new_requests:
            self._requests[new.request_id] = StoredRequest(new, self._vocab_size)

    def append(self, request_id: str, token_id: int) -> None:
        """Add a token that was sampled elsewhere."""
        assert 0 <= token_id < self._vocab_size, f"{request_id}: token id {token_id} was sampled of {self._vocab_size}"
        self[request_id].append(token_id)

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests; one that never got as far as this rank is no error."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)


def _fault_of(token_ids: np.ndarray, num_prompt_tokens: int, vocab_size: int) -> str | None:
    """Why the rank cannot run these tokens; the server checks them too, but one bad id would end every request here."""
    if not 0 < num_prompt_tokens <= len(token_ids):
        return f"{len(token_ids)} tokens for a prompt of {num_prompt_tokens}"
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= vocab_size:
        return f"token id {lowest if lowest < 0 else highest} is not in the vocabulary of {vocab_size}"
    return None
