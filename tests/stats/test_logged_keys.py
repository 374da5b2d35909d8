"""Keys in a decision log: read back as they were, and written once."""

from __future__ import annotations

import random
from array import array

import pytest

from megatron_medha.core.kv.prefix_keys import KEY_BYTES, GranuleKeys, root_key
from megatron_medha.stats.logged_keys import KeyReader, KeyWriter

ROOT = root_key(b"secret")


def keys_of(*tokens: int) -> bytes:
    return GranuleKeys(ROOT, 1).extend(array("i", tokens))


@pytest.mark.parametrize("max_known", [0, 1, 7, 10_000])
def test_keys_are_read_back_as_they_were(max_known: int) -> None:
    draw = random.Random(max_known)
    writer, reader = KeyWriter(max_known), KeyReader()
    prompts = [[]]
    for _ in range(300):
        prompt = [*draw.choice(prompts), *(draw.randrange(3) for _ in range(draw.randrange(5)))]
        prompts.append(prompt)
        keys = keys_of(*prompt)
        assert reader.read(writer.write(keys)) == keys


def test_what_the_log_has_is_not_written_again() -> None:
    writer = KeyWriter()
    first, second = keys_of(*range(100)), keys_of(*range(100), 1, 2)
    assert sum(map(len, writer.write(first))) > len(first)
    assert sum(map(len, writer.write(second))) < 4 * 3 * KEY_BYTES
    assert sum(map(len, writer.write(first))) < 2 * KEY_BYTES


@pytest.mark.parametrize("written", [["AAAA", ""], ["", "AAAA"], ["A" * 22 + "==", ""], ["!"], ["", "", ""]])
def test_what_no_writer_has_written_is_refused(written: list[str]) -> None:
    with pytest.raises(ValueError):
        KeyReader().read(written)
