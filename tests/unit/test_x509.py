"""Names, certificates, trust anchors and templates against docs/specification/provisioning.md and management-api.md."""

import base64
import string
import warnings
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from cryptography import x509 as library
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, padding, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from tests.distinguished_names import (
    CA_SPKI,
    ECDSA_SHA256,
    EQUALITY,
    FROM_DER,
    FROM_TEXT,
    OIDS,
    REFUSED,
    TAGS,
    attribute,
    certificate_of,
    name,
    sequence,
    tlv,
)

import kamado.x509
from kamado.errors import BadRequest, NotFound, Reason
from kamado.x509 import (
    Certificate,
    DistinguishedName,
    IdTemplate,
    TrustAnchor,
    VerifiedCertificate,
    check_public_key,
    parse_certificate,
    verify,
)

NOW = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


def read(der: bytes) -> DistinguishedName:
    return DistinguishedName.from_der(der)


def text(value: str) -> DistinguishedName:
    return DistinguishedName.from_text(value)


# --- 7.5: the text of names ---


@pytest.mark.parametrize(("given", "expected"), FROM_TEXT, ids=[f"7.5 from text: {row[0]}" for row in FROM_TEXT])
def test_text_of_a_name_from_text(given: str, expected: str) -> None:
    assert text(given).text == expected
    assert text(expected).text == expected


@pytest.mark.parametrize(("der", "expected"), [row[1:] for row in FROM_DER], ids=[f"7.5 {row[0]}" for row in FROM_DER])
def test_text_of_a_name_from_der(der: bytes, expected: str) -> None:
    assert read(der).text == expected
    assert read(der).der == der


@pytest.mark.parametrize(
    ("der", "expected"),
    [
        (name(), ""),
        # 7.3: the content is read as UTF-8 whatever the string type says.
        (name([("CN", "t61", b"\xe4")]), "CN=�"),
        (name([("CN", "bmp", b"\0a\0b")]), r"CN=\00a\00b"),
        (name([("CN", "general", "a")]), "CN=a"),
        (name([("CN", "ia5", "a")]), "CN=a"),
        # Java replaces an encoded surrogate by one character.
        (name([("CN", "utf8", b"x\xed\xa0\x80y\xed\xb0")]), "CN=x�y�"),
        (name([("CN", "utf8", b"a\xe2\x82b")]), "CN=a�b"),
        # 7.3: hex form.
        (name([("CN", "visible", "a")]), "CN=#1a0161"),
        (name([("CN", "universal", b"\0\0\0a")]), "CN=#1c0400000061"),
        (name([("CN", "octets", b"\xff")]), "CN=#0401ff"),
        (name([("CN", "boolean", b"\xff")]), "CN=#0101ff"),
        (name([("CN", "octets", b"\0" * 200)]), "CN=#0481c8" + "00" * 200),
        # 7.3: control characters and normal forms stay.
        (name([("CN", "utf8", "a\tb\x7f\ne\u0301")]), "CN=a\tb\x7f\ne\u0301"),
        (name([("CN", "utf8", " , ")]), "CN=\\ \\,\\ "),
        (name([("CN", "utf8", "\ra\r")]), "CN=\\\ra\\\r"),
        (name([("CN", "utf8", "#a#")]), r"CN=\#a\#"),
        (
            name(*[[(key, "prt", "x")] for key in ("UID", "DC", "STREET", "OU", "O", "ST", "L", "C", "CN")]),
            "CN=x,C=x,L=x,ST=x,O=x,OU=x,STREET=x,DC=x,UID=x",
        ),
    ],
)
def test_values_of_every_kind(der: bytes, expected: str) -> None:
    assert read(der).text == expected


