"""The latest items of responses, for clients that refer to them (item_reference) instead of sending them again."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from megatron_medha.server.bodies.responses_types import InputItem

MAX_BYTES = 16 * 2**20
_ITEM_BYTES = 1_000  # of an item beside its JSON


class RecentItems:
    """Items by client and id, in memory alone. Beyond MAX_BYTES the oldest are dropped."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._items: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._num_bytes = 0

    def add(self, client: str, item_id: str, item: bytes) -> None:
        """Keep an item of a response to this client, as JSON."""
        self._items[client, item_id] = item
        self._num_bytes += _ITEM_BYTES + len(item)
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= _ITEM_BYTES + len(self._items.popitem(last=False)[1])

    def find(self, client: str, item_id: str) -> InputItem | None:
        """The item, if it was this client's and is still there."""
        found = self._items.get((client, item_id))
        return None if found is None else msgspec.json.decode(found, type=InputItem)
