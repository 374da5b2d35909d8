"""The latest items of answers, for clients that refer to them (item_reference) instead of sending them again."""

from __future__ import annotations

import sys
from collections import OrderedDict

from megatron_medha.server.bodies.responses_types import InputItem

MAX_BYTES = 16 * 2**20
_ITEM_BYTES = 1_000  # of an item without its texts


class RecentItems:
    """Items by client and id, in memory alone. Beyond MAX_BYTES the oldest are dropped."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._items: OrderedDict[tuple[str, str], tuple[InputItem, int]] = OrderedDict()
        self._num_bytes = 0

    def add(self, client: str, item_id: str, item: InputItem) -> None:
        """Keep an item of an answer to this client."""
        texts = (item.content, item.arguments, item.input)
        num_bytes = _ITEM_BYTES + sum(sys.getsizeof(text) for text in texts)
        self._items[client, item_id] = (item, num_bytes)
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            _, (_, num_dropped) = self._items.popitem(last=False)
            self._num_bytes -= num_dropped

    def find(self, client: str, item_id: str) -> InputItem | None:
        """The item, if it was this client's and is still there."""
        found = self._items.get((client, item_id))
        return None if found is None else found[0]
