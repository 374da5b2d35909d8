"""A summary as text for a terminal of 120 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_medha.stats.text_table import number_text, percent_text, seconds_text, text_table

_LATENCIES = (
    ("TTFT", "ttft_s"),
    ("TTFT / alone", "slowdown"),
    ("TPOT", "tpot_s"),
    ("TBT", "tbt_s"),
    ("worst TBT", "max_tbt_s"),
    ("E2E", "e2e_s"),
)
_ONLY_IF_ANY = ("num_rejected", "num_unfinished", "hit_rate", "num_preemptions", "num_tokens_lost")
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
    return text_table(rows)


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
        ("prompt tokens cached", "hit_rate", percent_text),
        ("KV lost, times", "num_preemptions", _count),
        ("tokens recomputed", "num_tokens_lost", _count),
    ):
        if key in _ONLY_IF_ANY and not columns["all"].get(key):
            continue
        rows.append([label, *(show(column[key]) for column in columns.values())])
    return text_table(rows)


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


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 100.0 else f"{value:,.0f}x"


def _count(value: int) -> str:
    return f"{value:,}"
