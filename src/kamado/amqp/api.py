"""Links and request messages <-> calls of the core: the Tenant, Device Registration, Credentials and Device Connection
APIs (amqp-apis 3 to 12).

`Api` is made once per process, `Caller` once per connection. A caller is told of links and requests and answers each
through its link; what is sent when, and in which task, is not decided here. Most look-ups never wait: each is started
by hand and answered at once. One that waits becomes a `Pending`, for whoever has a task for it.
"""

import asyncio
import logging
import time
import types
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec

from kamado.amqp.codec import Int, encode_reply
from kamado.amqp.connection import Link, Request, Unusable
from kamado.auth import Principal
from kamado.connections import DeviceConnectionService
from kamado.errors import BadRequest, Forbidden, Reason, RegistryError, Unavailable
from kamado.lookup import Answer, LookupService

__all__ = ["Api", "ApiSettings", "Caller", "Pending", "Traffic"]

_log = logging.getLogger(__name__)

_LEEWAY: Final = timedelta(minutes=2)
"""For requests of a login that has ended (amqp-apis 5, step 5)."""
_SETTLED: Final = 1
"""snd-settle-mode."""
_STATUSES: Final = 600
_UNKNOWN: Final = "unknown"
"""The operation of requests with a subject that there is not."""
_SILENT: Final = frozenset((403, 404))
"""Statuses whose replies have no body: their text would help nobody but somebody who guesses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """What each link gets."""

    link_credit: int = 100
    """Requests that a client may have under way on one link."""
    operation_timeout: float = 3.0
    """Seconds for one request; clients have given up long before (amqp-apis 5, step 6)."""


class _Durations:
    """How long replies took. Plain integers: a look-up takes less time than a lock."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self) -> None:
        self.bounds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)
        """Upper bounds, seconds (configuration 4.2)."""
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float, number: int) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += number
        self.total += seconds * number


class Traffic:
    """What one API has had to do, in plain integers (configuration 4.2).

    Args:
        api: The first segment of its addresses.
        operations: Its subjects.
    """

    __slots__ = ("answered", "api", "denied", "durations", "links", "rejected")

    def __init__(self, api: str, *operations: str) -> None:
        self.api = api
        self.answered = {operation: [0] * _STATUSES for operation in (*operations, _UNKNOWN)}
        """Subject -> how many replies had the status that is the index."""
        self.rejected = {"malformed": 0, "no_reply_link": 0}
        self.denied = {"link": 0, "operation": 0}
        self.links = {"receiver": 0, "sender": 0}
        self.durations = _Durations()

    def count_error(self, subject: str | None, status: int) -> None:
        """Count a reply to a request that may have had any subject."""
        counts = self.answered.get(subject or _UNKNOWN)
        (self.answered[_UNKNOWN] if counts is None else counts)[status] += 1


