"""Hidden states from one pipeline stage to the next: receives posted ahead of time, sends that do not wait.

Each batch has a tag of its own, so that one may be sent before another whose receive was posted earlier. NCCL has no
tags: there hidden states arrive in the order of the posted receives, and no step overtakes another.

Shapes: T tokens of a packed batch, C hidden size.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class PendingReceive(NamedTuple):
    """Hidden states on their way: room for them, and what to wait for."""

    hidden_T1C: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The hidden states, once they are there."""
        self.work.wait()
        return self.hidden_T1C


class StageLink:
    """The links of one rank to the same place of the stage before and of the next."""

    def __init__(
        self, group: dist.ProcessGroup, *, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """group: of the ranks that differ in their stage only, in order of stages."""
        self._group = group
        self.stage, self.num_stages = group.rank(), group.size()
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # kept from being freed while they are on their way

    def post_receive(self, num_tokens: int, batch_id: int) -> PendingReceive:
        """Make room for a batch's hidden states."""
        hidden_T1C = torch.empty(num_tokens, 1, self._hidden_size, dtype=self._dtype, device=self._device)
        work = dist.irecv(hidden_T1C, group=self._group, group_src=self.stage - 1, tag=_tag(batch_id))
        assert work is not None, "this rank is of its own stage's group"
        return PendingReceive(hidden_T1C, work)

    def send(self, hidden_T1C: Tensor, batch_id: int) -> None:
        """Send a batch's to the next stage without waiting for it to be ready."""
        hidden_T1C = hidden_T1C.contiguous()
        work = dist.isend(hidden_T1C, group=self._group, group_dst=self.stage + 1, tag=_tag(batch_id))
        assert work is not None, "this rank is of its own stage's group"
        self._sent.append((work, hidden_T1C))
        # At most one batch more is in flight than there are stages, so what was sent that many batches ago has arrived
        # and this does not wait.
        if len(self._sent) > self.num_stages + 1:
            self._sent.popleft()[0].wait()

    def give_tokens(self, token_ids_R: Tensor) -> Tensor:
        """The last stage's token ids, on the first stage too; others do nothing. int64, of equal length on all.

        Called where all stages have computed the same batch and none has begun another, so that even without tags
        nothing else is under way between the two.
        """
        if self.stage == self.num_stages - 1:
            dist.send(token_ids_R.contiguous(), group=self._group, group_dst=0)
        elif self.stage == 0:
            dist.recv(token_ids_R, group=self._group, group_src=self.num_stages - 1)
        return token_ids_R

    def finish(self) -> None:
        """Wait until the next stage has all that was sent: gloo drops what is still under way with its tensor."""
        while self._sent:
            self._sent.popleft()[0].wait()


def _tag(batch_id: int) -> int:
    """Ids of batches in flight are close to one another; those of a rank's first steps are negative."""
    return batch_id % (1 << 30)
