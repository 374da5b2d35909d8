"""Draws docs/peers.svg: short prompts' p99 TTFT beside vLLM, from the tables of experiments/peers/README.md.

    python tools/peers_picture.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_HEADING = "### mixed-8192-16384"
_SERVERS = (
    ("vllm", "vLLM, default", "#b3541e"),
    ("vllm-cap-64", "vLLM at its best", "#c98a12"),
    ("medha", "megatron_medha", "#1f7a4d"),
)
_LEFT, _WIDTH, _ROW, _TOP = 170, 420, 62, 58
_LOW_S, _HIGH_S = 0.1, 100.0
_TICKS_S = (0.1, 1, 10, 100)


def p99_by_server() -> dict[str, list[float]]:
    """Seconds, by server, a value for each seed."""
    text = (ROOT / "experiments" / "peers" / "README.md").read_text(encoding="utf-8")
    section = text.partition(_HEADING)[2].partition("\n###")[0]
    found: dict[str, list[float]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 4 and re.fullmatch(r"\d+", cells[1]):
            found.setdefault(cells[0], []).append(float(cells[4]))
    return found


def picture() -> str:
    """The SVG. Its text has the colour of the page that shows it where the viewer says which, else a grey for both."""
    from math import log10

    def x(seconds: float) -> float:
        return _LEFT + _WIDTH * (log10(seconds) - log10(_LOW_S)) / (log10(_HIGH_S) - log10(_LOW_S))

    values = p99_by_server()
    bottom = _TOP + _ROW * len(_SERVERS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {bottom + 44}" width="640" height="{bottom + 44}" '
        'font-family="system-ui, sans-serif" font-size="14">',
        "<style>text{fill:#222}line{stroke:#9a9a9a}.bg{fill:#fff}"
        "@media(prefers-color-scheme:dark){text{fill:#e6e6e6}line{stroke:#777}.bg{fill:#16191d}}</style>",
        f'<rect class="bg" width="640" height="{bottom + 44}" rx="6"/>',
        '<text x="16" y="26" font-size="16" font-weight="600">'
        "Time to first token of short prompts beside long ones: p99</text>",
    ]
    for tick in _TICKS_S:
        parts.append(f'<line x1="{x(tick):.0f}" x2="{x(tick):.0f}" y1="{_TOP - 12}" y2="{bottom}" stroke-width="0.6"/>')
        parts.append(f'<text x="{x(tick):.0f}" y="{bottom + 18}" text-anchor="middle" font-size="12">{tick:g} s</text>')
    for place, (server, label, colour) in enumerate(_SERVERS):
        y = _TOP + _ROW * place + 16
        parts.append(f'<text x="{_LEFT - 14}" y="{y + 5}" text-anchor="end" font-weight="600">{label}</text>')
        for value in values[server]:
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="7" fill="{colour}" fill-opacity="0.9"/>')
        said = ", ".join(f"{value:.2g}" for value in sorted(values[server]))
        middle = x(sorted(values[server])[len(values[server]) // 2])
        parts.append(f'<text x="{middle:.0f}" y="{y + 26}" text-anchor="middle" font-size="13">{said} s</text>')
    parts.append(
        f'<text x="{_LEFT + _WIDTH / 2:.0f}" y="{bottom + 36}" text-anchor="middle" font-size="12">'
        "the same requests on the same two cores, three seeds, log scale</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs" / "peers.svg").write_text(picture(), encoding="utf-8")
