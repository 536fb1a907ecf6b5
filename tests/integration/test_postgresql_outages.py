"""PostgreSQL when things go wrong, as operators and adapters meet it: the real process (configuration 3.2)."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.integration.adapter import Adapter
from tests.integration.proxy import Proxy
from tests.integration.registry import Registry, kamado, poll
from tests.postgresql import PostgresqlServer

from kamado.storage import migrate

UNAVAILABLE = 69
TENANT = "acme"
DEFAULTS = {"storage.acquire_timeout": "2s", "storage.statement_timeout": "1s"}
AT_ONCE = 0.7
"""Seconds. Whoever waited for the database would do so for at least a second; with nothing else on the machine it is a
hundredth of that."""
RECOVERY = 6.0
"""Seconds until everything works again; promised are 2 on a machine that has nothing else to do."""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresqlServer]:
    """A server that tests may stop, and leave running."""
    with PostgresqlServer() as server:
        yield server


class Caller:
    """An adapter and an operator of one registry; the adapter's connection stays the same throughout."""

    def __init__(self, registry: Registry, tenant_id: str = TENANT) -> None:
        self.registry = registry
        self.tenant_id = tenant_id
        self.adapter = Adapter(registry.amqp_port, registry.username, registry.password)

    def look_up(self, device_id: str = "d1") -> int | None:
        reply = self.adapter.request(f"registration/{self.tenant_id}", "assert", properties={"device_id": device_id})
        return reply.status

    def create(self, device_id: str) -> int:
        return self.registry.request("POST", f"/v1/devices/{self.tenant_id}/{device_id}", {}).status

    def works(self, device_id: str) -> bool:
        return self.create(device_id) in {201, 409} and self.look_up(device_id) == 200


@contextmanager
def running(
    directory: Path, url: str, settings: Mapping[str, str] | None = None, *, data: bool = True
) -> Iterator[Caller]:
    with Registry(directory, DEFAULTS | dict(settings or {}), url=url) as registry:
        if data:
            registry.create_tenant(TENANT)
            registry.create_device(TENANT, "d1")
        caller = Caller(registry)
        try:
            yield caller
        finally:
            caller.adapter.close()


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


# Starting


def fail_to_start(directory: Path, url: str, settings: Mapping[str, str] | None = None) -> tuple[str, float]:
    """Start a registry that has to end by itself.

    Returns:
        What it said, and the seconds that it took.
    """
    registry = Registry(directory, DEFAULTS | dict(settings or {}), url=url)
    began = time.monotonic()
    result = registry.run("serve", expect_status=UNAVAILABLE)
    output = result.stdout + result.stderr
    assert "Traceback" not in output
    password = urlsplit(url).password
    assert password is not None
    assert password not in output
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert records[-1]["msg"] == "start failed"
    return records[-1]["error"], time.monotonic() - began


def test_what_does_not_pass_ends_the_start_at_once(server: PostgresqlServer, tmp_path: Path) -> None:
    name = urlsplit(server.create_database()).path[1:]
    server.run_sql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0 OWNER kamado")
    server.run_sql("CREATE DATABASE other OWNER kamado")
    server.run_sql("CREATE TABLE invoices (id int)", "other")
    server.run_sql("CREATE ROLE stranger LOGIN PASSWORD 'stranger-s3cret'")
    with Proxy(server.port) as proxy:
        version = server.run_sql("SHOW server_version_num")[:2].encode()
        proxy.replace = b"server_version\0" + version, b"server_version\0" + b"12"
        cases = {
            server.url(name).replace("@", "x@"): "refuses the login",
            server.url("nowhere"): "does not exist: create the database first",
            server.url("latin"): "has the encoding LATIN1; create the database with encoding UTF8",
            server.url("other"): "holds tables of another program",
            f"postgresql://stranger:stranger-s3cret@127.0.0.1:{server.port}/{name}": "has no right",
            server.url(name) + "?sslmode=perhaps": "sslmode",
            server.url(name) + "?connect_timeout=soon": "connect_timeout=soon is not a whole number",
            server.url(name) + "?keepalives_idle=9": "keepalives_idle is not supported",
            server.url(name) + "?colour=red": "colour",
            proxy.through(server.url(name)): "PostgreSQL 12 is too old; Kamado needs 13 or newer",
        }
        for number, (url, text) in enumerate(cases.items()):
            said, took = fail_to_start(tmp_path / str(number), url)
            assert text in said
            # Whatever may pass is waited for as long as `startup.deadline`, a minute.
            assert took < 45, said


