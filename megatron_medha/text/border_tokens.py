"""Tokens at which a text can be cut in two, and encoded in two parts with the ids of the whole.

The library first finds the added tokens in a text, from left to right and the longest first, and then encodes what is
between them piece by piece. So nothing before an added token depends on what comes after it, nor the other way round. A
token that no other one can contain or overlap is found wherever its text stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

    from megatron_medha.text.tokenizers.piece_backend import PieceBackend


@dataclass(frozen=True, slots=True)
class BorderToken:
    """An added token that is found wherever its text is."""

    token_id: int
    text: str


def border_tokens(backend: tokenizers.Tokenizer | PieceBackend) -> tuple[BorderToken, ...]:
    """Added tokens that are found wherever their text is; none where nothing is known of a tokenizer's cuts."""
    if getattr(backend.model, "dropout", None):
        return ()
    added = {
        token_id: token for token_id, token in backend.get_added_tokens_decoder().items()
        # Others are looked for in what the normalizer has made of the text between these.
        if token.content and not token.normalized and not (token.special and backend.encode_special_tokens)
    }  # fmt: skip
    texts = [token.content for token in added.values()]
    endings = {text[place:] for text in texts for place in range(1, len(text))}
    joined = "\0".join(texts)
    return tuple(
        BorderToken(token_id, text)
        for token_id, token in added.items()
        if not token.single_word  # it depends on its neighbours
        and "\0" not in (text := token.content)
        and not any(text[:place] in endings for place in range(1, len(text)))
        and text not in endings
        and joined.count(text) == 1
    )
