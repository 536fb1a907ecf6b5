"""Composition root: builds each object once from `Config`, starts what listens, stops it in order.

Start (configuration 3.2): log, health listener, database and schema, first identity, data of the first start,
listeners, ready. Stop (3.3): not ready, drain, refuse new work, let running work end, close connections, database,
health listener. What runs beside all of this goes on when a turn of it fails; should it end all the same, it takes
the rest down with it, in order.
"""

import asyncio
import contextlib
import errno
import gc
import json
import logging
import math
import os
import resource
import shlex
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import uvloop
from cryptography.x509 import load_pem_x509_certificates

from kamado import __version__, log
from kamado.amqp.api import Api, ApiSettings
from kamado.amqp.connection import ConnectionSettings
from kamado.amqp.server import AmqpServer, AmqpServerSettings
from kamado.auth import (
    CREDENTIALS_FILE,
    LOCAL_OPERATOR,
    Authenticator,
    Permissions,
    PermissionsError,
    ensure_first_identity,
    load_permissions,
)
from kamado.config import (
    AmqpConfig,
    AmqpTlsConfig,
    Config,
    HttpConfig,
    Loaded,
    TlsConfig,
    TlsError,
    hook_tls_context,
    read_hook_secret,
    tls_context,
)
from kamado.connections import DeviceConnectionService, DeviceConnectionSettings
from kamado.credentials import CredentialRules
from kamado.document import Identifiers
from kamado.errors import Unavailable
from kamado.http import api as http_api
from kamado.http.server import Health, HttpServer, HttpServerSettings
from kamado.listeners import Share
from kamado.lookup import LookupService, LookupSettings
from kamado.management import Management, ManagementSettings, Resource
from kamado.metrics import CONTENT_TYPE, Metrics
from kamado.operators import OperatorLogins, find_anonymous
from kamado.passwords import PasswordHasher
from kamado.provisioning import ProvisioningHook, ProvisioningService, ProvisioningSettings
from kamado.storage import StoreSettings, open_connections, open_store, shown_url
from kamado.store import Store

