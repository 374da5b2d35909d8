"""Compares two plays of one case, with and without the prefix cache."""

from __future__ import annotations

from typing import NamedTuple

from megatron_medha.bits.play import Play


class Difference(NamedTuple):
    """Two plays of one case, compared."""

    num_tokens: int       # outputs that both have
    num_other_tokens: int
    num_other_bits: int   # outputs of which a log-probability or the token differs
    first: str            # which it is; "" if none


def compare(plain: Play, cached: Play) -> Difference:
    """All outputs of all requests; of aborted ones, and behind a token that differs, what both have."""
    num_tokens = num_other_tokens = num_other_bits = 0
    first = ""
    for request_id, ours in cached.told.items():
        theirs = plain.told[request_id]
        if ours.prompt != theirs.prompt:
            continue  # it continues one that differs already
        pairs = zip(ours.tokens, theirs.tokens, ours.logprobs, theirs.logprobs)  # noqa: B905
        for index, (ours_id, theirs_id, ours_logprobs, theirs_logprobs) in enumerate(pairs):
            num_tokens += 1
            num_other_bits += ours_logprobs != theirs_logprobs
            if ours_logprobs != theirs_logprobs and not first:
                first = (
                    f"{request_id}, output {index}, prompt {len(ours.prompt)}, {ours.num_cached_tokens} cached: "
                    f"{ours_logprobs[:2]} and {theirs_logprobs[:2]}"
                )
            if ours_id != theirs_id:
                num_other_tokens += 1
                break
    return Difference(num_tokens, num_other_tokens, num_other_bits, first)
