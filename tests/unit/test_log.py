"""The form of log records: configuration 5.1 and 7.8."""

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from kamado.log import JsonFormatter, RepeatFilter, TextFormatter, configure


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def record(message: str = "connection opened", level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("kamado.amqp.server", level, __file__, 1, message, None, None)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_json_has_time_level_logger_message_and_fields() -> None:
    event = json.loads(
        JsonFormatter().format(record(level=logging.WARNING, tenant_id="acme", duration_ms=1.5, peer=None))
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("ts"))
    assert event == {
        "level": "warn",
        "logger": "kamado.amqp.server",
        "msg": "connection opened",
        "tenant_id": "acme",
        "duration_ms": 1.5,
    }


def test_json_is_one_line_whatever_is_in_it() -> None:
    line = JsonFormatter().format(record("a\nb", user="x\ny\u2028", thing=object()))
    assert "\n" not in line
    assert json.loads(line)["user"] == "x\ny\u2028"


def test_text_is_one_line_whatever_is_in_it() -> None:
    line = TextFormatter().format(record("a\nb", user="x\ny\x1b[31m", reason="two words", nothing=""))
    assert "\n" not in line
    assert "\x1b" not in line
    assert 'reason="two words"' in line
    assert 'nothing=""' in line
    assert "a\\nb" in line


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
@pytest.mark.parametrize(
    "name", ["password", "pwd_hash", "pwd-plain", "key", "salt", "Authorization", "token", "response"]
)
def test_secrets_are_masked_by_name(formatter: logging.Formatter, name: str) -> None:
    made = record()
    setattr(made, name, "c4nary")
    line = formatter.format(made)
    assert "c4nary" not in line
    assert "***" in line


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_traceback_of_an_error(formatter: logging.Formatter) -> None:
    made = record(level=logging.ERROR)
    try:
        raise ValueError("reason")
    except ValueError as error:
        made.exc_info = type(error), error, error.__traceback__
    assert "ValueError: reason" in formatter.format(made)


def test_repeated_warnings_are_held_back_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("kamado.log.time.monotonic", lambda: now[0])
    held = RepeatFilter(10)
    assert held.filter(record(level=logging.WARNING))
    assert not held.filter(record(level=logging.WARNING))
    assert not held.filter(record(level=logging.WARNING, tenant_id="other"))
    assert held.filter(record("another", level=logging.WARNING))
    assert held.filter(record())
    assert held.filter(record(level=logging.ERROR))
    assert held.filter(record(level=logging.ERROR))
    now[0] = 110.0
    again = record(level=logging.WARNING)
    assert held.filter(again)
    assert json.loads(JsonFormatter().format(again))["suppressed"] == 2


def test_memory_of_repeated_warnings_is_bounded() -> None:
    held = RepeatFilter()
    for number in range(3000):
        held.filter(record(f"message {number}", level=logging.WARNING))
    assert len(held._seen) <= 1001


def test_levels_of_single_loggers() -> None:
    stream = io.StringIO()
    configure("text", "warning", {"kamado.one": "debug"}, stream)
    logging.getLogger("kamado.one.deeper").debug("seen")
    logging.getLogger("kamado.two").info("not seen")
    configure("auto", "info", {}, stream)
    logging.getLogger("kamado.one.deeper").debug("not any more")
    logging.getLogger("kamado.two").info("now in JSON")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("seen")
    assert json.loads(second)["msg"] == "now in JSON"


def test_fields_of_a_process_are_on_every_record() -> None:
    stream = io.StringIO()
    configure("json", "info", {}, stream, fields={"worker": 2})
    logging.getLogger("kamado.one").info("something", extra={"tenant_id": "acme"})
    event = json.loads(stream.getvalue())
    assert (event["worker"], event["tenant_id"]) == (2, "acme")