__all__ = [
    "EXIT_CONFIGURATION",
    "EXIT_INTERNAL",
    "EXIT_UNAVAILABLE",
    "Core",
    "Process",
    "Server",
    "StartFailed",
    "begin",
    "build_core",
    "build_metrics",
    "check_access",
    "credential_rules",
    "now_utc",
    "run",
    "run_to_the_end",
    "store_settings",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_UNAVAILABLE = 69
EXIT_INTERNAL = 70
EXIT_CONFIGURATION = 78

SPARE_FILES = 100
"""Open files that are no connections of a front door: listeners, database, health checks, handshakes."""


COUNT_INTERVAL = 30.0
"""Seconds for which a count of tenants and devices is good enough for a metric."""
COUNT_TIMEOUT = 1.0
START_MARGIN = 0.5
"""Seconds before the deadline of the start at which the last try to open the database begins."""
LOAD_PAUSE = 0.5
PING_PAUSE = 0.2
"""Seconds between two pings of a database that has gone away in the middle of the start."""
START_TRIES = 5
"""How often the start asks for what the database, although it answers pings, fails to do."""
LAG_INTERVAL = 0.5
"""Seconds between two looks at how late the event loop is."""


def now_utc() -> datetime:
    """Tell the time: the one clock of the process."""
    return datetime.now(UTC)


# The core


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """Everything below the front doors."""

    credential_rules: CredentialRules
    passwords: PasswordHasher
    provisioning: ProvisioningService
    lookup: LookupService
    management: Management


def credential_rules(config: Config) -> CredentialRules:
    """Work out the rules for ids, passwords and hashes."""
    identifiers = Identifiers(
        tenant_pattern=config.ids.tenant_pattern,
        device_pattern=config.ids.device_pattern,
        auth_id_pattern=config.ids.username_pattern,
    )
    return CredentialRules(
        identifiers=identifiers,
        bcrypt_max_cost=config.credentials.bcrypt_max_cost,
        allowed_hash_functions=frozenset(config.credentials.allowed_hash_functions),
    )


def store_settings(config: Config) -> StoreSettings:
    """Work out how the database is used."""
    storage = config.storage
    return StoreSettings(
        auto_migrate=storage.auto_migrate,
        search_workers=config.search.workers,
        search_timeout=config.search.timeout,
        read_url=storage.read_url,
        pool_min=storage.pool_min,
        pool_max=storage.pool_max,
        acquire_timeout=storage.acquire_timeout,
        statement_timeout=storage.statement_timeout,
    )


def build_metrics(config: Config) -> Metrics:
    """Build what counts everything, with the labels that Hono puts on every series (configuration 4.1)."""
    common = {"host": socket.gethostname(), "component_type": "service", "component_name": "hono-registry"}
    return Metrics(version=__version__, labels=common if config.metrics.common_labels else {})


def _build_hasher(config: Config, metrics: Metrics, pool: str) -> PasswordHasher:
    hasher = PasswordHasher(
        workers=config.credentials.hash_workers,
        queue=config.credentials.hash_queue,
        cost=config.credentials.bcrypt_cost,
        observe=partial(metrics.observe_hash, pool),
    )
    metrics.watch_queue(pool, lambda: hasher.waiting)
    return hasher


def build_core(
    config: Config,
    store: Store,
    clock: Callable[[], datetime] = now_utc,
    metrics: Metrics | None = None,
    hook: ProvisioningHook | None = None,
) -> Core:
    """Build the core on a database. Close `Core.passwords` in the end."""
    metrics = metrics or build_metrics(config)
    rules = credential_rules(config)
    passwords = _build_hasher(config, metrics, "management")
    provisioning = ProvisioningService(
        store,
        ProvisioningSettings(
            verify_signature=config.provisioning.verify_signature,
            max_devices_per_tenant=config.devices.max_per_tenant,
            max_credentials_per_device=config.credentials.max_per_device,
        ),
        rules.identifiers,
        clock,
        hook=hook,
        observe=metrics.observe_provisioning,
    )
    lookup = LookupService(
        store.lookups,
        provisioning,
        LookupSettings(
            tenant_max_age=config.tenants.cache_max_age,
            assertion_max_age=config.devices.cache_max_age,
            credentials_max_age=config.credentials.cache_max_age,
        ),
        clock,
    )
    management = Management(
        store,
        passwords,
        rules.identifiers,
        rules,
        ManagementSettings(
            max_devices_per_tenant=config.devices.max_per_tenant,
            max_credentials_per_device=config.credentials.max_per_device,
            is_lenient=config.management.referential_integrity == "lenient",
            read_only=config.management.read_only,
            unmodifiable=frozenset(
                resource
                for resource, may_be_modified in (
                    (Resource.TENANTS, config.tenants.modification_enabled),
                    (Resource.DEVICES, config.devices.modification_enabled),
                    (Resource.CREDENTIALS, config.credentials.modification_enabled),
                )
                if not may_be_modified
            ),
            empty_search_is_found=config.search.empty_result == "200",
            expensive_search=config.search.expensive_rows,
        ),
        clock,
        metrics.observe_search,
        metrics.observe_unanswered_search,
    )
    return Core(
        credential_rules=rules,
        passwords=passwords,
        provisioning=provisioning,
        lookup=lookup,
        management=management,
    )


# TLS that can be read again


class ReloadableTls:
    """A TLS context whose key material and client CAs can be replaced while it is in use.

    A listener keeps the context that it was given, so that context leaves new connections to the one that was read
    last. That has a cache of sessions of its own: none is resumed that was checked against other CAs.
    """

    def __init__(self, tls: TlsConfig, name: str, metrics: Metrics) -> None:
        self._tls = tls
        self._name = name
        self._metrics = metrics
        self.context = tls_context(tls)
        self._tell_expiry()

    def reload(self) -> None:
        """Read the files again; what cannot be used is logged, and the old stays."""
        try:
            self.context.successor = tls_context(self._tls)
        except TlsError as error:
            logger.error(
                "key material not reloaded, the old stays", extra={"listener": self._name, "error": str(error)}
            )
        else:
            self._tell_expiry()
            logger.info("key material reloaded", extra={"listener": self._name})

    def _tell_expiry(self) -> None:
        files = {"server": self._tls.cert_file}
        if isinstance(self._tls, AmqpTlsConfig):
            files["client_ca"] = self._tls.client_ca_file
        for role, file in files.items():
            try:
                certificates = load_pem_x509_certificates(file.read_bytes()) if file is not None else []
            except (OSError, ValueError) as error:
                # OpenSSL takes some that this library does not.
                extra = {"listener": self._name, "file": str(file), "error": str(error)}
                logger.warning("end of a certificate not known, so there is no metric of it", extra=extra)
                continue
            # Of a chain, the server's own comes first.
            ends = [one.not_valid_after_utc.timestamp() for one in certificates]
            if ends:
                self._metrics.set_certificate_expiry(self._name, role, ends[0] if role == "server" else min(ends))


# The process


def _raise_open_file_limit(config: Config) -> None:
    """Let the process have as many sockets as the system allows it, and tell if all connections would need more."""
    needed = config.amqp.max_connections + HttpServerSettings().max_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Where there is no hard limit, the system may still refuse that there be no soft one.
    wanted = max(soft, needed) if hard == resource.RLIM_INFINITY else hard
    if soft not in {wanted, resource.RLIM_INFINITY}:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            logger.warning("limit of open files not raised", extra={"limit": soft, "error": str(error)})
        else:
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < needed:
        logger.warning("too few open files for all connections", extra={"limit": soft, "needed": needed})


class Server(Protocol):
    """A front door, as far as opening it goes."""

    async def listen(self, host: str, port: int, context: ssl.SSLContext | None) -> tuple[str, int]:
        """Open a listener and tell where it is."""

    def share(self, listening: socket.socket, share: Share, context: ssl.SSLContext | None) -> None:
        """Take connections from a socket that other processes take them from, too."""


class StartFailed(Exception):
    """The registry cannot start; the text is for the operator."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run(loaded: Loaded, *, ready_file: Path | None = None, command: str = "kamado", options: Sequence[str] = ()) -> int:
    """Run the registry until a signal ends it.

    Args:
        loaded: The configuration.
        ready_file: Where to write the addresses (JSON) once everything listens.
        command: How the command `kamado` was called, for the start-up lines.
        options: The options that say which configuration, for the start-up lines.

    Returns:
        Exit status: 0, 69 (database or a port cannot be had), 70 (internal error) or 78 (configuration).
    """
    begin(loaded)
    return run_to_the_end(Process(loaded.config, ready_file, command, options).main)


def begin(loaded: Loaded) -> None:
    """Set up what is of the whole process: its log and its limits."""
    config = loaded.config
    log.configure(config.log.format, config.log.level, config.log.levels)
    for warning in loaded.warnings:
        logger.warning("configuration", extra={"warning": warning})
    _raise_open_file_limit(config)


def run_to_the_end(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run the event loop; here, and only here, an error becomes an exit status.

    Returns:
        As for `run`.
    """
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())
    except StartFailed as error:
        logger.error("start failed", extra={"error": str(error)})
        return error.status
    except Unavailable as error:
        # The database went away between being opened and everything being ready.
        logger.error("start failed", extra={"error": str(error)})
        return EXIT_UNAVAILABLE
    except Exception:
        # The one place for what nobody foresaw.
        logger.exception("internal error")
        return EXIT_INTERNAL


