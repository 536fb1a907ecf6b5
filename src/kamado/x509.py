"""Distinguished names, device certificates, trust anchors and ID templates: all that is X.509.

Adapters build the text of a name with Java's RFC 2253 formatting and compare it as a string, so this module writes
names exactly as Java does. A library's name object cannot serve for that: it hides the string types, the order inside
an RDN and the exact bytes, which all show in the text. So names, and the frame of a certificate around them, are read
here by a small strict DER reader, which also takes what adapters take and libraries refuse (an unsorted SET, an odd
serial number). Keys and signatures are left to `cryptography`.

Nothing here knows of tenants, storage or the wire. Whatever bytes or text come in, the outcome is a value or
`BadRequest`.
"""

import binascii
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from threading import Lock
from typing import Final, NamedTuple, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import load_der_public_key

from kamado.errors import BadRequest, NotFound, Reason

__all__ = [
    "KEY_ALGORITHMS",
    "Certificate",
    "DistinguishedName",
    "IdTemplate",
    "TrustAnchor",
    "VerifiedCertificate",
    "check_public_key",
    "parse_certificate",
    "verify",
]


# --- DER ---

_SEQUENCE, _SET, _OID, _INTEGER, _BIT_STRING = 0x30, 0x31, 0x06, 0x02, 0x03
_UTF8, _PRINTABLE, _T61, _IA5, _GENERAL, _BMP = 0x0C, 0x13, 0x14, 0x16, 0x1B, 0x1E
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18


class _Element(NamedTuple):
    """One TLV and where it lies."""

    tag: int
    data: bytes
    start: int
    content_start: int
    end: int

    @property
    def content(self) -> bytes:
        return self.data[self.content_start : self.end]

    @property
    def encoded(self) -> bytes:
        return self.data[self.start : self.end]


def _element(data: bytes, start: int, end: int) -> _Element:
    """Read the element at `start`; definite, minimal lengths and tags of one byte only."""
    if end - start < 2:
        raise BadRequest("not DER: truncated")
    tag, length, position = data[start], data[start + 1], start + 2
    if tag & 0x1F == 0x1F:
        raise BadRequest("not DER: a tag number above 30 occurs in no name or certificate")
    if length >= 0x80:
        size = length & 0x7F
        # Four bytes of length are more than any limit on a request lets in.
        if not 1 <= size <= 4 or end - position < size:
            raise BadRequest("not DER: bad length")
        length = int.from_bytes(data[position : position + size], "big")
        position += size
        if length < 0x80 or length >> 8 * (size - 1) == 0:
            raise BadRequest("not DER: length not minimal")
    if length > end - position:
        raise BadRequest("not DER: truncated")
    return _Element(tag, data, start, position, position + length)


def _children(parent: _Element) -> Iterator[_Element]:
    position = parent.content_start
    while position < parent.end:
        child = _element(parent.data, position, parent.end)
        yield child
        position = child.end


def _whole(data: bytes, tag: int) -> _Element:
    """Read data that must be exactly one element of a tag."""
    element = _element(data, 0, len(data))
    if element.tag != tag or element.end != len(data):
        raise BadRequest("not DER: another structure than expected")
    return element


def _next(children: Iterator[_Element], *tags: int) -> _Element:
    element = next(children, None)
    if element is None or (tags and element.tag not in tags):
        raise BadRequest("not DER: another structure than expected")
    return element


