"""Which tokens a request's grammar allows next, where tokens are sampled."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_medha.grammar.guidance import GRAMMAR_ERROR_PREFIX, GrammarCompiler, GrammarError, error_of
from megatron_medha.worker.token_store import GrammarState, StoredRequest

_log = logging.getLogger(__name__)

# All other requests of the batch wait for a mask, so a grammar that takes longer ends its request. It gets that far
# only if it was quick at the beginning, which the API server has tried.
MAX_MASK_S = 1.0


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """Masks of a batch, and requests that have none."""

    by_row: Mapping[int, Tensor]  # (vocab_size,) bool
    faults: Mapping[str, str]     # why a request cannot go on, by its id


class GrammarMasks:
    """Masks for the requests of a rank that have a grammar.

    A matcher follows from the request's output so far. It is kept with the request while that lives on the rank, and
    made again from the tokens where the request comes again, after a rank's death or on another kvp rank.
    Grammars are compiled before their requests come (prepare), so that no step waits for that; one that comes
    unprepared, after the ranks were lost, is compiled in its step.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        """tokenizer: the directory or GGUF file that has one; read by load(), else when the first grammar comes."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = stop_token_ids
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()  # until there is a compiler

    def load(self) -> None:
        """Read the vocabulary before there are steps.

        A tenth of a second, for 150,000 entries over one, in which the library lets no other thread of this process
        run. Its error becomes the answer to requests with a grammar.
        """
        if not self._stop_token_ids:
            return  # no answer of this model could end; the API server takes no grammar
        try:
            self._the_compiler()
        except GrammarError as error:
            _log.info("structured_output_unavailable reason=%r", str(error))

    def prepare(self, grammar: str) -> None:
        """Compile a grammar before its request comes; on any thread. One that cannot be fails its request later."""
        try:
            self._the_compiler().prepare(grammar)
        except GrammarError as error:
            _log.info("grammar_compile_failed reason=%r", str(error))

    def allowed(self, requests: Sequence[StoredRequest]) -> AllowedTokens:
        """Masks by place in `requests`, of those that have a grammar."""
        by_row: dict[int, Tensor] = {}
        faults: dict[str, str] = {}
        for row, request in enumerate(requests):
            if request.sampling.grammar is None:
                continue
            try:
                by_row[row] = self._mask(request, request.sampling.grammar)
            except GrammarError as error:
                faults[request.request_id] = f"{GRAMMAR_ERROR_PREFIX}{error}"
        return AllowedTokens(by_row, faults)

    def _mask(self, request: StoredRequest, grammar: str) -> Tensor:
        if request.guided is None:
            request.guided = GrammarState(self._the_compiler().matcher(grammar))
        guided = request.guided
        started_s = time.monotonic()
        new_ids = request.output_ids[guided.num_consumed :]
        if new_ids and not guided.matcher.consume_tokens(new_ids):
            raise GrammarError(error_of(guided.matcher) or "the output so far does not match")
        guided.num_consumed += len(new_ids)
        bits = np.frombuffer(guided.matcher.compute_bitmask(), dtype=np.uint8)
        if guided.matcher.is_error():
            raise GrammarError(error_of(guided.matcher))
        if (taken_s := time.monotonic() - started_s) > MAX_MASK_S:
            raise GrammarError(f"the next token took {taken_s:.1f} s to find, the limit is {MAX_MASK_S:g} s")
        is_allowed = np.unpackbits(bits, bitorder="little", count=self._vocab_size)
        return torch.from_numpy(is_allowed).view(torch.bool)

    def _the_compiler(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler.of_checkpoint(self._tokenizer, self._vocab_size, self._stop_token_ids)
            return self._compiler
