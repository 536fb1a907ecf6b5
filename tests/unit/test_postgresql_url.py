"""URLs of PostgreSQL: libpq, 34.1.1.2 and 34.1.2 of PostgreSQL's documentation."""

import asyncio

import pytest

from kamado.storage import StorageError, open_store, shown_url
from kamado.storage.postgresql_url import PostgresqlUrl, parse_url

CUT = [
    *("postgresql://u:pa/ssw0rd@h/d", "postgresql://u:12/ssw0rd@h/d", "postgresql://u:p@a/ssw0rd@h/d"),
    "postgresql://u:12/ssw0rd?x@h/d",
    *("postgresql://u:pa?ssw0rd@h/d", "postgresql://u:pa?s=sw0rd@h/d", "postgresql://u:12?ssw0rd@h/d"),
    *("postgresql://u:pa#ssw0rd@h/d", "postgresql://u:[ssw0rd@h/d", "postgresql://u:ssw0rd@[::1/d"),
]
"""URLs with a character in the password that ends it, as it is not escaped."""


def parsed(*hosts: str, **members: object) -> PostgresqlUrl:
    rest: dict[str, object] = {"has_target": False, "connect_timeout": None, "application_name": None}
    return PostgresqlUrl(hosts=hosts, **(rest | members))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://h/d", parsed("postgresql://h/d")),
        ("postgres://u:p%40@h:1/d", parsed("postgres://u:p%40@h:1/d")),
        (
            "postgresql://u@a:1,b,[::1]:2/d",
            parsed("postgresql://u@a:1/d", "postgresql://u@b/d", "postgresql://u@[::1]:2/d"),
        ),
        (
            "postgresql://a,b/d?target_session_attrs=any&sslmode=require",
            parsed(
                "postgresql://a/d?target_session_attrs=any&sslmode=require",
                "postgresql://b/d?target_session_attrs=any&sslmode=require",
                has_target=True,
            ),
        ),
        ("postgresql:///d?host=/run/a", parsed("postgresql:///d?host=%2Frun%2Fa")),
        ("postgresql://u@/d?host=a,b", parsed("postgresql://u@/d?host=a", "postgresql://u@/d?host=b")),
        ("postgresql:///d?host=a,b&port=7", parsed("postgresql:///d?host=a&port=7", "postgresql:///d?host=b&port=7")),
        ("postgresql:///d?host=a,b&port=7,8", parsed("postgresql:///d?host=a&port=7", "postgresql:///d?host=b&port=8")),
        ("postgresql:///d", parsed("postgresql:///d")),
    ],
)
def test_each_host_has_a_url(url: str, expected: PostgresqlUrl) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize(("text", "seconds"), [("10", 10.0), ("0", None), ("-1", None)])
def test_a_bound_for_connecting(text: str, seconds: float | None) -> None:
    """libpq, connect_timeout: whole seconds for each host; zero and less mean no bound."""
    assert parse_url(f"postgresql://h/d?connect_timeout={text}") == parsed("postgresql://h/d", connect_timeout=seconds)


def test_a_name_for_the_connections() -> None:
    url = "postgresql://h/d?application_name=a%20b+c&options=-c%20work_mem%3D1MB"
    assert parse_url(url) == parsed("postgresql://h/d?options=-c%20work_mem%3D1MB", application_name="a b+c")


@pytest.mark.parametrize("asked", ["gssencmode=prefer", "channel_binding=disable", "client_encoding=UTF8", "sslsni=1"])
def test_what_is_done_anyway_may_be_asked_for(asked: str) -> None:
    assert parse_url(f"postgresql://h/d?{asked}") == parsed("postgresql://h/d")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("channel_binding=require", "channel_binding=require is not supported, only disable or prefer"),
        ("client_encoding=LATIN1", "client_encoding=LATIN1 is not supported, only utf8"),
        ("connect_timeout=soon", "connect_timeout=soon is not a whole number of seconds"),
        ("hostaddr=10.0.0.1", "hostaddr is not supported: name the address in place of the host"),
        ("keepalives_idle=10", "keepalives_idle is not supported: connections on which nothing comes back"),
        ("dbname=x", "dbname is not supported: name the database in the path"),
        ("service=x", "service is not supported"),
        ("replication=true", "replication is not supported"),
        ("host=a,b&port=1,2,3", "there are not as many ports as hosts"),
        ("host=a&port=b", "a port is a number"),
        ("x", "an option is written NAME=VALUE"),
    ],
)
def test_what_cannot_be_had_is_named(asked: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_url(f"postgresql:///d?{asked}")


@pytest.mark.parametrize("url", [*CUT, "postgresql://h:1:2/d", "postgresql://u:p@h:65536/d", "postgresql://a,:5/d"])
def test_hosts_that_cannot_be_read(url: str) -> None:
    with pytest.raises(ValueError, match="is written"):
        parse_url(url)


@pytest.mark.parametrize("url", CUT)
def test_an_error_says_nothing_of_a_password_that_was_cut(url: str) -> None:
    with pytest.raises(StorageError) as raised:
        asyncio.run(open_store(url))
    assert str(raised.value).startswith("postgresql://***: ")
    assert "sw0rd" not in str(raised.value)
    assert "pa" not in str(raised.value).replace("password", "")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@h:1/d?sslmode=require", "postgresql://u:***@h:1/d?sslmode=require"),
        ("postgresql://u@a,b/d", "postgresql://u@a,b/d"),
        ("postgresql://h/d?user=u&password=p&sslpassword=p", "postgresql://h/d?user=u&password=***&sslpassword=***"),
        ("postgresql://h/d?pass%77ord=p&PASSWORD=p", "postgresql://h/d?pass%77ord=***&PASSWORD=***"),
        (
            "postgresql://h/d?oauth_client_secret=p&scram_client_key=p&sslkey=k",
            "postgresql://h/d?oauth_client_secret=***&scram_client_key=***&sslkey=k",
        ),
        ("postgresql:///d?host=/run&application_name=a@b", "postgresql:///d?host=/run&application_name=a@b"),
        ("postgresql://u:p@h/d?application_name=a@b", "postgresql://u:***@h/d?application_name=a@b"),
        *((url, "postgresql://***") for url in CUT),
    ],
)
def test_what_is_shown_has_no_secret(url: str, shown: str) -> None:
    assert shown_url(url) == shown