def _encode(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content


# No registered identifier comes near this; without a bound, the arithmetic on one huge arc would be quadratic.
_MAX_OID_SIZE = 256


def _oid_text(content: bytes) -> str:
    known = _KNOWN_OIDS.get(content)
    if known is not None:
        return known
    if not content or len(content) > _MAX_OID_SIZE or content[-1] & 0x80:
        raise BadRequest("not DER: bad object identifier")
    arcs: list[int] = []
    arc, fresh = 0, True
    for octet in content:
        if fresh and octet == 0x80:
            raise BadRequest("not DER: bad object identifier")
        arc = arc << 7 | octet & 0x7F
        fresh = octet < 0x80
        if fresh:
            arcs.append(arc)
            arc = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


def _oid_content(dotted: str) -> bytes:
    first, second, *others = map(int, dotted.split("."))
    encoded = bytearray()
    for arc in (40 * first + second, *others):
        octets = [arc & 0x7F]
        while arc := arc >> 7:
            octets.append(0x80 | arc & 0x7F)
        encoded.extend(reversed(octets))
    return bytes(encoded)


# --- Distinguished names ---

# Provisioning 7.2: the types that Java's RFC 2253 form writes by keyword. All others appear as OID and hex.
_KEYWORDS: Final = {
    "2.5.4.3": "CN",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.9": "STREET",
    "0.9.2342.19200300.100.1.25": "DC",
    "0.9.2342.19200300.100.1.1": "UID",
}
_DC: Final = "0.9.2342.19200300.100.1.25"
_EMAIL: Final = "1.2.840.113549.1.9.1"
# Provisioning 7.4: what may be written in a text, beyond the above.
_INPUT_KEYWORDS: Final = {
    **{keyword: oid for oid, keyword in _KEYWORDS.items()},
    "S": "2.5.4.8",
    "T": "2.5.4.12",
    "SERIALNUMBER": "2.5.4.5",
    "SURNAME": "2.5.4.4",
    "GIVENNAME": "2.5.4.42",
    "INITIALS": "2.5.4.43",
    "GENERATION": "2.5.4.44",
    "DNQ": "2.5.4.46",
    "DNQUALIFIER": "2.5.4.46",
    "EMAILADDRESS": _EMAIL,
    "IP": "1.3.6.1.4.1.42.2.11.2.1",
}
_KNOWN_OIDS: Final = {_oid_content(dotted): dotted for dotted in {*_KEYWORDS, *_INPUT_KEYWORDS.values()}}
_OID_TEXT: Final = re.compile(r"(?:OID\.)?([0-2](?:\.[0-9]{1,64}){1,32})", re.ASCII | re.IGNORECASE)
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+")
_PRINTABLE_TEXT: Final = re.compile(r"[A-Za-z0-9 '()+,\-./:=?]*")

_TEXT_TYPES: Final = frozenset((_UTF8, _PRINTABLE, _T61, _IA5, _GENERAL, _BMP))
_FOLDED_TYPES: Final = frozenset((_UTF8, _PRINTABLE))

_SPECIAL: Final = ',=+<>#;"\\'
_NEEDS_ESCAPE: Final = re.compile(r'[,=+<>#;"\\\0]|^[ \r]|[ \r]\Z')
_ESCAPES: Final = {ord(character): "\\" + character for character in _SPECIAL} | {0: "\\00"}
_UP_TO_SPACE: Final = "".join(map(chr, range(0x21)))


def _escape(value: str) -> str:
    """Escape the text of a value (provisioning 7.3)."""
    if not _NEEDS_ESCAPE.search(value):
        return value
    # Java treats a carriage return at either end like a space; the chapter does not mention it, the adapters do it.
    inner = value.strip(" \r")
    if not inner:
        return "".join("\\" + character for character in value)
    start = value.index(inner)
    leading, trailing = value[:start], value[start + len(inner) :]
    return "".join(
        (
            *("\\" + character for character in leading),
            inner.translate(_ESCAPES),
            *("\\" + character for character in trailing),
        )
    )


_MAX_NAME_SIZE: Final = 16384
"""Bytes of an encoded name, characters of a written one; real names have some hundred."""
_MAX_NORMALIZED_LENGTH: Final = 256
"""Characters of a value; longer ones that are not ASCII are compared as they are. Normalising takes time by the square
of a run of combining characters, so that a long name, which any device may present, would stop everybody else."""


class _Attribute(NamedTuple):
    """Type and value of one attribute."""

    oid: str
    tag: int
    value: bytes
    """The complete encoding of the value."""
    plain: str | None
    """The unescaped text, `None` if the value is written in hex form (provisioning 7.3)."""

    @property
    def text(self) -> str:
        if self.plain is None:
            return f"{_KEYWORDS.get(self.oid, self.oid)}=#{self.value.hex()}"
        return f"{_KEYWORDS[self.oid]}={_escape(self.plain)}"

    @property
    def canonical_text(self) -> str:
        """The attribute as it enters the canonical key (provisioning 7.6, rules 3-5)."""
        keyword = _KEYWORDS.get(self.oid, self.oid).lower()
        if self.plain is None or self.tag not in _FOLDED_TYPES:
            return f"{keyword}=#{self.value.hex()}"
        folded = self.plain.upper().lower()
        if not folded.isascii():
            if len(folded) > _MAX_NORMALIZED_LENGTH:
                return f"{keyword}=#{self.value.hex()}"
            folded = unicodedata.normalize("NFKD", folded)
        return f"{keyword}={_escape(' '.join(folded.split()))}"


def _attribute(oid: str, value: _Element) -> _Attribute:
    plain = None
    if oid in _KEYWORDS and value.tag in _TEXT_TYPES:
        # As UTF-8 whatever the type says: so do the adapters (provisioning 7.3).
        plain = _decode_utf8(value.content)
    return _Attribute(oid, value.tag, value.encoded, plain)


_SURROGATE: Final = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]?")


