"""Plain data in pickles of every protocol, and damaged pickles."""

from __future__ import annotations

import argparse
import pickle
import random
from collections import OrderedDict
from typing import Any

import pytest

from megatron_medha.safe_files.pickle_machine import Global, GlobalResolvers, PickleError, SavedNamespace, unpickle

DATA = {
    "": None, "flags": [True, False], "numbers": (1, 255, 65_535, -1, 2**31, 2**100, -(2**70), 1.5),
    "texts": ["é", "a" * 300], "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "nested": {1: {"x": [[], {}]}},
}  # fmt: skip
SHARED = [DATA, DATA]
MEANINGS = GlobalResolvers(find=lambda name: name, make=lambda name, args: SavedNamespace())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol_is_read_as_by_pickle(protocol: int):
    read = unpickle(pickle.dumps(SHARED, protocol), MEANINGS)
    assert read == SHARED and read[0] is read[1]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_attributes_are_those_of_the_saved_object(protocol: int):
    read = unpickle(pickle.dumps(argparse.Namespace(a=1, b={"c": [2]}), protocol), MEANINGS)
    assert isinstance(read, SavedNamespace) and vars(read) == {"a": 1, "b": {"c": [2]}}


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_sets_are_read_as_lists_and_bytes_as_bytes(protocol: int):
    def make(name: Global, args: tuple[Any, ...]) -> Any:
        return list(args[0])

    read = unpickle(pickle.dumps([{7}, frozenset({8}), b"x", b"y" * 300], protocol), GlobalResolvers(lambda n: n, make))
    assert read == [[7], [8], b"x", b"y" * 300]


def test_a_damaged_pickle_is_read_or_refused():
    draw = random.Random(0)
    whole = [pickle.dumps([SHARED, argparse.Namespace(a=OrderedDict(b=1))], protocol) for protocol in range(6)]
    num_refused = 0
    for _ in range(3000):
        damaged = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            unpickle(bytes(damaged), MEANINGS)
        except PickleError:
            num_refused += 1
    assert num_refused > 1000
