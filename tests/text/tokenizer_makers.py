"""Tokenizer files of other kinds, each trained by its own library or written in its format."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from tests.text.tokenizer_texts import texts

END = "<|endoftext|>"
SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


def corpus() -> list[str]:
    return [text for text in texts(4000, (), seed=7) if text.strip()]


def write_gpt2(directory: Path, size: int = 1200) -> None:
    """vocab.json and merges.txt, as GPT-2's."""
    import tokenizers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus(), vocab_size=size, special_tokens=[END], show_progress=False)
    trained.save_model(str(directory))


def write_pieces(path: Path, **options: object) -> None:
    """A SentencePiece model."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=made, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 4500, "character_coverage": 0.98, **options},
    )  # fmt: skip
    path.write_bytes(made.getvalue())


def byte_ranks(size: int = 900) -> dict[bytes, int]:
    """A vocabulary of bytes with its ranks, merged from the corpus."""
    import tokenizers

    from megatron_medha.text.text_slices import CHAR_OF_BYTE

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus(), vocab_size=size, show_progress=False)
    byte_of = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    made = [bytes(byte_of[char] for char in token) for token, _ in by_id]
    merged = [token for token in made if len(token) > 1]
    return {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])}


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> None:
    """A file of tiktoken's."""
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


def write_megatron_tiktoken(path: Path, ranks: dict[bytes, int]) -> None:
    """The JSON of Megatron's TikTokenizer."""
    path.write_text(json.dumps([
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for token, rank in ranks.items()
    ]))  # fmt: skip
