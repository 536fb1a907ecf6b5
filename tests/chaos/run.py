"""Three registries on one database, clients, and what can go wrong, at random: what `test_chaos.py` runs.

Each instance reaches the database through a proxy of its own. Clients ask whichever instance they like, and write down
what they were told (`history.py`).
"""

import http.client
import json
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tests.chaos.history import Contact, Kind, Operation, Outcome, check, check_contacts
from tests.integration.adapter import Adapter, AuthenticationFailed, ConnectionClosed, LinkRefused
from tests.integration.certificates import Authority, Issued
from tests.integration.proxy import Proxy
from tests.integration.registry import Registry, Response, poll
from tests.postgresql import PostgresqlServer

__all__ = ["Chaos", "Report"]

TENANT: Final = "acme"
DEVICES: Final = tuple(f"device-{number}" for number in range(8))
STABLE: Final = tuple(f"stable-{number}" for number in range(4))
"""Devices that are never deleted, whose credentials change."""
CERTIFICATES: Final = 60
TOGETHER: Final = 3
"""Clients that come with one certificate at once."""
RECOVERY: Final = 20.0
"""Seconds in which everything works again for everybody; clients, instances and database may share two processors."""
PATIENCE: Final = 30.0
"""Seconds in which every request is answered, with whatever, or its connection is lost."""
DEFAULTS: Final = {"storage.acquire_timeout": "2s", "storage.statement_timeout": "1s"}
DONE: Final = ("create ok", "update ok", "delete ok", "read ok", "first contact 201", "first contact 200")
"""What has to be among the operations, for a run to say anything."""
UNKNOWN_TEXTS: Final = ("ask once more", "may have been done")


