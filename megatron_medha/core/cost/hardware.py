"""What a cluster is made of: accelerators, how many, and the links between them. No models, no predictions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.errors import check_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What one device reaches over a link, each way, in collectives and in messages to a single peer."""

    bytes_per_s: float = 1e10  # bus bandwidth as NCCL's tests define it: volume that must cross, over seconds
    latency_s: float = 1e-4    # of one collective or message, whatever its size


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Devices of one kind (accelerators, or CPU sockets) and their links; `num_devices` of them make the cluster.

    The efficiencies are what kernels reach of the data sheet. The overheads of steps, layers and chunks are only a
    first guess for a machine that OnlineCost will watch; a simulated cluster takes them from EngineCosts.
    Raises ConfigError for a value out of range.
    """

    name: str
    flops_per_s: float                  # dense matmul peak of one device, 2-byte types (on a CPU: the type served)
    memory_bytes_per_s: float
    fp8_flops_per_s: float | None = None  # the same for 1-byte types; None: no faster than flops_per_s
    memory_bytes: float | None = None   # of one device; None: not known, nothing can be laid out on it
    num_sms: int = 1                    # processors of one device that a kernel's tiles are spread over
    linear_efficiency: float = 0.7      # of the peak, reached by large matrix products
    attention_efficiency: float = 0.5   # of the peak, reached by long-context attention that keeps all processors busy
    lone_tile_efficiency: float = 0.5   # of one processor's peak, reached by a single attention tile on it
    memory_efficiency: float = 0.8
    kernel_overhead_s: float = 0.0      # filling and draining the device, per kernel
    step_overhead_s: float = 2e-3       # scheduling, messages and sampling of a step
    layer_overhead_s: float = 2e-5      # launches of one layer
    chunk_overhead_s: float = 2e-5      # per sequence in a step
    num_devices: int = 1
    devices_per_node: int = 1
    intra_node: Link = Link()
    inter_node: Link = Link()

    def __post_init__(self) -> None:
        check_ranges(
            "hardware", self, 1e3, 1e21,
            "flops_per_s", "memory_bytes_per_s", "fp8_flops_per_s", "memory_bytes",
        )  # fmt: skip
        check_ranges("hardware", self, 1, 1 << 20, "num_sms")
        check_ranges(
            "hardware", self, 0.001, 1.0,
            "linear_efficiency", "attention_efficiency", "lone_tile_efficiency", "memory_efficiency",
        )  # fmt: skip
        check_ranges(
            "hardware", self, 0.0, 10.0,
            "kernel_overhead_s", "step_overhead_s", "layer_overhead_s", "chunk_overhead_s",
        )  # fmt: skip
        check_ranges("hardware", self, 1, 1 << 24, "num_devices", "devices_per_node")
        for key in ("intra_node", "inter_node"):
            link: Link = getattr(self, key)
            check_ranges(f"hardware.{key}", link, 1e3, 1e21, "bytes_per_s")
            check_ranges(f"hardware.{key}", link, 0.0, 10.0, "latency_s")

    def matmul_flops_per_s(self, bytes_per_element: int) -> float:
        """The peak in a type of this size."""
        return self.fp8_flops_per_s or self.flops_per_s if bytes_per_element == 1 else self.flops_per_s

    def link(self, num_adjacent: int) -> Link:
        """The slowest link among this many neighbouring devices, the first of which is the first of its node."""
        return self.intra_node if num_adjacent <= self.devices_per_node else self.inter_node


def all_reduce_s(link: Link, num_ranks: int, num_bytes: float) -> float:
    """Sum of a tensor of `num_bytes` over the ranks: every byte but a rank's own share crosses twice (ring)."""
    return link.latency_s + 2 * (num_ranks - 1) / num_ranks * num_bytes / link.bytes_per_s if num_ranks > 1 else 0.0


def all_gather_s(link: Link, num_ranks: int, num_bytes: float) -> float:
    """Every rank gets the `num_bytes` of every other one."""
    return link.latency_s + (num_ranks - 1) * num_bytes / link.bytes_per_s if num_ranks > 1 else 0.0


def send_s(link: Link, num_bytes: float) -> float:
    """A message to one peer."""
    return link.latency_s + num_bytes / link.bytes_per_s
