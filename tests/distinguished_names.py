"""The examples of provisioning 7.5 and 7.6, and DER built by hand: libraries sort, refuse and hide what counts here."""

from collections.abc import Sequence

__all__ = ["EQUALITY", "FROM_DER", "FROM_TEXT", "OIDS", "TAGS", "attribute", "name", "sequence", "tlv"]

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
