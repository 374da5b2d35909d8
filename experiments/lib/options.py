"""Options of conf/ as the classes they become, for experiments that need no command."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.options.compose import CONF_MODULE

T = TypeVar("T")


def hardware(name: str) -> Hardware:
    """conf/hardware/<name>.yaml."""
    return _option("hardware", name, Hardware)


def engine(name: str) -> EngineCosts:
    """conf/engine/<name>.yaml."""
    return _option("engine", name, EngineCosts)


def model_shape(name: str) -> ModelShape:
    """The shape in conf/model/<name>.yaml."""
    return _option("model", name, ModelShape, "shape")


def _option(group: str, name: str, kind: type[T], key: str | None = None) -> T:
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        composed = OmegaConf.to_container(compose(overrides=[f"+{group}={name}"]), resolve=True)
    values = composed[group]
    return msgspec.convert(values if key is None else values[key], kind)
