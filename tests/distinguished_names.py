"""The examples of provisioning 7.5 and 7.6, and DER built by hand: libraries sort, refuse and hide what counts here."""

import base64
from collections.abc import Sequence

__all__ = [
    "CA_SPKI",
    "ECDSA_SHA256",
    "EQUALITY",
    "FROM_DER",
    "FROM_TEXT",
    "OIDS",
    "REFUSED",
    "TAGS",
    "attribute",
    "certificate_of",
    "name",
    "sequence",
    "tlv",
]


TAGS = {
    "utf8": 0x0C,
    "prt": 0x13,
    "t61": 0x14,
    "ia5": 0x16,
    "general": 0x1B,
    "bmp": 0x1E,
    "numeric": 0x12,
    "visible": 0x1A,
    "universal": 0x1C,
    "octets": 0x04,
    "boolean": 0x01,
}
OIDS = {
    "CN": "550403",
    "C": "550406",
    "L": "550407",
    "ST": "550408",
    "O": "55040a",
    "OU": "55040b",
    "STREET": "550409",
    "DC": "0992268993f22c640119",
    "UID": "0992268993f22c640101",
    "serialNumber": "550405",
    "surname": "550404",
    "title": "55040c",
    "givenName": "55042a",
    "email": "2a864886f70d010901",
    "1.3.6.1.4.1.99999.1": "2b06010401868d1f01",
}


