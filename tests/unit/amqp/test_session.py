"""Links, credit, deliveries: amqp-apis 4, 5 and AMQP 2.5 to 2.7."""

import pytest
from tests.unit.amqp.peer import ACCEPTED, Peer, message, parse_frames

from kamado.amqp import codec
from kamado.amqp.connection import AMQP_HEADER, Closed, LinkAttached, LinkDetached, RequestsReceived


def performatives(peer: Peer) -> list[codec.Performative | None]:
    return [performative for _channel, performative, _payload in peer.read()]


def rejection(disposition: codec.Disposition) -> codec.Error:
    """Return the error of a disposition with state rejected."""
    state = disposition.state
    assert isinstance(state, codec.Described)
    assert state.descriptor == 0x25
    assert isinstance(state.value, list)
    return codec.Error.read(state.value[0])


def started(**settings: object) -> Peer:
    return Peer(**settings).open().begin()  # type: ignore[arg-type]


def with_links(*, credit: int = 100, **settings: object) -> Peer:
    """A peer with a reply link (handle 0, with this credit) and a request link (handle 1)."""
    peer = started(**settings)
    peer.attach_receiver()
    peer.attach_sender()
    if credit:
        peer.flow(credit=credit)
    return peer


# --- Attach and detach ------------------------------------------------------------------------------------------------


def test_an_accepted_link_repeats_source_and_target() -> None:
    # amqp-apis 4.2: copied unchanged, whatever is in them
    peer = started()
    fields: list[object] = [
        "registration/acme/r",
        codec.UInt(0),
        codec.Symbol("session-end"),
        codec.UInt(0),
        False,
        None,
        None,
    ]
    fields.append({codec.Symbol("f"): codec.Described(codec.Symbol("x:filter"), "y")})
    fields += codec.Described(codec.ULong(0x26), []), codec.Array.of_symbols(["amqp:accepted:list"])
    source = codec.Terminus(codec.encode(codec.Described(codec.ULong(0x28), fields)))
    target = codec.Terminus(b"\x00\xa3\x10amqp:target:list\xd0\x00\x00\x00\x06\x00\x00\x00\x01\xa1\x00")
    peer.send(codec.Attach(name="auto-0", handle=4, role=True, snd_settle_mode=0, source=source, target=target))
    answer = peer.read_only(codec.Attach)
    assert answer.name == "auto-0"
    assert (answer.handle, answer.role) == (0, False)
    assert (answer.snd_settle_mode, answer.rcv_settle_mode) == (0, 0)
    assert answer.source is not None
    assert answer.target is not None
    assert answer.source.raw == source.raw
    assert answer.target.raw == target.raw
    assert answer.initial_delivery_count == 0
    assert answer.max_message_size is None
    link = peer.links["auto-0"]
    assert (link.is_sender, link.address, link.dynamic, link.snd_settle_mode) == (True, "registration/acme/r", False, 0)


def test_a_request_link_gets_its_credit_at_once() -> None:
    # amqp-apis 4.2, L10
    peer = started()
    peer.send(peer.sender(handle=7, snd_settle_mode=2))
    attach, flow = performatives(peer)
    assert isinstance(attach, codec.Attach)
    assert (attach.role, attach.snd_settle_mode, attach.initial_delivery_count) == (True, 0, None)
    assert isinstance(flow, codec.Flow)
    assert (flow.handle, flow.link_credit, flow.delivery_count, flow.next_incoming_id) == (0, 100, 0, 0)
    assert peer.links["s7"].snd_settle_mode == 2
    assert repr(peer.links["s7"]) == "<Link 's7' from peer, 'registration/acme', OPEN>"


def test_sender_and_receiver_may_have_one_name() -> None:
    # amqp-apis 4.1
    peer = started()
    peer.send(codec.Attach(name="auto-0", handle=0, role=True, source=codec.Terminus.source("tenant/x")))
    peer.send(codec.Attach(name="auto-0", handle=1, role=False, target=codec.Terminus.target("tenant")))
    attached = [event.link.address for event in peer.events if isinstance(event, LinkAttached)]
    assert attached == ["tenant/x", "tenant"]


@pytest.mark.parametrize("role", [True, False])
def test_absent_termini_and_dynamic_nodes_are_told_to_the_application(role: bool) -> None:
    # amqp-apis 4.3 rows 1 and 2: what to refuse is the application's matter
    peer = started(accepts=False)
    peer.send(codec.Attach(name="null", handle=0, role=role))
    assert peer.links["null"].address is None
    dynamic = codec.encode(codec.Described(codec.ULong(0x28 if role else 0x29), [None, None, None, None, True]))
    terminus = codec.Terminus(dynamic)
    peer.send(codec.Attach(name="dynamic", handle=1, role=role, source=terminus, target=terminus))
    assert (peer.links["dynamic"].address, peer.links["dynamic"].dynamic) == (None, True)


