"""Tenants, devices and credentials from files in the three JSON forms of Hono 1.2 (configuration 2.2).

Two steps. `read_files` reads and checks every entry and needs no database; `apply` hashes passwords, then writes
everything in one transaction, or nothing. All that is wrong is reported at once, by `apply`: what the files say, and
what does not go with the database. The rules of single entries are those of the management API; here are the rules of
files: their forms, the quirks of those that Hono has written, and what belongs to what.

The form of an element is told by its content:

* `{"tenant-id": ..., members of a tenant}`
* `{"tenant": ..., "devices": [{"device-id": ..., "data": {members of a device}}]}`
* `{"tenant": ..., "credentials": [{"device-id": ..., members of a credential}]}`
"""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar, cast

from kamado.auth import Principal
from kamado.credentials import (
    Credential,
    CredentialRules,
    CredentialUpdate,
    PlainPassword,
    parse_credential,
    plain_passwords,
    with_hashes,
    without_references,
)
from kamado.devices import Device, parse_device
from kamado.document import JsonObject, Members, decode, encode_base64, new_id
from kamado.errors import BadRequest, Conflict
from kamado.passwords import PasswordHasher
from kamado.store import Change, ChangeKind, Store, StoredCredentials, StoredDevice, StoredTenant, Transaction
from kamado.tenants import Tenant, parse_tenant

__all__ = ["Entry", "LoadCounts", "LoadErrors", "LoadPlan", "LoadProblem", "Progress", "apply", "read_files"]

T = TypeVar("T")

DeviceKey = tuple[str, str]
"""Tenant id and device id."""

Progress = Callable[[int, int], None]
"""Told how much is done of how much; of `apply`, in the thread of the database as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where something stands."""

    file: str
    path: str
    """Inside of the file, like `[0].devices[12]`; empty for the file itself."""
    name: str = ""
    """Whose entry it is, like `device press-1 of tenant acme`."""

    def problem(self, message: str) -> "LoadProblem":
        """Say what is wrong with it."""
        return LoadProblem(file=self.file, entry=" ".join(filter(None, (self.path, self.name))), message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProblem:
    """What is wrong, or worth knowing, and where."""

    file: str
    entry: str
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.file, self.entry, self.message)))


class LoadErrors(BadRequest):
    """Nothing was loaded, because of these."""

    def __init__(self, problems: Sequence[LoadProblem]) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{problems[0]}{more}")
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTenant:
    """A tenant of a file."""

    entry: Entry
    tenant_id: str
    tenant: Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDevice:
    """A device of a file."""

    entry: Entry
    tenant_id: str
    device_id: str
    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCredential:
    """A credentials object of a file."""

    entry: Entry
    tenant_id: str
    device_id: str
    update: CredentialUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What the files hold, each entry checked. One with problems is only good for finding more of them."""

    tenants: tuple[PlannedTenant, ...] = ()
    devices: tuple[PlannedDevice, ...] = ()
    credentials: tuple[PlannedCredential, ...] = field(default=(), repr=False)
    warnings: tuple[LoadProblem, ...] = ()
    problems: tuple[LoadProblem, ...] = ()
    broken_tenants: frozenset[str] = frozenset()
    """Those that stand in the files and have a problem: what belongs to them does not lack them."""
    broken_devices: frozenset[DeviceKey] = frozenset()
    is_complete: bool = True
    """Whether all files could be read up to their entries; otherwise nothing can be said to be missing."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compare with a database."""
        return not (self.tenants or self.devices or self.credentials)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCounts:
    """What was written."""

    tenants: int = 0
    devices: int = 0
    credentials: int = 0
    """Credentials objects."""
    replaced: int = 0
    """Tenants and devices among them that had been there before."""


# --- Files to a plan ---

# A comment, or a string, in which there is none. Possessive, so that an open quote costs one pass only.
_STRING_OR_COMMENT: Final = re.compile(rb'"(?:\\.|[^"\\])*+"|//[^\r\n]*+|/\*.*?\*/', re.DOTALL)
_PLACEHOLDER: Final = re.compile(r"\$\{[^}]*\}")
_JUST_NOW: Final = timedelta(seconds=5)


