"""Grammars that an output must match, by llguidance: compiled within limits, cached for requests with the same one.

The API server compiles each to check it; the ranks that sample compile it to mask logits, during their steps, before
its request comes to them. What a schema or a regex means is the library's business.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_medha.core.errors import CheckpointError, MedhaError
from megatron_medha.text.tokenizers.tokenizer_source import find_tokenizer, no_tokenizer, read_tokenizer

if TYPE_CHECKING:
    import llguidance

GRAMMAR_ERROR_PREFIX = "structured output: "  # how the reason begins that a rank gives for such a request's end

# Below the library's own limits: a step's fuel is spent while all other requests of the batch wait. With these the
# first mask of (a{1000}){1000} takes 0.25 s of a core (a vocabulary of bytes), of an ambiguous grammar of 5.5 KB 1.3 s.
_INITIAL_LEXER_FUEL = 200_000     # an enum of 8,000 values still compiles
_STEP_LEXER_FUEL = 50_000         # 4 ms by the library's own account
_STEP_MAX_ITEMS = 20_000          # 1 ms
_MAX_ITEMS_IN_ROW = 1_000
_MAX_LEXER_STATES = 50_000        # 100 MB
_MAX_GRAMMAR_SIZE = 100_000
_MAX_CACHED = 64                  # compiled grammars; clients send the same few over and over


class GrammarError(MedhaError):
    """A grammar that cannot be used; the message is the library's."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary, on any threads; while one compiles, others get what is kept."""

    def __init__(self, tokenizer_json: str, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        """Takes a second for a vocabulary of 150,000. GrammarError if the library cannot read the tokenizer.

        stop_token_ids: at least one; what may follow once the grammar is satisfied.
        """
        try:
            import llguidance
        except ModuleNotFoundError:
            raise GrammarError(
                "structured output needs llguidance, which is not installed on the server: "
                "pip install 'llguidance>=1.9.1,<2'"
            ) from None
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=_num_ids(tokenizer_json, vocab_size), eos_token=list(stop_token_ids)
            )
        except BaseException as error:
            # Two libraries read it: one raises bare Exceptions, and where the other panics that is not even one, of a
            # class that has no public name.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise GrammarError(f"this model's tokenizer cannot be guided: {error}") from None
            raise
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=_MAX_ITEMS_IN_ROW,
            initial_lexer_fuel=_INITIAL_LEXER_FUEL,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # around self._kept, never while anything is compiled

    @classmethod
    def of_checkpoint(cls, home: Path, vocab_size: int, stop_token_ids: Sequence[int]) -> GrammarCompiler:
        """For the tokenizer in that directory or GGUF file."""
        try:
            if (source := find_tokenizer(home)) is None:
                raise GrammarError(f"{home}: {no_tokenizer(home)}")
            text = read_tokenizer(source).content
        except CheckpointError as error:
            raise GrammarError(str(error)) from None
        return cls(text, vocab_size, stop_token_ids)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher that has seen nothing yet, and can go on. GrammarError says what is wrong with the grammar.

        grammar: in the form that the library's own LLMatcher.grammar_from_... functions give.
        """
        return self._keep(grammar).deep_copy()

    def prepare(self, grammar: str) -> None:
        """Compile a grammar that matcher() will be asked for; GrammarError as there."""
        self._keep(grammar)

    def _keep(self, grammar: str) -> llguidance.LLMatcher:
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept
        made = self.compile(grammar)
        with self._lock:
            self._kept[grammar] = made
            if len(self._kept) > _MAX_CACHED:
                self._kept.popitem(last=False)
        return made

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """As matcher(), but nothing is kept."""
        import llguidance

        made = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        # Some grammars turn out to be too much, or to be empty, only where a first token is to be chosen.
        mask = made.compute_bitmask() if not made.is_error() else b""
        if made.is_error():
            raise GrammarError(error_of(made))
        if not any(mask):
            raise GrammarError("no text matches it")
        return made


def error_of(matcher: llguidance.LLMatcher) -> str:
    """The library's message, without the marks it leaves where details were left out."""
    message: str = matcher.get_error()
    return message.replace("<non-verbose/>", "").strip()


def _num_ids(tokenizer_json: str, vocab_size: int) -> int:
    # The library wants a place for each of the tokenizer's own entries too, should the model have fewer.
    import tokenizers

    return max(vocab_size, tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab_size(with_added_tokens=True))
