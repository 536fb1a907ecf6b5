"""Links: amqp-apis 14, rows L, with a stock client against the real process."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from proton import Delivery, Link, Message, Terminus
from tests.databases import Databases
from tests.integration.acme import Acme, acme_fixture, credentials_request
from tests.integration.adapter import Adapter, LinkRefused
from tests.rows import Section

ROWS = Section("amqp-apis 14")
CHECKS = Section("amqp-apis 4.3")


@pytest.fixture(scope="module")
def acme(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    yield from acme_fixture(databases, tmp_path_factory.mktemp("links"))


@pytest.fixture
def adapter(acme: Acme) -> Iterator[Adapter]:
    with acme.adapter() as adapter:
        yield adapter


def refusal(adapter: Adapter, direction: str, address: str | None, **options: Any) -> str | None:
    """Attach a link that the server refuses, and return the condition. The pattern itself is checked by the client."""
    attach: Callable[..., Any] = adapter.attach_sender if direction == "sender" else adapter.attach_receiver
    with pytest.raises(LinkRefused) as refused:
        attach(address, **options)
    assert refused.value.description
    return refused.value.condition


@pytest.mark.parametrize(
    ("direction", "address", "condition"),
    [
        ROWS.case("L1", "sender", None, "amqp:not-allowed", also=[CHECKS.row(1)]),
        ROWS.case("L1-empty", "sender", "", "amqp:not-allowed"),
        ROWS.case("L2", "sender", "foo/acme", "amqp:not-found", also=[CHECKS.row(4)]),
        ROWS.case("L3", "receiver", "foo/acme/r1", "amqp:not-found", also=[CHECKS.row(4)]),
        ROWS.case("L5", "receiver", "registration/acme", "amqp:invalid-field", also=[CHECKS.row(7)]),
        ROWS.case("L5-credentials", "receiver", "credentials/acme", "amqp:invalid-field"),
        ROWS.case("L5-trailing-slash", "receiver", "registration/acme/", "amqp:invalid-field"),
        ROWS.case("L6", "receiver", "tenant", "amqp:invalid-field", also=[CHECKS.row(7)]),
        ROWS.case("L13", "sender", "/tenant", "amqp:not-found"),
        # Section 4.3, rows 2 and 3; section 3
        CHECKS.case("2-null", "receiver", None, "amqp:not-found"),
        CHECKS.case("3-empty", "receiver", "", "amqp:not-found"),
        CHECKS.case("3-leading-slash", "receiver", "/tenant/r1", "amqp:not-found"),
        pytest.param("sender", "registration//x", "amqp:not-found", id="3-empty-segment"),
        pytest.param("receiver", "registration//x", "amqp:not-found", id="3-empty-segment-of-reply"),
        pytest.param("sender", "Tenant", "amqp:not-found", id="3-case"),
        # Section 0.1: what is not offered here; 12 comes with a later release
        pytest.param("sender", "telemetry/acme", "amqp:not-found", id="0.1-telemetry"),
        pytest.param("sender", "event/acme", "amqp:not-found", id="0.1-event"),
        pytest.param("receiver", "command/acme", "amqp:not-found", id="0.1-command"),
        pytest.param("sender", "cmd_router/acme", "amqp:not-found", id="0.1-cmd_router"),
        pytest.param("receiver", "notification/registry", "amqp:not-found", id="0.1-notification"),
    ],
)
def test_refused(adapter: Adapter, direction: str, address: str | None, condition: str) -> None:
    assert refusal(adapter, direction, address) == condition
    # The session and the connection live on (section 2.3).
    assert adapter.request("tenant", "get", body='{"tenant-id":"acme"}').status == 200


@CHECKS.row(2)
def test_dynamic_nodes_are_not_implemented(adapter: Adapter) -> None:
    assert refusal(adapter, "receiver", None, dynamic=True) == "amqp:not-implemented"


@ROWS.row("L4")
@CHECKS.row(4, 5)
def test_l4_caller_without_rights(acme: Acme) -> None:
    with acme.adapter("nothing") as adapter:
        assert refusal(adapter, "sender", "registration/acme") == "amqp:unauthorized-access"
        assert refusal(adapter, "receiver", "registration/acme/r1") == "amqp:unauthorized-access"
        # Rights go before the shape of the reply address (row 5 before row 7) and before the settle mode (row 6), ...
        assert refusal(adapter, "receiver", "registration/acme") == "amqp:unauthorized-access"
        assert (
            refusal(adapter, "sender", "registration/acme", settle_mode=Link.SND_SETTLED) == "amqp:unauthorized-access"
        )
        # ... and the name of the endpoint goes before the rights (row 4 before row 5).
        assert refusal(adapter, "sender", "foo/acme") == "amqp:not-found"


@ROWS.row("L7")
@CHECKS.row(8)
def test_l7_reply_address_in_use(acme: Acme, adapter: Adapter) -> None:
    address = f"tenant/{uuid.uuid4()}"
    first = adapter.attach_receiver(address)
    assert refusal(adapter, "receiver", address) == "amqp:illegal-state"
    assert refusal(adapter, "receiver", f"{address}/") == "amqp:illegal-state"
    # From whichever connection the second one comes (section 4.4).
    with acme.adapter() as other:
        assert refusal(other, "receiver", address) == "amqp:illegal-state"
    # The first keeps working.
    sender = adapter.attach_sender("tenant")
    message = adapter.message("get", reply_to=address, body='{"tenant-id":"acme"}', message_id="m1")
    assert adapter.exchange(sender, message, "m1").link == first


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "detached"])
@ROWS.row("L8")
def test_l8_reply_address_is_free_after_detach(adapter: Adapter, closed: bool) -> None:
    """Section 4.5: any detach is answered with closed=true, and 4.4: the address can be attached again."""
    address = f"tenant/{uuid.uuid4()}"
    first = adapter.attach_receiver(address)
    adapter.detach(first, closed=closed)
    second = adapter.attach_receiver(address)
    sender = adapter.attach_sender("tenant")
    message = adapter.message("get", reply_to=address, body='{"tenant-id":"acme"}', message_id="m1")
    assert adapter.exchange(sender, message, "m1").link == second


@pytest.mark.parametrize("end", ["session", "connection", "socket"])
def test_reply_address_is_free_after_the_end_of(acme: Acme, adapter: Adapter, end: str) -> None:
    """Section 4.4: the registration ends with session and connection."""
    address = f"tenant/{uuid.uuid4()}"
    other = acme.adapter()
    other.attach_receiver(address)
    if end == "session":
        other.session.close()
        other.wait(lambda: other.session.state & other.session.REMOTE_CLOSED, "end")
    elif end == "connection":
        other.close()
    else:
        other.abort()

    def attached() -> bool:
        try:
            return bool(adapter.attach_receiver(address))
        except LinkRefused:
            # The server has yet to notice that the socket is gone.
            return False

    adapter.wait(attached, "the address")
    other.close()


@ROWS.row("L9")
@CHECKS.row(6)
def test_l9_settled_requests_are_refused(adapter: Adapter) -> None:
    assert refusal(adapter, "sender", "tenant", settle_mode=Link.SND_SETTLED) == "amqp:precondition-failed"


@pytest.mark.parametrize(
    "mode",
    [ROWS.case("L10", Link.SND_MIXED), pytest.param(Link.SND_UNSETTLED, id="4.2-unsettled")],
)
def test_l10_accepted_request_link(adapter: Adapter, mode: int) -> None:
    """L10, and section 4.2: what the server answers."""
    link = adapter.attach_sender("tenant", settle_mode=mode)
    assert link.credit == 100
    assert link.remote_target.address == "tenant"
    assert link.remote_snd_settle_mode == Link.SND_UNSETTLED
    assert link.remote_rcv_settle_mode == Link.RCV_FIRST
    assert not link.remote_max_message_size


@pytest.mark.parametrize(
    "address",
    [
        ROWS.case("L11", "registration/no-such-tenant"),
        ROWS.case("L11-credentials", "credentials/no-such-tenant"),
        pytest.param("tenant/anything", id="4.3-tenant-with-more"),
        pytest.param("registration/acme/anything", id="4.3-registration-with-more"),
        pytest.param("registration/acme/", id="3-trailing-slash"),
    ],
)
def test_accepted_request_addresses(adapter: Adapter, address: str) -> None:
    link = adapter.attach_sender(address)
    assert link.credit == 100
    # Copied unchanged (section 4.2).
    assert link.remote_target.address == address


@pytest.mark.parametrize(
    "address",
    [
        ROWS.case("L12", "registration/acme/a/b"),
        ROWS.case("L12-tenant", "tenant/a/b"),
        ROWS.case("L12-no-tenant", "registration/no-such-tenant/r1"),
    ],
)
def test_accepted_reply_addresses(adapter: Adapter, address: str) -> None:
    link = adapter.attach_receiver(address)
    assert link.remote_source.address == address
    assert link.remote_source.type == Terminus.SOURCE
    assert link.remote_snd_settle_mode == Link.SND_UNSETTLED
    adapter.detach(link)


def test_registration_without_tenant(acme: Acme) -> None:
    """Section 4.3: accepted as an attach if the rights allow it, and every request then ends in 400."""
    with acme.adapter("everything") as adapter:
        for address in ("registration", "credentials"):
            reply_to = f"{address}/acme/{uuid.uuid4()}"
            adapter.attach_receiver(reply_to)
            sender = adapter.attach_sender(address)
            subject = "assert" if address == "registration" else "get"
            message = adapter.message(
                subject, reply_to=reply_to, properties={"device_id": "d1"}, body="{}", message_id=address
            )
            assert adapter.exchange(sender, message, address).status == 400
    with acme.adapter() as adapter:
        assert refusal(adapter, "sender", "registration") == "amqp:unauthorized-access"


def test_presettled_delivery_on_a_mixed_link(adapter: Adapter) -> None:
    """Section 4.3: simply processed, without a disposition."""
    reply_to = f"tenant/{uuid.uuid4()}"
    adapter.attach_receiver(reply_to)
    sender = adapter.attach_sender("tenant", settle_mode=Link.SND_MIXED)
    message: Message = adapter.message("get", reply_to=reply_to, body='{"tenant-id":"acme"}', message_id="m1")
    adapter.send(sender, message, settled=True)
    assert adapter.await_reply("m1").status == 200
    adapter.wait(lambda: sender.credit == 100, "credit back")


def test_request_link_detached_while_a_request_runs(acme: Acme, adapter: Adapter) -> None:
    """Section 4.5: the request runs to its end and the reply is still sent."""
    reply_to = f"credentials/acme/{uuid.uuid4()}"
    adapter.attach_receiver(reply_to)
    sender = adapter.attach_sender("credentials/acme")
    name, certificate = acme.new_device()
    body = credentials_request(name, client_certificate=certificate.base64)
    message = adapter.message("get", reply_to=reply_to, body=body, message_id="m1")
    delivery = sender.delivery("1")
    sender.stream(message.encode())
    sender.advance()
    sender.close()
    adapter.pump()
    assert adapter.await_reply("m1").status == 201
    assert delivery.remote_state == Delivery.ACCEPTED


def test_two_thousand_links_of_one_connection(acme: Acme) -> None:
    """Section 2.3: thousands of handles per session are normal."""
    with acme.adapter() as adapter:
        links = [adapter.session.sender(f"many-{number}") for number in range(2000)]
        for number, link in enumerate(links):
            link.target.address = f"registration/tenant-{number}"
            link.open()
        adapter.wait(lambda: all(link.credit == 100 for link in links), "credit on all links")