@pytest.mark.parametrize(
    ("content", "dotted"),
    [("2a", "1.2"), ("00", "0.0"), ("8837", "2.999"), ("7f", "2.47"), ("78", "2.40"), ("2b8f65", "1.3.2021")],
)
def test_object_identifiers(content: str, dotted: str) -> None:
    pair = tlv(0x30, tlv(6, bytes.fromhex(content)) + b"\x13\1a")
    der = tlv(0x30, tlv(0x31, pair))
    assert read(der).text == f"{dotted}=#130161"
    assert text(f"{dotted}=a").der == der
    assert text(f"oid.{dotted} = a").der == der


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ""),
        (" CN = a , O = b ", "CN=a,O=b"),
        ("CN=a + O=b ; C = DE", "CN=a+O=b,C=DE"),
        ('CN="a" + O="b;c"', r"CN=a+O=b\;c"),
        (r'CN="say \"hi\" \41"', r"CN=say \"hi\" A"),
        ('CN=" a "', "CN=a"),
        ('CN=""', "CN="),
        ("CN=,O=", "CN=,O="),
        (r"CN=\,\=\+\<\>\#\;\"\\\ x", r"CN=\,\=\+\<\>\#\;\"\\ x"),
        (r"CN=\20a\20", "CN=\\ a\\ "),
        ("CN=a \\  ", "CN=a\\ \\ "),
        (r"CN=x\C3\A4y\C3\,", r"CN=xäy�\,"),
        ("CN=#0C03616263 , O=x", "CN=abc,O=x"),
        ("CN=#1203313233", "CN=#1203313233"),
        ("2.5.4.3=a,OID.2.5.4.10=b,oid.2.5.04.11=c", "CN=a,O=b,OU=c"),
        ("St=a,Street=b,dc=c,uid=d,l=e", "ST=a,STREET=b,DC=c,UID=d,L=e"),
        ("SURNAME=a", "2.5.4.4=#130161"),
        ("GIVENNAME=a", "2.5.4.42=#130161"),
        ("INITIALS=a", "2.5.4.43=#130161"),
        ("GENERATION=a", "2.5.4.44=#130161"),
        ("DNQ=a", "2.5.4.46=#130161"),
        ("DNQualifier=a", "2.5.4.46=#130161"),
        ("IP=a", "1.3.6.1.4.1.42.2.11.2.1=#130161"),
        # 7.4: Printable if all characters are of its set, else UTF8; e-mail and DC are IA5.
        (r"T=Aa0 '()\+\,-./:=?", "2.5.4.12=#130f" + b"Aa0 '()+,-./:=?".hex()),
        ("T=a@b", "2.5.4.12=#0c03614062"),
        ("T=ä", "2.5.4.12=#0c02c3a4"),
        ("EMAILADDRESS=ä@b", "1.2.840.113549.1.9.1=#0c04c3a44062"),
        ("DC=ä", "DC=ä"),
        # management 3.14
        ("cn=Pump 1, o = ACME ; c=DE", "CN=Pump 1,O=ACME,C=DE"),
        ("SERIALNUMBER=12", "2.5.4.5=#13023132"),
        ("EMAILADDRESS=Tu@x.org", "1.2.840.113549.1.9.1=#1608547540782e6f7267"),
    ],
)
def test_reading_a_text(given: str, expected: str) -> None:
    assert text(given).text == expected


@pytest.mark.parametrize("given", REFUSED)
def test_what_is_no_name_is_refused(given: str) -> None:
    """7.4, second paragraph."""
    with pytest.raises(BadRequest):
        text(given)


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"\x30",
        b"\x30\1",
        b"\x31\0",
        b"\x30\0\0",
        b"\x30\x80\0\0",
        b"\x30\x81\0",
        b"\x30\x82\0\x80" + b"\0" * 0x80,
        b"\x30\x81",
        b"\x30\x85\0\0\0\0\1\0",
        b"\x1f\x01\0",
        tlv(0x30, b"\x30\0"),
        tlv(0x30, b"\x31\0"),
        tlv(0x30, tlv(0x30, attribute("CN", "utf8", "a"))),
        tlv(0x30, tlv(0x31, b"\x31" + attribute("CN", "utf8", "a")[1:])),
        tlv(0x30, tlv(0x31, tlv(0x30, b"\x06\3\x55\4\3"))),
        tlv(0x30, tlv(0x31, tlv(0x30, b"\x06\3\x55\4\3\x0c\1a\x0c\1a"))),
        tlv(0x30, tlv(0x31, tlv(0x30, b"\x13\1a\x13\1a"))),
        *(
            tlv(0x30, tlv(0x31, tlv(0x30, tlv(6, bytes.fromhex(oid)) + b"\x13\1a")))
            for oid in ("", "80", "2a8001", "2a81", "2a" + "81" * 300 + "01")
        ),
    ],
)
def test_bytes_that_are_no_name_are_refused(der: bytes) -> None:
    with pytest.raises(BadRequest):
        read(der)


# --- 7.6: equality ---


def either(given: str | bytes) -> DistinguishedName:
    return text(given) if isinstance(given, str) else read(given)


SAME = [(either(first), either(second), equal) for first, second, equal in EQUALITY] + [
    # The rules that the table has no row for.
    (text("CN=Straße"), text("CN=STRASSE"), True),
    (text("CN=  a   b "), text("CN=A B"), True),
    (text("CN=é"), text("CN=e\u0301"), True),
    (text("CN=a"), text("OU=a"), False),
    (text("CN=a,O=b"), text("CN=a"), False),
    (read(name([("CN", "t61", "dev")])), read(name([("CN", "utf8", "DEV")])), False),
    (read(name([("CN", "utf8", "#0c0161")])), read(name([("CN", "numeric", "a")])), False),
    (text(r"CN=a\,O\=b"), text("CN=a,O=b"), False),
    (text(r"CN=a\+O\=b"), text("CN=a+O=b"), False),
    (text("1.2.3=a"), text("1.2.3=A"), False),
]


@pytest.mark.parametrize(("first", "second", "equal"), SAME, ids=[f"7.6 {row[0].text} ~ {row[1].text}" for row in SAME])
def test_when_two_names_are_equal(first: DistinguishedName, second: DistinguishedName, equal: bool) -> None:
    assert first.equals(second) is equal
    assert second.equals(first) is equal


@pytest.mark.parametrize("row", [5, 7])
def test_some_are_equal_by_their_text_alone(row: int) -> None:
    """7.6: yes by rule 6, no by rules 1-5."""
    first, second, _ = SAME[row]
    assert first.canonical_key != second.canonical_key
    assert first.text == second.text