def _decode_utf8(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        # Java replaces an encoded surrogate by one character, Python each of its bytes by one; FF counts once for both.
        return _SURROGATE.sub(b"\xff", content).decode(errors="replace")


_Rdns = tuple[tuple[_Attribute, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class DistinguishedName:
    """An X.500 name. `==` and `hash` go by `text`; whether two names are the same name is asked of `equals`."""

    text: str
    """Java's RFC 2253 form, byte for byte (provisioning 7.1-7.3)."""
    canonical_key: str = field(repr=False)
    """Equal for names that are equal by rules 1-5 of provisioning 7.6."""
    der: bytes = field(repr=False)
    """The encoded Name."""
    _rdns: _Rdns = field(repr=False)
    """In the order of `text`."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a name from its text (provisioning 7.4).

        Raises:
            BadRequest: The text is no distinguished name.
        """
        if len(text) > _MAX_NAME_SIZE:
            raise BadRequest("invalid distinguished name: too long")
        rdns = tuple(_parse_rdns(text))
        der = _encode(
            _SEQUENCE,
            b"".join(
                # DER sorts a SET OF by encoding; the text keeps the order it was written in.
                _encode(_SET, b"".join(sorted(_encode_attribute(attribute) for attribute in rdn)))
                for rdn in reversed(rdns)
            ),
        )
        return cls._make(rdns, der)

    @classmethod
    def from_der(cls, der: bytes) -> Self:
        """Read a name from its DER encoding. A SET that is not sorted is taken as it is.

        Raises:
            BadRequest: The bytes are not exactly one encoded Name.
        """
        if len(der) > _MAX_NAME_SIZE:
            raise BadRequest("not a name: too long")
        rdns: list[tuple[_Attribute, ...]] = []
        for rdn in _children(_whole(der, _SEQUENCE)):
            attributes: list[_Attribute] = []
            for pair in _children(rdn):
                parts = _children(pair)
                oid, value = _next(parts, _OID), _next(parts)
                if pair.tag != _SEQUENCE or next(parts, None) is not None:
                    raise BadRequest("not DER: an attribute of a name has a type and a value")
                attributes.append(_attribute(_oid_text(oid.content), value))
            if rdn.tag != _SET or not attributes:
                raise BadRequest("not DER: a name is a sequence of sets of attributes")
            rdns.append(tuple(attributes))
        rdns.reverse()
        return cls._make(tuple(rdns), der)

    @classmethod
    def _make(cls, rdns: _Rdns, der: bytes) -> Self:
        text = ",".join(["+".join([attribute.text for attribute in rdn]) for rdn in rdns])
        key = ",".join(["+".join(sorted([attribute.canonical_text for attribute in rdn])) for rdn in rdns])
        return cls(text, key, der, rdns)

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, DistinguishedName) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    def equals(self, other: "DistinguishedName") -> bool:
        """Tell whether both are the same name (provisioning 7.6, all six rules).

        Rule 6 makes this relation not transitive: an IA5 `DC=org` is the same as a UTF-8 `DC=org`, which is the same
        as a UTF-8 `DC=ORG`, which the first is not.
        """
        return self.text == other.text or self.canonical_key == other.canonical_key

    def values(self, keyword: str) -> list[str]:
        """Return the unescaped text values of an attribute, in the order of `text`; values in hex form are left out."""
        return [value for value in self._occurrences(keyword) if value is not None]

    @property
    def first_rdn_common_name(self) -> str | None:
        """The CN of the first RDN of `text` (authentication 4.3)."""
        return next((a.plain for a in (self._rdns[0] if self._rdns else ()) if a.oid == "2.5.4.3"), None)

    def _occurrences(self, keyword: str) -> list[str | None]:
        """All values of an attribute, `None` for a value in hex form."""
        oid = _INPUT_KEYWORDS[keyword.upper()]
        return [attribute.plain for rdn in self._rdns for attribute in rdn if attribute.oid == oid]

    def _adapter_value(self, keyword: str) -> str | None:
        """The value a stock adapter inserts: of each RDN it sees only the attribute that sorts first."""
        for rdn in reversed(self._rdns):
            first = min(rdn, key=lambda attribute: _KEYWORDS.get(attribute.oid, attribute.oid))
            if _KEYWORDS.get(first.oid) == keyword:
                return first.plain
        return None


def _encode_attribute(attribute: _Attribute) -> bytes:
    return _encode(_SEQUENCE, _encode(_OID, _oid_content(attribute.oid)) + attribute.value)


class _Text:
    """A cursor over the text of a distinguished name."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def peek(self) -> str:
        """The next character, `""` at the end."""
        return self.text[self.position : self.position + 1]

    def skip_spaces(self) -> None:
        while self.peek() == " ":
            self.position += 1

    def escaped(self) -> str:
        """Read what follows a backslash: one special character, or bytes of UTF-8 in hex."""
        octets = bytearray()
        while _HEX.fullmatch(pair := self.text[self.position : self.position + 2]):
            octets += bytes.fromhex(pair)
            self.position += 2
            if self.peek() != "\\" or not _HEX.fullmatch(self.text[self.position + 1 : self.position + 3]):
                return _decode_utf8(bytes(octets))
            self.position += 1
        character = self.peek()
        # The line ends are not in the chapter: Java writes (see `_escape`) and reads them escaped.
        if not character or character not in _SPECIAL + " \r\n":
            raise BadRequest(
                "invalid distinguished name: a backslash must precede a special character or two hex digits"
            )
        self.position += 1
        return character


def _parse_rdns(text: str) -> Iterator[tuple[_Attribute, ...]]:
    """Read the RDNs of a text in their order (provisioning 7.4)."""
    if not text:
        return
    cursor = _Text(text)
    attributes: list[_Attribute] = []
    while True:
        attributes.append(_parse_attribute(cursor))
        cursor.skip_spaces()
        separator = cursor.peek()
        cursor.position += 1
        if separator == "+":
            continue
        if separator not in {"", ",", ";"}:
            raise BadRequest("invalid distinguished name: text after the end of a value")
        yield tuple(attributes)
        if not separator:
            return
        attributes = []


def _parse_attribute(cursor: _Text) -> _Attribute:
    equals = cursor.text.find("=", cursor.position)
    if equals < 0:
        raise BadRequest("invalid distinguished name: each part must have the form type=value")
    oid = _parse_type(cursor.text[cursor.position : equals].strip(_UP_TO_SPACE))
    cursor.position = equals + 1
    cursor.skip_spaces()
    match cursor.peek():
        case "#":
            return _attribute(oid, _parse_hex(cursor))
        case '"':
            value = _parse_quoted(cursor)
        case _:
            value = _parse_plain(cursor)
    try:
        content = value.encode()
    except UnicodeEncodeError:
        raise BadRequest("invalid distinguished name: not a valid Unicode text") from None
    # IA5 holds ASCII only; where a value has other letters, UTF-8 gives the text that adapters see.
    if oid in {_DC, _EMAIL} and value.isascii():
        tag = _IA5
    else:
        tag = _PRINTABLE if _PRINTABLE_TEXT.fullmatch(value) else _UTF8
    return _attribute(oid, _whole(_encode(tag, content), tag))


def _parse_type(name: str) -> str:
    oid = _INPUT_KEYWORDS.get(name.upper()) if name.isascii() else None
    if oid is not None:
        return oid
    matched = _OID_TEXT.fullmatch(name)
    if matched is None:
        raise BadRequest("invalid distinguished name: unknown attribute type")
    arcs = [int(arc) for arc in matched[1].split(".")]
    if arcs[0] < 2 and arcs[1] >= 40:
        raise BadRequest("invalid distinguished name: no valid object identifier")
    dotted = ".".join(map(str, arcs))
    if len(_oid_content(dotted)) > _MAX_OID_SIZE:
        raise BadRequest("invalid distinguished name: object identifier too long")
    return dotted


def _parse_hex(cursor: _Text) -> _Element:
    matched = _HEX.match(cursor.text, cursor.position + 1)
    if matched is None:
        raise BadRequest("invalid distinguished name: # must be followed by hex digits")
    cursor.position = matched.end()
    encoded = bytes.fromhex(matched[0])
    element = _element(encoded, 0, len(encoded))
    if element.end != len(encoded):
        raise BadRequest("invalid distinguished name: after # must follow one DER encoded value")
    return element


_QUOTED_RUN: Final = re.compile(r'[^"\\]*')
_PLAIN_RUN: Final = re.compile(r'[^,;+"\\<>]*')


def _parse_quoted(cursor: _Text) -> str:
    pieces: list[str] = []
    cursor.position += 1
    while True:
        run = _QUOTED_RUN.match(cursor.text, cursor.position)
        assert run is not None  # it matches the empty text
        pieces.append(run[0])
        cursor.position = run.end() + 1
        match cursor.text[run.end() : run.end() + 1]:
            case "\\":
                pieces.append(cursor.escaped())
            case '"':
                # Java keeps no outer white space, not even in quotes.
                return "".join(pieces).strip(_UP_TO_SPACE)
            case _:
                raise BadRequest("invalid distinguished name: the closing quote is missing")


def _parse_plain(cursor: _Text) -> str:
    pieces: list[str] = []
    while True:
        run = _PLAIN_RUN.match(cursor.text, cursor.position)
        assert run is not None  # it matches the empty text
        cursor.position = run.end()
        if cursor.peek() != "\\":
            if cursor.peek() in {'"', "<", ">"}:
                raise BadRequest('invalid distinguished name: " < > must be escaped in a value')
            # Only spaces that were not escaped end here: an escaped one closes the piece before.
            pieces.append(run[0].rstrip(" "))
            return "".join(pieces)
        pieces.append(run[0])
        cursor.position += 1
        pieces.append(cursor.escaped())


# --- Certificates ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the registry needs to know of an X.509 certificate. Only `parse_certificate` makes one."""

    subject: DistinguishedName
    issuer: DistinguishedName
    not_before: datetime
    not_after: datetime
    public_key: bytes = field(repr=False)
    """DER SubjectPublicKeyInfo; a key that can be used if its algorithm has a name."""
    algorithm: str
    """Key algorithm as Java names it (RSA, EC, DSA, EdDSA ...); a dotted OID where there is no name."""
    der: bytes = field(repr=False)
    _signed: bytes = field(repr=False)
    _signature_algorithm: bytes = field(repr=False)
    """The encoded AlgorithmIdentifier; empty if the certificate names two different ones."""
    _signature: bytes = field(repr=False)


# The first and the last line of PEM, RFC 7468 and its two older names.
_PEM_LABELS: Final = (b"CERTIFICATE", b"X509 CERTIFICATE", b"TRUSTED CERTIFICATE")
_TIME: Final = {
    _UTC_TIME: re.compile(rb"(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)?()(Z|[+-]\d{4})"),
    _GENERALIZED_TIME: re.compile(rb"(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)?(?:\.(\d+))?(Z|[+-]\d{4})"),
}
# Names of java.security.KeyFactory, by the algorithm of the SubjectPublicKeyInfo.
_KEY_ALGORITHMS: Final = {
    "1.2.840.113549.1.1.1": "RSA",
    "1.2.840.113549.1.1.10": "RSASSA-PSS",
    "1.2.840.10045.2.1": "EC",
    "1.2.840.10040.4.1": "DSA",
    "1.3.101.110": "XDH",
    "1.3.101.111": "XDH",
    "1.3.101.112": "EdDSA",
    "1.3.101.113": "EdDSA",
    "1.2.840.113549.1.3.1": "DH",
}


def parse_certificate(data: bytes) -> Certificate:
    """Read one certificate, DER or PEM; of several in one PEM text the first, as Java does.

    Raises:
        BadRequest: The bytes are no X.509 certificate.
    """
    # A certificate is longer than 127 bytes, so the second byte of DER is none of a text.
    is_der = len(data) > 1 and data[0] == _SEQUENCE and data[1] >= 0x80
    return _read_certificate(data if is_der else _pem_content(data))


def _pem_content(data: bytes) -> bytes:
    for label in _PEM_LABELS:
        start = data.find(b"-----BEGIN " + label + b"-----")
        end = data.find(b"-----END " + label + b"-----", start)
        if 0 <= start < end:
            try:
                return binascii.a2b_base64(b"".join(data[start + len(label) + 16 : end].split()), strict_mode=True)
            except binascii.Error:
                raise BadRequest("not a certificate: broken Base64 in the PEM text") from None
    raise BadRequest("not a certificate: neither DER nor PEM")


def _read_certificate(der: bytes) -> Certificate:
    """Take a certificate apart (RFC 5280, 4.1)."""
    parts = _children(_whole(der, _SEQUENCE))
    signed, outer_algorithm, signature = _next(parts, _SEQUENCE), _next(parts, _SEQUENCE), _next(parts, _BIT_STRING)
    fields = _children(signed)
    first = _next(fields)
    if first.tag == 0xA0:
        # v1 is the default and should be absent; v2 and v3 change nothing that is read here.
        if first.content not in {b"\2\1\0", b"\2\1\1", b"\2\1\2"}:
            raise BadRequest("not a certificate: unknown version")
        first = _next(fields)
    if first.tag != _INTEGER or not first.content:
        raise BadRequest("not a certificate: no serial number")
    inner_algorithm, issuer, validity = _next(fields, _SEQUENCE), _next(fields, _SEQUENCE), _next(fields, _SEQUENCE)
    subject, public_key = _next(fields, _SEQUENCE), _next(fields, _SEQUENCE)
    # Unique identifiers and extensions decide nothing here.
    if next(parts, None) is not None or any(not 0x80 <= other.tag < 0xC0 for other in fields):
        raise BadRequest("not a certificate: more fields than it may have")
    if signature.content[:1] != b"\0":
        raise BadRequest("not a certificate: broken signature")
    times = _children(validity)
    not_before, not_after = _time(_next(times)), _time(_next(times))
    if next(times, None) is not None:
        raise BadRequest("not a certificate: broken validity")
    key_oid = _key_algorithm(public_key)
    if key_oid in _KEY_ALGORITHMS and _load(public_key.encoded) is None:
        raise BadRequest("not a certificate: broken public key")
    return Certificate(
        subject=DistinguishedName.from_der(subject.encoded),
        issuer=_issuer(issuer.encoded),
        not_before=not_before,
        not_after=not_after,
        public_key=public_key.encoded,
        algorithm=_KEY_ALGORITHMS.get(key_oid, key_oid),
        der=der,
        _signed=signed.encoded,
        _signature_algorithm=outer_algorithm.encoded if outer_algorithm.encoded == inner_algorithm.encoded else b"",
        _signature=signature.content[1:],
    )


@lru_cache(maxsize=64)
def _issuer(der: bytes) -> DistinguishedName:
    # The certificates of one fleet name the same few issuers over and over.
    return DistinguishedName.from_der(der)


def _key_algorithm(public_key: _Element) -> str:
    """Return the OID of a SubjectPublicKeyInfo's algorithm."""
    parts = _children(public_key)
    algorithm, _ = _next(parts, _SEQUENCE), _next(parts, _BIT_STRING)
    if next(parts, None) is not None:
        raise BadRequest("not DER: another structure than expected")
    return _oid_text(_next(_children(algorithm), _OID).content)


def _time(element: _Element) -> datetime:
    """Read a UTCTime or GeneralizedTime; the variants that DER forbids and old issuers write are taken too."""
    pattern = _TIME.get(element.tag)
    matched = pattern.fullmatch(element.content) if pattern is not None else None
    if matched is None:
        raise BadRequest("not a certificate: broken time")
    year, month, day, hour, minute, second = (int(group or 0) for group in matched.groups()[:6])
    if element.tag == _UTC_TIME:
        year += 1900 if year >= 50 else 2000  # RFC 5280, 4.1.2.5.1
    microsecond = int((matched[7] or b"")[:6].ljust(6, b"0"))
    zone: bytes = matched[8]
    try:
        instant = datetime(year, month, day, hour, minute, second, microsecond, tzinfo=UTC)
        if zone != b"Z":
            offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[3:]))
            instant += -offset if zone.startswith(b"+") else offset
    except (ValueError, OverflowError):
        raise BadRequest("not a certificate: no such time") from None
    return instant


