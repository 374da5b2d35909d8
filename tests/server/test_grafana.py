"""The Grafana board asks for metrics that the server has."""

from __future__ import annotations

import json
import re

from running_server import StartServer

from megatron_medha.cli.grafana import board


def test_every_metric_on_the_board_is_on_the_metrics_page(start_server: StartServer) -> None:
    page = start_server().get("/metrics").text
    names = {
        name.removesuffix("_bucket").removesuffix("_total")
        for panel in json.loads(board())["panels"]
        for target in panel["targets"]
        for name in re.findall(r"medha:\w+", target["expr"])
    }
    known = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (medha:\w+)", page, re.MULTILINE)}
    assert len(names) > 20
    # One histogram is named like a counter, for vLLM's sake.
    assert names <= known, names - known
