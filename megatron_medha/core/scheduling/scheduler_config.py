"""Options of the scheduler: one frozen class, checked when it is made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from megatron_medha.core.errors import ConfigError, check_ranges
from megatron_medha.core.scheduling.chunking import Chunking, ChunkRule
from megatron_medha.core.scheduling.policies import POLICIES, is_user_policy, policy_named


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How batches are formed. The defaults are those of the Medha paper and its authors' code."""

    policy: str = "lars"
    is_preemptive: bool = True            # False: a prefill that has begun goes before all others
    chunking: Chunking = Chunking.ADAPTIVE
    step_budget_s: float = 0.05           # of a step, over all pipeline stages
    tile_tokens: int = 32
    fixed_chunk_tokens: int = 512         # token budget of a step under FIXED
    max_batch_tokens: int = 8192
    max_num_sequences: int = 256          # that own KV at the same time
    max_chunk_tokens: int | None = None   # of one prompt in a step; vLLM's long_prefill_token_threshold
    deadline_multiplier: float = 1.5      # of the prompt's own predicted prefill time
    min_deadline_s: float = 0.5
    has_triage: bool = True               # long prefills that cannot meet their deadline any more let others go first
    slack_margin_steps: float = 8.0       # in step budgets: margin before every deadline, for policies that go by slack
    has_space_sharing: bool = True
    max_relative_slack: float = 0.4       # rho_max: the most of a step that a long prefill gives away
    max_banked_steps: float = 1.0         # the most unused credit that a long prefill's neighbours may save up
    progress_share: float = 0.1           # of each step, kept for the longest overdue prefill; 0: none
    max_skips: int = 10                   # candidates passed over before a batch is closed
    watermark: float = 0.01               # share of blocks kept free for running decodes to grow into
    # Whether a batch of prefill chunks may be held while another overtakes it. auto: on where the ranks can hold one
    # (overtaking.py: resolved); off in simulations, and in decision logs that do not name it.
    interruptible: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if is_user_policy(self.policy):
            policy_named(self.policy)  # says what is wrong with it
        elif self.policy not in (known := self._policies()):
            raise ConfigError(
                f"scheduler.policy={self.policy} is unknown; choose one of {', '.join(known)}, "
                "or name a function of your own as package.module:function"
            )
        check_ranges("scheduler", self, 1e-4, 3600.0, "step_budget_s")
        check_ranges("scheduler", self, 1, 1 << 20, "tile_tokens", "max_num_sequences")
        check_ranges("scheduler", self, 1, 1 << 30, "fixed_chunk_tokens", "max_batch_tokens", "max_chunk_tokens")
        check_ranges("scheduler", self, 0.0, 1e6, "deadline_multiplier", "slack_margin_steps")
        check_ranges("scheduler", self, 1e-6, 1e9, "min_deadline_s")
        check_ranges("scheduler", self, 0.0, 0.99, "max_relative_slack")
        check_ranges("scheduler", self, 0.0, 1e3, "max_banked_steps")
        check_ranges("scheduler", self, 0.0, 1.0, "progress_share")
        check_ranges("scheduler", self, 0, 1 << 30, "max_skips")
        check_ranges("scheduler", self, 0.0, 0.5, "watermark")
        if self.tile_tokens > self.max_batch_tokens:
            raise ConfigError(
                f"scheduler.tile_tokens={self.tile_tokens} must not exceed "
                f"scheduler.max_batch_tokens={self.max_batch_tokens}"
            )
        # All that decode run in every step, and one that prefills beside them must find room for a token.
        if self.max_num_sequences > self.max_batch_tokens:
            raise ConfigError(
                f"scheduler.max_num_sequences={self.max_num_sequences} must not exceed "
                f"scheduler.max_batch_tokens={self.max_batch_tokens}"
            )

    def _policies(self) -> Collection[str]:
        return POLICIES

    @property
    def chunk_rule(self) -> ChunkRule:
        """The bounds of every chunk."""
        return ChunkRule(
            chunking=self.chunking,
            tile_tokens=self.tile_tokens,
            max_tokens=self.max_batch_tokens,
            fixed_tokens=self.fixed_chunk_tokens,
            max_chunk_tokens=self.max_chunk_tokens or self.max_batch_tokens,
        )