# --- Keys and signatures ---

# What can sign; name (any case, as in Java) -> the names by `_KEY_ALGORITHMS` whose keys it takes.
_SIGNING_ALGORITHMS: Final = {
    "RSA": "RSA",
    "RSASSA-PSS": "RSASSA-PSS",
    "EC": "EC",
    "DSA": "DSA",
    "EDDSA": "EdDSA",
    "ED25519": "EdDSA",
    "ED448": "EdDSA",
}
KEY_ALGORITHMS: Final = tuple(_SIGNING_ALGORITHMS)
"""What may be said of a key, in any case."""


def check_public_key(der: bytes, algorithm: str, member: str) -> None:
    """Check that the bytes are a public key of that algorithm (management 4.5, 6.6).

    Args:
        der: SubjectPublicKeyInfo.
        algorithm: Name as `java.security.KeyFactory` knows it, in any case: RSA, EC, DSA, EdDSA ...
        member: Name of the member that holds the key, for the error.

    Raises:
        BadRequest: Unknown algorithm, or not a key of it.
    """
    wanted = algorithm.upper()
    if wanted not in _SIGNING_ALGORITHMS:
        raise BadRequest(f"{member}: unknown key algorithm")
    try:
        oid = _key_algorithm(_whole(der, _SEQUENCE))
    except BadRequest as error:
        raise BadRequest(f"{member}: not a public key ({error})") from None
    key = _load_key(der)
    fits = _KEY_ALGORITHMS.get(oid) == _SIGNING_ALGORITHMS[wanted] and (
        wanted not in {"ED25519", "ED448"} or isinstance(key, _EDWARDS[wanted])
    )
    if key is None or not fits:
        raise BadRequest(f"{member}: not a valid public key of algorithm {_SIGNING_ALGORITHMS[wanted]}")