@pytest.mark.parametrize("role", [True, False])
def test_a_refused_link_has_the_exact_pattern(role: bool) -> None:
    # amqp-apis 4.3, 15.7: attach with null source and target, then detach, in one write
    peer = started(accepts=False)
    attach = peer.receiver(handle=3, address="registration/other/aa") if role else peer.sender(handle=3)
    peer.send(attach)
    link = peer.links[attach.name]
    link.refuse("amqp:unauthorized-access", "unauthorized")
    answer, detach = performatives(peer)
    assert isinstance(answer, codec.Attach)
    assert (answer.name, answer.role, answer.source, answer.target) == (attach.name, not role, None, None)
    assert answer.initial_delivery_count == (0 if role else None)
    assert detach == codec.Detach(
        handle=answer.handle, closed=True, error=codec.Error("amqp:unauthorized-access", "unauthorized")
    )
    assert not link.is_open
    # Until the peer's detach its handle is taken and its frames are ignored.
    assert peer.flow(handle=3) == []
    assert peer.send(codec.Detach(handle=3, closed=True)) == []
    assert performatives(peer) == []
    link.send(b"x")
    link.accept()
    link.refuse("x", "y")
    link.give_credit()
    assert performatives(peer) == []
    # The handles can be used again, ours too.
    peer.send(peer.receiver(handle=3))
    peer.links["r3"].accept()
    assert peer.read_only(codec.Attach).handle == 0


@pytest.mark.parametrize("closed", [True, False])
def test_detach_is_answered_with_closed(closed: bool) -> None:
    # amqp-apis 4.5
    peer = with_links()
    link = peer.links["r0"]
    assert peer.send(codec.Detach(handle=0, closed=closed)) == [LinkDetached(link)]
    assert peer.read_only(codec.Detach) == codec.Detach(handle=0, closed=True)
    assert not link.is_open
    link.send(b"late")
    assert performatives(peer) == []


def test_a_detach_by_the_server() -> None:
    peer = with_links()
    link = peer.links["s1"]
    link.detach("amqp:resource-deleted", "gone")
    error = codec.Error("amqp:resource-deleted", "gone")
    assert peer.read_only(codec.Detach) == codec.Detach(handle=1, closed=True, error=error)
    # What was on its way is ignored.
    assert peer.transfer(0, message()) == []
    assert peer.transfer(1, message()) == []
    assert peer.send(codec.Detach(handle=1, closed=True)) == []
    assert performatives(peer) == []
    link.detach("x", "y")
    assert performatives(peer) == []


@pytest.mark.parametrize("refused", [False, True])
def test_a_handle_is_free_again_with_the_peers_detach(refused: bool) -> None:
    # AMQP 2.7.7: the one who detaches may use the handle anew at once; amqp-apis 4.4, 15.7
    peer = started(accepts=False)
    frames = codec.encode_frame(0, peer.sender()) + codec.encode_frame(0, codec.Detach(handle=1, closed=True))
    events = peer.write(3 * frames + codec.encode_frame(0, peer.sender()))
    links = [event.link for event in events if isinstance(event, LinkAttached)]
    for link in links[:3]:
        if refused:
            link.refuse("amqp:not-found", "no")
        else:
            link.accept()
    links[3].accept(100)
    peer.accepts = True
    assert [type(event) for event in events] == [LinkAttached, LinkDetached] * 3 + [LinkAttached]
    told = performatives(peer)
    assert [type(one) for one in told] == [codec.Attach, codec.Detach] * 3 + [codec.Attach, codec.Flow]
    # Each detach is about the attach before it.
    for attach, detach in zip(told[0:6:2], told[1:6:2], strict=True):
        assert isinstance(attach, codec.Attach)
        assert isinstance(detach, codec.Detach)
        assert attach.handle == detach.handle
    assert len(peer.transfer(0, message())) == 1
    peer.send(codec.Detach(handle=1, closed=True))
    assert isinstance(peer.read_only(codec.Detach), codec.Detach)
    # Nothing is left behind: the lowest handles are free.
    peer.send(peer.sender())
    attach = performatives(peer)[0]
    assert isinstance(attach, codec.Attach)
    assert attach.handle == 0


def test_a_session_that_ends_with_unanswered_links_says_no_more_of_them() -> None:
    peer = started()
    frames = codec.encode_frame(0, peer.sender()) + codec.encode_frame(0, codec.Detach(handle=1, closed=True))
    peer.write(frames + codec.encode_frame(0, codec.End()))
    assert isinstance(peer.read_only(codec.End), codec.End)
    peer.begin()
    assert peer.attach_sender().is_open