def read_files(paths: Sequence[Path], *, rules: CredentialRules, now: datetime) -> LoadPlan:
    """Read files and check every entry.

    Args:
        paths: The files; their order does not matter.
        rules: What ids, passwords and hashes have to look like.
        now: Which trust anchors are valid, for their templates. Those of tenants that only the database has do not
            count, so credentials that are given as certificates get their subject as auth-id there.

    Returns:
        The plan; files that cannot be read and entries that are against a rule are its `problems`.
    """
    reader = _Reader(rules, now)
    for path in paths:
        reader.read(path)
    return reader.finish()


class _Reader:
    """Collects entries and problems over several files."""

    def __init__(self, rules: CredentialRules, now: datetime) -> None:
        self._rules = rules
        self._now = now
        self._problems: list[LoadProblem] = []
        self._warnings: list[LoadProblem] = []
        self._tenants: dict[str, PlannedTenant] = {}
        self._devices: dict[DeviceKey, PlannedDevice] = {}
        # Where each first stands, broken or not.
        self._tenant_entries: dict[str, Entry] = {}
        self._device_entries: dict[DeviceKey, Entry] = {}
        self._is_complete = True
        # Credentials need the trust anchors of their tenants, so they are checked when all files have been read.
        self._found: list[tuple[Entry, str, JsonObject]] = []

    def read(self, path: Path) -> None:
        """Read one file, up to its entries."""
        entry = Entry(file=str(path), path="")
        try:
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            data = path.read_bytes()
        except OSError as error:
            self._problems.append(entry.problem(f"cannot be read: {error.strerror}"))
            self._is_complete = False
            return
        if timedelta(0) <= self._now - written < _JUST_NOW:
            self._warnings.append(entry.problem("was written just now; make sure that no registry is writing it"))
        try:
            elements = _decode_file(data)
        except BadRequest as error:
            self._problems.append(entry.problem(str(error)))
            self._is_complete = False
            return
        has_placeholders = b"${" in data
        for index, element in enumerate(elements):
            at = Entry(file=entry.file, path=f"[{index}]")
            count = len(self._problems)
            if not has_placeholders or not self._has_placeholder(at, element):
                self._checked(at, self._read_element, element)
            if len(self._problems) > count:
                self._note_ids(at, element)

    def _note_ids(self, entry: Entry, element: object) -> None:
        """Remember whom a broken element is about, so that nothing else is blamed for its absence."""
        if not isinstance(element, dict):
            return
        tenant_id, tenant, devices = element.get("tenant-id"), element.get("tenant"), element.get("devices")
        if isinstance(tenant_id, str):
            self._tenant_entries.setdefault(tenant_id, entry)
        if isinstance(tenant, str) and isinstance(devices, list):
            for device in devices:
                device_id = device.get("device-id") if isinstance(device, dict) else None
                if isinstance(device_id, str):
                    self._device_entries.setdefault((tenant, device_id), entry)

    def _has_placeholder(self, entry: Entry, element: object) -> bool:
        found = list(_placeholders(element, ""))
        self._problems += [entry.problem(f"{path}holds the placeholder {text}") for path, text in found]
        return bool(found)

    def _checked(self, entry: Entry, read: Callable[[Entry, T], None], value: T) -> None:
        try:
            read(entry, value)
        except BadRequest as error:
            self._problems.append(entry.problem(str(error)))

    def _read_element(self, entry: Entry, element: object) -> None:
        """Read an element of a file, whichever of the three forms it has."""
        members = Members(element)
        if members.value("tenant-id") is not None:
            self._read_tenant(entry, members)
            return
        names = [name for name in ("devices", "credentials") if members.value(name) is not None]
        if not names:
            raise BadRequest("is neither a tenant (tenant-id) nor a list of devices or credentials (tenant)")
        tenant_id = self._rules.identifiers.check_tenant_id(members.required_string("tenant"))
        members.finish()
        for name in names:
            values = members.value(name)
            if not isinstance(values, list):
                raise BadRequest(f"{name}: must be an array")
            for index, value in enumerate(values):
                at = Entry(file=entry.file, path=f"{entry.path}.{name}[{index}]")
                if name == "devices":
                    self._checked(at, self._read_device, (tenant_id, value))
                else:
                    self._checked(at, self._find_credential, (tenant_id, value))

    def _read_tenant(self, entry: Entry, members: Members) -> None:
        tenant_id = self._rules.identifiers.check_tenant_id(members.required_string("tenant-id"))
        entry = Entry(file=entry.file, path=entry.path, name=f"tenant {tenant_id}")
        self._checked(entry, self._add_tenant, (tenant_id, members.rest()))

    def _add_tenant(self, entry: Entry, value: tuple[str, JsonObject]) -> None:
        tenant_id, document = value
        anchors = document.get("trusted-ca")
        if isinstance(anchors, dict):
            # The form before Hono 1.0.
            document["trusted-ca"] = [anchors]
        first = self._tenant_entries.setdefault(tenant_id, entry)
        if first is not entry:
            raise BadRequest(f"tenant-id: stands in {first.problem('').entry} already")
        self._tenants[tenant_id] = PlannedTenant(entry=entry, tenant_id=tenant_id, tenant=parse_tenant(document))

    def _read_device(self, entry: Entry, value: tuple[str, object]) -> None:
        tenant_id, element = value
        members = Members(element)
        device_id = self._rules.identifiers.check_device_id(members.required_string("device-id"))
        members.drop("comment")
        data = members.object("data")
        members.finish()
        entry = Entry(file=entry.file, path=entry.path, name=_device_name(tenant_id, device_id))
        self._checked(entry, self._add_device, (tenant_id, device_id, data))

    def _add_device(self, entry: Entry, value: tuple[str, str, JsonObject]) -> None:
        tenant_id, device_id, data = value
        key = (tenant_id, device_id)
        first = self._device_entries.setdefault(key, entry)
        if first is not entry:
            raise BadRequest(f"device-id: stands in {first.problem('').entry} already")
        document = {name: member for name, member in data.items() if name != "comment"}
        try:
            device = parse_device(document)
        except BadRequest as error:
            raise BadRequest(f"data.{error}") from None
        self._devices[key] = PlannedDevice(entry=entry, tenant_id=tenant_id, device_id=device_id, device=device)

    def _find_credential(self, entry: Entry, value: tuple[str, object]) -> None:
        tenant_id, element = value
        members = Members(element)
        device_id = self._rules.identifiers.check_device_id(members.required_string("device-id"))
        entry = Entry(file=entry.file, path=entry.path, name=f"credentials of {_device_name(tenant_id, device_id)}")
        document = members.rest()
        self._found.append((entry, tenant_id, document | {"device-id": device_id}))

    def finish(self) -> LoadPlan:
        """Check the credentials, and what belongs together."""
        credentials: list[PlannedCredential] = []
        entries: dict[tuple[str, str, str], Entry] = {}
        for entry, tenant_id, document in self._found:
            device_id = cast(str, document["device-id"])
            try:
                update = self._parse_credential(entry, tenant_id, document)
            except BadRequest as error:
                self._problems.append(entry.problem(str(error)))
                type_, auth_id = document.get("type"), document.get("auth-id")
                if isinstance(type_, str) and isinstance(auth_id, str):
                    entries.setdefault((tenant_id, type_, auth_id), entry)
                continue
            first = entries.setdefault((tenant_id, update.type, update.auth_id), entry)
            if first is not entry:
                self._problems.append(
                    entry.problem(f"auth-id: {update.type} {update.auth_id} stands in {first.path} already")
                )
                continue
            credentials.append(PlannedCredential(entry=entry, tenant_id=tenant_id, device_id=device_id, update=update))
        self._warn_of_limits()
        return LoadPlan(
            tenants=tuple(self._tenants.values()),
            devices=tuple(self._devices.values()),
            credentials=tuple(credentials),
            warnings=tuple(self._warnings),
            problems=tuple(self._problems),
            broken_tenants=frozenset(self._tenant_entries.keys() - self._tenants.keys()),
            broken_devices=frozenset(self._device_entries.keys() - self._devices.keys()),
            is_complete=self._is_complete,
        )

    def _parse_credential(self, entry: Entry, tenant_id: str, document: JsonObject) -> CredentialUpdate:
        if document.get("type") == "hashed-password":
            document = self._with_lost_hashes(entry, document)
        tenant = self._tenants.get(tenant_id)
        update = parse_credential(
            document,
            "",
            rules=self._rules,
            trust_anchors=() if tenant is None else tenant.tenant.trust_anchors,
            now=self._now,
        )
        if not plain_passwords((update,)):
            # What refers to stored secrets is of no use here.
            without_references(update)
        return update

    def _with_lost_hashes(self, entry: Entry, document: JsonObject) -> JsonObject:
        """Disable password secrets without a password: Hono 1.2 loses the hash when a secret is updated by its id."""
        given = document.get("secrets")
        if not isinstance(given, list):
            return document
        kept: list[object] = []
        for index, secret in enumerate(given):
            if isinstance(secret, dict) and not any(
                secret.get(name) for name in ("pwd-plain", "pwd-hash", "hash-function")
            ):
                self._warnings.append(
                    entry.problem(f"secrets[{index}]: has no password, so it is loaded as a disabled one")
                )
                # The hash of nothing that anybody knows.
                unusable = encode_base64(secrets.token_bytes(32))
                secret = secret | {"enabled": False, "hash-function": "sha-256", "pwd-hash": unusable}
            kept.append(secret)
        return document | {"secrets": kept}

    def _warn_of_limits(self) -> None:
        devices: dict[str, int] = {}
        for tenant_id, _ in self._devices:
            devices[tenant_id] = devices.get(tenant_id, 0) + 1
        for planned in self._tenants.values():
            limits = planned.tenant.registration_limits
            count = devices.get(planned.tenant_id, 0)
            if limits is not None and -1 < limits.max_devices < count:
                self._warnings.append(
                    planned.entry.problem(f"has {count} devices, more than its max-devices of {limits.max_devices}")
                )