_EDWARDS: Final = {"ED25519": ed25519.Ed25519PublicKey, "ED448": ed448.Ed448PublicKey}
_WARNINGS_LOCK = Lock()


def _load(der: bytes) -> PublicKeyTypes | None:
    """Load a key; `None` if the bytes hold none that can be used."""
    # Weak or old kinds of key are the operator's choice; the filters of warnings belong to the whole process.
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load_der_public_key(der)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            return None


# The keys of trust anchors are asked for again and again; those of devices, in `_read_certificate`, are not.
_load_key = lru_cache(maxsize=256)(_load)


_RSA_PSS: Final = "1.2.840.113549.1.1.10"
_MGF1: Final = "1.2.840.113549.1.1.8"
_HASHES: Final[dict[str, Callable[[], hashes.HashAlgorithm]]] = {
    "1.3.14.3.2.26": hashes.SHA1,
    "2.16.840.1.101.3.4.2.4": hashes.SHA224,
    "2.16.840.1.101.3.4.2.1": hashes.SHA256,
    "2.16.840.1.101.3.4.2.2": hashes.SHA384,
    "2.16.840.1.101.3.4.2.3": hashes.SHA512,
    "2.16.840.1.101.3.4.2.7": hashes.SHA3_224,
    "2.16.840.1.101.3.4.2.8": hashes.SHA3_256,
    "2.16.840.1.101.3.4.2.9": hashes.SHA3_384,
    "2.16.840.1.101.3.4.2.10": hashes.SHA3_512,
}
# MD5 and older are not there: they prove nothing.
_SIGNATURE_HASHES: Final[dict[str, tuple[type[object], Callable[[], hashes.HashAlgorithm]]]] = {
    "1.2.840.113549.1.1.5": (rsa.RSAPublicKey, hashes.SHA1),
    "1.2.840.113549.1.1.14": (rsa.RSAPublicKey, hashes.SHA224),
    "1.2.840.113549.1.1.11": (rsa.RSAPublicKey, hashes.SHA256),
    "1.2.840.113549.1.1.12": (rsa.RSAPublicKey, hashes.SHA384),
    "1.2.840.113549.1.1.13": (rsa.RSAPublicKey, hashes.SHA512),
    "2.16.840.1.101.3.4.3.13": (rsa.RSAPublicKey, hashes.SHA3_224),
    "2.16.840.1.101.3.4.3.14": (rsa.RSAPublicKey, hashes.SHA3_256),
    "2.16.840.1.101.3.4.3.15": (rsa.RSAPublicKey, hashes.SHA3_384),
    "2.16.840.1.101.3.4.3.16": (rsa.RSAPublicKey, hashes.SHA3_512),
    "1.2.840.10045.4.1": (ec.EllipticCurvePublicKey, hashes.SHA1),
    "1.2.840.10045.4.3.1": (ec.EllipticCurvePublicKey, hashes.SHA224),
    "1.2.840.10045.4.3.2": (ec.EllipticCurvePublicKey, hashes.SHA256),
    "1.2.840.10045.4.3.3": (ec.EllipticCurvePublicKey, hashes.SHA384),
    "1.2.840.10045.4.3.4": (ec.EllipticCurvePublicKey, hashes.SHA512),
    "2.16.840.1.101.3.4.3.9": (ec.EllipticCurvePublicKey, hashes.SHA3_224),
    "2.16.840.1.101.3.4.3.10": (ec.EllipticCurvePublicKey, hashes.SHA3_256),
    "2.16.840.1.101.3.4.3.11": (ec.EllipticCurvePublicKey, hashes.SHA3_384),
    "2.16.840.1.101.3.4.3.12": (ec.EllipticCurvePublicKey, hashes.SHA3_512),
    "1.2.840.10040.4.3": (dsa.DSAPublicKey, hashes.SHA1),
    "2.16.840.1.101.3.4.3.1": (dsa.DSAPublicKey, hashes.SHA224),
    "2.16.840.1.101.3.4.3.2": (dsa.DSAPublicKey, hashes.SHA256),
    "1.3.101.112": (ed25519.Ed25519PublicKey, hashes.SHA512),
    "1.3.101.113": (ed448.Ed448PublicKey, hashes.SHA512),
}


