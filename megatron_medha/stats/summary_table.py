"""A summary as text for a terminal of 120 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LATENCIES = (
    ("TTFT", "ttft_s"),
    ("TTFT / alone", "slowdown"),
    ("TPOT", "tpot_s"),
    ("TBT", "tbt_s"),
    ("worst TBT", "max_tbt_s"),
    ("E2E", "e2e_s"),
)
_PERCENTILES = ("p50", "p90", "p99")


def summary_table(values: Mapping[str, Any]) -> str:
    """Latencies by length class, targets met, throughput, and what the machine did; ends with a newline."""
    classes: Mapping[str, Any] = values["classes"]
    blocks = [_latencies(classes) + _left_out(values), _counts(values), _machine(values)]
    return "\n".join(block for block in blocks if block)


def _latencies(classes: Mapping[str, Any]) -> str:
    rows = [["", *(f"{name} {percent}" for name in classes for percent in _PERCENTILES)]]
    for label, key in _LATENCIES:
        cells = [
            _times(found[key][percent]) if key == "slowdown" else seconds_text(found[key][percent])
            for found in classes.values()
            for percent in _PERCENTILES
        ]
        rows.append([label, *cells])
    return _aligned(rows)


def _left_out(values: Mapping[str, Any]) -> str:
    """Who is not in the latencies: percentiles of those who got through look good where many did not."""
    num_left_out = values["all"]["num_requests"] - values["all"]["num_first_tokens"]
    if not num_left_out:
        return ""
    return f"{num_left_out:,} requests have no first token and are in none of these figures\n"


def _counts(values: Mapping[str, Any]) -> str:
    columns = {**values["classes"], "all": values["all"]}
    rows = [["", *columns]]
    for label, key, show in (
        ("requests", "num_requests", _count),
        ("finished", "num_finished", _count),
        ("rejected", "num_rejected", _count),
        ("unfinished", "num_unfinished", _count),
        ("meet the SLO", "attainment", percent_text),
        ("goodput, requests/s", "goodput_per_s", number_text),
        ("requests/s", "requests_per_s", number_text),
        ("output tokens/s", "output_tokens_per_s", number_text),
        ("all tokens/s", "tokens_per_s", number_text),
        ("KV lost, times", "num_preemptions", _count),
        ("tokens recomputed", "num_tokens_lost", _count),
    ):
        if key in ("num_rejected", "num_unfinished", "num_preemptions", "num_tokens_lost") and not columns["all"][key]:
            continue
        rows.append([label, *(show(column[key]) for column in columns.values())])
    return _aligned(rows)


def _machine(values: Mapping[str, Any]) -> str:
    machine = values.get("machine")
    if machine is None:
        return ""
    stages = " ".join(percent_text(share) for share in machine["utilisation_by_stage"])
    kv = (
        f"; KV used {percent_text(machine['kv_used_mean'])} on average, {percent_text(machine['kv_used_max'])} at most"
        if machine["kv_used_mean"] is not None
        else ""
    )
    return (
        f"{machine['num_gpus']} GPUs, {values['duration_s']:,.0f} s from first arrival to last token, "
        f"{machine['num_batches']:,} batches\n"
        f"stages busy {stages}; bubbles {percent_text(machine['bubbles'])} of the time with work in the pipeline{kv}\n"
        f"MFU {percent_text(machine['mfu'])} (causal), MBU {percent_text(machine['mbu'])}, both of all GPUs' peak over "
        "the whole time\n"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "".join(line.rstrip() + "\n" for line in lines)


def seconds_text(value: float | None) -> str:
    """Seconds or milliseconds, three or four digits; - for None."""
    if value is None:
        return "-"
    if value < 1.0:
        return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if value < 100.0 else f"{value:,.0f} s"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 100.0 else f"{value:,.0f}x"


def percent_text(value: float | None) -> str:
    """A share in percent; - for None. What rounds to nothing has no sign: sums of seconds are off in the last bit."""
    return "-" if value is None else f"{round(100.0 * value, 1) + 0.0:.1f}%"


def number_text(value: float | None) -> str:
    """A number of any size; - for None."""
    return "-" if value is None else f"{value:,.3f}" if value < 10.0 else f"{value:,.0f}"


def _count(value: int) -> str:
    return f"{value:,}"