def test_attach_and_detach_in_one_read() -> None:
    for accepts in (True, False):
        peer = started(accepts=accepts)
        attach = codec.encode_frame(0, peer.receiver())
        events = peer.write(attach + codec.encode_frame(0, codec.Detach(handle=0)))
        link = peer.links["r0"]
        if not accepts:
            link.refuse("amqp:not-found", "no")
        assert events == [LinkAttached(link), LinkDetached(link)]
        answer, detach = performatives(peer)
        assert isinstance(answer, codec.Attach)
        assert isinstance(detach, codec.Detach)
        assert detach.closed
        assert not link.is_open
        peer.send(peer.receiver())  # the handle is free


def test_attach_and_the_end_in_one_read() -> None:
    for end in (codec.End(), codec.Close()):
        peer = started()
        events = peer.write(codec.encode_frame(0, peer.sender()) + codec.encode_frame(0, end))
        link = peer.links["s1"]
        assert events[:2] == [LinkAttached(link), LinkDetached(link)]
        assert [type(performative) for performative in performatives(peer)] == [type(end)]


def test_unattached_handles_end_the_session() -> None:
    # AMQP 2.8.17 unattached-handle, handle-in-use
    flow = codec.Flow(incoming_window=1, next_outgoing_id=0, outgoing_window=1, handle=9)
    for performative in (codec.Transfer(handle=9, delivery_id=0), flow, codec.Detach(handle=9)):
        peer = with_links()
        events = peer.send(performative)
        assert events == [LinkDetached(peer.links["r0"]), LinkDetached(peer.links["s1"])]
        end = peer.read_only(codec.End)
        assert end.error is not None
        assert end.error.condition == "amqp:session:unattached-handle"
    peer = with_links()
    peer.send(peer.sender(handle=0))
    end = peer.read_only(codec.End)
    assert end.error is not None
    assert end.error.condition == "amqp:session:handle-in-use"


def test_transactions_are_refused() -> None:
    peer = started()
    coordinator = codec.Terminus(codec.encode(codec.Described(codec.ULong(0x30), [])))
    assert peer.send(codec.Attach(name="tx", handle=0, role=False, target=coordinator)) == []
    _attach, detach = performatives(peer)
    assert isinstance(detach, codec.Detach)
    assert detach.error is not None
    assert detach.error.condition == "amqp:not-implemented"


def test_too_many_links_are_refused_and_then_cut_off() -> None:
    # amqp-apis 2.3, 17
    peer = started(max_links=2)
    peer.attach_sender(0)
    peer.attach_sender(1)
    peer.send(peer.sender(2))
    assert "s2" not in peer.links
    _attach, detach = performatives(peer)
    assert isinstance(detach, codec.Detach)
    assert detach.error is not None
    assert detach.error.condition == "amqp:resource-limit-exceeded"
    peer.send(codec.Detach(handle=2, closed=True))
    peer.send(codec.Detach(handle=1, closed=True))
    peer.attach_sender(5)
    # Who never answers refusals is not served for ever.
    for handle in range(10, 10 + 1024):
        peer.send(peer.sender(handle))
    assert not peer.connection.is_closed
    assert isinstance(peer.send(peer.sender(9999))[-1], Closed)


@pytest.mark.parametrize("which", ["name", "address"])
def test_links_with_endless_names_are_refused(which: str) -> None:
    # Both are kept as long as the link, and there may be 65536 of those; amqp-apis 4.3: the exact pattern
    peer = started()
    target = codec.Terminus.target("registration/acme")
    peer.send(codec.Attach(name="x" * 1024, handle=0, role=False, target=target))
    assert peer.links["x" * 1024].is_open
    peer.read()
    name, target = ("é" * 512 + "x", target) if which == "name" else ("n", codec.Terminus.target("é" * 512 + "x"))
    assert peer.send(codec.Attach(name=name, handle=1, role=False, target=target)) == []
    answer, detach = performatives(peer)
    assert isinstance(answer, codec.Attach)
    assert (answer.name, answer.target) == (name, None)
    assert isinstance(detach, codec.Detach)
    assert detach.error is not None
    assert detach.error.condition == "amqp:invalid-field"
    # While the peer does not detach nothing of it is kept.
    refused = peer.connection._sessions[0].links[1]
    assert (refused.name, refused.address) == ("", None)
    assert peer.send(codec.Detach(handle=1, closed=True)) == []
    assert list(peer.connection._sessions[0].links) == [0]


