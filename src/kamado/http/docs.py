"""The description of the management API as two documents: `/openapi.json` for programs, `/docs` for people.

The page is made here from the description, whole and once, when the API is built: no script, nothing loaded from
anywhere, so that it may have the strictest content security policy on the origin where operators are logged in
(decision 0017). What is written for people in the description may have paragraphs, `code` and **bold**, nothing else.
Understands of JSON Schema what the description uses. Knows no route and no request.
"""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any, Final, cast

from kamado.document import Identifiers, encode
from kamado.http.openapi import describe

__all__ = ["Document", "make_documents"]

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """Something that stays as it is while the registry runs."""

    body: bytes
    content_type: bytes
    headers: tuple[tuple[bytes, bytes], ...]

    @property
    def tag(self) -> str:
        """The entity tag, in its quotes."""
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    def is_known(self, if_none_match: str) -> bool:
        """Whether whoever sent this header has the document already (RFC 9110, 13.1.2)."""
        tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
        return "*" in tags or self.tag in tags


_COMMON_HEADERS: Final = (
    # To be asked for anew each time, since another login may be needed by then; it is answered with 304 mostly.
    (b"cache-control", b"private, no-cache"),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def make_documents(identifiers: Identifiers, max_body_size: int, realm: str) -> dict[str, Document]:
    """Make what is served beside the API itself, by path; see `describe` for the arguments."""
    description = describe(identifiers, max_body_size, realm)
    style = resources.files("kamado.http").joinpath("docs.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src 'sha256-{b64encode(hashlib.sha256(style.encode()).digest()).decode()}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    page_headers = (
        *_COMMON_HEADERS,
        (b"content-security-policy", policy.encode()),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-frame-options", b"DENY"),
    )
    return {
        "/openapi.json": Document(encode(description), b"application/json; charset=utf-8", _COMMON_HEADERS),
        "/docs": Document(_Page(description, style).text.encode(), b"text/html; charset=utf-8", page_headers),
    }


class _Page:
    """The page.

    Args:
        description: An OpenAPI document.
        style: Its style sheet.
    """

    def __init__(self, description: Json, style: str) -> None:
        self._description = description
        self._schemas = cast(Json, description["components"]["schemas"])
        info = description["info"]
        operations = self._operations()
        self.text = "".join(
            (
                '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
                f"<title>{escape(info['title'])}</title><style>{style}</style></head><body>",
                f"<header><h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>",
                f'<p>{escape(info["summary"])} <a href="/openapi.json">OpenAPI {escape(description["openapi"])}'
                "</a></p></header>",
                f"<div class=columns>{self._contents(operations)}<main>",
                f"<section class=intro>{_prose(info['description'])}{self._logins()}</section>",
                *(self._tag(tag, operations) for tag in description["tags"]),
                '<h2 id="schemas">Schemas</h2>',
                *(self._schema_section(name) for name in sorted(self._schemas)),
                "</main></div></body></html>\n",
            )
        )

    def _operations(self) -> dict[str, list[tuple[str, list[str], Json]]]:
        """Find the operations of each tag: path, methods, description; `HEAD` goes with `GET`."""
        operations: dict[str, list[tuple[str, list[str], Json]]] = {}
        for path, item in self._description["paths"].items():
            for method in ("get", "post", "put", "delete"):
                if method in item:
                    operation = item[method]
                    operation = operation | {"parameters": item.get("parameters", []) + operation.get("parameters", [])}
                    methods = ["get", "head"] if method == "get" and "head" in item else [method]
                    operations.setdefault(operation["tags"][0], []).append((path, methods, operation))
        return operations

    def _resolve(self, value: Json) -> Json:
        reference = value.get("$ref")
        if reference is None:
            return value
        _, _, kind, name = reference.split("/")
        return cast(Json, self._description["components"][kind][name])

    # Around the operations

    def _contents(self, operations: dict[str, list[tuple[str, list[str], Json]]]) -> str:
        lines = ['<nav aria-label="Contents">']
        for tag in self._description["tags"]:
            lines.append(f'<h2><a href="#{_anchor(tag["name"])}">{escape(tag["name"])}</a></h2><ul>')
            for _, methods, operation in operations[tag["name"]]:
                text = f"{_badge(methods[0])}<span>{escape(operation['summary'])}</span>"
                lines.append(f'<li><a href="#{operation["operationId"]}">{text}</a></li>')
            lines.append("</ul>")
        lines.append('<h2><a href="#schemas">Schemas</a></h2></nav>')
        return "".join(lines)

    def _logins(self) -> str:
        schemes = self._description["components"]["securitySchemes"].values()
        return "".join(
            f"<p><strong>Login.</strong> HTTP {escape(scheme['scheme'].capitalize())}. "
            f"{_inline(scheme['description'])}</p>"
            for scheme in schemes
        )

    def _tag(self, tag: Json, operations: dict[str, list[tuple[str, list[str], Json]]]) -> str:
        sections = "".join(self._operation(*operation) for operation in operations[tag["name"]])
        return f'<h2 id="{_anchor(tag["name"])}">{escape(tag["name"])}</h2>{_prose(tag["description"])}{sections}'

    # Operations

    def _operation(self, path: str, methods: list[str], operation: Json) -> str:
        badges = " ".join(_badge(method) for method in methods)
        identifier = operation["operationId"]
        return "".join(
            (
                f'<section class=operation id="{identifier}"><h3>{badges} <code>{_breakable(path)}</code> ',
                f'<a class=anchor href="#{identifier}">{escape(operation["summary"])}</a></h3>',
                _prose(operation.get("description", "")),
                self._parameters(operation["parameters"]),
                self._request(operation.get("requestBody")),
                self._responses(operation["responses"]),
                "</section>",
            )
        )

    def _parameters(self, parameters: list[Json]) -> str:
        rows = []
        for parameter in map(self._resolve, parameters):
            name = f"<code>{escape(parameter['name'])}</code> <small>{escape(parameter['in'])}</small>"
            example = "".join(
                self._example(one.get("summary", "Example"), " ".join(one["value"]))
                for one in parameter.get("examples", {}).values()
            )
            rows.append(
                (
                    name + _required(parameter.get("required", False)),
                    self._type(parameter["schema"]),
                    _prose(parameter["description"]) + example,
                )
            )
        return _table("Parameters", rows) if rows else ""

    def _request(self, body: Json | None) -> str:
        if body is None:
            return ""
        lines = []
        for media_type, content in body["content"].items():
            needed = "needed" if body["required"] else "may be left out"
            lines.append(
                f"<p>{self._type(content['schema'])} as <code>{escape(media_type)}</code>; {needed}.</p>"
                + "".join(self._example(one["summary"], one["value"]) for one in content["examples"].values())
            )
        return f"<h4>Request body</h4>{''.join(lines)}"

    def _responses(self, responses: Json) -> str:
        rows = []
        for status, one in responses.items():
            response = self._resolve(one)
            about = _prose(response["description"])
            for name, header in response.get("headers", {}).items():
                about += f"<p><code>{escape(name)}</code>: {_inline(self._resolve(header)['description'])}</p>"
            shape = ""
            for media_type, content in response.get("content", {}).items():
                shape += f"{self._type(content['schema'])}<br><small>{escape(media_type)}</small>"
                if "example" in content:
                    about += self._example("Example", content["example"])
            rows.append((f"<span class=s{status[0]}>{status}</span>", shape or "–", about))
        return _table("Responses", rows)

    def _example(self, summary: str, value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
        return f"<details><summary>{_inline(summary)}</summary><pre><code>{escape(text)}</code></pre></details>"

    # Schemas

    def _schema_section(self, name: str) -> str:
        return (
            f'<section class=schema id="schema-{name}"><h3><a class=anchor href="#schema-{name}">{name}</a></h3>'
            f"{self._schema(self._schemas[name])}</section>"
        )

    def _schema(self, schema: Json) -> str:
        text = _prose(schema.get("description", ""))
        if "properties" not in schema:
            text += f"<p>{self._type(schema)}</p>"
            return text + self._examples(schema)
        rows = [
            (
                f"<code>{escape(name)}</code>{_required(name in schema.get('required', ()))}",
                self._type(member),
                self._member(member),
            )
            for name, member in schema["properties"].items()
        ]
        rest = schema.get("additionalProperties", True)
        if rest is not False:
            rows.append(("<em>any other</em>", self._type(rest), ""))
        return text + _table("", rows)

    def _member(self, member: Any) -> str:
        if not isinstance(member, dict):
            return ""
        text = _prose(member.get("description", ""))
        if "default" in member:
            text += f"<p>Left out: <code>{escape(json.dumps(member['default']))}</code>.</p>"
        if "properties" in member:
            text += self._schema({name: value for name, value in member.items() if name != "description"})
        items = member.get("items")
        if isinstance(items, dict) and "properties" in items:
            text += self._schema(items)
        return text + self._examples(member)

    def _examples(self, schema: Json) -> str:
        examples = schema.get("examples", ())
        return "".join(f"<p>Example: <code>{escape(_plain(example))}</code></p>" for example in examples[:1])

    def _type(self, schema: Any) -> str:
        """Say in a line what values a schema allows."""
        if not isinstance(schema, dict):
            return "any value" if schema else "nothing"
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return f'<a href="#schema-{name}">{name}</a>'
        if "const" in schema:
            return f"<code>{escape(json.dumps(schema['const']))}</code>"
        if "enum" in schema:
            return _alternatives(f"<code>{escape(json.dumps(one))}</code>" for one in schema["enum"])
        if "anyOf" in schema and "properties" not in schema:
            return _alternatives(map(self._type, schema["anyOf"]))
        kind = schema.get("type", "any value")
        kinds = [kind] if isinstance(kind, str) else list(kind)
        if "array" in kinds:
            kinds[kinds.index("array")] = f"list of {self._type(schema.get('items', True))}"
        values = schema.get("additionalProperties")
        if "object" in kinds and isinstance(values, dict) and not schema.get("properties"):
            kinds[kinds.index("object")] = f"object of {self._type(values)}"
        rules = ", ".join(_rules(schema))
        return _alternatives(kinds) + (f" <small>{rules}</small>" if rules else "")


_RULES: Final = {
    "format": "{}",
    "contentEncoding": "{}",
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} long",
    "maxLength": "at most {} long",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "uniqueItems": "each once",
    "minProperties": "not empty",
    "default": "{} if left out",
}


_ANY_CASE: Final = re.compile("\\[([a-z])[A-Z]]")
"""A letter of a pattern that does not look at case."""


def _rules(schema: Json) -> Iterator[str]:
    for name, text in _RULES.items():
        if name in schema:
            yield escape(text.format(schema[name]))
    if "pattern" in schema:
        pattern = _ANY_CASE.sub(r"\1", schema["pattern"])
        yield f"<code>{_breakable(pattern)}</code>" + (" in any case" if pattern != schema["pattern"] else "")


def _alternatives(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


def _table(title: str, rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return f"<h4>{title}</h4>" if title else ""
    lines = "".join(f"<tr><th scope=row>{head}</th><td>{kind}</td><td>{about}</td></tr>" for head, kind, about in rows)
    return (f"<h4>{title}</h4>" if title else "") + f"<table>{lines}</table>"


def _required(is_required: bool) -> str:
    return " <em class=required>required</em>" if is_required else ""


def _badge(method: str) -> str:
    return f'<span class="method {method}">{method.upper()}</span>'


def _anchor(name: str) -> str:
    return f"tag-{name.lower()}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _breakable(text: str) -> str:
    """Let long paths and patterns wrap on a narrow screen."""
    return re.sub(r"([/|])", r"\1<wbr>", escape(text))


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph)