class Api:
    """The APIs of this process.

    Args:
        lookup: Answers the questions.
        settings: See there.
        clock: The time now, aware UTC.
        connections: Keeps device connections; `None` if that API is not offered.
    """

    def __init__(
        self,
        lookup: LookupService,
        settings: ApiSettings,
        clock: Callable[[], datetime],
        connections: DeviceConnectionService | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock
        tenants, batch = _TenantApi(lookup), lookup.batch
        endpoints = [
            _Endpoint(
                name="tenant",
                operations={"get": tenants.get},
                without_right={"get": tenants.get_if_allowed},
                batch=batch,
                reply_segments=2,
                reply_form="tenant/<reply-id>",
            ),
            _Endpoint.of_tenants("registration", {"assert": _RegistrationApi(lookup).ask}, batch),
            _Endpoint.of_tenants("credentials", {"get": _CredentialsApi(lookup).get}, batch),
        ]
        if connections is not None:
            operations = _DeviceConnectionApi(connections).operations
            endpoints.append(_Endpoint.of_tenants("device_con", operations, connections.batch, has_error_bodies=False))
        self.endpoints = {endpoint.name: endpoint for endpoint in endpoints}

    @property
    def traffic(self) -> Sequence[Traffic]:
        """What each API has had to do."""
        return [endpoint.traffic for endpoint in self.endpoints.values()]


_Result = tuple[int, bytes | None, str | None, str | None]
"""What `Answer` has, with or without a payload."""
_Operation = Callable[["_Target", Request], Coroutine[Any, Any, _Result]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Endpoint:
    """One API: the first segment of its addresses, its operations, and what is special about its replies."""

    name: str
    operations: Mapping[str, _Operation]
    """Subject -> what answers to a caller that has the right to it."""
    without_right: Mapping[str, _Operation]
    """Subject -> what answers to one that has not."""
    batch: Callable[[], AbstractContextManager[None]]
    """Entered for requests that came together."""
    reply_segments: int
    """What a reply-to address has at least (amqp-apis 4.3, row 7)."""
    reply_form: str
    has_error_bodies: bool = True
    """Whether a refusal tells its text; clients of some APIs take any body for a result (amqp-apis 7)."""
    subscribed: set[str] = field(default_factory=set)
    """Reply-to addresses with an open link, of all connections of this process (amqp-apis 4.4)."""
    traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "traffic", Traffic(self.name, *self.operations))

    @classmethod
    def of_tenants(
        cls,
        name: str,
        operations: Mapping[str, _Operation],
        batch: Callable[[], AbstractContextManager[None]],
        *,
        has_error_bodies: bool = True,
    ) -> "_Endpoint":
        """Make an API whose addresses name a tenant."""
        return cls(
            name=name,
            operations=operations,
            without_right=dict.fromkeys(operations, _refuse_right),
            batch=batch,
            reply_segments=3,
            reply_form=f"{name}/<tenant>/<reply-id>",
            has_error_bodies=has_error_bodies,
        )

    def operations_for(self, principal: Principal, address: str, tenant_id: str | None) -> Mapping[str, _Operation]:
        """Work out what answers to the requests that a caller sends to an address."""
        # For the Tenant API the tenant is in the question, not in the address: a grant may cover all of them.
        of_tenants = self.reply_segments == 3
        covers = address if of_tenants else "tenant/*"
        may_execute = principal.authorities.may_execute
        denied = [subject for subject in self.operations if not may_execute(covers, subject)]
        if of_tenants and tenant_id is None:
            operations: Mapping[str, _Operation] = dict.fromkeys(self.operations, _refuse_without_tenant)
        elif denied:
            operations = self.operations
        else:
            return self.operations  # of thousands of links this is the one they have in common
        return {**operations, **{subject: self.without_right[subject] for subject in denied}}


class _Target:
    """What a request link leads to: all that is the same for each of its requests is decided once."""

    __slots__ = ("address", "endpoint", "operations", "principal", "replies", "tenant_id")

    def __init__(
        self, endpoint: _Endpoint, address: str, tenant_id: str | None, replies: dict[str, Link], principal: Principal
    ) -> None:
        self.endpoint = endpoint
        self.address = address
        self.tenant_id = tenant_id
        self.replies = replies
        self.principal = principal
        self.operations = endpoint.operations_for(principal, address, tenant_id)


@dataclass(frozen=True, slots=True)
class _Subscription:
    """What a reply link stands for."""

    endpoint: _Endpoint
    address: str


class Caller:
    """One connection's view of the APIs.

    Args:
        api: The APIs.
        principal: Who has logged in.
        defer: Takes each request that has to wait.
    """

    def __init__(self, api: Api, principal: Principal, defer: "Callable[[Pending], None]") -> None:
        self.principal = principal
        self._api = api
        self._defer = defer
        self._replies: dict[str, dict[str, Link]] = {name: {} for name in api.endpoints}
        self._ends = None if principal.expires is None else principal.expires + _LEEWAY
        self.is_draining = False
        """Whether requests are sent back unread, since the process is about to stop (amqp-apis 5.2)."""

    # Links

    def attach(self, link: Link) -> None:
        """Accept or refuse a link: the checks of amqp-apis 4.3, in their order."""
        address = link.address
        if link.is_sender:
            if link.dynamic:
                return self._refuse(link, "amqp:not-implemented", "dynamic nodes are not supported")
            if address is None:
                return self._refuse(link, "amqp:not-found", "no such node")
        elif not address:
            return self._refuse(link, "amqp:not-allowed", "anonymous relay is not supported")
        address = address.rstrip("/")
        segments = address.split("/")
        if "" in segments:
            # Of an empty tenant nobody could say what it means.
            return self._refuse(link, "amqp:not-found", "no such address")
        endpoint = self._api.endpoints.get(segments[0])
        if endpoint is None:
            return self._refuse(link, "amqp:not-found", "no endpoint registered for that address")
        authorities = self.principal.authorities
        allowed = authorities.may_read(address) if link.is_sender else authorities.may_write(address)
        if not allowed or self.principal.is_expired(self._api.clock()):
            endpoint.traffic.denied["link"] += 1
            return self._refuse(link, "amqp:unauthorized-access", "unauthorized")
        if not link.is_sender:
            if link.snd_settle_mode == _SETTLED:
                return self._refuse(link, "amqp:precondition-failed", "endpoint requires AT_LEAST_ONCE QoS")
            tenant_id = segments[1] if len(segments) > 1 else None
            link.context = _Target(endpoint, address, tenant_id, self._replies[endpoint.name], self.principal)
            endpoint.traffic.links["receiver"] += 1
            return link.accept(self._api.settings.link_credit)
        if len(segments) < endpoint.reply_segments:
            return self._refuse(
                link, "amqp:invalid-field", f"reply-to address must have the form {endpoint.reply_form}"
            )
        if address in endpoint.subscribed:
            return self._refuse(link, "amqp:illegal-state", "reply-to address already subscribed")
        endpoint.subscribed.add(address)
        self._replies[endpoint.name][address] = link
        endpoint.traffic.links["sender"] += 1
        link.context = _Subscription(endpoint, address)
        return link.accept()

    def detached(self, link: Link) -> None:
        """Forget a link that is gone; its address can be attached again."""
        context = link.context
        if isinstance(context, _Subscription):
            context.endpoint.subscribed.discard(context.address)
            context.endpoint.traffic.links["sender"] -= 1
            self._replies[context.endpoint.name].pop(context.address, None)
        elif isinstance(context, _Target):
            context.endpoint.traffic.links["receiver"] -= 1

    def _refuse(self, link: Link, condition: str, description: str) -> None:
        _log.debug(
            "link refused",
            extra={"principal": self.principal.name, "address": link.address, "condition": condition},
        )
        link.refuse(condition, description)

    # Requests

    def receive(self, link: Link, requests: Sequence[Request]) -> None:
        """Answer requests of one link: the steps of amqp-apis 5."""
        target = link.context
        assert isinstance(target, _Target)
        if self.is_draining:
            for request in requests:
                link.release_delivery(request)
        elif len(requests) == 1:
            self._answer(link, target, requests)
        else:
            # A request that waits leaves `_answer` where it waits, so nothing waits inside of the batch.
            with target.endpoint.batch():
                self._answer(link, target, requests)

    def _answer(self, link: Link, target: _Target, requests: Sequence[Request]) -> None:
        started = time.perf_counter()
        replies = target.replies
        traffic = target.endpoint.traffic
        respond = self._respond if self._ends is None or self._api.clock() < self._ends else self._respond_to_expired
        finished = answered = 0
        for request in requests:
            reply_to = request.reply_to
            # Formal check (amqp-apis 5.1); what else may be wrong gets a proper reply.
            if reply_to is None or request.correlation_id is None or request.subject is None:
                link.reject_delivery(request, "hono:bad-request", "malformed request message")
                traffic.rejected["malformed"] += 1
                finished += 1
                continue
            link.accept_delivery(request)
            reply_link = replies.get(reply_to)
            if reply_link is None:
                reply_link = replies.get(reply_to.rstrip("/"))
                if reply_link is None:
                    self._log_unanswerable(target, reply_to)
                    traffic.rejected["no_reply_link"] += 1
                    finished += 1
                    continue
            # What does not have to wait is answered here and now, without a task.
            coroutine = respond(target, request)
            try:
                waited = coroutine.send(None)
            except StopIteration as done:
                reply_link.send(done.value)
                answered += 1
            else:
                self._defer(Pending(coroutine, waited, link, reply_link, target, request, started))
        if answered:
            # Replies to what came together leave together, so for each of them it took as long as for all.
            traffic.durations.add(time.perf_counter() - started, answered)
        if finished or answered:
            link.give_credit(finished + answered)

    async def _respond(self, target: _Target, request: Request) -> bytes:
        """Run one request and encode its reply: the one place that turns errors into replies."""
        endpoint, subject = target.endpoint, request.subject
        assert subject is not None
        try:
            operation = target.operations.get(subject)
            if operation is None:
                raise BadRequest("there is no such operation", reason=Reason.MALFORMED_REQUEST)
            status, payload, cache_control, tenant_id = await operation(target, request)
        except RegistryError as error:
            return _refusal(target, request, error)
        except Exception:
            _log.exception("request failed", extra=_fields(target, request))
            return _reply_to_error(target, request, 500, "internal error")
        endpoint.traffic.answered[subject][status] += 1
        device_id = request.application_properties.get("device_id")
        assert request.correlation_id is not None
        return encode_reply(
            endpoint.name,
            request.correlation_id,
            status,
            payload,
            cache_control=cache_control,
            tenant_id=tenant_id,
            device_id=device_id if type(device_id) is str else None,
        )

    async def _respond_to_expired(self, target: _Target, request: Request) -> bytes:
        """Refuse a request since the login ended more than two minutes ago."""
        return _refusal(target, request, _forbidden())

    def _log_unanswerable(self, target: _Target, reply_to: str) -> None:
        _log.debug(
            "request dropped, its reply link is missing",
            extra={"principal": self.principal.name, "address": target.address, "reply_to": reply_to},
        )


@dataclass(slots=True)
class Pending:
    """A request that waits for something: the database, mostly.

    It was started outside of a task and goes on in one.
    """

    coroutine: Coroutine[Any, Any, bytes]
    waited: object
    """What the coroutine yielded when it was started."""
    link: Link
    reply_link: Link
    target: _Target
    request: Request
    started: float

    async def finish(self, operation_timeout: float) -> None:
        """Wait for the end, but not for ever, and send the reply; it is dropped if its link is gone by then.

        Cancelled, the request gets no reply; whether its change was made is open.

        Args:
            operation_timeout: Seconds until the reply is 503 (amqp-apis 5, step 6).
        """
        try:
            async with asyncio.timeout(operation_timeout):
                reply = await _resume(self.coroutine, self.waited)
        except TimeoutError:
            reply = _refusal(self.target, self.request, Unavailable("the request took too long"))
        self.target.endpoint.traffic.durations.add(time.perf_counter() - self.started, 1)
        self.reply_link.send(reply)
        self.link.give_credit()

    def abandon(self) -> None:
        """Release what the request holds, if it never came to its end."""
        self.coroutine.close()


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, bytes], waited: object) -> Generator[object, object, bytes]:
    """Go on with a coroutine that has been started by hand and waits for `waited`."""
    while True:
        try:
            sent = yield waited
        except BaseException as error:
            # Whatever it is (the cancellation at a time-out, most likely), it is the coroutine's to handle.
            advance, value = coroutine.throw, error
        else:
            advance, value = coroutine.send, sent  # type: ignore[assignment]
        try:
            waited = advance(value)
        except StopIteration as done:
            reply: bytes = done.value
            return reply