def tlv(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content


def attribute(type_: str, kind: str, value: str | bytes) -> bytes:
    content = value if isinstance(value, bytes) else value.encode()
    return tlv(0x30, tlv(0x06, bytes.fromhex(OIDS[type_])) + tlv(TAGS[kind], content))


def name(*rdns: Sequence[tuple[str, str, str | bytes]]) -> bytes:
    """A Name with RDNs, and attributes in them, in encoding order."""
    return tlv(0x30, b"".join(tlv(0x31, b"".join(attribute(*part) for part in rdn)) for rdn in rdns))


def sequence(*parts: bytes) -> bytes:
    return tlv(0x30, b"".join(parts))


# 7.5, from text: input, output.
FROM_TEXT = [
    ("CN=dev 1, OU=Plant 7, O=Acme", "CN=dev 1,OU=Plant 7,O=Acme"),
    ("cn=dev1;ou=Plant 7;o=Acme", "CN=dev1,OU=Plant 7,O=Acme"),
    ('CN="Smith, John",O=Acme', r"CN=Smith\, John,O=Acme"),
    ("CN=a=b,O=Acme", r"CN=a\=b,O=Acme"),
    ("CN=A#1", r"CN=A\#1"),
    (r"CN=\ lead", r"CN=\ lead"),
    ("CN=trail\\ ", "CN=trail\\ "),
    ("CN=two  spaces", "CN=two  spaces"),
    (
        "emailAddress=ops@acme.example,CN=ca",
        "1.2.840.113549.1.9.1=#16106f70734061636d652e6578616d706c65,CN=ca",
    ),
    ("CN=ca,SERIALNUMBER=0815", "CN=ca,2.5.4.5=#130430383135"),
    ("T=Ing,CN=x", "2.5.4.12=#1303496e67,CN=x"),
    ("1.2.3.4=abc", "1.2.3.4=#1303616263"),
    ("CN=#0c03616263", "CN=abc"),
    ("OU=b+CN=a,O=c", "OU=b+CN=a,O=c"),
    ("S=Bavaria,C=DE", "ST=Bavaria,C=DE"),
    ("CN=x/O=y", r"CN=x/O\=y"),
    (r"CN=\E2\82\AC", "CN=€"),
    (r"STREET=Ring 1\, Haus 2", r"STREET=Ring 1\, Haus 2"),
    ("CN=", "CN="),
]


# 7.5, from DER: row, encoded name, output.
FROM_DER = [
    ("C·O·CN", name([("C", "prt", "DE")], [("O", "utf8", "Acme")], [("CN", "utf8", "dev")]), "CN=dev,O=Acme,C=DE"),
    ("DC·DC", name([("DC", "ia5", "org")], [("DC", "ia5", "acme")]), "DC=acme,DC=org"),
    ("outer spaces", name([("CN", "utf8", "  a   b  ")]), r"CN=\ \ a   b\ " + "\\ "),
    ("one space", name([("CN", "utf8", " ")]), "CN=\\ "),
    ("specials", name([("CN", "utf8", r'a,b+c"d\e<f>g;h=i')]), r"CN=a\,b\+c\"d\\e\<f\>g\;h\=i"),
    ("NUL", name([("CN", "utf8", "a\0b")]), r"CN=a\00b"),
    ("no specials", name([("CN", "utf8", "a/b'c(d)*e")]), "CN=a/b'c(d)*e"),
    (
        "e-mail utf8",
        name([("email", "utf8", "a@b.example")]),
        "1.2.840.113549.1.9.1=#0c0b6140622e6578616d706c65",
    ),
    (
        "e-mail ia5",
        name([("email", "ia5", "a@b.example")]),
        "1.2.840.113549.1.9.1=#160b6140622e6578616d706c65",
    ),
    ("CN numeric", name([("CN", "numeric", "123")]), "CN=#1203313233"),
    ("SET OU CN", name([("OU", "utf8", "b"), ("CN", "utf8", "a")]), "OU=b+CN=a"),
    ("SET CN serialNumber", name([("CN", "utf8", "a"), ("serialNumber", "prt", "1")]), "CN=a+2.5.4.5=#130131"),
    ("own OID", name([("1.3.6.1.4.1.99999.1", "utf8", "t")]), "1.3.6.1.4.1.99999.1=#0c0174"),
    (
        "title surname givenName",
        name([("title", "utf8", "Ing")], [("surname", "utf8", "S")], [("givenName", "utf8", "G")]),
        "2.5.4.42=#0c0147,2.5.4.4=#0c0153,2.5.4.12=#0c03496e67",
    ),
]

# 7.6: two names, as text or encoded, and whether they are equal.
EQUALITY: list[tuple[str | bytes, str | bytes, bool]] = [
    ("CN=dev,O=Acme", "cn=DEV , o=acme", True),
    (name([("CN", "prt", "dev")]), name([("CN", "utf8", "DEV  ")]), True),
    ("CN=a+OU=b,O=c", "OU=b+CN=a,O=c", True),
    ("CN=a,O=b", "O=b,CN=a", False),
    (name([("DC", "ia5", "org")]), name([("DC", "ia5", "ORG")]), False),
    (name([("DC", "ia5", "org")]), name([("DC", "utf8", "org")]), True),
    ("EMAILADDRESS=A@b.c", "EMAILADDRESS=a@b.c", False),
    (name([("CN", "t61", "dev")]), name([("CN", "utf8", "dev")]), True),
]

# 7.4, second paragraph: what is refused.
REFUSED = [
    *("E=x", "SN=x", "TITLE=x", "PSEUDONYM=x", "USERID=x", "ſ=x", "=x", "C N=x"),
    *("CN=x,,O=y", "CN=x,", "CN=x;", ",CN=x", "CN=x+", "CN=x+,O=y", "CN=x+O"),
    *("nonsense", "CN", " ", "CN=x,O", "/O=x/CN=y"),
    *("CN=#", "CN=#0", "CN=#0c0", "CN=#xy", "CN=#0c", "CN=#0c0361", "CN=#0c016162", "CN=#0c01616", "CN=#0c0161x"),
    *("CN=#1f0161", "CN=#0c80", "CN=#0c810161", "CN=#0c8500000000016100"),
    *("CN=x\\", "CN=x\\z", "CN=x\\4", "CN=x\\4g", 'CN="x\\'),
    *('CN=a"b', "CN=a<b", "CN=a>b", "CN=a+b", "CN=a,b", 'CN="a"b', 'CN="a', 'CN="a\\"', "CN=<"),
    *("3.1=x", "1.40=x", "0.40.1=x", "1=x", "1.=x", "1..2=x", ".1=x", "OID.CN=x", "1.-2=x", "1.٣=x"),
    *("CN=\ud800", "2.5.4.5=\udc00", "1" + ".9" * 40 + "=x", "1.2." + "9" * 65 + "=x"),
    "1.2" + ("." + "9" * 64) * 30 + "=x",
]

# A key to put into certificates that nobody verifies (management 12.1).
CA_SPKI = base64.b64decode(
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEeqP/YOvBk2Wl8VO9yMpIGIqRLSqTe6uYdEhwYundVsznOBK6x0rZcfPd1XT8ouVejj/p8CEIgkz7"
    "kzCSwYrW4w=="
)
ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")


def certificate_of(
    *,
    version: bytes = b"\xa0\3\2\1\2",
    serial: bytes = b"\2\1\1",
    inner: bytes = ECDSA_SHA256,
    outer: bytes = ECDSA_SHA256,
    issuer: bytes = name([("CN", "utf8", "ca")]),
    validity: bytes = sequence(tlv(0x17, b"240101000000Z"), tlv(0x17, b"440101000000Z")),
    subject: bytes = name([("CN", "utf8", "dev")]),
    public_key: bytes = CA_SPKI,
    rest: bytes = b"",
    signature: bytes = tlv(3, b"\0" * 99),
    trailer: bytes = b"",
) -> bytes:
    signed = sequence(version, serial, inner, issuer, validity, subject, public_key, rest)
    return sequence(signed, outer, signature, trailer)
