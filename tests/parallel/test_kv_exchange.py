"""What travels between kvp ranks, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_medha.parallel import kv_exchange
from megatron_medha.parallel.kv_exchange import KVExchange, RankSet, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_log_sum_exp_travel_in_one_tensor_without_losing_a_bit(dtype: torch.dtype) -> None:
    out_THD = torch.randn(5, 6, 16).to(dtype)
    lse_TH = torch.randn(6, 5).T * 1e-3 + 12.0  # not contiguous; more digits than bf16 has
    lse_TH[2, 3] = -torch.inf                   # an empty shard
    packed_THE = pack(out_THD, lse_TH)
    assert packed_THE.dtype == dtype and packed_THE.is_contiguous()
    out, lse = unpack(packed_THE, 16)
    assert torch.equal(out, out_THD) and torch.equal(lse, lse_TH)


def test_messages_of_one_exchange_are_posted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    # NCCL runs single ones in order: two ranks that both receive first would wait for each other.
    posted: list[list[tuple[str, int]]] = []

    def post(op: Any, tensor: torch.Tensor, *, group: Any, group_peer: int) -> tuple[str, int]:
        return op.__name__, group_peer

    def post_together(posts: list[tuple[str, int]]) -> list[Any]:
        posted.append(posts)
        return []

    monkeypatch.setattr(kv_exchange.dist, "P2POp", post)
    monkeypatch.setattr(kv_exchange.dist, "batch_isend_irecv", post_together)
    group: Any = SimpleNamespace(rank=lambda: 1, size=lambda: 4)
    exchange = KVExchange(group, [RankSet((0, 1), 0, 2), RankSet((1, 3), 2, 3)])
    exchange.begin(torch.zeros(5, 2, 16), torch.zeros(5, 2))
    assert [sorted(posts) for posts in posted] == [[("irecv", 0), ("irecv", 3), ("isend", 0), ("isend", 3)]]