# The operations


class _TenantApi:
    """amqp-apis 9."""

    def __init__(self, lookup: LookupService) -> None:
        self._lookup = lookup

    async def get(self, target: _Target, request: Request) -> Answer:
        """Answer a caller that may get every tenant."""
        tenant_id = request.application_properties.get("tenant_id")
        if type(tenant_id) is str:
            return await self._lookup.get_tenant(target.principal, tenant_id)
        return await self._lookup.get_tenant_by_body(target.principal, _body(request))

    async def get_if_allowed(self, target: _Target, request: Request) -> Answer:
        """Answer a caller that may get some tenants, if it is one of these (amqp-apis 9.2)."""
        may_execute = target.principal.authorities.may_execute
        tenant_id = request.application_properties.get("tenant_id")
        # In the old variant the right is checked before the look-up.
        if type(tenant_id) is str and not may_execute(f"tenant/{tenant_id}", "get"):
            raise _forbidden()
        answer = await self.get(target, request)
        if not may_execute(f"tenant/{answer.tenant_id}", "get"):
            raise _forbidden()
        return answer


class _RegistrationApi:
    """amqp-apis 10."""

    def __init__(self, lookup: LookupService) -> None:
        self._assert_registration = lookup.assert_registration

    async def ask(self, target: _Target, request: Request) -> Answer:
        assert target.tenant_id is not None
        arguments = request.application_properties
        device_id = arguments.get("device_id")
        if type(device_id) is not str:
            raise BadRequest("device_id: must be given, as a string", reason=Reason.MALFORMED_REQUEST)
        gateway_id = arguments.get("gateway_id")
        return await self._assert_registration(
            target.principal, target.tenant_id, device_id, gateway_id if type(gateway_id) is str else None
        )