def _is_signed_by(certificate: Certificate, public_key: bytes) -> bool:
    """Tell whether a key made the certificate's signature."""
    if not certificate._signature_algorithm:
        return False
    key = _load_key(public_key)
    signed, signature = certificate._signed, certificate._signature
    try:
        parts = _children(_whole(certificate._signature_algorithm, _SEQUENCE))
        oid = _oid_text(_next(parts, _OID).content)
        if oid == _RSA_PSS:
            if not isinstance(key, rsa.RSAPublicKey):
                return False
            scheme, digest = _pss(_next(parts, _SEQUENCE))
            key.verify(signature, signed, scheme, digest)
            return True
        kind, make_digest = _SIGNATURE_HASHES.get(oid, (None, None))
        if kind is None or make_digest is None or not isinstance(key, kind):
            return False
        digest = make_digest()
        match key:
            case rsa.RSAPublicKey():
                key.verify(signature, signed, padding.PKCS1v15(), digest)
            case ec.EllipticCurvePublicKey():
                key.verify(signature, signed, ec.ECDSA(digest))
            case dsa.DSAPublicKey():
                key.verify(signature, signed, digest)
            case _:
                assert isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey)
                key.verify(signature, signed)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, BadRequest):
        # Besides a wrong signature: parameters or sizes that the algorithm cannot have.
        return False
    return True