def test_a_role_that_may_not_write_does_not_start_unless_it_need_not(server: PostgresqlServer, tmp_path: Path) -> None:
    url = server.create_database()
    name = urlsplit(url).path[1:]
    with running(tmp_path, url):
        pass
    server.run_sql(
        "CREATE ROLE reader LOGIN PASSWORD 'reader-s3cret'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader", name
    )
    reader = f"postgresql://reader:reader-s3cret@127.0.0.1:{server.port}/{name}"
    said, took = fail_to_start(tmp_path, reader, {"storage.auto_migrate": "false"})
    assert "the role reader has no right to INSERT, UPDATE, DELETE in connection_usage, credential_sets" in said
    assert took < 45
    command = kamado("operator", "add", "ada", "--set", f"storage.url={reader}", expect_status=UNAVAILABLE)
    assert "permission denied for table operators" in command.stderr, "the database's own words"
    assert "reader-s3cret" not in command.stderr
    with running(tmp_path, reader, {"management.read_only": "true"}, data=False) as caller:
        assert caller.look_up() == 200
        assert caller.create("d2") == 403
    granted = "SELECT, INSERT, UPDATE, DELETE"
    server.run_sql(
        f"GRANT {granted} ON ALL TABLES IN SCHEMA public TO reader; REVOKE DELETE ON devices FROM reader", name
    )
    said, _ = fail_to_start(tmp_path, reader)
    assert "has no right to DELETE in devices: grant it, or set management.read_only" in said
    # Whatever else is there is nobody's business.
    server.run_sql("GRANT DELETE ON devices TO reader; CREATE TABLE reports (n int)", name)
    with running(tmp_path, reader, {"storage.auto_migrate": "false"}, data=False) as caller:
        assert caller.works("d2")


def test_a_database_that_is_away_is_waited_for_until_the_deadline(server: PostgresqlServer, tmp_path: Path) -> None:
    url = server.create_database()
    server.stop()
    try:
        said, took = fail_to_start(tmp_path, url, {"startup.deadline": "6s", "storage.acquire_timeout": "20s"})
        assert "cannot be reached" in said
        assert "refused" in said
        assert 5.5 <= took < 45, "not given up before, though the database may be there in the next moment"
    finally:
        server.start()


def test_silence_at_the_start_is_given_up_at_the_deadline(server: PostgresqlServer, tmp_path: Path) -> None:
    with Proxy(server.port) as proxy:
        proxy.swallow()
        said, _ = fail_to_start(tmp_path, proxy.through(server.create_database()), {"startup.deadline": "4s"})
        assert "cannot be reached: no answer" in said


def test_a_database_that_comes_up_in_time_is_used(server: PostgresqlServer, tmp_path: Path) -> None:
    url = server.create_database()
    server.stop()
    starting = threading.Timer(2.0, server.start)
    starting.start()
    with running(tmp_path, url) as caller:
        assert caller.look_up() == 200
    starting.join()


def interrupt(proxy: Proxy, asked: Sequence[bytes]) -> None:
    """Take the database away whenever the next one of these is asked, each time until that has been noticed."""
    for statement in asked:
        proxy.refused = 0
        proxy.cut_before, proxy.refuses_then = statement, True
        proxy.accept()
        poll(lambda: proxy.refused > 2, what=f"{statement!r} is asked, and the database not reached")
    proxy.accept()


def test_a_database_that_goes_away_in_the_middle_of_the_start_is_waited_for(
    server: PostgresqlServer, tmp_path: Path
) -> None:
    (tmp_path / "tenants.json").write_text(json.dumps([{"tenant-id": TENANT}]))
    url = server.create_database()
    asyncio.run(migrate(url))
    settings = {"startup.load": str(tmp_path / "tenants.json"), "startup.deadline": "110s", "log.format": "text"}
    statements = (
        *(b"FROM schema_version", b"FROM unfinished_copies", b"FROM operators", b"FROM milestones"),
        *(b"INSERT INTO identities", b"FROM tenants LIMIT 1", b"INSERT INTO tenants"),
        # For the start-up lines, which can do without.
        b"coalesce((SELECT tenant_id FROM tenants",
    )
    with Proxy(server.port) as proxy, ThreadPoolExecutor(1) as pool:
        interrupted = pool.submit(interrupt, proxy, statements)
        with Registry(tmp_path, settings, url=proxy.through(url)) as registry:
            interrupted.result()
            assert "is ready." in registry.log.read_text()
            poll(lambda: registry.request("GET", f"/v1/tenants/{TENANT}").status == 200, what="recovery")
            assert registry.credentials_file.exists()