def test_names_compare_and_hash_by_text() -> None:
    first, second = read(name([("CN", "t61", "dev")])), text("CN=dev")
    assert first == second
    assert hash(first) == hash(second)
    assert text("CN=a") != text("CN=A")
    assert first != "CN=dev"


def test_values_of_an_attribute() -> None:
    subject = text(r"CN=a\, b,OU=x+OU=y,CN=#1203313233,O=z,CN=c")
    assert subject.values("CN") == ["a, b", "c"]
    assert subject.values("ou") == ["x", "y"]
    assert subject.values("DC") == []


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("CN=coap-adapter,OU=Hono,O=Eclipse", "coap-adapter"),
        ("OU=x,CN=y", None),
        (r"CN=a\,b,O=x", "a,b"),
        ("OU=x+CN=y", "y"),
        ("CN=#1203313233", None),
        ("", None),
    ],
)
def test_user_name_of_a_certificate(subject: str, expected: str | None) -> None:
    """authentication 4.3."""
    assert text(subject).first_rdn_common_name == expected


# --- properties ---

characters = st.one_of(
    st.sampled_from(string.ascii_letters + ' ,=+<>#;"\\\0\r\n\t€äßÉ\u0301\u00a0😀'),
    st.characters(exclude_categories=["Cs"]),
)
values = st.text(characters, max_size=12)


@st.composite
def attributes(draw: st.DrawFn) -> tuple[str, str, bytes]:
    content = draw(st.one_of(values.map(str.encode), st.binary(max_size=12)))
    return draw(st.sampled_from(sorted(OIDS))), draw(st.sampled_from(sorted(TAGS))), content


names_from_der = st.lists(st.lists(attributes(), min_size=1, max_size=3), max_size=4).map(
    lambda rdns: DistinguishedName.from_der(name(*rdns))
)


@given(names_from_der)
def test_text_of_a_name_reads_back(subject: DistinguishedName) -> None:
    again = text(subject.text)
    assert again.text == subject.text
    assert again.equals(subject)


@given(names_from_der)
def test_encoding_of_a_text_reads_back(subject: DistinguishedName) -> None:
    from_text = text(subject.text)
    again = read(from_text.der)
    assert again.der == from_text.der
    # DER sorts the attributes of one RDN, so the text may have them in another order, which does not count.
    assert again.canonical_key == from_text.canonical_key


@given(st.lists(names_from_der, min_size=3, max_size=3))
def test_equality_is_reflexive_symmetric_and_transitive_by_key(names: list[DistinguishedName]) -> None:
    for subject in names:
        assert subject.equals(subject)
        assert subject.equals(read(subject.der))
    for first, second in pairwise(names):
        assert first.equals(second) == second.equals(first)
        assert first.equals(second) == (first.canonical_key == second.canonical_key or first.text == second.text)


@given(st.text(st.sampled_from("aBcß é"), max_size=8))
def test_case_and_spaces_do_not_count_in_folded_values(value: str) -> None:
    first = read(name([("CN", "utf8", value)]))
    second = read(name([("CN", "prt", f"  {value.upper()} ")]))
    assert first.canonical_key == second.canonical_key


@given(st.one_of(st.text(), st.text(st.sampled_from('CNO=,;+"\\#0c1 <>a.\ud800'))))
def test_any_text_is_a_name_or_refused(given_text: str) -> None:
    try:
        subject = text(given_text)
    except BadRequest:
        return
    assert text(subject.text).text == subject.text
    assert read(subject.der).equals(subject) or "+" in subject.text


@given(st.binary(max_size=200))
def test_any_bytes_are_a_name_or_refused(data: bytes) -> None:
    for parse in (read, parse_certificate):
        with suppress(BadRequest):
            parse(data)


# --- certificates ---

CA_CERT = base64.b64decode(
    "MIIBYzCCAQmgAwIBAgIBBzAKBggqhkjOPQQDAjA7MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzERMA8GA1UEAwwIcGxh"
    "bnQtY2EwHhcNMjQwMTAxMDAwMDAwWhcNNDQwMTAxMDAwMDAwWjA7MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzERMA8G"
    "A1UEAwwIcGxhbnQtY2EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAR6o/9g68GTZaXxU73IykgYipEtKpN7q5h0SHBi6d1WzOc4ErrHStlx893V"
    "dPyi5V6OP+nwIQiCTPuTMJLBitbjMAoGCCqGSM49BAMCA0gAMEUCIGDjczYmqu/5jmZta50rCn3l2zKMh4YnFk71KzIRJi2bAiEA8l46uGG/bnUv"
    "f5PIzFj7CWGCTXzaXS2HngaA3kaTbLU="
)
DEV_CERT = base64.b64decode(
    "MIIBYDCCAQigAwIBAgIBCDAKBggqhkjOPQQDAjA7MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzERMA8GA1UEAwwIcGxh"
    "bnQtY2EwHhcNMjQwNjAxMDAwMDAwWhcNMzQwNjAxMDAwMDAwWjA6MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzEQMA4G"
    "A1UEAwwHcHVtcC0xNzBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABAcK4LwmfjGbDvdKr3bvwiUA3/O5KTFvHzUGnsLFKBeiXMznx5M8vJT6GnOm"
    "W/bIZPKrtjb3bj0YrvjkUPb8QQIwCgYIKoZIzj0EAwIDRgAwQwIgd4yimDc+369js8cKg3FUblp4WK1yXNkhkBAprvr81tACH3hdf6pHZaViCY6v"
    "xu4hkGfjdleKsbnq3KOSRggACoQ="
)


