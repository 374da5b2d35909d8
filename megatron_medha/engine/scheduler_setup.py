"""All a scheduler is made from, as one value: built at start, written into the decision log, rebuilt for a replay."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec

from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.fitted_cost import FittedCost
from megatron_medha.core.cost.online_cost import OnlineCost
from megatron_medha.core.cost.step_cost import CostModel, Hardware, RooflineCost
from megatron_medha.core.cost.step_sizes import NO_STEP_SIZES, PaddedCost, StepSizes
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.scheduling.policies import Policy
from megatron_medha.core.scheduling.prefill_packer import PrefillLimits
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSetup:
    """Configuration and circumstances of a scheduler."""

    config: SchedulerConfig
    shape: ModelShape
    hardware: Hardware
    layout: ParallelLayout  # of one replica
    num_blocks: int  # of each KVP rank
    block_size: int
    max_tokens_per_shard: int | None = None  # of one request on one KVP rank; None: all its memory
    engine: EngineCosts | None = None  # for a cluster that is only calculated; None: the roofline of one that runs
    profile: FittedCost | None = None  # what the cost model starts from, instead of the hardware's data sheet
    kv: KVConfig = NO_PREFIX_CACHE  # as of a decision log that does not say
    step_sizes: StepSizes = NO_STEP_SIZES  # that the ranks fill steps up to
    learns: bool = True  # False: predictions stay what they are before anything has run, as a simulation may want it

    @property
    def shard_tokens(self) -> int:
        """Tokens of one request on one KVP rank, at most."""
        return self.max_tokens_per_shard or self.num_blocks * self.block_size

    @property
    def cluster_cost(self) -> ClusterCost:
        """The cost model of a cluster that is only calculated."""
        assert self.engine is not None
        return ClusterCost(
            shape=self.shape, hardware=self.hardware, engine=self.engine, layout=self.layout, step_sizes=self.step_sizes
        )

    def build(self, policy: Policy | None = None, limits: PrefillLimits | None = None) -> Scheduler:
        """A scheduler that has seen nothing yet; its cost model starts from the profile or the roofline and learns.

        Raises ConfigError if the profile is of another model.
        """
        roofline = RooflineCost(shape=self.shape, hardware=self.hardware, layout=self.layout)
        online = OnlineCost(roofline)
        if self.profile is not None:
            if self.profile.shape != self.shape:
                raise ConfigError(
                    f"profile: measured with {self.profile.shape.name} at another shape or dtype than "
                    f"{self.shape.name} is served in; run `medha profile` again"
                )
            online.start_from(self.profile)
        cost: CostModel = online if self.learns else roofline
        if self.engine is not None and not self.learns:
            cost = self.cluster_cost
        elif self.step_sizes:
            cost = PaddedCost(cost, self.step_sizes)
        memory = KVMemory(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_context_len=self.shape.max_context_len,
            kvp=self.layout.kvp,
            max_tokens_per_shard=self.max_tokens_per_shard,
            watermark=self.config.watermark,
            kv=self.kv,
        )
        return Scheduler(self.config, cost, memory, self.layout.spp, policy, limits, self.step_sizes)

    def header(self) -> dict[str, Any]:
        """As the first line of a decision log."""
        header: dict[str, Any] = msgspec.to_builtins(self)
        if self.kv.prefix_cache:  # the default may change
            header["kv"]["granule_tokens"] = self.kv.tokens_per_granule(self.block_size)
        return header

    @classmethod
    def from_header(
        cls, header: dict[str, Any], config_class: type[SchedulerConfig] = SchedulerConfig
    ) -> SchedulerSetup:
        """The setup a decision log was recorded under. Raises ConfigError if the header is not one of ours."""
        known = {each.name for each in fields(config_class)}
        if isinstance(recorded := header.get("config"), dict) and (unknown := sorted(recorded.keys() - known)):
            raise ConfigError(f"the decision log's scheduler has options that this version lacks: {', '.join(unknown)}")
        try:
            config = msgspec.convert(recorded, config_class)
            return replace(msgspec.convert({**header, "config": {}}, cls), config=config)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the decision log's header does not describe a scheduler: {error}") from None