def _pss(parameters: _Element) -> tuple[padding.PSS, hashes.HashAlgorithm]:
    """Read RSASSA-PSS-params (RFC 4055, 3.1); all but the trailer field have defaults built on SHA-1."""
    digest = mask_digest = _HASHES["1.3.14.3.2.26"]()
    salt_length = 20
    for parameter in _children(parameters):
        parts = _children(parameter)
        match parameter.tag:
            case 0xA0:
                digest = _hash(_next(parts, _SEQUENCE))
            case 0xA1:
                mask = _children(_next(parts, _SEQUENCE))
                if _oid_text(_next(mask, _OID).content) != _MGF1:
                    raise BadRequest("unknown mask generation function")
                mask_digest = _hash(_next(mask, _SEQUENCE))
            case 0xA2:
                salt_length = int.from_bytes(_next(parts, _INTEGER).content, "big", signed=True)
                if not 0 <= salt_length <= 1024:
                    raise BadRequest("no possible salt length")
    return padding.PSS(padding.MGF1(mask_digest), salt_length), digest


def _hash(algorithm: _Element) -> hashes.HashAlgorithm:
    make = _HASHES.get(_oid_text(_next(_children(algorithm), _OID).content))
    if make is None:
        raise BadRequest("unknown hash algorithm")
    return make()


# --- ID templates ---

