"""Log lines: an event and its fields, for people and for programs."""

from __future__ import annotations

import json
import logging
import sys

from megatron_medha.system.log_lines import JsonLines, TextLines


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("medha", logging.INFO, __file__, 1, "request_done", None, None)
    made.fields = fields
    return made


def test_a_text_line_has_its_fields_and_no_client_can_forge_another() -> None:
    line = TextLines().format(record(status=200, ttft_s=0.25, request_id='x outcome="done"\n2026 INFO forged'))
    assert "INFO medha request_done status=200 ttft_s=0.25 " in line
    assert line.endswith(r'request_id="x outcome=\"done\"\n2026 INFO forged"') and "\n" not in line


def test_a_json_line_is_one_object_with_the_traceback_inside() -> None:
    made = record(request_id="a\nb", status=None)
    try:
        raise ValueError("oops")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = JsonLines().format(made)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["event"], told["level"], told["request_id"], told["status"]) == ("request_done", "info", "a\nb", None)
    assert "ValueError: oops" in told["traceback"]
