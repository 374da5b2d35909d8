"""Keys of granules: equal where everything up to there is equal, and however the tokens came."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.kv.prefix_keys import KEY_BYTES, GranuleKeys, root_key

ROOT = root_key(b"secret", "model")
token_ids = st.lists(st.integers(0, 3), max_size=40).map(lambda ids: array("i", ids))


def keys_of(tokens: array[int], granule_tokens: int, root: bytes = ROOT) -> list[bytes]:
    keys = GranuleKeys(root, granule_tokens).extend(tokens)
    assert len(keys) == len(tokens) // granule_tokens * KEY_BYTES
    return [keys[place : place + KEY_BYTES] for place in range(0, len(keys), KEY_BYTES)]


@given(first=token_ids, second=token_ids, granule_tokens=st.integers(1, 9))
def test_two_keys_are_equal_where_all_tokens_up_to_there_are_equal(
    first: array[int], second: array[int], granule_tokens: int
) -> None:
    for place, (one, other) in enumerate(
        zip(keys_of(first, granule_tokens), keys_of(second, granule_tokens), strict=False), start=1
    ):
        end = place * granule_tokens
        assert (one == other) == (first[:end] == second[:end])


@given(tokens=token_ids, granule_tokens=st.integers(1, 9))
def test_no_two_places_of_a_sequence_have_one_key(tokens: array[int], granule_tokens: int) -> None:
    keys = keys_of(tokens, granule_tokens)
    assert len(set(keys)) == len(keys)


@given(parts=st.lists(token_ids, max_size=5), outputs=token_ids, granule_tokens=st.integers(1, 9))
def test_keys_made_token_by_token_are_those_of_the_whole(
    parts: list[array[int]], outputs: array[int], granule_tokens: int
) -> None:
    whole = array("i", [token for part in (*parts, outputs) for token in part])
    prompt = GranuleKeys(ROOT, granule_tokens)
    made = b"".join(prompt.extend(part) for part in parts)
    choice, other = prompt.copy(), prompt.copy()
    for token in outputs:
        made += choice.append(token)
        other.append(token + 1)  # another choice of the same prompt
    assert made == b"".join(keys_of(whole, granule_tokens))


def test_keys_of_another_root_are_others() -> None:
    tokens = array("i", [1, 2, 3])
    roots = [
        ROOT, root_key(b"another secret", "model"), root_key(b"secret", "model", ""), root_key(b"secret", "mod", "el"),
        root_key(b"secret", "mode", "l"), root_key(b"secret"), root_key(b"secret", "model", "salt"),
    ]  # fmt: skip
    keys = [key for root in roots for key in keys_of(tokens, 1, root)]
    assert len(set(keys)) == len(keys)
    assert root_key(b"secret", "model") == ROOT


def test_a_salt_may_be_any_text() -> None:
    assert root_key(b"secret", "\ud800") != root_key(b"secret", "\ud801")