def test_the_peers_handle_max_is_kept() -> None:
    peer = Peer().open()
    peer.send(codec.Begin(next_outgoing_id=0, incoming_window=9, outgoing_window=9, handle_max=0))
    peer.read()
    peer.attach_sender(0)
    peer.send(peer.sender(1))
    end = peer.read_only(codec.End)
    assert end.error is not None
    assert end.error.condition == "amqp:resource-limit-exceeded"


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_a_request_and_its_reply() -> None:
    # amqp-apis 15.3
    peer = with_links()
    (event,) = peer.transfer(0, message(application_properties={"device_id": "d2", "gateway_id": "gw1"}))
    request_link, reply_link = peer.links["s1"], peer.links["r0"]
    assert isinstance(event, RequestsReceived)
    assert event.link is request_link
    (request,) = event.requests
    assert (request.delivery_id, request.settled, request.subject) == (0, False, "assert")
    assert request.reply_to == "registration/acme/r"
    assert request.correlation_id == b"\xa1\x02m1"
    assert request.application_properties == {"device_id": "d2", "gateway_id": "gw1"}
    assert request.body is None
    request_link.accept_delivery(request)
    reply_link.send(b"reply")
    request_link.give_credit()
    (_, first, _), (_, second, payload), (_, third, _) = peer.read()
    assert first == codec.Disposition(role=True, first=0, last=0, settled=True, state=ACCEPTED)
    assert isinstance(second, codec.Transfer)
    assert (second.handle, second.delivery_id, second.message_format, second.settled) == (0, 0, 0, False)
    assert second.delivery_tag == bytes(4)
    assert not second.more
    assert payload == b"reply"
    assert isinstance(third, codec.Flow)
    assert (third.handle, third.delivery_count, third.link_credit, third.next_incoming_id) == (1, 1, 100, 1)


def test_a_batch_is_answered_with_one_disposition_and_one_flow() -> None:
    peer = with_links()
    data = b"".join(
        codec.encode_frame(
            0,
            codec.Transfer(handle=1, delivery_id=number, delivery_tag=b"t", message_format=0),
            message(message_id=codec.ULong(number)),
        )
        for number in range(100)
    )
    (event,) = peer.write(data)
    assert isinstance(event, RequestsReceived)
    assert [request.correlation_id for request in event.requests] == [
        codec.encode(codec.ULong(number)) for number in range(100)
    ]
    for request in event.requests:
        event.link.accept_delivery(request)
        event.link.give_credit()
    disposition, flow = performatives(peer)
    assert disposition == codec.Disposition(role=True, first=0, last=99, settled=True, state=ACCEPTED)
    assert isinstance(flow, codec.Flow)
    assert (flow.delivery_count, flow.link_credit, flow.next_incoming_id) == (100, 100, 100)
    assert performatives(peer) == []


def test_credit_grows_only_by_what_is_finished() -> None:
    # amqp-apis 14 M12
    peer = with_links()
    for number in range(100):
        peer.transfer(number, message())
    link = peer.links["s1"]
    link.give_credit(3)
    flow = peer.read_only(codec.Flow)
    assert (flow.delivery_count, flow.link_credit) == (100, 3)
    link.give_credit()
    flow = peer.read_only(codec.Flow)
    assert (flow.delivery_count, flow.link_credit) == (100, 4)


def test_dispositions_are_joined_only_where_they_are_neighbours() -> None:
    # amqp-apis 5.2
    peer = with_links()
    for number in (0, 1, 2, 3, 5, 6, 0xFFFFFFFF):
        peer.transfer(number, message())
    link = peer.links["s1"]
    requests = peer.requests
    for index in (0, 1, 3, 4, 5, 6):
        link.accept_delivery(requests[index])
    link.reject_delivery(requests[2], "hono:bad-request", "malformed request message")
    *accepted, rejected = performatives(peer)
    assert [(item.first, item.last) for item in accepted if isinstance(item, codec.Disposition)] == [
        (0, 1),
        (3, 3),
        (5, 6),
        (0xFFFFFFFF, 0xFFFFFFFF),
    ]
    assert isinstance(rejected, codec.Disposition)
    assert (rejected.role, rejected.first, rejected.settled) == (True, 2, True)
    assert rejection(rejected) == codec.Error("hono:bad-request", "malformed request message")


def test_released_deliveries() -> None:
    # amqp-apis 5.2
    peer = with_links()
    peer.transfer(4, message())
    peer.links["s1"].release_delivery(peer.requests[0])
    disposition = peer.read_only(codec.Disposition)
    assert disposition == codec.Disposition(
        role=True, first=4, settled=True, state=codec.Described(codec.ULong(0x26), [])
    )


def test_pre_settled_deliveries_get_no_disposition() -> None:
    # amqp-apis 4.3, below the table
    peer = with_links()
    peer.transfer(0, message(), settled=True)
    peer.transfer(1, message()[:10])
    peer.transfer(2, message()[:10], settled=True)
    link = peer.links["s1"]
    assert [request.settled for request in peer.requests] == [True]
    link.accept_delivery(peer.requests[0])
    link.reject_delivery(peer.requests[0], "x", "y")
    link.release_delivery(peer.requests[0])
    dispositions = [item for item in performatives(peer) if isinstance(item, codec.Disposition)]
    assert [item.first for item in dispositions] == [1]


