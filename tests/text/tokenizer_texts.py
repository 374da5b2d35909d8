"""Texts to encode: random Unicode, code, white space, names of special tokens, emoji, CJK, nothing, long ones."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

_CODE = 'def f(x):\n    return {"a": [x, 1.5e-3], "b": None}  # TODO: 100% "quoted"\r\n\tfor i in range(0x10):\n\n'
_WORDS = [
    "the", "server", "answers", "requests", "don't", "WE'LL", "it's", "12345", "3.14", "caf\u00e9", "nai\u0308ve",
    "e\u0301", "\ufb01ne", "\u2167", "\uff21\uff22", "\u00bd",
]  # fmt: skip
_EMOJI = "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7\u2764\ufe0f\U0001f3fd"
_CJK = "\u4f60\u597d\u4e16\u754c\u3053\u3093\u306b\u3061\u306f\ud55c\uad6d\uc5b4\u3000\u3002\u1112\u1161\u11ab"
_SPACES = (" ", "  ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u2003", "     ", "\u3000", "\u200b", "\u2028")
# A few blocks in which every point has long had its meaning: libraries differ in the version of Unicode that they know.
_BLOCKS = ((0x20, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0x1100, 0x11FF),
           (0x1E00, 0x1FFF), (0x2000, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),
           (0xFB00, 0xFB06), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1F5FF))  # fmt: skip


def texts(count: int, special: Sequence[str], seed: int = 0) -> list[str]:
    """So many, the same for a seed."""
    drawn = random.Random(seed)

    def part() -> str:
        match drawn.randrange(8):
            case 0:
                return "".join(_character(drawn) for _ in range(drawn.randrange(12)))
            case 1:
                start = drawn.randrange(len(_CODE))
                return _CODE[start : start + drawn.randrange(40)]
            case 2:
                return "".join(drawn.choices(_SPACES, k=drawn.randrange(1, 6)))
            case 3:
                return drawn.choice(special) if special else "<s>"
            case 4:
                return "".join(drawn.choices(_EMOJI, k=drawn.randrange(1, 4)))
            case 5:
                return "".join(drawn.choices(_CJK, k=drawn.randrange(1, 6)))
            case _:
                return drawn.choice(("", " ")).join(drawn.choices(_WORDS, k=drawn.randrange(1, 6)))

    made = ["", " ", "\n", "a", "".join(special), _CODE * 30, " ".join(_WORDS) * 40]
    while len(made) < count:
        made.append("".join(part() for _ in range(drawn.randrange(1, 7))))
    return made


def _character(drawn: random.Random) -> str:
    while True:
        found = chr(drawn.randint(*drawn.choice(_BLOCKS)))
        if unicodedata.category(found) != "Cn":
            return found