_PLACEHOLDER: Final = re.compile(r"\{\{subject-(dn|cn|ou|o)\}\}")
_ANY_PLACEHOLDER: Final = re.compile(r"\{\{.*?\}\}", re.DOTALL)
# Java's Matcher.replaceAll: a backslash stands for what follows it, a dollar for a group, of which there is none.
_JAVA_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class IdTemplate:
    """A template for an auth-id or a device id (management 4.6; provisioning 3.3, 3.4)."""

    text: str

    @classmethod
    def parse(cls, text: str, member: str) -> Self:
        """Check a template.

        Raises:
            BadRequest: It has no placeholder, or one that is not known.
        """
        rest, count = _PLACEHOLDER.subn("\0", text)
        if unknown := _ANY_PLACEHOLDER.search(rest):
            raise BadRequest(f"{member}: {unknown[0]} is none of the placeholders subject-dn, -cn, -ou and -o")
        if not count:
            raise BadRequest(f"{member}: needs a placeholder: subject-dn, -cn, -ou or -o in double braces")
        return cls(text)

    def fill(self, subject: DistinguishedName) -> str:
        """Insert the subject's values, literally and in one pass.

        Of an attribute that occurs several times, the value that stands last in the subject's text is taken.

        Raises:
            BadRequest: The subject lacks an attribute, or it is empty or in hex form (reason `TEMPLATE_NOT_FILLED`).
        """

        def value(placeholder: re.Match[str]) -> str:
            occurrences = [subject.text] if placeholder[1] == "dn" else subject._occurrences(placeholder[1])
            if not occurrences or not occurrences[-1]:
                raise BadRequest(
                    f"the subject has no text value for {placeholder[0]}", reason=Reason.TEMPLATE_NOT_FILLED
                )
            return occurrences[-1]

        return _PLACEHOLDER.sub(value, self.text)

    def adapter_fill(self, subject: DistinguishedName) -> str | None:
        """Return what a stock adapter makes of the template, `None` if it fails (provisioning 3.3).

        It loses backslashes and fails at a dollar sign.
        """
        pieces: list[str] = []
        position = 0
        for placeholder in _PLACEHOLDER.finditer(self.text):
            keyword = placeholder[1].upper()
            value = subject.text if keyword == "DN" else subject._adapter_value(keyword)
            if not value:
                return None
            unescaped = _JAVA_ESCAPE.sub("", value)
            if "$" in unescaped or "\\" in unescaped:
                return None
            pieces += (self.text[position : placeholder.start()], _JAVA_ESCAPE.sub(r"\1", value))
            position = placeholder.end()
        pieces.append(self.text[position:])
        return "".join(pieces)


# --- Trust ---


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustAnchor:
    """A CA that a tenant trusts: an entry of `trusted-ca` (management 4.5)."""

    id: str
    subject: DistinguishedName
    subject_dn_bytes: bytes | None = None
    public_key: bytes = field(repr=False)
    """DER SubjectPublicKeyInfo."""
    algorithm: str | None = None
    not_before: datetime
    not_after: datetime
    auto_provisioning_enabled: bool = False
    auto_provision_as_gateway: bool = False
    device_id_template: IdTemplate | None = None
    auth_id_template: IdTemplate | None = None
    ocsp_revocation_enabled: bool = False
    ocsp_responder_uri: str | None = None
    ocsp_responder_cert: str | None = None
    """Base64, as it was given."""
    ocsp_nonce_enabled: bool = False

    def is_valid_at(self, now: datetime) -> bool:
        """Tell whether `now` lies in the CA's validity period, both ends included."""
        return self.not_before <= now <= self.not_after


_PROOF: Final = object()


@dataclass(frozen=True, slots=True)
class VerifiedCertificate:
    """A certificate that a trust anchor of the tenant vouches for. Only `verify` makes one."""

    certificate: Certificate
    anchor: TrustAnchor
    _proof: object = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self._proof is _PROOF, "only verify() proves a certificate"


def verify(
    certificate: Certificate, anchors: Sequence[TrustAnchor], now: datetime, *, check_signature: bool
) -> VerifiedCertificate:
    """Check a device certificate against a tenant's trust anchors (provisioning 3.2, rows 8-10).

    1. An anchor has the name of the certificate's issuer, is valid now and provisions automatically. Several may:
       while a CA changes its key, two entries carry one name.
    2. The certificate is within its own validity period.
    3. The key of one of those anchors made its signature; that anchor vouches. Without `check_signature` the first
       vouches.

    Raises:
        NotFound: One of the three does not hold; the reason says which.
    """
    named = [anchor for anchor in anchors if anchor.subject.equals(certificate.issuer)]
    if not named:
        raise NotFound("no trust anchor", reason=Reason.ISSUER_UNKNOWN)
    valid = [anchor for anchor in named if anchor.is_valid_at(now)]
    if not valid:
        raise NotFound("no trust anchor", reason=Reason.ISSUER_EXPIRED)
    candidates = [anchor for anchor in valid if anchor.auto_provisioning_enabled]
    if not candidates:
        raise NotFound("no trust anchor", reason=Reason.ISSUER_DOES_NOT_PROVISION)
    if now < certificate.not_before:
        raise NotFound("certificate not valid", reason=Reason.CERTIFICATE_NOT_YET_VALID)
    if now > certificate.not_after:
        raise NotFound("certificate not valid", reason=Reason.CERTIFICATE_EXPIRED)
    for anchor in candidates:
        if not check_signature or _is_signed_by(certificate, anchor.public_key):
            return VerifiedCertificate(certificate, anchor, _PROOF)
    raise NotFound("certificate not valid", reason=Reason.SIGNATURE_INVALID)