@dataclass
class Report:
    """What was done, and what was wrong with it."""

    operations: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Tell it, for people."""
        told = {"operations": self.operations, "faults": self.faults}
        lines = [
            f"{what}: " + ", ".join(f"{number} {name}" for name, number in sorted(some.items()))
            for what, some in told.items()
        ]
        return lines + [f"PROBLEM: {problem}" for problem in self.problems]


class _Lost(Exception):
    """There was no answer."""


class Chaos:
    """One run.

    Args:
        directory: For files.
        seconds: How long faults go on.
        seed: Of whatever is chosen at random by what makes faults.
    """

    def __init__(self, directory: Path, seconds: float, seed: int) -> None:
        self._directory = directory
        self._seconds = seconds
        self._seed = seed
        self.report = Report()
        self._lock = threading.Lock()
        self._history: list[Operation] = []
        self._contacts: list[Contact] = []
        self._states = count(1)
        self._is_over = threading.Event()
        self._authority = Authority.create("CN=Chaos CA,O=Acme")
        self._certificates: list[Issued] = []
        self.marker = f"chaos-{uuid.uuid4()}"
        """In the environment of each process of the instances."""

    def run(self) -> Report:
        """Run it all, and check it."""
        with ExitStack() as stack:
            self._server = stack.enter_context(PostgresqlServer(settings={"max_connections": "100"}))
            url = self._server.create_database()
            self._name = urlsplit(url).path[1:]
            self._proxies = [stack.enter_context(Proxy(self._server.port)) for _ in range(3)]
            self._instances = [
                Registry(
                    self._directory / str(number),
                    {"auth.first_login_dir": str(self._directory), "shutdown.grace": "2s"} | DEFAULTS,
                    url=proxy.through(url),
                    arguments=["--workers", "2"] if number == 2 else [],
                    environment={"CHAOS": self.marker},
                )
                for number, proxy in enumerate(self._proxies)
            ]
            for instance in self._instances:
                stack.callback(instance.kill)
                instance.start()
            lines = (self._directory / "adapter.credentials").read_text().splitlines()
            login = dict(line.split("=", 1) for line in lines if "=" in line)
            self._login = login["username"], login["password"]
            self._prepare()
            self._rage()
            self._check()
            for instance in self._instances:
                instance.stop()
        return self.report

    def _prepare(self) -> None:
        registry = self._instances[0]
        registry.create_tenant(TENANT, {"trusted-ca": [self._authority.trust_anchor(auto_provisioning_enabled=True)]})
        self._certificates = [self._authority.issue(f"CN=pump-{number},O=Acme") for number in range(CERTIFICATES)]
        for device_id in STABLE:
            registry.create_device(TENANT, device_id)
            state, begin = next(self._states), time.monotonic()
            path = f"/v1/credentials/{TENANT}/{device_id}"
            response = registry.request("PUT", path, _credentials(device_id, state))
            assert response.status == 204
            self._note(
                f"credentials of {device_id}", Kind.CREATE, Outcome.OK, begin, state=state, version=response.etag
            )

    def _rage(self) -> None:
        works: list[Callable[[random.Random], None]] = [
            *[self._change_devices] * 3,
            *[self._change_credentials] * 2,
            *[self._look_up] * 3,
        ]
        threads = [
            threading.Thread(target=self._keep_on, args=(work, random.Random(f"{self._seed} {number}")))
            for number, work in enumerate(works)
        ]
        threads += [threading.Thread(target=self._come_first, args=(number,)) for number in range(TOGETHER)]
        self._meeting = threading.Barrier(TOGETHER)
        for thread in threads:
            thread.start()
        try:
            self._make_faults(random.Random(self._seed))
            # On a busy machine, not everything has been done by then.
            poll(lambda: all(self.report.operations[done] for done in DONE), what="each kind of operation")
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join(4 * PATIENCE)
        assert not any(thread.is_alive() for thread in threads), "a client waits for ever"

    # Clients

    def _note(
        self,
        resource: str,
        kind: Kind,
        outcome: Outcome,
        begin: float,
        *,
        state: int | None = None,
        version: str | None = None,
        replaces: str | None = None,
    ) -> None:
        end = time.monotonic()
        with self._lock:
            self.report.operations[f"{kind.value} {outcome.value}"] += 1
            if end - begin > PATIENCE:
                self.report.problems.append(f"{kind.value} of {resource} was answered after {end - begin:.1f} s")
            self._history.append(
                Operation(
                    resource=resource,
                    kind=kind,
                    outcome=outcome,
                    begin=begin,
                    end=end,
                    state=state,
                    version=version,
                    replaces=replaces,
                )
            )

    def complain(self, problem: str) -> None:
        """Note something that must not be."""
        with self._lock:
            self.report.problems.append(problem)

    def _keep_on(self, work: Callable[[random.Random], None], choice: random.Random) -> None:
        client = _Client(self, choice)
        self._clients.client = client
        try:
            while not self._is_over.is_set():
                work(choice)
            # What was in the way is gone: nothing may fail any more.
            deadline = time.monotonic() + RECOVERY
            while not self._recover(client):
                if time.monotonic() > deadline:
                    self.complain(f"a client ({work.__name__}) has not recovered in {RECOVERY:g} s")
                    return
                time.sleep(0.05)
        finally:
            client.close()

    _clients = threading.local()

    @property
    def _client(self) -> "_Client":
        client = self._clients.client
        assert isinstance(client, _Client)
        return client

    def _recover(self, client: "_Client") -> bool:
        """Tell whether everything works, at each instance."""
        for number in range(len(self._instances)):
            client.turn_to(number)
            try:
                if client.request("GET", f"/v1/tenants/{TENANT}").status != 200:
                    return False
                written = f"/v1/devices/{TENANT}/recovered-{uuid.uuid4()}"
                if client.request("POST", written, {}).status != 201:
                    return False
                if client.ask("registration", "assert", properties={"device_id": STABLE[0]}).status != 200:
                    return False
            except _Lost:
                return False
        return True

    def _change_devices(self, choice: random.Random) -> None:
        device_id = choice.choice(DEVICES)
        self._change(choice, device_id, f"/v1/devices/{TENANT}/{device_id}", _device, may_delete=True)

    def _change_credentials(self, choice: random.Random) -> None:
        device_id = choice.choice(STABLE)
        self._change(
            choice,
            f"credentials of {device_id}",
            f"/v1/credentials/{TENANT}/{device_id}",
            lambda state: _credentials(device_id, state),
            may_delete=False,
        )

    def _change(
        self,
        choice: random.Random,
        resource: str,
        path: str,
        document: Callable[[int], object],
        *,
        may_delete: bool,
    ) -> None:
        """Read a resource and change what was read."""
        client, begin = self._client, time.monotonic()
        client.turn(choice)
        try:
            found = client.request("GET", path)
        except _Lost:
            self._note(resource, Kind.READ, Outcome.UNKNOWN, begin)
            time.sleep(0.05)
            return
        if found.status == 503:
            self._note(resource, Kind.READ, Outcome.FAIL, begin)
            time.sleep(0.05)
            return
        if found.status not in {200, 404}:
            self.complain(f"GET {path}: {found.status} {found.body!r}")
            return
        is_there = found.status == 200
        etag = found.etag if is_there else None
        self._note(
            resource,
            Kind.READ,
            Outcome.OK,
            begin,
            state=_state_of(found.json()) if is_there else None,
            version=etag,
        )
        client.turn(choice)
        if etag is None:
            self._write(resource, Kind.CREATE, "POST", path, document, None)
        elif may_delete and choice.random() < 0.15:
            self._write(resource, Kind.DELETE, "DELETE", path, None, etag)
        else:
            self._write(resource, Kind.UPDATE, "PUT", path, document, etag)

    def _write(
        self,
        resource: str,
        kind: Kind,
        method: str,
        path: str,
        document: Callable[[int], object] | None,
        etag: str | None,
    ) -> None:
        state = None if document is None else next(self._states)
        body = None if document is None or state is None else document(state)
        begin = time.monotonic()
        try:
            response = self._client.request(method, path, body, {} if etag is None else {"If-Match": etag})
        except _Lost:
            self._note(resource, kind, Outcome.UNKNOWN, begin, state=state, replaces=etag)
            time.sleep(0.05)
            return
        outcome, version = Outcome.FAIL, None
        if response.status in {201, 204}:
            outcome, version = Outcome.OK, None if document is None else response.etag
        elif response.status == 503:
            if any(text in str(response.object["error"]) for text in UNKNOWN_TEXTS):
                outcome = Outcome.UNKNOWN
            if response.headers["Retry-After"] != "2":
                self.complain(f"{method} {path}: 503 without Retry-After")
        elif response.status not in {404, 409, 412}:
            self.complain(f"{method} {path}: {response.status} {response.body!r}")
        self._note(resource, kind, outcome, begin, state=state, version=version, replaces=etag)

    def _look_up(self, choice: random.Random) -> None:
        client = self._client
        client.turn(choice)
        if choice.random() < 0.5:
            resource = choice.choice(DEVICES)
            question: dict[str, Any] = {
                "api": "registration",
                "subject": "assert",
                "properties": {"device_id": resource},
            }
        else:
            device_id = choice.choice(STABLE)
            resource = f"credentials of {device_id}"
            body = json.dumps({"type": "psk", "auth-id": device_id})
            question = {"api": "credentials", "subject": "get", "body": body}
        begin = time.monotonic()
        try:
            reply = client.ask(**question)
        except _Lost:
            self._note(resource, Kind.READ, Outcome.UNKNOWN, begin)
            time.sleep(0.05)
            return
        if reply.status in {200, 404}:
            state = _state_of(reply.json()) if reply.status == 200 else None
            self._note(resource, Kind.READ, Outcome.OK, begin, state=state)
        elif reply.status == 503:
            self._note(resource, Kind.READ, Outcome.FAIL, begin)
            time.sleep(0.02)
        else:
            self.complain(f"look-up of {resource}: {reply.status}")

    def _come_first(self, number: int) -> None:
        """Come with one certificate after the other, at the same moment as others who have the same."""
        client = _Client(self, random.Random(number))
        for place, issued in enumerate(self._certificates):
            self._meeting.wait(8 * PATIENCE)
            client.turn_to((number + place) % len(self._instances))
            auth_id = issued.certificate.subject.rfc4514_string()
            body = json.dumps({"type": "x509-cert", "auth-id": auth_id, "client-certificate": issued.base64})
            while not self._try_first(client, auth_id, body):
                time.sleep(0.05)
            # About as many as there is time for.
            self._is_over.wait(self._seconds / CERTIFICATES)
        client.close()

    def _try_first(self, client: "_Client", auth_id: str, body: str) -> bool:
        begin = time.monotonic()
        try:
            reply = client.ask("credentials", "get", body=body)
        except _Lost:
            reply = None
        took = time.monotonic() - begin
        with self._lock:
            told = "lost" if reply is None else str(reply.status)
            self.report.operations[f"first contact {told}"] += 1
            if took > PATIENCE:
                self.report.problems.append(f"a first contact was answered after {took:.1f} s")
            if reply is None or reply.status == 503:
                return False
            if reply.status not in {200, 201}:
                self.report.problems.append(f"first contact of {auth_id}: {reply.status}")
            else:
                device_id = reply.json()["device-id"]
                self._contacts.append(Contact(auth_id=auth_id, device_id=device_id, is_new=reply.status == 201))
        return True

    # What goes wrong

    def _make_faults(self, choice: random.Random) -> None:
        faults: Sequence[Callable[[random.Random], None]] = (
            self._kill_instance,
            self._kill_worker,
            self._restart_database,
            self._kill_database,
            self._terminate_backends,
            self._cut,
            self._swallow,
        )
        end = time.monotonic() + self._seconds
        # Each once, whatever chance has it.
        first = list(faults)
        choice.shuffle(first)
        while first or time.monotonic() < end:
            time.sleep(choice.uniform(0.3, 1.5))
            fault = first.pop() if first else choice.choice(faults)
            fault(choice)
            self.report.faults[fault.__name__.strip("_").replace("_", " ")] += 1

    def _kill_instance(self, choice: random.Random) -> None:
        instance = choice.choice(self._instances)
        instance.kill()
        time.sleep(choice.uniform(0.0, 0.5))
        instance.start()

    def _kill_worker(self, choice: random.Random) -> None:
        children = Path("/proc/{0}/task/{0}/children".format(self._instances[2].pid))
        # For a moment there may be none, if others have been killed just now.
        workers = poll(lambda: children.read_text().split(), what="a worker")
        with suppress(ProcessLookupError):
            os.kill(int(choice.choice(workers)), signal.SIGKILL)

    def _restart_database(self, _choice: random.Random) -> None:
        self._server.restart(immediate=True)

    def _kill_database(self, choice: random.Random) -> None:
        self._server.kill()
        time.sleep(choice.uniform(0.0, 1.0))
        self._server.start()

    def _terminate_backends(self, _choice: random.Random) -> None:
        self._server.run_sql(
            f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{self._name}'"
        )

    def _cut(self, choice: random.Random) -> None:
        choice.choice(self._proxies).cut()

    def _swallow(self, choice: random.Random) -> None:
        proxy = choice.choice(self._proxies)
        proxy.swallow()
        time.sleep(choice.uniform(0.3, 3.0))
        proxy.let_through()

    # In the end

    def instance(self, number: int) -> Registry:
        """Return an instance."""
        return self._instances[number]

    @property
    def login(self) -> tuple[str, str]:
        """User name and password of adapters."""
        return self._login

    def _check(self) -> None:
        registry = self._instances[0]
        for device_id in DEVICES:
            self._read_last(device_id, registry.request("GET", f"/v1/devices/{TENANT}/{device_id}"))
        for device_id in STABLE:
            response = registry.request("GET", f"/v1/credentials/{TENANT}/{device_id}")
            self._read_last(f"credentials of {device_id}", response)
        self.report.problems += check(self._history)
        rows = self._server.run_sql(
            "SELECT auth_id, device_id FROM credentials WHERE type = 'x509-cert'", self._name
        ).splitlines()
        stored = dict(row.split("|") for row in rows)
        self.report.problems += check_contacts(self._contacts, stored)
        if len(stored) != CERTIFICATES:
            self.report.problems.append(f"{len(stored)} certificates have a device, of {CERTIFICATES} that came")
        for what, sql in CONSISTENT.items():
            wrong = self._server.run_sql(sql, self._name)
            if wrong:
                self.report.problems.append(f"{what}: {wrong}")

    def _read_last(self, resource: str, response: Response) -> None:
        assert response.status in {200, 404}, response.body
        state = _state_of(response.json()) if response.status == 200 else None
        self._note(resource, Kind.READ, Outcome.OK, time.monotonic(), state=state)


CONSISTENT: Final = {
    "the tenant's count is not that of its devices": """
        SELECT u.devices, (SELECT count(*) FROM devices d WHERE d.tenant_id = u.tenant_id) FROM tenant_usage u
        WHERE u.devices <> (SELECT count(*) FROM devices d WHERE d.tenant_id = u.tenant_id)""",
    "a range does not hold as many devices as it counts": """
        SELECT r.first_id, r.devices, count(d.device_id)
        FROM (SELECT *, lead(first_id) OVER (PARTITION BY tenant_id ORDER BY first_id) AS next FROM device_ranges) r
        LEFT JOIN devices d ON d.tenant_id = r.tenant_id AND d.device_id >= r.first_id
          AND (r.next IS NULL OR d.device_id < r.next)
        GROUP BY r.tenant_id, r.first_id, r.devices HAVING r.devices <> count(d.device_id)""",
    "members of a device that does not exist": """
        SELECT DISTINCT m.device_id FROM device_members m
        LEFT JOIN devices d USING (tenant_id, device_id) WHERE d.device_id IS NULL""",
    "a device without its members": """
        SELECT d.device_id FROM devices d
        WHERE d.document LIKE '%"n":%' AND NOT EXISTS (
          SELECT 1 FROM device_members m WHERE m.tenant_id = d.tenant_id AND m.device_id = d.device_id)""",
    "members that are not the document's": """
        SELECT d.device_id, d.document, m.value FROM devices d JOIN device_members m USING (tenant_id, device_id)
        WHERE m.member = '/defaults/n' AND m.value NOT LIKE '%' || (d.document::json -> 'defaults' ->> 'n')""",
    "a device without a set of credentials, or the other way round": """
        SELECT device_id FROM devices d FULL JOIN credential_sets s USING (tenant_id, device_id)
        WHERE d.version IS NULL OR s.version IS NULL""",
    "a device that was provisioned without its credential": """
        SELECT device_id FROM devices d
        WHERE auto_provisioned = 1 AND 1 <> (
          SELECT count(*) FROM credentials c WHERE c.tenant_id = d.tenant_id AND c.device_id = d.device_id)""",
}
"""What must have no rows."""


def _device(state: int) -> object:
    return {"defaults": {"n": f"n{state}"}}


def _credentials(auth_id: str, state: int) -> object:
    return [{"type": "psk", "auth-id": auth_id, "ext": {"n": f"n{state}"}, "secrets": [{"key": "c2VjcmV0"}]}]


def _state_of(document: Any) -> int:
    """Read the number of the state from whatever form a resource comes in."""
    if isinstance(document, list):
        (document,) = document
    members = document.get("defaults") or document.get("ext")
    return int(members["n"][1:])


class _Client:
    """Somebody who asks, now this instance, now that."""

    def __init__(self, chaos: Chaos, choice: random.Random) -> None:
        self._chaos = chaos
        self._choice = choice
        self._number = 0
        self._adapters: dict[int, tuple[int, Adapter]] = {}

    def turn(self, choice: random.Random) -> None:
        """Ask another instance from now on."""
        self._number = choice.randrange(3)

    def turn_to(self, number: int) -> None:
        """Ask a certain one."""
        self._number = number

    def request(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Response:
        """Send a request to the management API."""
        try:
            return self._chaos.instance(self._number).request(method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            raise _Lost from error

    def ask(self, api: str, subject: str, **question: Any) -> Any:
        """Send a request as an adapter; connects anew if need be."""
        try:
            return self._adapter().request(f"{api}/{TENANT}", subject, **question)
        except (OSError, ConnectionClosed, AuthenticationFailed, LinkRefused) as error:
            self._forget()
            raise _Lost from error
        except AssertionError as error:
            # A request that was released is none: a worker without a supervisor takes no more.
            if "did not come" in str(error):
                self._chaos.complain(f"instance {self._number} at {time.time():.2f}: {api}: {question}: {error}")
            self._forget()
            raise _Lost from error

    def _adapter(self) -> Adapter:
        port = self._chaos.instance(self._number).amqp_port
        known = self._adapters.get(self._number)
        if known is not None and known[0] == port:
            return known[1]
        self._forget()
        adapter = Adapter(port, *self._chaos.login, timeout=PATIENCE)
        self._adapters[self._number] = port, adapter
        return adapter

    def _forget(self) -> None:
        known = self._adapters.pop(self._number, None)
        if known is not None:
            known[1].abort()

    def close(self) -> None:
        """Part from everybody."""
        for _, adapter in self._adapters.values():
            adapter.abort()
