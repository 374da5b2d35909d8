"""What the routes know once the engine takes requests: its facts, tokenizer and sampling defaults."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.ports import EngineFacts
from megatron_medha.server.http.request_body import PromptLimits
from megatron_medha.text.sampling_defaults import OPENAI_DEFAULTS, SamplingDefaults
from megatron_medha.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Ready:
    """What is known once requests can be taken."""

    facts: EngineFacts
    tokenizer: Tokenizer
    sampling_defaults: SamplingDefaults = OPENAI_DEFAULTS

    @property
    def prompt_limits(self) -> PromptLimits:
        """What no prompt within the model's context exceeds."""
        num_tokens = self.facts.max_request_tokens
        return PromptLimits(num_tokens, self.tokenizer.max_chars(num_tokens))