def test_certificates_of_management_12_1() -> None:
    ca, device = parse_certificate(CA_CERT), parse_certificate(DEV_CERT)
    assert ca.subject.text == ca.issuer.text == "CN=plant-ca,OU=Line 7,O=Example GmbH"
    assert (ca.not_before, ca.not_after) == (datetime(2024, 1, 1, tzinfo=UTC), datetime(2044, 1, 1, tzinfo=UTC))
    assert (ca.public_key, ca.algorithm, ca.der) == (CA_SPKI, "EC", CA_CERT)
    assert device.subject.text == "CN=pump-17,OU=Line 7,O=Example GmbH"
    assert device.issuer == ca.subject
    template = IdTemplate.parse("{{subject-cn}}@{{subject-ou}}", "auth-id-template")
    assert template.fill(device.subject) == "pump-17@Line 7"


def pem(der: bytes, label: str = "CERTIFICATE") -> bytes:
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{body}-----END {label}-----\n".encode()


@pytest.mark.parametrize(
    "data",
    [
        pem(CA_CERT),
        pem(CA_CERT, "X509 CERTIFICATE"),
        b"  \r\n" + pem(CA_CERT).replace(b"\n", b"\r\n"),
        b"subject=CN = plant-ca\n\n" + pem(CA_CERT) + pem(DEV_CERT),
    ],
)
def test_pem(data: bytes) -> None:
    assert parse_certificate(data).der == CA_CERT


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"0",
        CA_CERT + b"\0",
        CA_CERT[:-1],
        pem(CA_CERT)[:-30],
        pem(CA_CERT, "PUBLIC KEY"),
        pem(CA_CERT).replace(b"MII", b"M%I"),
        pem(CA_CERT).replace(b"MII", b"MI"),
        pem(b""),
        base64.b64encode(CA_CERT),
    ],
)
def test_what_is_no_certificate_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_certificate(data)


@pytest.mark.parametrize(
    "der",
    [
        certificate_of(),
        certificate_of(version=b""),
        certificate_of(version=b"\xa0\3\2\1\0"),
        certificate_of(version=b"\xa0\3\2\1\1"),
        certificate_of(serial=b"\2\1\0"),
        certificate_of(serial=b"\2\1\xff"),
        certificate_of(serial=tlv(2, b"\x7f" * 40)),
        certificate_of(rest=b"\x81\2\0\1\x82\2\0\1\xa3\2\x30\0"),
        certificate_of(public_key=sequence(sequence(b"\6\3\x2a\3\4"), b"\3\2\0\1")),
        # Not sorted as DER demands, and names of no attributes: adapters take both.
        certificate_of(subject=name([("OU", "utf8", "b"), ("CN", "utf8", "a")])),
        certificate_of(subject=name()),
    ],
)
def test_odd_certificates_are_read(der: bytes) -> None:
    certificate = parse_certificate(der)
    assert certificate.issuer.text == "CN=ca"
    assert certificate.algorithm in {"EC", "1.2.3.4"}


