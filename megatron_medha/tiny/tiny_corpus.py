"""The text the tiny model learns from: the Python standard library's own source, as every installation has it."""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_medha.core.errors import ConfigError
from megatron_medha.tiny.tiny_tokenizer import ASSISTANT_ID, EOS_ID, USER_ID

# Installed packages, and files that are data or test cases more than programs.
_SKIPPED = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "turtledemo",
}  # fmt: skip
_MAX_ANSWER_BYTES = 300  # so that question and answer about fit one training window
_MAX_ANSWER_LINES = 12
# A function's first line and the first line of its docstring.
_DOCUMENTED = re.compile(rb'([ \t]*)def \w.*:[ \t]*\r?\n[ \t]+r?(?:"""|\'\'\')[ \t]*([^"\'\n\\]{10,80})')


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids (int64) of all documents one after the other, each closed by the end token."""

    training_ids: Tensor
    held_out_ids: Tensor  # of other files
    num_training_files: int
    num_held_out_files: int


def read_stdlib(seed: int, *, held_out_share: float = 0.03, conversation_share: float = 0.15) -> Corpus:
    """Source files in an order drawn from the seed, and conversations made of the training files' functions.

    Raises ConfigError when the installation comes without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))
    random.Random(seed).shuffle(paths)
    documents = [content for path in paths if len(content := path.read_bytes()) > 200]
    num_held_out = max(1, round(len(documents) * held_out_share))
    held_out, training = documents[:num_held_out], documents[num_held_out:]
    num_training_bytes = sum(map(len, training))
    if num_training_bytes < 1_000_000:
        raise ConfigError(
            f"{root} holds only {num_training_bytes} bytes of Python source, too little to train on. "
            "Some distributions ship the standard library compiled: use a Python that has its source"
        )
    conversations = list(_conversations(training))
    num_conversation_tokens = sum(map(len, conversations))
    if conversations:
        # Short functions are few: said several times, they are seen often enough to learn when to answer and stop.
        conversations *= max(1, round(num_training_bytes * conversation_share / num_conversation_tokens))
    return Corpus(
        training_ids=_joined([*training, *conversations]),
        held_out_ids=_joined(held_out),
        num_training_files=len(training),
        num_held_out_files=len(held_out),
    )


def windows(ids: Tensor, sequence_len: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """(inputs, targets) [B, sequence_len] of the windows beginning at those places; targets are one token further."""
    at = starts[:, None] + torch.arange(sequence_len + 1)
    tokens = ids[at]
    return tokens[:, :-1], tokens[:, 1:]


def draw_starts(ids: Tensor, sequence_len: int, num_windows: int, generator: torch.Generator) -> Tensor:
    """Random places at which a whole window fits."""
    return torch.randint(0, len(ids) - sequence_len - 1, (num_windows,), generator=generator)


def _joined(streams: Sequence[bytes | Sequence[int]]) -> Tensor:
    """One int64 tensor of all streams; bytes are documents and get the end token."""
    parts = []
    end = torch.tensor([EOS_ID])
    for stream in streams:
        if isinstance(stream, bytes):
            parts += [torch.frombuffer(bytearray(stream), dtype=torch.uint8).long(), end]
        else:
            parts.append(torch.tensor(stream))
    return torch.cat(parts)


def _conversations(documents: Sequence[bytes]) -> Iterator[list[int]]:
    """A user's question, the first line of a docstring, and as answer the short function it documents."""
    for content in documents:
        lines = content.splitlines(keepends=True)
        for index, line in enumerate(lines[:-1]):
            match = _DOCUMENTED.match(line + lines[index + 1])
            if match is None:
                continue
            indent, question = match.groups()
            answer = [line]
            for following in lines[index + 1 : index + 1 + _MAX_ANSWER_LINES]:
                if following.strip() and not following.startswith((indent + b" ", indent + b"\t")):
                    break
                answer.append(following)
            answer_bytes = b"".join(line.removeprefix(indent) for line in answer).rstrip()
            if len(answer) <= _MAX_ANSWER_LINES and len(answer_bytes) <= _MAX_ANSWER_BYTES:
                yield [USER_ID, *question, EOS_ID, ASSISTANT_ID, *answer_bytes, EOS_ID]