class _CredentialsApi:
    """amqp-apis 11."""

    def __init__(self, lookup: LookupService) -> None:
        self._get_credentials = lookup.get_credentials

    async def get(self, target: _Target, request: Request) -> Answer:
        assert target.tenant_id is not None
        return await self._get_credentials(target.principal, target.tenant_id, _body(request))


class _DeviceConnectionApi:
    """amqp-apis 12."""

    def __init__(self, connections: DeviceConnectionService) -> None:
        self._connections = connections
        self.operations: dict[str, _Operation] = {
            "set-last-gw": self._set_last_gateway,
            "get-last-gw": self._get_last_gateway,
            "set-cmd-handling-adapter-instance": self._set_adapter_instance,
            "remove-cmd-handling-adapter-instance": self._remove_adapter_instance,
            "get-cmd-handling-adapter-instances": self._get_adapter_instances,
        }

    async def _set_last_gateway(self, target: _Target, request: Request) -> _Result:
        device_id, gateway_id = _text(request, "device_id"), _text(request, "gateway_id")
        assert target.tenant_id is not None
        await self._connections.set_last_gateway(target.principal, target.tenant_id, device_id, gateway_id)
        return 204, None, None, target.tenant_id

    async def _get_last_gateway(self, target: _Target, request: Request) -> _Result:
        device_id = _text(request, "device_id")
        assert target.tenant_id is not None
        payload = await self._connections.get_last_gateway(target.principal, target.tenant_id, device_id)
        return 200, payload, None, target.tenant_id

    async def _set_adapter_instance(self, target: _Target, request: Request) -> _Result:
        device_id, adapter_instance_id = _text(request, "device_id"), _text(request, "adapter_instance_id")
        lifespan = request.application_properties.get("lifespan")
        # Taken for absent it would never end, which is not what was meant.
        if lifespan is not None and type(lifespan) is not Int:
            raise BadRequest("lifespan: must be an int", reason=Reason.MALFORMED_REQUEST)
        assert target.tenant_id is not None
        await self._connections.set_adapter_instance(
            target.principal, target.tenant_id, device_id, adapter_instance_id, lifespan
        )
        return 204, None, None, target.tenant_id

    async def _remove_adapter_instance(self, target: _Target, request: Request) -> _Result:
        device_id, adapter_instance_id = _text(request, "device_id"), _text(request, "adapter_instance_id")
        assert target.tenant_id is not None
        await self._connections.remove_adapter_instance(
            target.principal, target.tenant_id, device_id, adapter_instance_id
        )
        return 204, None, None, target.tenant_id

    async def _get_adapter_instances(self, target: _Target, request: Request) -> _Result:
        device_id = _text(request, "device_id")
        assert target.tenant_id is not None
        payload = await self._connections.get_adapter_instances(
            target.principal, target.tenant_id, device_id, _body(request)
        )
        return 200, payload, None, target.tenant_id


