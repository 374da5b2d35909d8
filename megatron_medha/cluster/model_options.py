"""How a model is run: the one place where its options are defined and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_medha.core.errors import ConfigError, check_member, check_range
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.kernels.backend_table import BACKENDS, is_rehearsal

_MAX_BLOCK_SIZE = 4096  # tokens; beyond that the last block of every request wastes more than tables ever cost


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How the model is run. conf/model/auto.yaml says more of each; what depends on the checkpoint the rank checks."""

    dtype: str = "auto"                     # auto: the checkpoint's own
    device: str = "auto"
    block_size: int | None = None           # tokens in a KV block; None: the attention backend's own
    kv_memory_gib: float | None = None
    kv_memory_share: float | None = None    # of free memory, while kv_memory_gib is None; None: the device's own
    kv_dtype: str = "auto"                  # auto: the model's
    fp8: str = "none"                       # recipe of the linear layers
    weight_dtype: str = "auto"              # of the linear layers; auto: the model's
    cuda_graphs: bool = True                # read only on a GPU
    batch_invariant: bool = False           # read only on a GPU
    max_context_len: int | None = None      # None: the checkpoint's own
    num_threads: int | None = None          # of each rank; None: its share of the cores it may use
    attention_backend: str = "auto"
    attention_tiles: str = "auto"           # of the triton backend; auto: measured when a rank is loaded
    linear_backend: str = "auto"            # CPU: kernels of the linear layers
    instruction_set: str = "auto"           # CPU: what the native kernels use
    virtual_tp: str = "1"                   # CPU: slices of row-parallel layers, whose sums have one order over any tp
    shape: ModelShape | None = None         # of a model that is only simulated

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise ConfigError(
                "model.dtype=float16: a CPU multiplies float16 matrices thousands of times slower; "
                "use bfloat16, which takes the same memory"
            )
        check_member("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_member("model.device", self.device, ("auto", "cpu", "cuda"))
        check_member("model.attention_backend", self.attention_backend, ("auto", *BACKENDS))
        check_member("model.linear_backend", self.linear_backend, ("auto", "native", "onednn"))
        check_member("model.instruction_set", self.instruction_set, ("auto", "amx", "avx512_bf16", "avx512", "avx2"))
        check_member("model.kv_dtype", self.kv_dtype, ("auto", "fp8_e4m3"))
        check_member("model.fp8", self.fp8, ("none", "tensorwise", "blockwise"))
        check_member("model.weight_dtype", self.weight_dtype, ("auto", "int8", "int4"))
        is_cpu = self.device == "cpu" and not is_rehearsal()
        if is_cpu and self.attention_backend != "auto" and BACKENDS[self.attention_backend].device == "cuda":
            raise ConfigError(f"model.attention_backend={self.attention_backend}: needs model.device=cuda; use auto")
        if self.attention_tiles != "auto" and self.attention_backend not in ("auto", "triton"):
            raise ConfigError(
                f"model.attention_tiles={self.attention_tiles}: read by model.attention_backend=triton only, "
                f"not {self.attention_backend}"
            )
        if is_cpu and self.attention_tiles != "auto":
            raise ConfigError(f"model.attention_tiles={self.attention_tiles}: needs model.device=cuda; use auto")
        if is_cpu and self.kv_dtype != "auto":
            raise ConfigError(f"model.kv_dtype={self.kv_dtype}: needs model.device=cuda; use auto")
        if self.device == "cuda" and self.weight_dtype != "auto":
            raise ConfigError(f"model.weight_dtype={self.weight_dtype}: needs model.device=cpu; there is model.fp8")
        check_member("model.virtual_tp", self.virtual_tp, ("auto", "1", "2", "4", "8"))
        if self.device == "cuda" and self.virtual_tp != "1":
            raise ConfigError(f"model.virtual_tp={self.virtual_tp}: needs model.device=cpu; use 1")
        for key in ("linear_backend", "instruction_set"):
            if self.device == "cuda" and getattr(self, key) != "auto":
                raise ConfigError(f"model.{key}={getattr(self, key)}: needs model.device=cpu; use auto")
        if self.linear_backend == "onednn" and self.weight_dtype != "auto":
            raise ConfigError(f"model.linear_backend=onednn: not together with model.weight_dtype={self.weight_dtype}")
        if self.fp8 != "none" and self.weight_dtype != "auto":
            raise ConfigError(f"model.weight_dtype={self.weight_dtype}: not together with model.fp8={self.fp8}")
        check_range("model.block_size", self.block_size, 1, _MAX_BLOCK_SIZE)
        check_range("model.kv_memory_gib", self.kv_memory_gib, 1e-6, 1e6)
        check_range("model.kv_memory_share", self.kv_memory_share, 0.001, 0.99)
        check_range("model.max_context_len", self.max_context_len, 2, 1 << 40)
        check_range("model.num_threads", self.num_threads, 1, 4096)

    @property
    def simulated_shape(self) -> ModelShape | None:
        """The shape with its KV in kv_dtype."""
        if self.shape is None or self.kv_dtype == "auto":
            return self.shape
        return replace(self.shape, kv_bytes_per_element=1)
