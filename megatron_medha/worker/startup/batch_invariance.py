"""Makes a row's bits independent of what else is in the batch on a GPU, as far as there are kernels for it."""

from __future__ import annotations

import logging
from importlib import import_module

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.attention.backend import AttentionBackend

log = logging.getLogger(__name__)

_KEYS_AT_ONCE = 128  # of the largest tile
_PACKAGE = "batch_invariant_ops"  # Thinking Machines' matrix products in Triton, for all of torch in this process


def make_batch_invariant(backend: AttentionBackend) -> None:
    """Attention sums keys up in parts of the backend's partition_tokens at fixed positions, merged in their order.

    Products of linear layers come from a package where it is installed; the log says whether. Raises ConfigError for a
    backend that cuts keys by its load, and for parts its kernels do not take.
    """
    if not backend.has_fixed_splits:
        raise ConfigError(
            f"model.batch_invariant=true: attention_backend={backend.name} cuts keys by what else is in the batch; "
            "use attention_backend=triton"
        )
    split_tokens = backend.partition_tokens
    if split_tokens % _KEYS_AT_ONCE:
        raise ConfigError(f"kv.partition_tokens={split_tokens}: on a GPU it must be a multiple of {_KEYS_AT_ONCE}")
    backend.fixed_split_tokens = split_tokens
    log.info("batch_invariant_attention split_tokens=%d", split_tokens)
    try:
        import_module(_PACKAGE).enable_batch_invariant_mode()
    except (ImportError, AttributeError) as error:
        log.warning("batch_invariant_linear_layers=false reason=%r (pip install %s)", str(error), _PACKAGE)
    else:
        log.info("batch_invariant_linear_layers=true package=%s", _PACKAGE)