async def _refuse_right(target: _Target, request: Request) -> _Result:
    raise _forbidden()


async def _refuse_without_tenant(target: _Target, request: Request) -> _Result:
    raise BadRequest("the link's address names no tenant", reason=Reason.MALFORMED_REQUEST)


def _text(request: Request, name: str) -> str:
    value = request.application_properties.get(name)
    if type(value) is not str:
        raise BadRequest(f"{name}: must be given, as a string", reason=Reason.MALFORMED_REQUEST)
    return value


def _body(request: Request) -> bytes | None:
    body = request.body
    if isinstance(body, Unusable):
        raise BadRequest("the body must be data, a string or a binary", reason=Reason.MALFORMED_REQUEST)
    return body


def _forbidden() -> Forbidden:
    return Forbidden("no right to do that", reason=Reason.NO_RIGHT)


# Replies to what failed


def _refusal(target: _Target, request: Request, error: RegistryError) -> bytes:
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug(
            "request refused",
            extra=_fields(target, request) | {"status": error.status, "reason": error.reason, "error": str(error)},
        )
    if error.reason is Reason.NO_RIGHT:
        target.endpoint.traffic.denied["operation"] += 1
    return _reply_to_error(target, request, error.status, str(error))


def _reply_to_error(target: _Target, request: Request, status: int, text: str) -> bytes:
    target.endpoint.traffic.count_error(request.subject, status)
    correlation_id = request.correlation_id
    assert correlation_id is not None
    properties = request.application_properties
    device_id = properties.get("device_id")
    tenant_id = target.tenant_id
    if target.endpoint.name == "tenant":
        # What was asked for is only known here in the old variant.
        asked = properties.get("tenant_id")
        tenant_id = asked if type(asked) is str else None
    return encode_reply(
        target.endpoint.name,
        correlation_id,
        status,
        None if status in _SILENT or not target.endpoint.has_error_bodies else msgspec.json.encode({"error": text}),
        tenant_id=tenant_id,
        device_id=device_id if type(device_id) is str else None,
    )


def _fields(target: _Target, request: Request) -> dict[str, object]:
    properties = request.application_properties
    return {
        "principal": target.principal.name,
        "address": target.address,
        "subject": request.subject,
        "tenant_id": target.tenant_id,
        "device_id": properties.get("device_id"),
        "gateway_id": properties.get("gateway_id"),
    }