def test_undecodable_messages_are_rejected_and_the_link_goes_on() -> None:
    # amqp-apis 5 step 1
    peer = with_links()
    assert peer.transfer(0, b"\x00\x53\x73\xc0") == []
    disposition, flow = performatives(peer)
    assert isinstance(disposition, codec.Disposition)
    assert rejection(disposition).condition == "amqp:decode-error"
    assert isinstance(flow, codec.Flow)
    assert (flow.delivery_count, flow.link_credit) == (1, 100)
    assert peer.transfer(1, message())


def test_other_message_formats_are_not_decoded() -> None:
    peer = with_links()
    transfer = codec.Transfer(handle=1, delivery_id=0, delivery_tag=b"", message_format=1)
    assert peer.send(transfer, message()) == []
    assert isinstance(performatives(peer)[0], codec.Disposition)


def test_a_delivery_in_many_frames() -> None:
    # amqp-apis 5 step 1
    peer = with_links()
    data = message(body=b"x" * 1000)
    peer.transfer(7, data[:1], more=True)
    for position in range(1, len(data) - 1):
        assert peer.transfer(None if position % 2 else 7, data[position : position + 1], more=True) == []
    (event,) = peer.transfer(None, data[-1:])
    assert isinstance(event, RequestsReceived)
    assert event.requests[0].body == b"x" * 1000
    assert event.requests[0].delivery_id == 7
    link = peer.links["s1"]
    link.give_credit()
    flow = peer.read_only(codec.Flow)
    assert (flow.next_incoming_id, flow.delivery_count, flow.link_credit) == (len(data), 1, 100)


def test_frames_of_deliveries_on_two_links_may_alternate() -> None:
    peer = with_links()
    peer.attach_sender(2, "tenant")
    first, second = message(subject="first"), message(subject="second")
    peer.transfer(0, first[:9], more=True)
    peer.transfer(1, second[:5], handle=2, more=True)
    peer.transfer(None, first[9:])
    peer.transfer(None, second[5:], handle=2)
    assert [request.subject for request in peer.requests] == ["first", "second"]


def test_an_aborted_delivery_is_ignored() -> None:
    # amqp-apis 5 step 1
    peer = with_links()
    peer.transfer(0, message()[:9], more=True)
    assert peer.transfer(None, b"", aborted=True) == []
    flow = peer.read_only(codec.Flow)
    assert (flow.delivery_count, flow.link_credit) == (1, 100)
    assert peer.transfer(1, message())
    assert peer.requests[0].delivery_id == 1


def test_settled_may_be_told_with_the_last_frame() -> None:
    peer = with_links()
    peer.transfer(0, message()[:9], more=True)
    peer.transfer(None, message()[9:], settled=True)
    assert peer.requests[0].settled


@pytest.mark.parametrize(
    ("first", "second", "condition"),
    [
        ({"delivery_id": 0, "more": True}, {"delivery_id": 1}, "amqp:invalid-field"),
        ({"delivery_id": None}, None, "amqp:invalid-field"),
    ],
)
def test_deliveries_out_of_order_detach_the_link(
    first: dict[str, object], second: dict[str, object] | None, condition: str
) -> None:
    peer = with_links()
    link = peer.links["s1"]
    events = peer.transfer(payload=message(), **first)  # type: ignore[arg-type]
    if second is not None:
        events = peer.transfer(payload=message(), **second)  # type: ignore[arg-type]
    assert events == [LinkDetached(link)]
    detach = peer.read_only(codec.Detach)
    assert detach.closed
    assert detach.error is not None
    assert detach.error.condition == condition
    assert not peer.connection.is_closed


def test_a_delivery_without_credit_detaches_the_link() -> None:
    peer = Peer(credit=2).open().begin()
    link = peer.attach_sender()
    other = peer.attach_sender(2)
    for number in range(2):
        assert peer.transfer(number, message())
    assert peer.transfer(2, message()) == [LinkDetached(link)]
    detach = peer.read_only(codec.Detach)
    assert detach.error is not None
    assert detach.error.condition == "amqp:link:transfer-limit-exceeded"
    # The session and its other links go on.
    assert peer.transfer(3, message(), handle=2)
    assert other.is_open


def test_a_delivery_before_the_attach_is_answered_ends_the_link() -> None:
    peer = started()
    transfer = codec.Transfer(handle=1, delivery_id=0, delivery_tag=b"", message_format=0)
    events = peer.write(codec.encode_frame(0, peer.sender()) + codec.encode_frame(0, transfer, message()))
    link = peer.links["s1"]
    assert events == [LinkAttached(link), LinkDetached(link)]
    attach, detach = performatives(peer)
    assert isinstance(attach, codec.Attach)
    assert attach.target is None
    assert isinstance(detach, codec.Detach)