@pytest.mark.parametrize(
    "der",
    [
        certificate_of(version=b"\xa0\3\2\1\3"),
        certificate_of(version=b"\xa0\3\2\1\xff"),
        certificate_of(version=b"\xa0\0"),
        certificate_of(serial=b""),
        certificate_of(serial=b"\2\0"),
        certificate_of(issuer=b"\x31\0"),
        certificate_of(subject=b"\x30\2\x31\0"),
        certificate_of(public_key=b""),
        certificate_of(public_key=CA_SPKI[:-1] + b"\0"),
        certificate_of(public_key=sequence(b"\x30\0", b"\3\1\0")),
        certificate_of(public_key=sequence(ECDSA_SHA256, b"\3\1\0", b"\5\0")),
        certificate_of(rest=b"\x30\0"),
        certificate_of(trailer=b"\5\0"),
        certificate_of(signature=b"\3\0", subject=name([("CN", "utf8", "x" * 99)])),
        certificate_of(signature=tlv(3, b"\1" * 99)),
        certificate_of(signature=tlv(4, b"\0" * 99)),
        certificate_of(validity=sequence(tlv(0x17, b"240101000000Z"))),
        certificate_of(validity=sequence(*[tlv(0x17, b"240101000000Z")] * 3)),
    ],
)
def test_broken_certificates_are_refused(der: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_certificate(der)


@pytest.mark.parametrize(
    ("tag", "content", "expected"),
    [
        (0x17, b"500101000000Z", datetime(1950, 1, 1, tzinfo=UTC)),
        (0x17, b"491231235959Z", datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (0x17, b"2401010000Z", datetime(2024, 1, 1, tzinfo=UTC)),
        (0x17, b"240101020000+0200", datetime(2024, 1, 1, tzinfo=UTC)),
        (0x17, b"240101000000-0130", datetime(2024, 1, 1, 1, 30, tzinfo=UTC)),
        (0x18, b"99991231235959Z", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (0x18, b"00010101000000Z", datetime(1, 1, 1, tzinfo=UTC)),
        (0x18, b"20240101000000.5Z", datetime(2024, 1, 1, 0, 0, 0, 500000, tzinfo=UTC)),
        (0x18, b"20240101000000.1234567Z", datetime(2024, 1, 1, 0, 0, 0, 123456, tzinfo=UTC)),
        (0x18, b"20500101000000Z", datetime(2050, 1, 1, tzinfo=UTC)),
        (0x17, b"240230000000Z", None),
        (0x17, b"240101240000Z", None),
        (0x17, b"240101000060Z", None),
        (0x17, b"240101000000", None),
        (0x17, b"240101000000+2", None),
        (0x17, "2401010000٣0Z".encode(), None),
        (0x17, b"", None),
        (0x18, b"00000101000000Z", None),
        (0x18, b"99991231235959-0100", None),
        (0x18, b"00010101000000+0001", None),
        (0x18, b"20240101000000.Z", None),
        (0x04, b"20240101000000Z", None),
    ],
)
def test_times_of_a_certificate(tag: int, content: bytes, expected: datetime | None) -> None:
    der = certificate_of(validity=sequence(tlv(tag, content), tlv(0x17, b"440101000000Z")))
    if expected is None:
        with pytest.raises(BadRequest):
            parse_certificate(der)
    else:
        assert parse_certificate(der).not_before == expected


# --- keys and signatures ---

RSA = rsa.generate_private_key(65537, 2048)
EC, OTHER_EC = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
EC_521 = ec.generate_private_key(ec.SECP521R1())
ED25519, ED448 = ed25519.Ed25519PrivateKey.generate(), ed448.Ed448PrivateKey.generate()
DSA = dsa.generate_private_key(1024)
Signer = (
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
    | dsa.DSAPrivateKey
)


Digest = (
    hashes.SHA224
    | hashes.SHA256
    | hashes.SHA384
    | hashes.SHA512
    | hashes.SHA3_224
    | hashes.SHA3_256
    | hashes.SHA3_384
    | hashes.SHA3_512
)


def spki(key: Signer | x25519.X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def issue(
    signer: Signer = EC,
    digest: Digest | None = None,
    scheme: padding.PSS | None = None,
    *,
    not_before: datetime = NOW - timedelta(days=1),
    not_after: datetime = NOW + timedelta(days=1),
) -> Certificate:
    """A device's certificate, made by a library so that nobody checks signatures with the code that made them."""
    builder = (
        library.CertificateBuilder()
        .subject_name(library.Name([library.NameAttribute(NameOID.COMMON_NAME, "dev")]))
        .issuer_name(library.Name([library.NameAttribute(NameOID.COMMON_NAME, "ca")]))
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .serial_number(1)
        .public_key(OTHER_EC.public_key())
    )
    if digest is None and not isinstance(signer, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey):
        digest = hashes.SHA256()
    made = builder.sign(signer, digest, rsa_padding=scheme)
    return parse_certificate(made.public_bytes(Encoding.DER))


def anchor(
    key: Signer = EC,
    *,
    id_: str = "a",
    subject: str = "CN=ca",
    provisions: bool = True,
    not_before: datetime = NOW - timedelta(days=9),
    not_after: datetime = NOW + timedelta(days=9),
) -> TrustAnchor:
    return TrustAnchor(
        id=id_,
        subject=text(subject),
        public_key=spki(key),
        not_before=not_before,
        not_after=not_after,
        auto_provisioning_enabled=provisions,
    )


def pss(mask: hashes.HashAlgorithm, salt_length: int) -> padding.PSS:
    return padding.PSS(padding.MGF1(mask), salt_length)


@pytest.mark.parametrize(
    ("signer", "digest", "scheme"),
    [
        *((RSA, digest(), None) for digest in (hashes.SHA224, hashes.SHA256, hashes.SHA384, hashes.SHA512)),
        *((RSA, digest(), None) for digest in (hashes.SHA3_224, hashes.SHA3_256, hashes.SHA3_384, hashes.SHA3_512)),
        (RSA, hashes.SHA256(), pss(hashes.SHA256(), 32)),
        (RSA, hashes.SHA512(), pss(hashes.SHA256(), 17)),
        *((EC, digest(), None) for digest in (hashes.SHA224, hashes.SHA256, hashes.SHA384, hashes.SHA512)),
        *((EC, digest(), None) for digest in (hashes.SHA3_224, hashes.SHA3_256, hashes.SHA3_384, hashes.SHA3_512)),
        (EC_521, hashes.SHA512(), None),
        (DSA, hashes.SHA224(), None),
        (DSA, hashes.SHA256(), None),
        (ED25519, None, None),
        (ED448, None, None),
    ],
)
def test_every_kind_of_signature(signer: Signer, digest: Digest | None, scheme: padding.PSS | None) -> None:
    certificate = issue(signer, digest, scheme)
    assert verify(certificate, [anchor(signer)], NOW, check_signature=True).certificate is certificate
    others = [anchor(key) for key in (RSA, EC, EC_521, DSA, ED25519, ED448) if key is not signer]
    with pytest.raises(NotFound) as refusal:
        verify(certificate, others, NOW, check_signature=True)
    assert refusal.value.reason is Reason.SIGNATURE_INVALID


def test_a_changed_certificate_is_not_signed() -> None:
    der = bytearray(issue().der)
    place = der.rindex(b"dev")
    der[place] ^= 1
    with pytest.raises(NotFound) as refusal:
        verify(parse_certificate(bytes(der)), [anchor()], NOW, check_signature=True)
    assert refusal.value.reason is Reason.SIGNATURE_INVALID


MD5_RSA = "2a864886f70d010104"
RSASSA_PSS = "2a864886f70d01010a"


def algorithm(oid: str, *parameters: bytes) -> bytes:
    return sequence(tlv(6, bytes.fromhex(oid)), *parameters)


@pytest.mark.parametrize(
    "algorithms",
    [
        # Two different algorithms in one certificate (RFC 5280, 4.1.1.2).
        (ECDSA_SHA256, algorithm("2a8648ce3d040303")),
        *(
            (same, same)
            for same in (
                algorithm(MD5_RSA, b"\5\0"),
                algorithm("2a0304"),
                algorithm(RSASSA_PSS),
                algorithm(RSASSA_PSS, sequence()),
                algorithm(RSASSA_PSS, sequence(tlv(0xA0, algorithm(MD5_RSA)))),
                algorithm(RSASSA_PSS, sequence(tlv(0xA1, algorithm(MD5_RSA)))),
                algorithm(RSASSA_PSS, sequence(tlv(0xA2, tlv(2, b"\xff")))),
                algorithm(RSASSA_PSS, sequence(tlv(0xA3, tlv(2, b"\1")), tlv(0xA2, tlv(2, b"\x7f" * 8)))),
                sequence(),
                sequence(b"\6\0"),
            )
        ),
    ],
)
def test_no_key_verifies_what_is_no_signature(algorithms: tuple[bytes, bytes]) -> None:
    inner, outer = algorithms
    certificate = parse_certificate(certificate_of(inner=inner, outer=outer))
    with pytest.raises(NotFound) as refusal:
        verify(certificate, [anchor(EC), anchor(RSA)], NOW, check_signature=True)
    assert refusal.value.reason is Reason.SIGNATURE_INVALID


def test_pss_with_the_defaults() -> None:
    """RFC 4055, 3.1: absent parameters are SHA-1 and a salt of 20 bytes."""
    same = algorithm(RSASSA_PSS, sequence())
    signed = sequence(
        *(b"\2\1\1", same, name([("CN", "utf8", "ca")])),
        sequence(tlv(0x17, b"240101000000Z"), tlv(0x17, b"440101000000Z")),
        *(name([("CN", "utf8", "dev")]), CA_SPKI),
    )
    signature = RSA.sign(signed, pss(hashes.SHA1(), 20), hashes.SHA1())
    certificate = parse_certificate(sequence(signed, same, tlv(3, b"\0" + signature)))
    assert verify(certificate, [anchor(RSA)], NOW, check_signature=True)


@pytest.mark.parametrize(
    ("key", "name_"),
    [
        (RSA, "RSA"),
        (RSA, "rsa"),
        (EC, "EC"),
        (EC_521, "ec"),
        (DSA, "DSA"),
        (ED25519, "EdDSA"),
        (ED448, "EdDSA"),
        (ED25519, "Ed25519"),
        (ED448, "ED448"),
    ],
)
def test_public_keys_are_checked_for_their_algorithm(key: Signer, name_: str) -> None:
    check_public_key(spki(key), name_, "public-key")


@pytest.mark.parametrize(
    ("der", "name_"),
    [
        (CA_SPKI, "RSA"),
        (spki(RSA), "EC"),
        (spki(RSA), "RSASSA-PSS"),
        (spki(ED25519), "Ed448"),
        (spki(ED448), "Ed25519"),
        (spki(x25519.X25519PrivateKey.generate()), "EdDSA"),
        (CA_SPKI, "X25519"),
        (CA_SPKI, "ROT13"),
        (CA_SPKI, ""),
        (CA_SPKI + b"\0", "EC"),
        (CA_SPKI[:-1], "EC"),
        (CA_SPKI[:-1] + b"\0", "EC"),
        (b"", "EC"),
        (CA_CERT, "EC"),
        (sequence(algorithm("2a8648ce3d0201", tlv(6, b"\x2a\3")), b"\3\3\0\4\4"), "EC"),
    ],
    # Keys made anew in each process would give the cases other names in each.
    ids=lambda value: value if isinstance(value, str) else "key",
)
def test_what_is_no_key_of_the_algorithm_is_refused(der: bytes, name_: str) -> None:
    with pytest.raises(BadRequest, match=r"^trusted-ca\[0\]\.public-key: "):
        check_public_key(der, name_, "trusted-ca[0].public-key")


def test_a_key_that_the_library_frowns_at_raises_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    key = spki(ec.generate_private_key(ec.SECP256R1()))

    def frown(der: bytes) -> object:
        warnings.warn("curves like this one will not be supported", DeprecationWarning, stacklevel=2)
        return load_der_public_key(der)

    monkeypatch.setattr(kamado.x509, "load_der_public_key", frown)
    check_public_key(key, "EC", "public-key")


@given(st.binary(max_size=64), st.integers(0, len(CA_SPKI)))
def test_any_bytes_are_a_key_or_refused(data: bytes, place: int) -> None:
    for der in (data, CA_SPKI[:place] + data + CA_SPKI[place + len(data) :]):
        with suppress(BadRequest):
            check_public_key(der, "EC", "public-key")


@given(st.binary(min_size=1, max_size=8), st.integers(0, len(DEV_CERT)))
def test_a_damaged_certificate_is_refused_in_order(data: bytes, place: int) -> None:
    """Any bytes give a value or an error of the contract, up to the signature check."""
    der = DEV_CERT[:place] + data + DEV_CERT[place + len(data) :]
    ca = TrustAnchor(
        id="a",
        subject=text("CN=plant-ca,OU=Line 7,O=Example GmbH"),
        public_key=CA_SPKI,
        not_before=datetime.min.replace(tzinfo=UTC),
        not_after=datetime.max.replace(tzinfo=UTC),
        auto_provisioning_enabled=True,
    )
    try:
        verified = verify(parse_certificate(der), [ca], NOW, check_signature=True)
    except (BadRequest, NotFound):
        return
    assert verified.certificate.subject.text == "CN=pump-17,OU=Line 7,O=Example GmbH"


# --- trust: provisioning 3.2, rows 8-10 ---


def refusal_of(certificate: Certificate, *anchors: TrustAnchor, check_signature: bool = True) -> Reason | None:
    with pytest.raises(NotFound) as refusal:
        verify(certificate, anchors, NOW, check_signature=check_signature)
    return refusal.value.reason


LATER, EARLIER = NOW + timedelta(seconds=1), NOW - timedelta(seconds=1)


@pytest.mark.parametrize(
    ("anchors", "reason"),
    [
        ([], Reason.ISSUER_UNKNOWN),
        ([anchor(subject="CN=other")], Reason.ISSUER_UNKNOWN),
        ([anchor(not_after=EARLIER)], Reason.ISSUER_EXPIRED),
        ([anchor(not_before=LATER)], Reason.ISSUER_EXPIRED),
        ([anchor(provisions=False)], Reason.ISSUER_DOES_NOT_PROVISION),
        ([anchor(not_after=EARLIER), anchor(provisions=False)], Reason.ISSUER_DOES_NOT_PROVISION),
        ([anchor(OTHER_EC)], Reason.SIGNATURE_INVALID),
        ([anchor(OTHER_EC), anchor(EC, provisions=False)], Reason.SIGNATURE_INVALID),
    ],
)
def test_why_an_issuer_is_not_trusted(anchors: list[TrustAnchor], reason: Reason) -> None:
    assert refusal_of(issue(), *anchors) is reason


def test_a_certificate_out_of_its_period() -> None:
    """Row 9."""
    assert refusal_of(issue(not_before=LATER), anchor()) is Reason.CERTIFICATE_NOT_YET_VALID
    assert refusal_of(issue(not_after=EARLIER), anchor()) is Reason.CERTIFICATE_EXPIRED
    assert refusal_of(issue(not_after=EARLIER), anchor(), check_signature=False) is Reason.CERTIFICATE_EXPIRED


def test_both_ends_of_a_period_belong_to_it() -> None:
    """Section 1: a CA counts as valid while notBefore <= now <= notAfter."""
    assert anchor(not_before=NOW).is_valid_at(NOW)
    assert anchor(not_after=NOW).is_valid_at(NOW)
    now = NOW.replace(microsecond=0)
    verify(issue(not_before=now), [anchor()], now, check_signature=True)
    verify(issue(not_after=now), [anchor()], now, check_signature=True)


def test_during_a_key_roll_over_the_anchor_that_signed_vouches() -> None:
    old, new = anchor(OTHER_EC, id_="old"), anchor(EC, id_="new", subject="cn=CA")
    assert verify(issue(EC), [old, new], NOW, check_signature=True).anchor is new
    assert verify(issue(OTHER_EC), [old, new], NOW, check_signature=True).anchor is old


def test_without_the_signature_check_the_first_anchor_with_the_flag_vouches() -> None:
    anchors = [
        anchor(id_="a", provisions=False),
        anchor(id_="b", not_after=EARLIER),
        anchor(RSA, id_="c"),
        anchor(id_="d"),
    ]
    assert verify(issue(), anchors, NOW, check_signature=False).anchor.id == "c"


def test_only_verify_makes_a_verified_certificate() -> None:
    with pytest.raises(AssertionError):
        VerifiedCertificate(issue(), anchor(), object())


# --- templates: management 4.6, provisioning 3.3 and 3.4 ---


@pytest.mark.parametrize(
    "template",
    [
        "",
        "dev",
        "{{subject-cn}}-{{serial}}",
        "{{ subject-cn }}",
        "{{SUBJECT-CN}}",
        "{{}}{{subject-o}}",
        "{{subject-cn}",
    ],
)
def test_templates_need_known_placeholders(template: str) -> None:
    with pytest.raises(BadRequest, match=r"^auth-id-template: "):
        IdTemplate.parse(template, "auth-id-template")


@pytest.mark.parametrize(
    ("template", "subject", "expected"),
    [
        ("{{subject-o}}-{{subject-cn}}", "CN=pump-9,OU=Plant 7,O=Acme", "Acme-pump-9"),
        ("{{subject-ou}}", "CN=a,OU=x,OU=y,O=z", "y"),
        ("{{subject-dn}}", r"CN=a\, b,O=z", r"CN=a\, b,O=z"),
        ("{{subject-cn}}/{{subject-cn}}", r"CN=a\, b", "a, b/a, b"),
        # Multi-valued RDNs are looked at whole.
        ("{{subject-ou}}", "CN=a+OU=b,O=c", "b"),
        # One pass: a placeholder in a value stays.
        ("{{subject-cn}}", "CN={{subject-o}},O=x", "{{subject-o}}"),
        ("{{{subject-cn}}}", "CN=a", "{a}"),
        (r"\1{{subject-cn}}$", r"CN=\\1", r"\1\1$"),
    ],
)
def test_filling_a_template(template: str, subject: str, expected: str) -> None:
    assert IdTemplate.parse(template, "t").fill(text(subject)) == expected


@pytest.mark.parametrize(
    ("template", "subject"),
    [
        ("{{subject-ou}}", "CN=a"),
        ("{{subject-cn}}", "CN="),
        ("{{subject-cn}}", "CN=#1203313233"),
        ("{{subject-cn}}", "CN=x,CN="),
        ("{{subject-dn}}", ""),
    ],
)
def test_a_template_without_its_value(template: str, subject: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        IdTemplate.parse(template, "t").fill(text(subject))
    assert refusal.value.reason is Reason.TEMPLATE_NOT_FILLED
    assert IdTemplate.parse(template, "t").adapter_fill(text(subject)) is None


@pytest.mark.parametrize(
    ("template", "subject", "expected"),
    [
        ("{{subject-dn}}", r"CN=Smith\, John", "CN=Smith, John"),
        ("a {{subject-cn}} {{subject-o}} z", r"CN=x\\y,O=Acme", "a xy Acme z"),
        ("{{subject-cn}}$", "CN=x", "x$"),
        ("{{subject-cn}}", "CN=1$", None),
        ("{{subject-cn}}", r"CN=1\\$", "1$"),
        ("{{subject-cn}}", r"CN=x\\", None),
        # Of an RDN with several attributes the adapter sees the one whose type sorts first.
        ("{{subject-cn}}", "OU=b+CN=a", "a"),
        ("{{subject-ou}}", "OU=b+CN=a", None),
        ("{{subject-ou}}", "OU=b+CN=a,OU=c", "c"),
    ],
)
def test_what_a_stock_adapter_makes_of_a_template(template: str, subject: str, expected: str | None) -> None:
    assert IdTemplate.parse(template, "t").adapter_fill(text(subject)) == expected


def test_an_unknown_placeholder_is_named() -> None:
    """Management 4.6."""
    for template in ("{{subject-CN}}", "{{subject-cn}}-{{serial}}"):
        with pytest.raises(BadRequest, match=r"^t: \{\{(subject-CN|serial)\}\} is none of"):
            IdTemplate.parse(template, "t")
    with pytest.raises(BadRequest, match="needs a placeholder"):
        IdTemplate.parse("dev", "t")


def test_a_long_name_costs_no_more_than_its_length() -> None:
    """A name is what any device may present: neither its size nor what is in it may stop everybody else."""
    # Normalising such a run takes time by the square of its length.
    run = "\u0315\u0300" * 128
    assert not DistinguishedName.from_text(f"CN={run}").canonical_key.startswith("cn=#")
    name = DistinguishedName.from_text(f"CN={run}x,O=Acme")
    assert name.canonical_key.startswith("cn=#0c")
    assert name.canonical_key.endswith(",o=acme")
    assert name.equals(DistinguishedName.from_der(name.der))
    assert not name.equals(DistinguishedName.from_text(f"CN={run}X,O=Acme"))
    with pytest.raises(BadRequest, match="too long"):
        DistinguishedName.from_text("CN=" + "x" * 16384)
    with pytest.raises(BadRequest, match="too long"):
        DistinguishedName.from_der(b"\x30\x82\x40\x00" + bytes(16384))
