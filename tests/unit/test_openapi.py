"""The description of the management API is valid, says what the routes are, and its examples are what it says."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any, cast

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from kamado import __version__
from kamado.document import Identifiers
from kamado.http.api import Api, ApiSettings
from kamado.http.docs import make_documents
from kamado.http.openapi import describe
from kamado.management import Management

Json = dict[str, Any]
DESCRIPTION = cast(Json, describe(Identifiers(), 64 * 1024, "Hono"))
METHODS = ("get", "head", "post", "put", "delete")


async def nobody(_: object, source: str) -> Any:
    raise AssertionError


API = Api(cast(Management, None), ApiSettings(), nobody)


def test_description_is_valid_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(DESCRIPTION).validate()
    assert DESCRIPTION["openapi"].startswith("3.1.")
    assert DESCRIPTION["info"]["version"] == __version__
    assert [server["url"] for server in DESCRIPTION["servers"]] == ["/"]


def test_description_and_routes_have_the_same_paths_and_methods() -> None:
    described = {
        path: sorted(method.upper() for method in METHODS if method in item)
        for path, item in DESCRIPTION["paths"].items()
    }
    assert described == {path: sorted(methods) for path, methods in API.routes.items()}


def values(value: object, name: str) -> Iterator[Any]:
    """Find all members of a name, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name:
                yield inner
            yield from values(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from values(inner, name)


def resolve(reference: str) -> Any:
    value: Any = DESCRIPTION
    for token in reference.removeprefix("#/").split("/"):
        value = value[token]
    return value


def test_every_reference_and_every_component_is_used() -> None:
    references = set(values(DESCRIPTION, "$ref"))
    for reference in references:
        assert resolve(reference) is not None
    for kind in ("schemas", "parameters", "headers", "responses"):
        for name in DESCRIPTION["components"][kind]:
            assert f"#/components/{kind}/{name}" in references, f"nothing uses {kind}/{name}"


def test_every_operation_has_a_name_of_its_own_and_a_known_tag() -> None:
    operations = [item[method] for item in DESCRIPTION["paths"].values() for method in METHODS if method in item]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    tags = {tag["name"] for tag in DESCRIPTION["tags"]}
    assert {tag for operation in operations for tag in operation["tags"]} == tags
    for link in (one for links in values(DESCRIPTION, "links") for one in links.values()):
        assert link["operationId"] in names


def validator(schema: Any) -> Draft202012Validator:
    return Draft202012Validator(
        {"components": DESCRIPTION["components"], "allOf": [schema]},
        format_checker=Draft202012Validator.FORMAT_CHECKER,
    )


def contents() -> Iterator[tuple[str, Json]]:
    for path, item in DESCRIPTION["paths"].items():
        for method, operation in item.items():
            if method in METHODS:
                where = f"{method} {path}"
                for content in operation.get("requestBody", {}).get("content", {}).values():
                    yield f"{where} request", content
                for status, one in operation["responses"].items():
                    response = resolve(one["$ref"]) if "$ref" in one else one
                    for content in response.get("content", {}).values():
                        yield f"{where} {status}", content


@pytest.mark.parametrize("content", [pytest.param(content, id=where) for where, content in contents()])
def test_examples_of_bodies_have_the_form_they_are_examples_of(content: Json) -> None:
    examples = [one["value"] for one in content.get("examples", {}).values()]
    if "example" in content:
        examples.append(content["example"])
    for example in examples:
        validator(content["schema"]).validate(example)


def test_examples_of_schemas_and_parameters_have_the_form_they_are_examples_of() -> None:
    seen = 0

    def look(value: object) -> None:
        nonlocal seen
        if isinstance(value, dict):
            if isinstance(value.get("examples"), list):
                for example in value["examples"]:
                    validator(value).validate(example)
                    seen += 1
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(DESCRIPTION["components"])
    for parameter in DESCRIPTION["components"]["parameters"].values():
        for example in parameter.get("examples", {}).values():
            validator(parameter["schema"]).validate(example["value"])
            schema = parameter["schema"]["items"]["contentSchema"]
            for text in example["value"]:
                validator(schema).validate(json.loads(text))
                seen += 1
    assert seen > 10


def test_limits_and_patterns_in_force_are_described() -> None:
    identifiers = replace(Identifiers(), tenant_pattern=re.compile("[a-z]+|X"))
    description = cast(Json, describe(identifiers, 4096, "Plant"))
    OpenAPIV31SpecValidator(description).validate()
    schema = description["components"]["parameters"]["TenantId"]["schema"]
    assert schema["pattern"] == "^(?:[a-z]+|X)$"
    assert schema["maxLength"] == 256
    assert "4096 bytes" in description["info"]["description"]
    assert "Plant" in description["components"]["securitySchemes"]["login"]["description"]


def test_a_password_is_never_described_as_shown() -> None:
    # management-api 6.10
    check = validator({"$ref": "#/components/schemas/StoredCredential"})
    secret: Json = {"id": "x"}
    stored = {"type": "hashed-password", "auth-id": "a", "enabled": True, "secrets": [secret]}
    check.validate(stored)
    for name in ("pwd-plain", "pwd-hash", "hash-function", "salt"):
        assert not check.is_valid(stored | {"secrets": [secret | {name: "x"}]})


# The page


class Page(HTMLParser):
    """What a browser would see of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br", "wbr"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


DOCUMENTS = make_documents(Identifiers(), 64 * 1024, "Hono")
PAGE = Page(DOCUMENTS["/docs"].body.decode())
TEXT = "".join(PAGE.texts)


def test_page_loads_nothing_and_runs_nothing() -> None:
    assert PAGE.open == []
    for tag, attributes in PAGE.tags:
        assert tag not in {"script", "iframe", "img", "object", "embed", "form", "base"}
        assert not any(name.startswith("on") or name in {"style", "src"} for name in attributes)
        if tag == "link":
            assert attributes["href"] == "data:,"
        elif "href" in attributes:
            assert attributes["href"] == "/openapi.json" or str(attributes["href"]).startswith("#")


def test_page_links_to_places_that_it_has() -> None:
    identifiers = [attributes["id"] for _, attributes in PAGE.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    for _, attributes in PAGE.tags:
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in identifiers, target


def test_page_has_no_heading_without_a_text() -> None:
    assert not re.search(r"</h4>(?:<h|</section)", DOCUMENTS["/docs"].body.decode())


def test_page_has_every_operation_schema_member_and_status() -> None:
    identifiers = {attributes["id"] for _, attributes in PAGE.tags if "id" in attributes}
    for path, item in DESCRIPTION["paths"].items():
        assert path in TEXT
        for method in ("get", "post", "put", "delete"):
            if method in item:
                assert item[method]["operationId"] in identifiers
                assert set(item[method]["responses"]) <= set(PAGE.texts)
    for name, schema in DESCRIPTION["components"]["schemas"].items():
        assert f"schema-{name}" in identifiers
        assert set(schema.get("properties", ())) <= set(PAGE.texts)
    for parameter in DESCRIPTION["components"]["parameters"].values():
        assert parameter["name"] in PAGE.texts


def test_patterns_that_do_not_look_at_case_are_readable() -> None:
    assert "^(days|monthly|unknown)$ in any case" in TEXT
    assert "[dD]" not in TEXT


def test_texts_are_escaped() -> None:
    documents = make_documents(Identifiers(), 64 * 1024, '<script>alert("x")</script>')
    assert b"<script" not in documents["/docs"].body
    assert b"&lt;script" in documents["/docs"].body