def test_a_delivery_on_a_reply_link_detaches_it() -> None:
    peer = with_links()
    assert peer.transfer(0, message(), handle=0) == [LinkDetached(peer.links["r0"])]
    detach = peer.read_only(codec.Detach)
    assert detach.error is not None
    assert detach.error.condition == "amqp:not-allowed"


@pytest.mark.parametrize("frames", [1, 3])
def test_too_large_a_message_detaches_the_link(frames: int) -> None:
    peer = with_links(max_message_size=3000, max_frame_size=8192)
    link = peer.links["s1"]
    data = message(body=b"x" * 3000)
    step = -(-len(data) // frames)
    for start in range(0, len(data), step):
        events = peer.transfer(0 if start == 0 else None, data[start : start + step], more=start + step < len(data))
    assert events == [LinkDetached(link)]
    detach = peer.read_only(codec.Detach)
    assert detach.error is not None
    assert detach.error.condition == "amqp:link:message-size-exceeded"
    assert peer.connection.next_deadline() is not None


def test_unfinished_messages_of_all_links_are_bounded() -> None:
    peer = started(max_message_size=1000)
    for handle in range(20):
        peer.attach_sender(handle)
    for handle in range(16):
        assert peer.transfer(handle, b"x" * 1000, handle=handle, more=True) == []
    # A link that goes, or a delivery that is given up, makes room.
    peer.send(codec.Detach(handle=0))
    peer.transfer(None, b"", handle=1, aborted=True)
    assert peer.transfer(17, b"x" * 1000, handle=17, more=True) == []
    assert peer.transfer(18, b"x" * 1000, handle=18, more=True) == []
    closed = peer.transfer(19, b"x", handle=19, more=True)[-1]
    assert isinstance(closed, Closed)
    assert closed.condition == "amqp:resource-limit-exceeded"


def test_frames_without_payload_take_no_memory() -> None:
    peer = with_links()
    data = message()
    peer.transfer(0, b"", more=True)
    for _ in range(100):
        peer.transfer(None, b"", more=True)
    partial = peer.links["s1"]._partial
    assert partial is not None
    assert partial.parts == []
    peer.transfer(None, data[:20], more=True)
    peer.transfer(None, data[20:])
    assert [request.subject for request in peer.requests] == ["assert"]


def test_credit_that_the_peer_skips_is_given_back() -> None:
    # AMQP 2.6.7: a sender may advance its delivery-count; amqp-apis 4.2: the credit stays what it was
    peer = with_links()
    peer.flow(handle=1, delivery_count=40, credit=None)
    flow = peer.read_only(codec.Flow)
    assert (flow.handle, flow.delivery_count, flow.link_credit) == (1, 40, 100)
    # It leaves with what else is given back in the batch.
    peer.flow(handle=1, delivery_count=140, credit=None)
    peer.links["s1"].give_credit()
    flow = peer.read_only(codec.Flow)
    assert (flow.delivery_count, flow.link_credit) == (140, 101)
    # One that goes backwards or beyond all credit is not believed.
    peer.flow(handle=1, delivery_count=3, credit=None)
    peer.flow(handle=1, delivery_count=400, credit=None)
    peer.links["s1"].give_credit()
    assert peer.read_only(codec.Flow).delivery_count == 140


def test_the_session_window_never_closes() -> None:
    peer = with_links()
    session = peer.links["s1"]._session
    session.window = 0x7FFFFFFF // 2
    peer.transfer(0, message())
    flow = peer.read_only(codec.Flow)
    assert (flow.handle, flow.next_incoming_id, flow.incoming_window) == (None, 1, 0x7FFFFFFF)


# --- Replies ----------------------------------------------------------------------------------------------------------


def replies(peer: Peer) -> list[tuple[int | None, bytes]]:
    return [
        (performative.delivery_id, payload)
        for _channel, performative, payload in peer.read()
        if isinstance(performative, codec.Transfer)
    ]


def test_replies_wait_for_credit_in_order() -> None:
    # amqp-apis 14 M13, 4.2
    peer = with_links(credit=0)
    link = peer.links["r0"]
    for number in range(5):
        link.send(b"%d" % number)
    assert replies(peer) == []
    assert peer.connection.pending_output == 5
    peer.flow(credit=2)
    assert replies(peer) == [(0, b"0"), (1, b"1")]
    peer.flow(credit=2)  # told before the peer saw the two
    assert replies(peer) == []
    peer.flow(credit=2, delivery_count=2)
    link.send(b"5")
    assert replies(peer) == [(2, b"2"), (3, b"3")]
    peer.flow(credit=10, delivery_count=4)
    assert replies(peer) == [(4, b"4"), (5, b"5")]
    assert peer.connection.pending_output == 0
    link.send(b"6")
    assert peer.connection.pending_output > 0
    assert replies(peer) == [(6, b"6")]


def test_credit_before_the_attach_is_answered_counts() -> None:
    peer = started()
    flow = codec.Flow(incoming_window=99, next_outgoing_id=0, outgoing_window=1, handle=0, link_credit=1)
    peer.write(codec.encode_frame(0, peer.receiver()) + codec.encode_frame(0, flow))
    peer.links["r0"].send(b"x")
    assert replies(peer) == [(0, b"x")]


def test_credit_can_be_taken_back() -> None:
    peer = with_links(credit=10)
    link = peer.links["r0"]
    link.send(b"0")
    link.send(b"1")
    peer.flow(credit=1, delivery_count=0)
    link.send(b"2")
    assert replies(peer) == [(0, b"0"), (1, b"1")]
    peer.flow(credit=0xFFFFFFFF, delivery_count=2)
    assert replies(peer) == [(2, b"2")]


def test_drain_uses_up_the_credit() -> None:
    # AMQP 2.6.7
    peer = with_links(credit=0)
    link = peer.links["r0"]
    link.send(b"0")
    peer.flow(credit=10, drain=True)
    transfer, flow = performatives(peer)
    assert isinstance(transfer, codec.Transfer)
    assert isinstance(flow, codec.Flow)
    assert (flow.handle, flow.delivery_count, flow.link_credit, flow.drain) == (0, 10, 0, True)
    link.send(b"1")
    assert replies(peer) == []
    peer.flow(credit=1, delivery_count=10)
    assert replies(peer) == [(1, b"1")]


def test_echo_is_answered() -> None:
    peer = with_links(credit=5)
    peer.links["r0"].send(b"x")
    peer.read()
    peer.flow(credit=5, echo=True)
    flow = peer.read_only(codec.Flow)
    assert (flow.handle, flow.delivery_count, flow.link_credit, flow.available) == (0, 1, 4, 0)
    peer.flow(handle=1, credit=None, echo=True)
    flow = peer.read_only(codec.Flow)
    assert (flow.handle, flow.link_credit) == (1, 100)
    peer.flow(handle=None, next_incoming_id=1, echo=True)
    flow = peer.read_only(codec.Flow)
    assert (flow.handle, flow.next_outgoing_id) == (None, 1)


def test_replies_wait_for_the_peers_window() -> None:
    # AMQP 2.5.6
    peer = Peer().open().begin(incoming_window=2)
    peer.attach_receiver(0)
    peer.attach_receiver(2, "tenant/r")
    peer.flow(handle=0, incoming_window=2)
    peer.flow(handle=2, incoming_window=2)
    peer.links["r0"].send(b"0")
    peer.links["r2"].send(b"1")
    peer.links["r0"].send(b"2")
    peer.links["r2"].send(b"3")
    peer.links["r0"].send(b"4")
    assert replies(peer) == [(0, b"0"), (1, b"1")]
    peer.flow(handle=None, next_incoming_id=1, incoming_window=2)
    assert replies(peer) == [(2, b"2")]
    peer.flow(handle=None, next_incoming_id=3, incoming_window=100)
    assert sorted(payload for _id, payload in replies(peer)) == [b"3", b"4"]
    assert peer.connection.pending_output == 0


@pytest.mark.parametrize("max_frame_size", [512, 600, 4096])
@pytest.mark.parametrize("size", [400, 480, 500, 512, 513, 5000, 100_000])
def test_no_frame_exceeds_what_the_peer_can_take(max_frame_size: int, size: int) -> None:
    # amqp-apis 7
    peer = Peer().open(max_frame_size=max_frame_size).begin()
    peer.attach_receiver()
    peer.flow()
    payload = bytes(index % 251 for index in range(size))
    link = peer.links["r0"]
    link.send(payload)
    link.send(b"next")
    data = peer.connection.data_to_send()
    received = b""
    transfers = []
    for _channel, performative, part in parse_frames(data):
        assert isinstance(performative, codec.Transfer)
        assert len(codec.encode_frame(0, performative, part)) <= max_frame_size
        transfers.append(performative)
        received += part
    assert received == payload + b"next"
    assert [transfer.more for transfer in transfers] == [True] * (len(transfers) - 2) + [False, False]
    assert transfers[0].delivery_id == 0
    assert transfers[-1].delivery_id == 1
    # Each frame counts for the window: after all of them, the same number again can be sent.
    peer.flow(next_incoming_id=len(transfers), incoming_window=1, delivery_count=2)
    link.send(b"a")
    link.send(b"b")
    assert replies(peer) == [(2, b"a")]


def test_a_large_reply_waits_for_the_window_between_its_frames() -> None:
    peer = Peer().open(max_frame_size=512).begin(incoming_window=2)
    peer.attach_receiver(0)
    peer.attach_receiver(2)
    peer.flow(handle=0, credit=1, incoming_window=2)
    peer.flow(handle=2, credit=1, incoming_window=2)
    peer.links["r0"].send(b"x" * 1800)
    first = peer.read()
    assert len(first) == 2
    peer.links["r2"].send(b"other")
    # The credit of the link is used up by the first frame; its other frames need none.
    peer.flow(handle=0, credit=0, delivery_count=1, next_incoming_id=2, incoming_window=100)
    rest = peer.read()
    payloads = {
        handle: b"".join(
            payload for _, item, payload in first + rest if isinstance(item, codec.Transfer) and item.handle == handle
        )
        for handle in (0, 1)
    }
    assert payloads == {0: b"x" * 1800, 1: b"other"}


def test_a_peer_without_credit_cannot_fill_the_memory() -> None:
    # amqp-apis 17: over the bound, drop the connection with amqp:resource-limit-exceeded
    peer = with_links(credit=0, max_queued_replies=3)
    link = peer.links["r0"]
    for _ in range(3):
        link.send(b"x" * 100)
    assert peer.connection.pending_output == 300
    link.send(b"x" * 100)
    assert peer.connection.is_closed
    assert peer.connection.pending_output < 300
    close = peer.read_only(codec.Close)
    assert close.error is not None
    assert close.error.condition == "amqp:resource-limit-exceeded"
    link.send(b"x")
    events = peer.connection.lost()
    assert events[:2] == [LinkDetached(link), LinkDetached(peer.links["s1"])]
    assert isinstance(events[2], Closed)


def test_queued_replies_go_with_their_link() -> None:
    peer = with_links(credit=0)
    peer.links["r0"].send(b"x" * 100)
    peer.send(codec.Detach(handle=0))
    peer.read()
    assert peer.connection.pending_output == 0


def test_replies_are_sent_settled_to_who_wants_that() -> None:
    peer = started()
    peer.send(peer.receiver(snd_settle_mode=1))
    assert peer.read_only(codec.Attach).snd_settle_mode == 1
    peer.flow()
    peer.links["r0"].send(b"x")
    peer.links["r0"].send(b"x" * 100_000)
    assert all(item.settled for item in performatives(peer) if isinstance(item, codec.Transfer) and item.delivery_id)


def test_dispositions_of_the_peer() -> None:
    # amqp-apis 4.2: settle when the client's disposition arrives; rcv-settle-mode second awaits ours
    peer = with_links()
    link = peer.links["r0"]
    for _ in range(3):
        link.send(b"x")
    peer.read()
    peer.send(codec.Disposition(role=True, first=0, settled=True, state=ACCEPTED))
    peer.send(codec.Disposition(role=True, first=1))
    peer.send(codec.Disposition(role=True, first=1, state=codec.Described(codec.ULong(0x23), [])))
    peer.send(codec.Disposition(role=False, first=0, settled=True))
    assert performatives(peer) == []
    peer.send(codec.Disposition(role=True, first=1, last=2, state=ACCEPTED))
    assert peer.read_only(codec.Disposition) == codec.Disposition(role=False, first=1, last=2, settled=True)


def test_handles_of_any_width() -> None:
    peer = started()
    for handle in (0, 255, 256, 0xFFFFFFFF):
        peer.attach_sender(handle, f"registration/{handle}")
    for number, handle in enumerate((0xFFFFFFFF, 256, 255, 0)):
        (event,) = peer.transfer(number, message(), handle=handle)
        assert isinstance(event, RequestsReceived)
        assert event.link.address == f"registration/{handle}"


def test_many_reply_links_have_handles_of_their_own() -> None:
    peer = started()
    for handle in range(300):
        peer.attach_receiver(handle)
        peer.flow(handle=handle)
    for handle in (0, 255, 256, 299):
        peer.links[f"r{handle}"].send(b"%d" % handle)
    handles = [item.handle for item in performatives(peer) if isinstance(item, codec.Transfer)]
    assert handles == [0, 255, 256, 299]


def test_everything_in_one_read() -> None:
    peer = Peer()
    begin = codec.Begin(next_outgoing_id=0, incoming_window=9, outgoing_window=9)
    peer.write(
        AMQP_HEADER
        + codec.encode_frame(0, codec.Open(container_id="c"))
        + codec.encode_frame(0, begin)
        + codec.encode_frame(0, peer.receiver())
        + codec.encode_frame(0, peer.sender())
    )
    kinds = [type(performative) for performative in performatives(peer)]
    assert kinds == [codec.Open, codec.Begin, codec.Attach, codec.Attach, codec.Flow]


def test_late_accepts_come_before_the_end_of_their_session() -> None:
    peer = with_links()
    peer.transfer(0, message())
    link = peer.links["s1"]
    link.accept_delivery(peer.requests[0])
    peer.send(codec.End())
    assert [type(item) for item in performatives(peer)] == [codec.Disposition, codec.End]
    link.accept_delivery(peer.requests[0])
    link.reject_delivery(peer.requests[0], "x", "y")
    link.give_credit()
    assert performatives(peer) == []
