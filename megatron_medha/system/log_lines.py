"""Log lines on stderr: events with fields, as text for people or as JSON for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any


def set_up_logging(level: str, *, is_json: bool) -> None:
    """For the whole process. Fields come with a record as extra={"fields": {...}}."""
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(JsonLines() if is_json else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[output])


class TextLines(logging.Formatter):
    """Time, level, logger, event, and its fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the library's name
        """The line without a traceback."""
        fields = " ".join(f"{name}={_plain(value)}" for name, value in _fields(record).items())
        line = super().formatMessage(record)
        return f"{line} {fields}" if fields else line


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, event, and its fields beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _plain(value: object) -> str:
    # Clients choose some values (request ids): what could pass for another field or line is quoted.
    text = str(value)
    is_safe = text and text.isprintable() and not any(char in text for char in ' ="')
    return text if is_safe else json.dumps(text)