# While it runs


def test_an_outage_is_told_at_once_and_over_as_soon_as_the_database_is_back(
    server: PostgresqlServer, tmp_path: Path
) -> None:
    """Configuration 3.2, database at run time; 3.1, three failed pings."""
    with running(tmp_path, server.create_database()) as caller:
        registry = caller.registry
        for stop in (server.stop, server.kill):
            stop()
            try:
                poll(lambda: caller.look_up() == 503, what="it is noticed")
                asked = [seconds(caller.look_up) for _ in range(20)]
                assert sorted(asked)[10] < AT_ONCE
                response = registry.request("GET", f"/v1/devices/{TENANT}/d1")
                assert (response.status, response.headers["Retry-After"]) == (503, "2")
                assert response.object == {"error": "the database cannot be reached"}
                refused = [seconds(lambda: caller.create("d2")) for _ in range(20)]
                assert sorted(refused)[10] < AT_ONCE
                assert caller.create("d2") == 503
                assert caller.look_up("nobody") == 503, "and not 404"
                assert registry.health("/liveness").status == 200
                poll(lambda: registry.health("/readiness").status == 503, what="not ready")
            finally:
                server.start()
            assert seconds(lambda: poll(lambda: caller.works("d3"), what="recovery")) < RECOVERY
            poll(lambda: registry.health("/readiness").status == 200, what="ready")


def test_a_write_whose_outcome_is_unknown_says_so_and_may_be_repeated(server: PostgresqlServer, tmp_path: Path) -> None:
    url = server.create_database()
    with Proxy(server.port) as proxy, running(tmp_path, proxy.through(url)) as caller:
        path = f"/v1/devices/{TENANT}/d1"
        before = caller.registry.request("GET", path).etag
        with ThreadPoolExecutor(1) as pool:
            proxy.cut_after, proxy.refuses_then = b"COMMIT\0", True
            writing = pool.submit(caller.registry.request, "PUT", path, {"ext": {"n": 1}}, {"If-Match": before})
            response = writing.result()
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        assert "see, or ask once more" in str(response.object["error"])
        proxy.accept()
        poll(lambda: caller.look_up() == 200, what="recovery")
        # It was made: a retry finds another version than the one that it was to replace.
        assert caller.registry.request("PUT", path, {"ext": {"n": 1}}, {"If-Match": before}).status == 412
        assert caller.registry.request("GET", path).object["ext"] == {"n": 1}


def test_silence_fails_what_is_asked_and_is_over_by_itself(server: PostgresqlServer, tmp_path: Path) -> None:
    url = server.create_database()
    with Proxy(server.port) as proxy, running(tmp_path, proxy.through(url)) as caller:
        proxy.swallow()
        assert seconds(lambda: poll(lambda: caller.look_up() == 503, what="it is noticed")) < 15
        assert sorted(seconds(caller.look_up) for _ in range(5))[2] < AT_ONCE
        assert caller.create("d2") == 503
        proxy.let_through()
        assert seconds(lambda: poll(lambda: caller.works("d2"), what="recovery")) < RECOVERY


# Several servers


def test_a_standby_that_is_promoted_takes_over(tmp_path: Path) -> None:
    with PostgresqlServer() as primary, PostgresqlServer(primary=primary) as standby:
        url = primary.create_database()
        both = url.replace(f":{primary.port}/", f":{primary.port},127.0.0.1:{standby.port}/")
        # A commit is known to both.
        primary.run_sql("ALTER SYSTEM SET synchronous_standby_names = '*'; SELECT pg_reload_conf()")
        poll(lambda: primary.run_sql("SELECT sync_state FROM pg_stat_replication") == "sync")
        with running(tmp_path, both) as caller:
            assert caller.works("d2")
            primary.kill()
            poll(lambda: caller.look_up("d2") == 503, what="it is noticed, and a standby takes no writes")
            standby.promote()
            assert seconds(lambda: poll(lambda: caller.works("d3"), what="recovery")) < RECOVERY
            assert caller.look_up("d2") == 200
            # The old one comes back as it was: it is not asked for anything.
            primary.settings["default_transaction_read_only"] = "on"
            primary.start()
            assert caller.works("d4")
            standby.restart()
            assert seconds(lambda: poll(lambda: caller.works("d5"), what="recovery")) < RECOVERY
            assert standby.run_sql("SELECT count(*) FROM devices", urlsplit(url).path[1:]) == "5"