def _device_name(tenant_id: str, device_id: str) -> str:
    return f"device {device_id} of tenant {tenant_id}"


def _decode_file(data: bytes) -> list[object]:
    """Decode a file; comments, which Hono's parser takes, become blanks, so that positions in errors stay true."""
    if b"//" in data or b"/*" in data:
        data = _STRING_OR_COMMENT.sub(_blank_comment, data)
    if not data.strip():
        return []
    value = decode(data)
    if not isinstance(value, list):
        raise BadRequest("must hold a JSON array")
    return value


def _blank_comment(match: re.Match[bytes]) -> bytes:
    text = match[0]
    return text if text.startswith(b'"') else b" " * len(text)


def _placeholders(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _placeholders(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _placeholders(inner, f"{path}[{index}]")
    elif isinstance(value, str) and (found := _PLACEHOLDER.search(value)):
        yield path and f"{path}: ", found[0]


# --- A plan to the database ---

_HASHED_AT_ONCE: Final = 16
_ENTRIES_PER_REPORT: Final = 1000


async def apply(
    plan: LoadPlan,
    store: Store,
    passwords: PasswordHasher,
    principal: Principal,
    clock: Callable[[], datetime],
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> LoadCounts:
    """Write everything in one transaction, or nothing.

    What is there already is a problem, unless it may be replaced: then a tenant, a device and the credentials of a
    device become exactly what the files say; devices of which the files hold no credentials keep theirs. Limits are
    not applied. Devices may belong to tenants, and credentials to devices, that are in the database only.

    A plan with problems is only compared with the database, to tell them all together.

    Waits for the hashing of passwords and for the database. Cancelled before the transaction it leaves nothing behind,
    in it everything or nothing; a retry is safe.

    Args:
        plan: What to write.
        store: The database.
        passwords: Hashes plain passwords.
        principal: Who is recorded as having done it.
        clock: The time now, aware UTC.
        replace: Whether to replace what is there.
        progress: Told how far it is.

    Raises:
        LoadErrors: The plan has problems, something is there already or misses what it belongs to, or a name is taken.
        Unavailable: The database cannot be written now.
    """
    if plan.problems:

        async def examine(transaction: Transaction) -> Sequence[LoadProblem]:
            return await _Examination(transaction, plan).find_problems(may_replace=replace)

        raise LoadErrors([*plan.problems, *await store.read(examine)])
    reporter = _Reporter(plan, progress)
    sets = await _hash_credentials(plan, passwords, reporter)

    async def write(transaction: Transaction) -> LoadCounts:
        examination = _Examination(transaction, plan)
        problems = await examination.find_problems(may_replace=replace)
        if problems:
            raise LoadErrors(problems)
        return await _Writer(transaction, principal, clock(), sets, examination).write(plan, reporter)

    return await store.write(write)


class _Reporter:
    """Tells how far it is, not too often."""

    def __init__(self, plan: LoadPlan, progress: Progress | None) -> None:
        self.passwords = [password for one in plan.credentials for password in plain_passwords((one.update,))]
        self._total = len(self.passwords) + len(plan.tenants) + len(plan.devices)
        self._progress = progress

    def tell(self, done: int, *, always: bool = False) -> None:
        """Say that so many passwords, tenants and devices are done."""
        if self._progress is not None and (always or done % _ENTRIES_PER_REPORT == 0 or done == self._total):
            self._progress(done, self._total)


async def _hash_credentials(
    plan: LoadPlan, passwords: PasswordHasher, reporter: _Reporter
) -> dict[DeviceKey, tuple[Credential, ...]]:
    hashes: dict[PlainPassword, str] = {}
    plain = reporter.passwords
    for start in range(0, len(plain), _HASHED_AT_ONCE):
        batch = plain[start : start + _HASHED_AT_ONCE]
        hashed = await asyncio.gather(*(passwords.hash(password.text) for password in batch))
        hashes.update(zip(batch, hashed, strict=True))
        reporter.tell(len(hashes), always=True)
    return {
        key: tuple(without_references(update) for update in with_hashes([planned.update for planned in some], hashes))
        for key, some in _by_device(plan.credentials).items()
    }


def _by_device(credentials: Sequence[PlannedCredential]) -> dict[DeviceKey, list[PlannedCredential]]:
    devices: dict[DeviceKey, list[PlannedCredential]] = {}
    for planned in credentials:
        devices.setdefault((planned.tenant_id, planned.device_id), []).append(planned)
    return devices


class _Examination:
    """Compares a plan with what is there already, and remembers that for who writes."""

    def __init__(self, transaction: Transaction, plan: LoadPlan) -> None:
        self._transaction = transaction
        self._plan = plan
        self._problems: list[LoadProblem] = []
        self.sets = _by_device(plan.credentials)
        """The credentials of the plan, by device."""
        self.tenants: dict[str, StoredTenant | None] = {}
        """`None` for a tenant that is not there."""
        self.taken: set[DeviceKey] = set()
        """Of the plan's devices, those that are there already, or have a credentials set."""
        self.devices: dict[DeviceKey, StoredDevice] = {}
        self.credentials: dict[DeviceKey, StoredCredentials] = {}
        self._owners: dict[tuple[str, str, str], str] = {}
        """Tenant id, type and auth-id -> the device that has it."""

    async def find_problems(self, *, may_replace: bool) -> Sequence[LoadProblem]:
        """Find what does not go together."""
        plan = self._plan
        for tenant in plan.tenants:
            self.tenants[tenant.tenant_id] = await self._transaction.find_tenant(tenant.tenant_id, to_change=True)
            if self.tenants[tenant.tenant_id] is not None and not may_replace:
                self._problems.append(tenant.entry.problem("exists already"))
        for tenant_id in plan.broken_tenants:
            self.tenants[tenant_id] = await self._transaction.find_tenant(tenant_id)
        new_tenants = {tenant_id for tenant_id, stored in self.tenants.items() if stored is None}
        await self._find_what_is_there(new_tenants)
        planned_devices: set[DeviceKey] = set()
        for device in plan.devices:
            key = (device.tenant_id, device.device_id)
            planned_devices.add(key)
            # What a deleted tenant has left behind goes when it is inserted, so it is not in the way.
            if device.tenant_id not in new_tenants and await self._has_tenant(device.entry, device.tenant_id):
                stored = await self._transaction.find_device(*key, to_change=True) if key in self.taken else None
                if stored is not None:
                    self.devices[key] = stored
                    if not may_replace:
                        self._problems.append(device.entry.problem("exists already"))
        planned_devices |= plan.broken_devices
        for key, entries in self.sets.items():
            if key[0] not in new_tenants and await self._has_tenant(entries[0].entry, key[0]):
                await self._examine_set(key, entries, is_planned=key in planned_devices, may_replace=may_replace)
            elif key not in planned_devices and key[0] in new_tenants:
                self._miss(entries[0].entry, "device")
        return self._problems

    async def _find_what_is_there(self, new_tenants: set[str]) -> None:
        """Look for all at once, so that only what is there has to be looked at."""
        ids: dict[str, dict[str, None]] = {}
        for tenant_id, device_id in [*((one.tenant_id, one.device_id) for one in self._plan.devices), *self.sets]:
            if tenant_id not in new_tenants:
                ids.setdefault(tenant_id, {})[device_id] = None
        for tenant_id, some in ids.items():
            taken = await self._transaction.find_taken(tenant_id, list(some))
            self.taken.update((tenant_id, device_id) for device_id in taken)
        names: dict[str, list[tuple[str, str]]] = {}
        for one in self._plan.credentials:
            if one.tenant_id not in new_tenants:
                names.setdefault(one.tenant_id, []).append((one.update.type, one.update.auth_id))
        for tenant_id, wanted in names.items():
            owners = await self._transaction.find_owners(tenant_id, wanted)
            for name, owner in zip(wanted, owners, strict=True):
                if owner is not None:
                    self._owners[tenant_id, *name] = owner

    def _miss(self, entry: Entry, what: str) -> None:
        if self._plan.is_complete:
            self._problems.append(entry.problem(f"there is no such {what}"))

    async def _has_tenant(self, entry: Entry, tenant_id: str) -> bool:
        if tenant_id not in self.tenants:
            self.tenants[tenant_id] = await self._transaction.find_tenant(tenant_id)
        if self.tenants[tenant_id] is not None:
            return True
        self._miss(entry, "tenant")
        return False

    async def _examine_set(
        self, key: DeviceKey, entries: Sequence[PlannedCredential], *, is_planned: bool, may_replace: bool
    ) -> None:
        stored = await self._transaction.find_credentials(*key, to_change=True) if key in self.taken else None
        if stored is not None:
            self.credentials[key] = stored
            # A device that exists already has been reported.
            if stored.credentials and not may_replace and not is_planned:
                self._problems.append(entries[0].entry.problem("has credentials already"))
        elif not is_planned:
            self._miss(entries[0].entry, "device")
        for planned in entries:
            owner = self._owners.get((key[0], planned.update.type, planned.update.auth_id))
            # Another device may hold it if that device's credentials are replaced as well.
            if owner is not None and owner != key[1] and (key[0], owner) not in self.sets:
                self._problems.append(planned.entry.problem(f"auth-id: belongs to device {owner} already"))


class _Writer:
    """Writes a plan in which nothing is wrong."""

    def __init__(
        self,
        transaction: Transaction,
        principal: Principal,
        now: datetime,
        sets: dict[DeviceKey, tuple[Credential, ...]],
        found: _Examination,
    ) -> None:
        self._transaction = transaction
        self._principal = principal
        self._now = now
        self._sets = sets
        self._found = found

    async def write(self, plan: LoadPlan, reporter: _Reporter) -> LoadCounts:
        """Write the plan.

        Raises:
            LoadErrors: A name is taken.
        """
        done = len(reporter.passwords)
        for tenant in plan.tenants:
            await self._named(tenant.entry, self._write_tenant(tenant))
            done += 1
            reporter.tell(done)
        # All that goes, goes before anything comes: an auth-id may move from one device to another.
        for stored in self._found.credentials.values():
            if stored.credentials:
                await self._transaction.replace_credentials(
                    StoredCredentials(tenant_id=stored.tenant_id, device_id=stored.device_id, version=stored.version)
                )
        written: set[DeviceKey] = set()
        new: list[PlannedDevice] = []
        with_sets: list[PlannedDevice] = []
        for device in plan.devices:
            key = (device.tenant_id, device.device_id)
            written.add(key)
            before = self._found.devices.get(key)
            if before is not None:
                await self._named(device.entry, self._replace_device(device, before))
                done += 1
                reporter.tell(done)
            else:
                (with_sets if key in self._found.taken else new).append(device)
        for key, entries in self._found.sets.items():
            if key not in written:
                await self._named(entries[0].entry, self._write_credentials(key))
        # Last what is counted: from there on others that create devices in the same tenants have to wait.
        await self._insert_devices(new, reporter, done)
        done += len(new)
        for device in with_sets:
            await self._named(device.entry, self._insert_device(device))
            done += 1
            reporter.tell(done)
        return LoadCounts(
            tenants=len(plan.tenants),
            devices=len(plan.devices),
            credentials=len(plan.credentials),
            replaced=len(self._found.devices)
            + sum(self._found.tenants[planned.tenant_id] is not None for planned in plan.tenants),
        )

    async def _named(self, entry: Entry, work: Awaitable[None]) -> None:
        """Do something for an entry, which a conflict then names."""
        try:
            await work
        except Conflict as conflict:
            raise LoadErrors([entry.problem(str(conflict))]) from conflict

    async def _write_tenant(self, planned: PlannedTenant) -> None:
        before = self._found.tenants[planned.tenant_id]
        stored = StoredTenant(
            tenant_id=planned.tenant_id,
            version=new_id(),
            created=self._now if before is None else before.created,
            updated=None if before is None else self._now,
            tenant=planned.tenant,
        )
        if before is None:
            await self._transaction.insert_tenant(stored)
        else:
            await self._transaction.update_tenant(stored)
        await self._record(
            ChangeKind.TENANT,
            planned.tenant_id,
            planned.tenant_id,
            None if before is None else before.version,
            stored.version,
        )

    async def _replace_device(self, planned: PlannedDevice, before: StoredDevice) -> None:
        key = (planned.tenant_id, planned.device_id)
        version = new_id()
        await self._transaction.update_device(
            replace(before, version=version, updated=self._now, device=planned.device)
        )
        await self._record(ChangeKind.DEVICE, *key, before.version, version)
        if key in self._sets:
            await self._write_credentials(key)

    async def _insert_devices(self, devices: Sequence[PlannedDevice], reporter: _Reporter, done: int) -> None:
        """Insert devices of which nothing is there."""
        versions: list[tuple[str, str]] = []

        def each() -> Iterator[tuple[StoredDevice, StoredCredentials]]:
            for number, planned in enumerate(devices, done + 1):
                device, credentials = self._new_device(planned)
                versions.append((device.version, credentials.version))
                yield device, credentials
                reporter.tell(number)

        await self._transaction.insert_devices(each())
        for planned, (version, set_version) in zip(devices, versions, strict=True):
            await self._record_insertion(planned, version, set_version)

    async def _insert_device(self, planned: PlannedDevice) -> None:
        """Insert a device of which a credentials set is there."""
        device, credentials = self._new_device(planned)
        is_new_set = await self._transaction.insert_device(device, credentials)
        await self._record_insertion(planned, device.version, credentials.version if is_new_set else None)

    async def _record_insertion(self, planned: PlannedDevice, version: str, set_version: str | None) -> None:
        await self._record(ChangeKind.DEVICE, planned.tenant_id, planned.device_id, None, version)
        if set_version is not None:
            await self._record(ChangeKind.CREDENTIALS, planned.tenant_id, planned.device_id, None, set_version)

    def _new_device(self, planned: PlannedDevice) -> tuple[StoredDevice, StoredCredentials]:
        device = StoredDevice(
            tenant_id=planned.tenant_id,
            device_id=planned.device_id,
            version=new_id(),
            created=self._now,
            device=planned.device,
        )
        return device, self._stored_credentials((planned.tenant_id, planned.device_id))

    async def _write_credentials(self, key: DeviceKey) -> None:
        credentials = self._stored_credentials(key)
        await self._transaction.replace_credentials(credentials)
        await self._record(ChangeKind.CREDENTIALS, *key, self._found.credentials[key].version, credentials.version)

    def _stored_credentials(self, key: DeviceKey) -> StoredCredentials:
        return StoredCredentials(
            tenant_id=key[0],
            device_id=key[1],
            version=new_id(),
            credentials=self._sets.get(key, ()),
        )

    async def _record(self, kind: ChangeKind, tenant_id: str, resource_id: str, before: str | None, after: str) -> None:
        await self._transaction.record(
            Change(
                principal=self._principal.name,
                kind=kind,
                tenant_id=tenant_id,
                resource_id=resource_id,
                before=before,
                after=after,
            )
        )
