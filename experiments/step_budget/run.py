"""How well steps keep their time budget on a machine nobody has profiled, read from a server's decision log.

    python -m experiments.no_convoy.run checkpoints/tiny          # writes such a log, among others
    python -m experiments.step_budget.run experiments/no_convoy/decisions_lars.jsonl

A mixed step has decodes and prefill chunks. It is held against its budget once the cost model has seen
`--after` steps. Prints the share of mixed steps at most 10% over budget; the share within 10% either way among
those that were filled up to the budget (others are short because there was no more work); and the error
of the predictions themselves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_medha.core.batch import Batch, Completed
from megatron_medha.engine.decision_log import read_log


def main() -> None:
    """Read the log and print figures beside bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--after", type=int, default=500, help="steps the cost model has seen before")
    args = parser.parse_args()
    batches: dict[int, Batch] = {}
    ran: list[tuple[Batch, float]] = []
    with args.log.open(encoding="utf-8") as lines:
        header, records = read_log(lines)
        tile = header["config"]["tile_tokens"]
        for record in records:
            if isinstance(record.entry, Batch):
                batches[record.entry.batch_id] = record.entry
            elif isinstance(record.entry, Completed):
                ran.append((batches.pop(record.entry.batch_id), record.entry.duration_s))
    ran = ran[args.after :]
    if not ran:
        sys.exit(f"{args.log} holds no steps after the first {args.after}")
    # The floor of one tile may break the budget by design: in a step that is full before any prefill comes.
    mixed = [
        (batch, duration_s)
        for batch, duration_s in ran
        if any(c.num_tokens == 1 for c in batch.chunks)
        and (sum(c.num_tokens for c in batch.chunks if c.num_tokens > 1) > tile)
    ]
    errors = sorted(abs(batch.predicted_s - duration_s) / duration_s for batch, duration_s in ran)
    print(f"{len(ran)} steps after the first {args.after}; {len(mixed)} mixed")
    print(f"prediction error      p50 {quantile(errors, 0.5):.1%}   p95 {quantile(errors, 0.95):.1%}   (goal p95 5%)")
    if not mixed:
        sys.exit("no mixed steps: run a load with decodes beside prefills")
    kept = sum(duration_s <= 1.1 * batch.budget_s for batch, duration_s in mixed) / len(mixed)
    filled = [(b, s) for b, s in mixed if b.predicted_s > 0.95 * b.budget_s]
    close = sum(abs(s - b.budget_s) <= 0.1 * b.budget_s for b, s in filled) / max(1, len(filled))
    print(f"mixed steps at most 10% over budget        {kept:.1%}   bar 95%   {'kept' if kept >= 0.95 else 'MISSED'}")
    print(f"{len(filled)} filled mixed steps within 10% of it  {close:.1%}   bar 95%   "
          f"{'kept' if close >= 0.95 else 'MISSED'}")
    sys.exit(0 if min(kept, close) >= 0.95 else 1)


def quantile(ordered: list[float], share: float) -> float:
    """Of a sorted list."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    main()