def test_a_replica_is_asked_and_nothing_is_missing_because_of_it(tmp_path: Path) -> None:
    with PostgresqlServer() as primary, PostgresqlServer(primary=primary) as replica:
        url = primary.create_database()
        name = urlsplit(url).path[1:]
        poll(lambda: replica.run_sql("SELECT count(*) FROM pg_database WHERE datname = '" + name + "'") == "1")
        read_url = url.replace(f":{primary.port}/", f":{replica.port}/")

        def look_ups_of(server: PostgresqlServer) -> int:
            return int(
                server.run_sql(
                    "SELECT coalesce(sum(idx_tup_fetch + idx_scan), 0) FROM pg_stat_user_tables "
                    "WHERE relname = 'devices'",
                    name,
                )
            )

        with running(tmp_path, url, {"storage.read_url": read_url}) as caller:
            poll(lambda: replica.run_sql("SELECT count(*) FROM devices", name) == "1", what="replay")
            before = look_ups_of(primary)
            assert [caller.look_up() for _ in range(20)] == [200] * 20
            assert look_ups_of(primary) < before + 20
            replica.run_sql("SELECT pg_wal_replay_pause()")
            # That is a request, which is granted before the next record.
            poll(lambda: replica.run_sql("SELECT pg_get_wal_replay_pause_state()") == "paused", what="the pause")
            assert caller.create("new") == 201
            assert caller.look_up("new") == 200
            changed = caller.registry.request("PUT", f"/v1/devices/{TENANT}/d1", {"enabled": False})
            assert changed.status == 204
            assert caller.look_up() == 200, "as it was, for as long as the replica lags behind"
            assert caller.look_up("nobody") == 404
            replica.kill()
            assert {caller.look_up("new") for _ in range(20)} == {200}
            assert caller.look_up() == 404
            events = {json.loads(line)["msg"] for line in caller.registry.log.read_text().splitlines()}
            assert "replica away, look-ups go to the primary until it is back" in events
            assert not [event for event in events if event.startswith("database")]
            replica.start()
            poll(lambda: replica.run_sql("SELECT count(*) FROM devices", name) == "2", what="replay")
            asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'kamado'"
            poll(lambda: replica.run_sql(asked, name) != "0", what="the replica is used again")
            assert caller.look_up("new") == 200


# Several instances


def test_instances_that_start_at_once_make_everything_once(server: PostgresqlServer, tmp_path: Path) -> None:
    url = server.create_database()
    data = {
        "tenants.json": [{"tenant-id": TENANT}],
        "devices.json": [{"tenant": TENANT, "devices": [{"device-id": f"d{n}", "data": {}} for n in range(300)]}],
    }
    for name, document in data.items():
        (tmp_path / name).write_text(json.dumps(document))
    load = ",".join(str(tmp_path / name) for name in data)
    instances = [Registry(tmp_path / str(n), {"startup.load": load}, url=url) for n in range(3)]
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(Registry.start, instances))
        files = [one for one in instances if one.credentials_file.exists()]
        assert len(files) == 1
        for one in instances:
            with Adapter(one.amqp_port, files[0].username, files[0].password) as adapter:
                reply = adapter.request(f"registration/{TENANT}", "assert", properties={"device_id": "d7"})
                assert reply.status == 200
        for number, one in enumerate(instances):
            assert one.request("POST", f"/v1/devices/{TENANT}/new-{number}", {}).status == 201
        name = urlsplit(url).path[1:]
        assert server.run_sql("SELECT count(*) FROM devices; SELECT count(*) FROM identities", name) == "303\n1"
        for one in instances:
            one.stop()
    finally:
        for one in instances:
            one.kill()