def check_access(config: HttpConfig, *, has_operators: bool, command: str = "kamado", options: str = "") -> str:
    """Say who may use the management API (management 3.11).

    Args:
        config: Of the management API.
        has_operators: Whether there is an operator's account.
        command: How the command `kamado` is called.
        options: What it is to be given besides; with a blank before it.

    Raises:
        StartFailed: It would be open to whoever reaches it, and nobody has said that it may.
    """
    if has_operators:
        return "operators log in by name and password"
    if config.is_local:
        return "nobody has to log in, since only this machine reaches it and there is no operator account"
    if config.auth.allow_anonymous:
        return "nobody has to log in, whoever reaches it may use it (http.auth.allow_anonymous)"
    raise StartFailed(
        "the management API would be open to everybody who reaches it, since there is no operator account: add one "
        f"({command} operator add NAME{options}), bind http.insecure and http.secure to loopback, or say "
        "http.auth.allow_anonymous=true",
        EXIT_CONFIGURATION,
    )


class Process:
    """One run of `kamado serve`."""

    def __init__(self, config: Config, ready_file: Path | None, command: str, options: Sequence[str]) -> None:
        self._config = config
        self._ready_file = ready_file
        self._command = command
        self._options = options
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        """Of a part that ended, because of which the rest has to."""
        self._drain_delay = 0.0
        self._metrics = build_metrics(config)
        self._store: Store | None = None
        self._start_end = math.inf
        """Until when the database is waited for (monotonic)."""
        self._counted = -math.inf
        self._tls: list[ReloadableTls] = []
        self._authenticator: Authenticator | None = None
        self._addresses: dict[str, str] = {}
        self._access = ""
        """Who may use the management API, in words."""

    async def main(self) -> int:
        """Start, serve until a signal, stop."""
        config = self._config
        self._handle_signals()
        self._check_ready_file()
        permissions = self._load_permissions()
        async with contextlib.AsyncExitStack() as stack:
            health = await self._open_health(stack)
            store = await self._open_store(stack, auto_migrate=config.storage.auto_migrate)
            health.ping = store.ping
            await self._check_access(store)
            core = build_core(config, store, metrics=self._metrics, hook=self._build_hook(stack))
            stack.callback(core.passwords.close)
            await self._ensure_identity(store, core.passwords, permissions)
            await self._load_first_data(store, core.passwords, core.credential_rules)
            amqp, http = await self._open_front_doors(stack, store, core, permissions)
            health.is_started = True
            await self._announce(store)
            # Last: whoever waited for it finds all of the above done and said.
            self._write_ready_file()
            await self._wait_for_the_end()

            logger.info("draining")
            health.is_draining = True
            await asyncio.sleep(self._drain_delay)
            await self._close_front_doors(amqp, http)
        logger.info("stopped")
        return 0

    async def _open_health(self, stack: contextlib.AsyncExitStack) -> Health:
        config = self._config
        health = Health(
            metrics=self._scrape,
            metrics_type=CONTENT_TYPE,
            metrics_paths=frozenset((config.metrics.path, "/metrics")),
        )
        server = HttpServer(health)
        # The last to go: probes see 503 until the end (configuration 3.3).
        stack.push_async_callback(server.stop, 1.0)
        self._run_beside(stack, health.watch())
        await self._listen_one("health", config.health.bind, config.health.port, None, server)
        return health

    async def _check_access(self, store: Store) -> None:
        has_operators = await self._insist(store.lookups.has_operators)
        options = "".join(f" {shlex.quote(word)}" for word in self._options)
        self._access = check_access(
            self._config.http, has_operators=has_operators, command=self._command, options=options
        )

    async def _open_front_doors(
        self, stack: contextlib.AsyncExitStack, store: Store, core: Core, permissions: Permissions | None
    ) -> tuple[AmqpServer, HttpServer]:
        """Serve adapters and operators from now on."""
        config, metrics = self._config, self._metrics
        lifetime = timedelta(seconds=config.auth.lifetime) if config.auth.lifetime else None
        # Threads of their own: whoever tries passwords does not keep operators from setting some, nor they adapters
        # from logging in.
        logins = _build_hasher(config, metrics, "logins")
        stack.callback(logins.close)
        self._authenticator = Authenticator(store, logins, permissions, lifetime)
        connections = await self._open_connections(stack)
        amqp = self._build_amqp(core, connections, self._authenticator)
        metrics.watch_adapters(amqp.api.traffic, amqp.connections)
        stack.push_async_callback(amqp.stop, 0.0)
        await self._listen("amqp", config.amqp, amqp)
        # Again threads of their own, for the same reason.
        operator_logins = _build_hasher(config, metrics, "operators")
        stack.callback(operator_logins.close)
        http = self._build_http(core, store, operator_logins)
        stack.push_async_callback(http.stop, 0.0)
        await self._listen("http", config.http, http)
        self._settle(stack)
        return amqp, http

    async def _close_front_doors(self, amqp: AmqpServer, http: HttpServer) -> None:
        grace = self._config.shutdown.grace
        async with asyncio.TaskGroup() as group:
            group.create_task(amqp.stop(grace))
            group.create_task(http.stop(grace))

    def _settle(self, stack: contextlib.AsyncExitStack) -> None:
        # What the start has made stays to the end; the garbage collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        self._watch_lag()
        stack.callback(self._end_watch)

    # Until the end

    def _run_beside(self, stack: contextlib.AsyncExitStack, part: Coroutine[Any, Any, None]) -> None:
        """Run a part until the stack is left; if it fails, everything ends."""
        task = asyncio.get_running_loop().create_task(part)
        task.add_done_callback(self._note_end)
        stack.callback(task.cancel)

    def _note_end(self, part: asyncio.Future[None]) -> None:
        if part.cancelled() or (error := part.exception()) is None:
            return
        if self._stop.is_set():
            logger.error("a part failed while everything ends", exc_info=error)
        else:
            self._failure = error
            self._stop.set()

    async def _wait_for_the_end(self) -> None:
        """Wait until a signal ends it, or a part that fails."""
        await self._stop.wait()
        if self._failure is not None:
            raise self._failure

    # Signals

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._request_stop, self._config.shutdown.drain_delay)
        # Who presses Ctrl-C balances no load over us and does not want to wait.
        loop.add_signal_handler(signal.SIGINT, self._request_stop, 0.0)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _request_stop(self, drain_delay: float) -> None:
        if self._stop.is_set():
            logger.warning("second signal, stopping at once")
            self._stop_at_once()
        self._drain_delay = drain_delay
        self._stop.set()

    def _stop_at_once(self) -> None:
        # Nothing is lost: what was acknowledged is on disk.
        os._exit(1)

    def _reload(self) -> None:
        """Read again what may change while the registry runs (configuration 1.2, reload)."""
        for tls in self._tls:
            tls.reload()
        if self._authenticator is not None:
            self._authenticator.reload()

    # Start

    def _load_permissions(self) -> Permissions | None:
        path = self._config.auth.permissions_file
        if path is None:
            return None
        try:
            permissions = load_permissions(path)
        except PermissionsError as error:
            raise StartFailed(f"auth.permissions_file: {error}", EXIT_CONFIGURATION) from error
        for warning in permissions.warnings:
            logger.warning("permissions file", extra={"warning": warning})
        return permissions

    async def _open_store(self, stack: contextlib.AsyncExitStack, *, auto_migrate: bool) -> Store:
        config = self._config
        self._start_end = time.monotonic() + config.startup.deadline
        try:
            async with asyncio.timeout(config.startup.deadline):
                settings = replace(
                    store_settings(config),
                    auto_migrate=auto_migrate,
                    must_write=not config.management.read_only,
                    # Somewhat less, so that what is in the way can be said.
                    open_timeout=max(0.0, config.startup.deadline - START_MARGIN),
                    observe=partial(self._metrics.observe_commit, "registry"),
                )
                store = await open_store(config.storage.url, settings)
        except Unavailable as error:
            raise StartFailed(str(error), EXIT_UNAVAILABLE) from error
        except TimeoutError as error:
            raise StartFailed("the database could not be opened in startup.deadline", EXIT_UNAVAILABLE) from error
        stack.push_async_callback(store.close)
        self._store = store
        self._metrics.watch_writes("registry", lambda: store.waiting_writes)
        return store

    async def _insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do what the start needs the opened database for; once more, should that go away and be back in time.

        Args:
            work: May be done again, whatever has become of it before.

        Raises:
            Unavailable: The database is away, or answers and cannot do it.
        """
        tries = 1
        while True:
            try:
                return await work()
            except Unavailable as error:
                if tries == START_TRIES:
                    raise
                logger.warning("the start waits for the database", extra={"error": str(error)})
            tries += 1
            await self._wait_for_database()

    async def _wait_for_database(self) -> None:
        assert self._store is not None, "it was opened"
        while True:
            try:
                await self._store.ping()
                return
            except Unavailable:
                if time.monotonic() + PING_PAUSE > self._start_end:
                    raise
            await asyncio.sleep(PING_PAUSE)

    async def _scrape(self, is_ready: bool) -> bytes:
        """Make the page of metrics."""
        await self._count()
        return self._metrics.render(is_ready=is_ready)

    async def _count(self) -> None:
        """Count tenants and devices, now and then (configuration 4.2)."""
        now = time.monotonic()
        if self._store is not None and now - self._counted >= COUNT_INTERVAL:
            # Who asks meanwhile is shown the old numbers, as is everybody if there are no new ones in time.
            self._counted = now
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(COUNT_TIMEOUT):
                    self._metrics.set_inventory(*await self._store.search(lambda searches: searches.count()))

    def _watch_lag(self, due: float | None = None) -> None:
        """Measure now and then how late the event loop is; `due` is when this should have been called."""
        now = time.perf_counter()
        if due is not None:
            self._metrics.observe_lag(max(0.0, now - due))
        loop = asyncio.get_running_loop()
        self._lag_timer = loop.call_later(LAG_INTERVAL, self._watch_lag, now + LAG_INTERVAL)

    def _end_watch(self) -> None:
        self._lag_timer.cancel()

    async def _ensure_identity(self, store: Store, passwords: PasswordHasher, permissions: Permissions | None) -> None:
        """Make the first identity where nobody could log in otherwise (authentication 5.1)."""
        if permissions is not None:
            return
        directory = self._config.login_dir
        try:
            directory.mkdir(parents=True, exist_ok=True)
            made = await self._insist(lambda: ensure_first_identity(store, passwords, directory, now_utc()))
        except OSError as error:
            message = f"the login for adapters cannot be written to {directory}: {error.strerror}"
            raise StartFailed(message, EXIT_UNAVAILABLE) from error
        if made is not None:
            logger.info("identity for adapters made", extra={"file": str(made)})
        elif not await self._insist(lambda: store.read(lambda transaction: transaction.list_identities())):
            logger.warning("no adapter can log in: every identity was removed; see: kamado identity add --help")

    async def _open_connections(self, stack: contextlib.AsyncExitStack) -> DeviceConnectionService | None:
        """Open what is kept of device connections, and see that it does not grow without end."""
        config = self._config.device_connection
        if not config.enabled:
            return None
        observe = partial(self._metrics.observe_commit, "connections")
        settings = replace(store_settings(self._config), observe=observe)
        connections = await open_connections(self._config.storage.url, settings)
        stack.push_async_callback(connections.close)
        service = DeviceConnectionService(
            connections,
            DeviceConnectionSettings(
                max_devices_per_tenant=config.max_devices_per_tenant,
                refresh_interval=config.refresh_interval,
                gateway_lifetime=config.gateway_lifetime,
            ),
            now_utc,
        )
        self._run_beside(stack, service.keep_clean())
        return service

    def _build_amqp(
        self, core: Core, connections: DeviceConnectionService | None, authenticator: Authenticator
    ) -> AmqpServer:
        config = self._config.amqp
        return AmqpServer(
            Api(core.lookup, ApiSettings(link_credit=config.link_credit), now_utc, connections),
            authenticator,
            AmqpServerSettings(
                connection=ConnectionSettings(
                    container_id=self._container_id(),
                    max_frame_size=config.max_frame_size,
                    idle_timeout=config.idle_timeout,
                    open_timeout=config.handshake_timeout,
                    max_links=config.max_links_per_connection,
                    max_message_size=config.max_message_size,
                    version=__version__,
                ),
                mechanisms=config.sasl_mechanisms,
                handshake_timeout=config.handshake_timeout,
                max_connections=config.max_connections,
            ),
            now_utc,
            observe_login=self._metrics.observe_login,
        )

    def _container_id(self) -> str:
        """Stable for a process, and its own (amqp-apis 2.1)."""
        config = self._config.amqp
        listener = config.secure if config.secure_enabled else config.insecure
        # A port that the system chooses is not known yet.
        return f"{config.container_name}-{listener.bind}:{listener.port or os.getpid()}"

    async def _listen(self, name: str, config: HttpConfig | AmqpConfig, server: Server) -> None:
        """Open the plain and the TLS listener of a front door, as configured."""
        if config.insecure_enabled:
            await self._listen_one(name, config.insecure.bind, config.insecure.port, None, server)
        if config.secure_enabled:
            tls = ReloadableTls(config.tls, name, self._metrics)
            self._tls.append(tls)
            await self._listen_one(f"{name}s", config.secure.bind, config.secure.port, tls.context, server)

    async def _listen_one(
        self, scheme: str, host: str, port: int, context: ssl.SSLContext | None, server: Server
    ) -> None:
        with self._explained(scheme, host, port):
            self._note_address(scheme, *await server.listen(host, port, context))

    @staticmethod
    @contextlib.contextmanager
    def _explained(scheme: str, host: str, port: int) -> Iterator[None]:
        """Say which listener it is that cannot be had."""
        try:
            yield
        except OSError as error:
            # A name that is not resolved has a number of its own kind, below zero.
            cause = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            message = f"{scheme}: {host}:{port} cannot be had: {cause}"
            raise StartFailed(message, EXIT_UNAVAILABLE) from error

    def _note_address(self, scheme: str, bound_host: str, bound_port: int) -> None:
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        protocol = "http" if scheme == "health" else scheme
        self._addresses[scheme] = f"{protocol}://{shown}:{bound_port}"

    def _check_ready_file(self) -> None:
        """Find out before anything is started whether the file can be written."""
        if self._ready_file is None:
            return
        try:
            if self._ready_file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            temporary = self._temporary_ready_file(self._ready_file)
            temporary.touch()
            temporary.unlink()
        except OSError as error:
            message = f"--ready-file: {self._ready_file} cannot be written: {error.strerror}"
            raise StartFailed(message, EXIT_CONFIGURATION) from error

    def _write_ready_file(self) -> None:
        if self._ready_file is None:
            return
        temporary = self._temporary_ready_file(self._ready_file)
        try:
            temporary.write_text(json.dumps(self._addresses))
            temporary.replace(self._ready_file)
        except OSError as error:
            # It could be when the start began: the disk is full, say.
            temporary.unlink(missing_ok=True)
            message = f"--ready-file: {self._ready_file} cannot be written: {error.strerror}"
            raise StartFailed(message, EXIT_UNAVAILABLE) from error

    @staticmethod
    def _temporary_ready_file(path: Path) -> Path:
        """Where it is written first, so that nobody reads half of it."""
        return path.with_name(f".{path.name}.{os.getpid()}")

    async def _announce(self, store: Store) -> None:
        """Say what runs where, who may log in, and what to type next."""
        storage = self._config.storage
        database = shown_url(storage.url) if storage.file is None else str(storage.file)
        login = self._config.login_dir / CREDENTIALS_FILE
        fields = self._addresses | {"database": database, "http_access": self._access}
        if self._config.auth.permissions_file is not None:
            fields["permissions_file"] = str(self._config.auth.permissions_file)
        elif login.exists():
            fields["adapter_credentials"] = str(login)
        if not log.is_text(self._config.log.format):
            logger.info("ready", extra=fields)
            return
        lines = [f"Kamado {__version__} is ready."]
        rows = [
            (self._addresses.get("http"), "management API"),
            (self._addresses.get("https"), "management API with TLS"),
            (self._addresses.get("amqp"), "APIs for adapters"),
            (self._addresses.get("amqps"), "APIs for adapters with TLS"),
            (self._addresses["health"], "health checks: /readiness, /liveness"),
            (database, "database"),
            (fields.get("adapter_credentials"), "login for adapters: user name and password"),
        ]
        width = max(len(where) for where, _ in rows if where)
        lines += [f"  {where:<{width}}  {what}" for where, what in rows if where]
        lines += [
            f"Management API: {self._access}.",
            *await self._suggestions(store),
            "Ctrl-C stops it.",
        ]
        print("\n".join(lines), flush=True)

    async def _suggestions(self, store: Store) -> list[str]:
        try:
            has_operators = await store.lookups.has_operators()
            has_tenant = await store.lookups.find_tenant("DEFAULT_TENANT") is not None
        except Unavailable:
            return []  # everything runs, and nobody needs these
        url = self._addresses.get("http") or self._addresses["https"]
        curl = "curl -i -u NAME" if has_operators else "curl -i"
        request, tenant_id = ("", "DEFAULT_TENANT") if has_tenant else (" -X POST", "my-tenant")
        return [
            "Next, in a second terminal:",
            f"  {curl}{request} {url}/v1/tenants/{tenant_id}",
            f"  {self._command} ask tenant {tenant_id}{self._options_to_ask()}",
        ]

    def _options_to_ask(self) -> str:
        """The options of this run for `ask`, which needs to know the port that was chosen where 0 is configured."""
        words, chosen = list(self._options), self._find_chosen_ports()
        told = set[str]()
        for index, word in enumerate(words):
            key = word.partition("=")[0].strip()
            if index and words[index - 1] == "--set" and key in chosen:
                words[index] = f"{key}={chosen[key]}"
                told.add(key)
        asked = "amqp.secure.port" if self._config.amqp.secure_enabled else "amqp.insecure.port"
        if asked in chosen.keys() - told:
            words += ["--set", f"{asked}={chosen[asked]}"]
        return "".join(f" {shlex.quote(word)}" for word in words)

    def _find_chosen_ports(self) -> dict[str, int]:
        """Setting -> the port that the system chose for it."""
        config = self._config
        configured = {
            "health": ("health.port", config.health.port),
            "http": ("http.insecure.port", config.http.insecure.port),
            "https": ("http.secure.port", config.http.secure.port),
            "amqp": ("amqp.insecure.port", config.amqp.insecure.port),
            "amqps": ("amqp.secure.port", config.amqp.secure.port),
        }
        return {
            key: urlsplit(self._addresses[scheme]).port or 0
            for scheme, (key, port) in configured.items()
            if port == 0 and scheme in self._addresses
        }

    async def _load_first_data(self, store: Store, passwords: PasswordHasher, rules: CredentialRules) -> None:
        """Load what `startup.load` names, while there is no tenant at all."""
        paths = self._config.startup.load
        end = time.monotonic() + self._config.startup.deadline
        while paths:
            try:
                if not await store.read(lambda transaction: transaction.has_tenants()):
                    await self._load(paths, store, passwords, rules)
                return
            except Unavailable:
                # Perhaps another start is at it: what it loads is kept for it until it is done.
                if time.monotonic() + LOAD_PAUSE > end:
                    raise
                await asyncio.sleep(LOAD_PAUSE)

    async def _load(
        self, paths: Sequence[Path], store: Store, passwords: PasswordHasher, rules: CredentialRules
    ) -> None:
        # Not on the way to the first answer of every other start.
        from kamado import load

        try:
            plan = load.read_files(paths, rules=rules, now=now_utc())
            counts = await load.apply(plan, store, passwords, LOCAL_OPERATOR, now_utc)
        except load.LoadErrors as error:
            if await store.read(lambda transaction: transaction.has_tenants()):
                return  # another start was faster
            for problem in error.problems:
                logger.error("startup.load", extra={"problem": str(problem)})
            raise StartFailed("startup.load: the files have errors, nothing was loaded", EXIT_CONFIGURATION) from error
        logger.info(
            "data loaded",
            extra={"tenants": counts.tenants, "devices": counts.devices, "credentials": counts.credentials},
        )

    def _build_hook(self, stack: contextlib.AsyncExitStack) -> ProvisioningHook | None:
        config = self._config.provisioning.hook
        if config.url is None:
            return None
        # Loads an HTTP client, which few registries need.
        from kamado.http.hook import HttpHook, HttpHookSettings

        try:
            settings = HttpHookSettings(
                url=config.url,
                timeout=config.timeout,
                max_concurrent=config.max_concurrent,
                secret=None if config.secret_file is None else read_hook_secret(config.secret_file),
                tls=hook_tls_context(config) if config.is_https else None,
                version=__version__,
            )
        except TlsError as error:
            # It could be read when the configuration was checked.
            raise StartFailed(f"provisioning.hook.{error.key}: {error}", EXIT_CONFIGURATION) from error
        hook = HttpHook(settings)
        stack.push_async_callback(hook.close)
        return hook

    def _build_http(self, core: Core, store: Store, passwords: PasswordHasher) -> HttpServer:
        config = self._config.http
        anonymous = find_anonymous(is_local=config.is_local, allow_anonymous=config.auth.allow_anonymous)
        api = http_api.Api(
            core.management,
            http_api.ApiSettings(
                max_body_size=config.max_body_size,
                cors_allowed_origins=frozenset(config.cors_allowed_origins),
                realm=config.auth.realm,
                page_offset_in_pages=self._config.search.page_offset_unit == "pages",
                identifiers=core.credential_rules.identifiers,
            ),
            OperatorLogins(store.lookups, passwords, anonymous),
            observe=self._metrics.observe_http,
        )
        return HttpServer(api, HttpServerSettings(idle_timeout=config.idle_timeout))
