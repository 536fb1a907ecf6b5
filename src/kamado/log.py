"""How log records look: one event per line, as JSON for machines or as text for a terminal (configuration 5.1).

Modules log a fixed message with fields in `extra`; nothing else knows the form. Fields that could hold a secret are
masked by name, whatever was passed by mistake.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

__all__ = ["JsonFormatter", "RepeatFilter", "TextFormatter", "configure", "is_text"]

# Everything else in a record's __dict__ came in by `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "suppressed", "color_message"}
# Configuration 7.8.
_SECRET = frozenset(
    {
        "authorization",
        "key",
        "password",
        "pwd_hash",
        "pwd_plain",
        "response",
        "salt",
        "secret",
        "shared_secret",
        "token",
    }
)
_LEVELS = {"WARNING": "warn"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = {
        name: "***" if name.lower().replace("-", "_") in _SECRET else value
        for name, value in vars(record).items()
        if name not in _OWN and value is not None
    }
    if suppressed := getattr(record, "suppressed", 0):
        fields["suppressed"] = suppressed
    return fields


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `ts`, `level`, `logger`, `msg`, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        instant = datetime.fromtimestamp(record.created, UTC)
        event: dict[str, object] = {
            "ts": instant.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": _LEVELS.get(record.levelname, record.levelname.lower()),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        event |= _fields(record)
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message and `name=value` for each field; control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        instant = datetime.fromtimestamp(record.created).astimezone()
        parts = [
            f"{instant:%H:%M:%S}",
            f"{_LEVELS.get(record.levelname, record.levelname.lower()):5}",
            _safe(record.getMessage()),
        ]
        parts += [f"{name}={_shown(value)}" for name, value in _fields(record).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _safe(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _shown(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or not text.isprintable() else text


class RepeatFilter(logging.Filter):
    """Lets one of equal warnings through per interval, and tells how many it held back.

    Args:
        interval: Seconds.
    """

    def __init__(self, interval: float = 10.0) -> None:
        super().__init__()
        self._interval = interval
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide whether a record is written."""
        if record.levelno != logging.WARNING:
            return True
        name = (record.name, str(record.msg))
        now = time.monotonic()
        until, held_back = self._seen.get(name, (0.0, 0))
        if now < until:
            self._seen[name] = until, held_back + 1
            return False
        # The messages are fixed texts, so this cannot grow much; the bound is for libraries that format their own.
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[name] = now + self._interval, 0
        if held_back:
            record.suppressed = held_back
        return True


class _Fields(logging.Filter):
    """Puts fields on every record."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__()
        self._fields = fields

    def filter(self, record: logging.LogRecord) -> bool:
        vars(record).update(self._fields)
        return True


def is_text(form: str, stream: TextIO | None = None) -> bool:
    """Tell whether a form means text, on a stream (standard output if omitted)."""
    return form == "text" or (form == "auto" and (stream or sys.stdout).isatty())


def configure(
    form: str,
    level: str,
    levels: Mapping[str, str],
    stream: TextIO | None = None,
    *,
    fields: Mapping[str, object] | None = None,
) -> None:
    """Send all records to one stream.

    Args:
        form: `text`, `json`, or `auto`: text if the stream is a terminal.
        level: Lowest level of all loggers.
        levels: Logger name -> its own lowest level.
        stream: Standard output if omitted.
        fields: Put on every record.
    """
    stream = stream or sys.stdout
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if is_text(form, stream) else JsonFormatter())
    handler.addFilter(RepeatFilter())
    if fields:
        handler.addFilter(_Fields(fields))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).setLevel(logging.NOTSET)
    # The HTTP client under the provisioning hook tells of each request, and of each of its steps at level debug.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The driver of PostgreSQL tells, with a traceback, of each connection that its pool could not make anew.
    logging.getLogger("asyncpg").setLevel(logging.ERROR)
    for name, own in levels.items():
        logging.getLogger(name).setLevel(own.upper())
    logging.captureWarnings(capture=True)
