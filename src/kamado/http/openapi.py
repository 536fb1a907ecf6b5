"""The description of the management API in the form of OpenAPI 3.1, as `/openapi.json` serves it.

One dictionary, written by hand and put together once: what is said here is said nowhere else in code, so
`tests/integration/test_openapi.py` throws data made from it at the running registry, and `tests/unit/test_openapi.py`
compares its paths with the routes. Limits and patterns come from where they are enforced.

Requests are described as they are accepted (management 3.6: texts for booleans, `null` for left out ...), answers as
they are sent. What a schema cannot say stands in the texts.
"""

from collections.abc import Iterable
from typing import Any, Final

from kamado import __version__
from kamado.credentials import MAX_DN_LENGTH, MAX_PASSWORD_SIZE
from kamado.document import INT32_MAX, INT64_MAX, MAX_IDENTIFIER_LENGTH, Identifiers, JsonObject
from kamado.search import DEFAULT_PAGE_SIZE, MAX_FILTERS, MAX_PAGE_OFFSET, MAX_PAGE_SIZE, MAX_POINTER_LENGTH, MAX_SORTS
from kamado.x509 import KEY_ALGORITHMS

__all__ = ["describe"]

Json = dict[str, Any]

_JSON: Final = "application/json"


def describe(identifiers: Identifiers, max_body_size: int, realm: str) -> JsonObject:
    """Describe the API.

    Args:
        identifiers: The rules for ids that are in force.
        max_body_size: Bytes.
        realm: Of the login.

    Returns:
        The OpenAPI document, ready to be encoded.
    """
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Kamado management API",
            "version": __version__,
            "summary": "Tenants, devices and credentials of a device registry for Eclipse Hono.",
            "description": _INTRODUCTION.format(max_body_size=max_body_size),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The registry that serves this description."}],
        "security": [{}, {"login": []}],
        "tags": [
            {
                "name": "Tenants",
                "description": "A tenant is a group of devices with limits and trusted CAs of its own.",
            },
            {"name": "Devices", "description": "What may send, through which gateways, with which defaults."},
            {
                "name": "Credentials",
                "description": "What a device proves its identity with. Every device has one list of credentials, "
                "made empty together with the device, and read and written as a whole.",
            },
            {"name": "Description", "description": "This description itself."},
        ],
        "paths": _paths(),
        "components": {
            "schemas": _schemas(identifiers),
            "parameters": _parameters(identifiers),
            "headers": _HEADERS,
            "responses": _error_responses(max_body_size),
            "securitySchemes": {
                "login": {
                    "type": "http",
                    "scheme": "basic",
                    "description": f"An account that `kamado operator add` has made; the realm is `{realm}`. Nobody "
                    "has to log in while there is no account and only this machine can reach the registry.",
                }
            },
        },
    }


_INTRODUCTION: Final = """\
Manages tenants, their devices and the credentials of these. The paths, members and statuses are those of Eclipse \
Hono, versions 1.2 and 2.7.

**Requests.** Bodies are JSON in UTF-8, sent as `application/json`, of {max_body_size} bytes at most. A member that \
is not described is refused. An explicit `null` counts as left out. One slash at the end of a path is ignored, except \
where a device would be created under a random id, or all devices be deleted.

**Versions.** Tenant, device and list of credentials each have a version, which is new after every change and comes in \
`ETag`, without quotes. `If-Match` lets a change happen only to the version that was read.

**Errors.** Every error has a JSON object with a text in `error` that names the member or parameter and the rule. A \
request that fails has changed nothing. With status 503 it may be sent again after `Retry-After` seconds; if it was a \
change that timed out, look first whether it has been made."""


# --- Parts ---


def _ref(kind: str, name: str, **more: Any) -> Json:
    return {"$ref": f"#/components/{kind}/{name}", **more}


def _schema(name: str, description: str | None = None, **more: Any) -> Json:
    return _ref("schemas", name, **({"description": description} if description else {}), **more)


def _object(
    properties: Json, required: Iterable[str] = (), description: str | None = None, *, rest: Any = False, **more: Any
) -> Json:
    schema: Json = {"type": "object"}
    if description:
        schema["description"] = description
    schema["properties"] = properties
    if names := list(required):
        schema["required"] = names
    return schema | {"additionalProperties": rest} | more


def _array(items: Json, description: str, **more: Any) -> Json:
    return {"type": "array", "description": description, "items": items, **more}


def _text(description: str, **more: Any) -> Json:
    return {"type": "string", "description": description, **more}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _any_case(*constants: str, **more: Any) -> Json:
    """Describe constants that are recognised in any case."""
    letters = ("".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in constant) for constant in constants)
    return {"type": "string", "pattern": f"^({'|'.join(letters)})$", **more}


def _whole(pattern: str) -> str:
    return f"^{pattern}$" if "|" not in pattern else f"^(?:{pattern})$"


# --- Examples ---

# It was made for the specification; nothing else uses it.
_CERTIFICATE: Final = (
    "MIIBYzCCAQmgAwIBAgIBBzAKBggqhkjOPQQDAjA7MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzERMA8GA1UEAwwIcGxh"
    "bnQtY2EwHhcNMjQwMTAxMDAwMDAwWhcNNDQwMTAxMDAwMDAwWjA7MRUwEwYDVQQKDAxFeGFtcGxlIEdtYkgxDzANBgNVBAsMBkxpbmUgNzERMA8G"
    "A1UEAwwIcGxhbnQtY2EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAR6o/9g68GTZaXxU73IykgYipEtKpN7q5h0SHBi6d1WzOc4ErrHStlx893V"
    "dPyi5V6OP+nwIQiCTPuTMJLBitbjMAoGCCqGSM49BAMCA0gAMEUCIGDjczYmqu/5jmZta50rCn3l2zKMh4YnFk71KzIRJi2bAiEA8l46uGG/bnUv"
    "f5PIzFj7CWGCTXzaXS2HngaA3kaTbLU="
)
_VERSION: Final = "6c1f8e2e-0f39-4e5e-8a1b-5b7c3f5d0a11"
_CREATED: Final = "2031-05-02T08:00:00Z"

_TENANT_EXAMPLES: Final[Json] = {
    "limited": {
        "summary": "For one type of adapter, at most 500 devices",
        "value": {
            "adapters": [{"type": "hono-mqtt", "enabled": True}],
            "registration-limits": {"max-devices": 500},
            "ext": {"customer": "Example Metering"},
        },
    },
    "provisioning": {
        "summary": "Devices with a certificate of this CA register themselves",
        "value": {
            "trust-anchor-group": "example-factories",
            "trusted-ca": [
                {
                    "cert": _CERTIFICATE,
                    "auto-provisioning-enabled": True,
                    "auto-provisioning-device-id-template": "press-{{subject-cn}}",
                }
            ],
        },
    },
}
_STORED_TENANT_EXAMPLE: Final[Json] = {
    "enabled": True,
    "adapters": [{"type": "hono-mqtt", "enabled": True, "device-authentication-required": True}],
    "registration-limits": {"max-devices": 500, "max-credentials-per-device": -1},
    "ext": {"customer": "Example Metering"},
}
_DEVICE_EXAMPLES: Final[Json] = {
    "sensor": {
        "summary": "Behind a gateway, with a default that adapters apply",
        "value": {"via": ["gateway-1"], "defaults": {"content-type": "application/cbor"}, "ext": {"serial": "A-17"}},
    },
    "gateway": {
        "summary": "A gateway that may register the devices behind it",
        "value": {"memberOf": ["hall-3"], "authorities": ["auto-provisioning-enabled"]},
    },
}
_STORED_DEVICE_EXAMPLE: Final[Json] = {
    "enabled": True,
    "via": ["gateway-1"],
    "defaults": {"content-type": "application/cbor"},
    "ext": {"serial": "A-17"},
    "status": {"created": _CREATED},
}
_CREDENTIALS_EXAMPLES: Final[Json] = {
    "password": {
        "summary": "A password; only its hash is kept",
        "value": [{"type": "hashed-password", "auth-id": "sensor-1", "secrets": [{"pwd-plain": "a-first-secret"}]}],
    },
    "several": {
        "summary": "A pre-shared key, and a certificate by its subject",
        "value": [
            {"type": "psk", "auth-id": "sensor-1", "secrets": [{"key": "YS1zZWNvbmQtc2VjcmV0"}]},
            {"type": "x509-cert", "auth-id": "CN=sensor-1,O=Example Metering", "secrets": [{}]},
        ],
    },
    "none": {"summary": "Take all credentials away", "value": []},
}
_STORED_CREDENTIALS_EXAMPLE: Final[list[Json]] = [
    {
        "type": "hashed-password",
        "auth-id": "sensor-1",
        "enabled": True,
        "secrets": [{"id": "b7d1c2f4-52a9-4c55-8c0e-6e9d4a1f7b20", "not-after": "2033-03-31T22:00:00Z"}],
    }
]


# --- Headers, parameters, errors ---

_HEADERS: Final[Json] = {
    "ETag": {
        "description": "The version of the resource, without quotes.",
        "required": True,
        "schema": {"type": "string", "format": "uuid", "examples": [_VERSION]},
    },
    "NewETag": {
        "description": "The new version of the resource, without quotes.",
        "required": True,
        "schema": {"type": "string", "format": "uuid", "examples": [_VERSION]},
    },
    "Location": {
        "description": "The path of the new resource.",
        "required": True,
        "schema": {"type": "string", "pattern": "^/v1/(tenants|devices)/", "examples": ["/v1/tenants/metering"]},
    },
    "Retry-After": {
        "description": "Seconds after which it is worth another try.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1, "examples": [2]},
    },
    "WWW-Authenticate": {
        "description": "How to log in.",
        "required": True,
        "schema": {"type": "string", "pattern": "^Basic realm=", "examples": ['Basic realm="Hono"']},
    },
    "Tag": {
        "description": "Changes with the content; `If-None-Match` with it is answered with 304.",
        "required": True,
        "schema": {"type": "string", "pattern": '^"[0-9a-f]+"$'},
    },
}


def _parameters(identifiers: Identifiers) -> Json:
    def path(name: str, what: str, pattern: str, example: str) -> Json:
        return {
            "name": name,
            "in": "path",
            "required": True,
            "description": what,
            "schema": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_IDENTIFIER_LENGTH,
                "pattern": _whole(pattern),
                "examples": [example],
            },
        }

    def query(name: str, description: str, schema: Json, **more: Any) -> Json:
        return {"name": name, "in": "query", "description": description, "schema": schema, **more}

    def repeated(name: str, description: str, schema: str, limit: int, examples: Json) -> Json:
        items = {
            "type": "string",
            "format": f"json-{schema.lower()}",
            "contentMediaType": _JSON,
            "contentSchema": _schema(schema),
        }
        array = {"type": "array", "items": items, "maxItems": limit}
        return query(name, description, array, style="form", explode=True, examples=examples)

    return {
        "TenantId": path("tenant", "Id of the tenant. Case matters.", identifiers.tenant_pattern.pattern, "metering"),
        "DeviceId": path(
            "device",
            "Id of the device within its tenant. Case matters.",
            identifiers.device_pattern.pattern,
            "sensor-1",
        ),
        # A search checks no tenant-id: what cannot be one is just not there (management 3.2).
        "SearchedTenantId": {
            "name": "tenant",
            "in": "path",
            "required": True,
            "description": "Id of the tenant. An id that no tenant can have is answered with 404, too.",
            "schema": {"type": "string", "minLength": 1, "examples": ["metering"]},
        },
        "IfMatch": {
            "name": "If-Match",
            "in": "header",
            "description": "Change the resource only if it has this version: as `ETag` told it, or in quotes, also "
            "with `W/`; a list of versions separated by commas; or `*` for any. Empty counts as left out.",
            "schema": {"type": "string"},
        },
        "PageSize": query(
            "pageSize",
            "How many to return at most. 0 returns the total only. If it is given more than once, the first counts.",
            {"type": "integer", "minimum": 0, "maximum": MAX_PAGE_SIZE, "default": DEFAULT_PAGE_SIZE},
        ),
        "PageOffset": query(
            "pageOffset",
            "How many to skip, or how many pages, if `search.page_offset_unit` is set to that. If it is given more "
            "than once, the first counts.",
            {"type": "integer", "minimum": 0, "maximum": MAX_PAGE_OFFSET, "default": 0},
        ),
        "FilterJson": repeated(
            "filterJson",
            "A condition, as a JSON object. It may be repeated; all of them must hold.",
            "Filter",
            MAX_FILTERS,
            {"serial": {"summary": "By a member of `ext`", "value": ['{"field":"/ext/serial","value":"A-*"}']}},
        ),
        "SortJson": repeated(
            "sortJson",
            "What to sort by, as a JSON object. It may be repeated: first the primary key. Ties, and everything if "
            "this is left out, are in the order of ids.",
            "Sort",
            MAX_SORTS,
            {"newest": {"summary": "By id, backwards", "value": ['{"field":"/id","direction":"desc"}']}},
        ),
        "After": query(
            "after",
            "Only those whose id comes after this one: pages that do not shift when something is created or deleted "
            "meanwhile. Begin with the empty text, go on with the last id of each page. Goes neither with `sortJson` "
            "nor with a `pageOffset`.",
            {"type": "string"},
        ),
        "IsGateway": query(
            "isGateway",
            "`true`, in any case: only gateways, that is devices that are named in `via` of another or are `memberOf` "
            "a group. Any other text: only the others. Empty counts as left out.",
            {"type": "string", "examples": ["true", "false"]},
        ),
    }


def _error_responses(max_body_size: int) -> Json:
    def error(description: str, example: Json, headers: Json | None = None) -> Json:
        content = {_JSON: {"schema": _schema("Error"), "example": example}}
        return {"description": description, **({"headers": headers} if headers else {}), "content": content}

    return {
        "BadRequest": error(
            "The request is malformed or breaks a rule; the text names the member or parameter and the rule.",
            {"error": "adapters[0].type: must be given and not be empty"},
        ),
        "Unauthorized": error(
            "A login is needed, or name or password are wrong.",
            {"error": "a login is required: name and password of an operator's account"},
            {"WWW-Authenticate": _ref("headers", "WWW-Authenticate")},
        ),
        "Forbidden": error(
            "The caller may not do this, a limit is reached, or the page that sent the request is of another origin.",
            {"error": "max-devices: the tenant may not have more than 500"},
        ),
        "NotFound": error("There is no such tenant or device.", {"error": "there is no tenant metering"}),
        "NothingFound": error(
            "Nothing matches, or there is no such tenant. `search.empty_result` can make that a 200.",
            {"error": "nothing matches"},
        ),
        "Conflict": error(
            "Something else has the id, the alias, the subject DN of a trusted CA (which `subject-dn` repeats), or "
            "type and auth-id of a credential.",
            {"error": "tenant metering exists already"},
        ),
        "PreconditionFailed": error(
            "The resource has another version than `If-Match` says; nothing was changed.",
            {"error": "If-Match: the resource has another version"},
        ),
        "TooLarge": error(
            f"The body is longer than {max_body_size} bytes.",
            {"error": f"the body must not be longer than {max_body_size} bytes"},
        ),
        "InternalError": error("Something is wrong inside; the log says what.", {"error": "internal error"}),
        "Unavailable": error(
            "The database or the registry is too busy, or about to stop.",
            {"error": "too many connections; try again later"},
            {"Retry-After": _ref("headers", "Retry-After")},
        ),
    }


_ERRORS: Final = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    412: "PreconditionFailed",
    413: "TooLarge",
    500: "InternalError",
    503: "Unavailable",
}


def _with_errors(responses: Json, *statuses: int, **named: str) -> Json:
    """Add the error responses: those of every operation, those named by status, and those with a text of their own."""
    errors: Json = {
        str(status): _ref("responses", _ERRORS[status]) for status in sorted({400, 401, 403, 500, 503, *statuses})
    }
    errors |= {status.removeprefix("_"): _ref("responses", name) for status, name in named.items()}
    return responses | dict(sorted(errors.items()))


# --- Paths ---


def _paths() -> Json:
    tenant, device = _ref("parameters", "TenantId"), _ref("parameters", "DeviceId")
    page = [_ref("parameters", name) for name in ("PageSize", "PageOffset", "FilterJson", "SortJson", "After")]
    if_match = [_ref("parameters", "IfMatch")]
    return {
        "/v1/tenants": _path(
            get=_search("Tenants", "searchTenants", "Search tenants", "TenantPage", page),
            post=_create(
                "Tenants",
                "createTenantWithGeneratedId",
                "Create a tenant, with an id that the registry makes",
                _body("Tenant", _TENANT_EXAMPLES, required=False),
                404,
            ),
        ),
        "/v1/tenants/{tenant}": _path(
            parameters=[tenant],
            get=_read("Tenants", "getTenant", "Get a tenant", "StoredTenant", _STORED_TENANT_EXAMPLE),
            post=_create(
                "Tenants",
                "createTenant",
                "Create a tenant",
                _body("Tenant", _TENANT_EXAMPLES, required=False),
                404,
            ),
            put=_write(
                "Tenants",
                "updateTenant",
                "Replace a tenant",
                "What is left out goes back to its default, trusted CAs included.",
                _body("Tenant", _TENANT_EXAMPLES),
                409,
            ),
            delete=_delete(
                "Tenants",
                "deleteTenant",
                "Delete a tenant",
                "Its devices are out of reach at once, and gone for good when a tenant of this id is created again.",
                if_match,
            ),
        ),
        "/v1/devices/{tenant}": _path(
            get=_search(
                "Devices",
                "searchDevices",
                "Search the devices of a tenant",
                "DevicePage",
                [_ref("parameters", "SearchedTenantId"), *page, _ref("parameters", "IsGateway")],
            ),
            post=_create(
                "Devices",
                "createDeviceWithGeneratedId",
                "Create a device, with an id that the registry makes",
                _body("Device", _DEVICE_EXAMPLES, required=False),
                parameters=[tenant],
            ),
            delete=_delete(
                "Devices",
                "deleteAllDevices",
                "Delete all devices of a tenant",
                "Their credentials go with them; the tenant stays, and so do devices that are created meanwhile. It is "
                "no error if there are none, or no tenant. If it is interrupted, some are gone; send it again.",
                [tenant],
                is_all=True,
            ),
        ),
        "/v1/devices/{tenant}/{device}": _path(
            parameters=[tenant, device],
            get=_read("Devices", "getDevice", "Get a device", "StoredDevice", _STORED_DEVICE_EXAMPLE),
            post=_create(
                "Devices",
                "createDevice",
                "Create a device",
                _body("Device", _DEVICE_EXAMPLES, required=False),
            ),
            put=_write(
                "Devices",
                "updateDevice",
                "Replace a device",
                "What is left out goes back to its default. `status` and the credentials stay as they are.",
                _body("Device", _DEVICE_EXAMPLES),
            ),
            delete=_delete(
                "Devices",
                "deleteDevice",
                "Delete a device",
                "Its credentials go with it. Other devices may go on naming it in `via`.",
                if_match,
            ),
        ),
        "/v1/credentials/{tenant}/{device}": _path(
            parameters=[tenant, device],
            get=_read(
                "Credentials",
                "getCredentials",
                "Get the credentials of a device",
                "StoredCredentials",
                _STORED_CREDENTIALS_EXAMPLE,
                description="Passwords and their hashes are never shown, pre-shared keys only to a caller with the "
                "right to see them. A device without credentials has an empty list.",
            ),
            put=_write(
                "Credentials",
                "setCredentials",
                "Replace the credentials of a device",
                "What the list leaves out is gone. A secret that is stored already and stays as it is can be sent as "
                "its `id` alone; what else belongs to a secret (`not-after`, `comment` ...) has to be repeated.",
                _body("Credentials", _CREDENTIALS_EXAMPLES),
                409,
            ),
        ),
        "/openapi.json": _path(
            get=_document("getDescription", "This description, in the form of OpenAPI 3.1", _JSON, {"type": "object"})
        ),
        "/docs": _path(get=_document("getPage", "This description, as a page", "text/html", {"type": "string"})),
    }


def _path(parameters: list[Json] | None = None, **operations: Json) -> Json:
    """Put a path together; who answers `GET` answers `HEAD`, too."""
    path: Json = {"parameters": parameters} if parameters else {}
    for method, operation in operations.items():
        path[method] = operation
        if method == "get":
            path["head"] = _head(operation)
    return path


def _head(operation: Json) -> Json:
    responses = {
        status: {
            "description": _bodiless(status),
            **({"headers": response["headers"]} if "headers" in response else {}),
        }
        for status, response in operation["responses"].items()
    }
    identifier = operation["operationId"]
    return {
        **{name: operation[name] for name in ("tags", "parameters") if name in operation},
        "operationId": f"check{identifier[0].upper()}{identifier[1:]}",
        "summary": f"{operation['summary']}: headers only",
        "responses": responses,
    }


def _bodiless(status: str) -> str:
    return "As for GET, without the body." if status == "200" else "As for GET, without the text."


def _operation(tag: str, identifier: str, summary: str, description: str | None, parameters: list[Json] | None) -> Json:
    operation: Json = {"tags": [tag], "operationId": identifier, "summary": summary}
    if description:
        operation["description"] = description
    if parameters:
        operation["parameters"] = parameters
    return operation


def _body(schema: str, examples: Json, *, required: bool = True) -> Json:
    return {"required": required, "content": {_JSON: {"schema": _schema(schema), "examples": examples}}}


def _link(operation: str, **parameters: str) -> Json:
    return {"operationId": operation, "parameters": parameters}


_LINKS: Final[Json] = {
    "Tenants": {
        "GetIt": _link("getTenant", tenant="$response.body#/id"),
        "ReplaceIt": _link(
            "updateTenant", **{"tenant": "$response.body#/id", "header.If-Match": "$response.header.ETag"}
        ),
        "DeleteIt": _link("deleteTenant", tenant="$response.body#/id"),
        "AddDevice": _link("createDeviceWithGeneratedId", tenant="$response.body#/id"),
        "FindItsDevices": _link("searchDevices", tenant="$response.body#/id"),
    },
    "Devices": {
        "GetIt": _link("getDevice", tenant="$request.path.tenant", device="$response.body#/id"),
        "ReplaceIt": _link(
            "updateDevice",
            **{
                "tenant": "$request.path.tenant",
                "device": "$response.body#/id",
                "header.If-Match": "$response.header.ETag",
            },
        ),
        "DeleteIt": _link("deleteDevice", tenant="$request.path.tenant", device="$response.body#/id"),
        "GetItsCredentials": _link("getCredentials", tenant="$request.path.tenant", device="$response.body#/id"),
        "SetItsCredentials": _link("setCredentials", tenant="$request.path.tenant", device="$response.body#/id"),
    },
}


def _create(
    tag: str, identifier: str, summary: str, body: Json, *not_these: int, parameters: list[Json] | None = None
) -> Json:
    operation = _operation(tag, identifier, summary, "Without a body, everything has its default.", parameters)
    example = {"Tenants": "metering", "Devices": "sensor-1"}[tag]
    operation["requestBody"] = body
    operation["responses"] = _with_errors(
        {
            "201": {
                "description": "Created.",
                "headers": {"ETag": _ref("headers", "ETag"), "Location": _ref("headers", "Location")},
                "content": {_JSON: {"schema": _schema("Created"), "example": {"id": example}}},
                "links": _LINKS[tag],
            }
        },
        *({404, 409, 413} - {*not_these}),
    )
    return operation


def _read(
    tag: str, identifier: str, summary: str, schema: str, example: Any, *, description: str | None = None
) -> Json:
    operation = _operation(tag, identifier, summary, description, None)
    operation["responses"] = _with_errors(
        {
            "200": {
                "description": "Here it is.",
                "headers": {"ETag": _ref("headers", "ETag")},
                "content": {_JSON: {"schema": _schema(schema), "example": example}},
            }
        },
        404,
    )
    return operation


def _search(tag: str, identifier: str, summary: str, schema: str, parameters: list[Json]) -> Json:
    item = {"Tenants": ("metering", _STORED_TENANT_EXAMPLE), "Devices": ("sensor-1", _STORED_DEVICE_EXAMPLE)}[tag]
    operation = _operation(
        tag, identifier, summary, "In the order of ids unless `sortJson` says otherwise, page by page.", parameters
    )
    operation["responses"] = _with_errors(
        {
            "200": {
                "description": "What matches. A page behind the end is empty.",
                "content": {
                    _JSON: {
                        "schema": _schema(schema),
                        "example": {"total": 1, "result": [{"id": item[0], **item[1]}]},
                    }
                },
            }
        },
        _404="NothingFound",
    )
    return operation


def _write(tag: str, identifier: str, summary: str, description: str, body: Json, *statuses: int) -> Json:
    operation = _operation(tag, identifier, summary, description, [_ref("parameters", "IfMatch")])
    operation["requestBody"] = body
    names = ("tenant",) if tag == "Tenants" else ("tenant", "device")
    read = {"Tenants": "getTenant", "Devices": "getDevice", "Credentials": "getCredentials"}[tag]
    done = {
        "description": "Done.",
        "headers": {"ETag": _ref("headers", "NewETag")},
        "links": {"GetIt": _link(read, **{name: f"$request.path.{name}" for name in names})},
    }
    operation["responses"] = _with_errors({"204": done}, 404, 412, 413, *statuses)
    return operation


def _delete(
    tag: str, identifier: str, summary: str, description: str, parameters: list[Json], *, is_all: bool = False
) -> Json:
    operation = _operation(tag, identifier, summary, description, parameters)
    operation["responses"] = _with_errors({"204": {"description": "Gone."}}, *(() if is_all else (404, 412)))
    return operation


def _document(identifier: str, summary: str, media_type: str, schema: Json) -> Json:
    operation = _operation("Description", identifier, summary, None, None)
    headers = {"ETag": _ref("headers", "Tag")}
    operation["responses"] = _with_errors(
        {
            "200": {"description": "Here it is.", "headers": headers, "content": {media_type: {"schema": schema}}},
            "304": {"description": "It is still what `If-None-Match` says.", "headers": headers},
        }
    )
    return operation


# --- Schemas ---


def _schemas(identifiers: Identifiers) -> Json:
    return (
        _tenant_schemas()
        | _trust_schemas()
        | _device_schemas()
        | _credential_schemas(identifiers)
        | _search_schemas()
        | _common_schemas()
    )


_BASE64: Final = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}(?:==)?|[A-Za-z0-9+/]{3}=?)?$"
_TRUE_OR_FALSE: Final = ["true", "True", "TRUE", "false", "False", "FALSE"]


def _number(minimum: int, maximum: int, description: str) -> Json:
    """Describe an integer that may also come as a number with a fraction, or as text."""
    digits = len(str(maximum)) - 1
    sign = r"\+?" if minimum == 0 else r"(?:\+?|-(?=0*[01]$))"
    return {
        "description": f"{description} A fraction is cut off; decimal text is taken, too; `null` counts as left out.",
        "anyOf": [
            {"type": "integer", "minimum": minimum, "maximum": maximum},
            {"type": "number", "exclusiveMinimum": minimum - 1, "exclusiveMaximum": maximum + 1},
            {"type": "string", "pattern": f"^{sign}[0-9]{{1,{digits}}}$"},
            {"type": "null"},
        ],
    }


def _common_schemas() -> Json:
    scalar = {"type": ["string", "number", "boolean"]}
    return {
        "Error": _object(
            {
                "error": _text("What is wrong, for people."),
                "subject-dn": _text("Of a trusted CA that another tenant has already."),
            },
            ["error"],
            rest={"type": "string"},
        ),
        "Created": _object({"id": _text("Id of the new resource.", minLength=1)}, ["id"]),
        "Boolean": {
            "description": "The usual spellings as text are taken, too, and whole numbers (0 is false); `null` counts "
            "as left out.",
            "anyOf": [
                {"type": "boolean"},
                {"type": "string", "enum": _TRUE_OR_FALSE},
                {"type": "integer"},
                {"type": "null"},
            ],
        },
        "Text": {
            "type": ["string", "number", "boolean", "null"],
            "description": "A number or boolean is taken as its JSON text; `null` counts as left out.",
        },
        "NonEmptyText": {
            "description": "A number or boolean is taken as its JSON text.",
            "anyOf": [{"type": "string", "minLength": 1}, {"type": ["number", "boolean"]}],
        },
        "NoText": {"enum": ["", None], "description": "Left out, or as good as."},
        "Texts": {
            "description": "One text counts as a list of one; numbers and booleans as their JSON text; `null` as left "
            "out.",
            "anyOf": [{"type": "array", "items": scalar}, scalar, {"type": "null"}],
        },
        "FreeForm": {
            "type": ["object", "null"],
            "description": "Any members, kept as they are. `null` counts as left out.",
        },
        "Ignored": {"description": "Any value; it is not looked at."},
        "Count": _number(0, INT32_MAX, "A whole number from 0."),
        "Limit": _number(-1, INT32_MAX, "A whole number; -1 is no limit."),
        "LongLimit": _number(-1, INT64_MAX, "A whole number; -1 is no limit."),
        "Timestamp": {
            "type": "string",
            "format": "date-time",
            "description": "Date and time with an offset of 18 hours at most. Seconds may be left out; what is beyond "
            "whole seconds is cut off.",
            "examples": ["2031-12-31T23:59:59Z"],
        },
        "OptionalTimestamp": {
            **_or_null(_schema("Timestamp")),
            "description": "As `Timestamp`; `null` counts as left out.",
        },
        "StoredTimestamp": {
            "type": "string",
            "format": "date-time",
            "pattern": "Z$",
            "description": "In UTC, whole seconds.",
            "examples": ["2031-12-31T23:59:59Z"],
        },
        "Binary": {
            "type": "string",
            "contentEncoding": "base64",
            "pattern": _BASE64,
            "description": "Standard Base64; the padding may be left out.",
        },
        "Certificate": {
            "type": "string",
            "contentEncoding": "base64",
            "format": "x509-certificate",
            "description": "An X.509 certificate, DER or PEM, in Base64.",
        },
        "PublicKey": {
            "type": "string",
            "contentEncoding": "base64",
            "format": "public-key",
            "description": "A public key as SubjectPublicKeyInfo in DER, in Base64.",
        },
        "DistinguishedName": {
            "type": "string",
            "format": "distinguished-name",
            "description": "The name of a certificate's subject as text, most specific part first. It is kept in the "
            "spelling of Java (RFC 2253).",
            "examples": ["CN=plant-ca,OU=Line 7,O=Example GmbH"],
        },
        "IdTemplate": {
            "type": "string",
            "format": "id-template",
            "description": "A text with at least one of `{{subject-dn}}`, `{{subject-cn}}`, `{{subject-ou}}` and "
            "`{{subject-o}}`, in whose place the values of the certificate's subject are put.",
            "examples": ["{{subject-cn}}@{{subject-o}}"],
        },
        "StoredFreeForm": {"type": "object", "minProperties": 1, "description": "As it was given."},
    }


def _tenant_schemas() -> Json:
    adapter: Json = {
        "type": _schema("NonEmptyText", "Which adapters: `hono-http`, `hono-mqtt`, `hono-amqp`, `hono-coap` ..."),
        "enabled": _schema("Boolean", "Whether the tenant's devices may use them.", default=False),
        "device-authentication-required": _schema(
            "Boolean", "Whether devices have to prove who they are.", default=True
        ),
        "ext": _schema("FreeForm", "Anything else that the adapters are to know."),
    }
    since = _schema("Timestamp", "When the counting begins.")
    period = _or_null(_schema("Period")) | {"description": "How long is counted together; a month if left out."}
    ttls: Json = {
        "max-ttl": "Seconds that a message may live at most, of any kind.",
        "max-ttl-telemetry-qos0": "As `max-ttl`, for telemetry that is sent at most once.",
        "max-ttl-telemetry-qos1": "As `max-ttl`, for telemetry that is sent at least once.",
        "max-ttl-command-response": "As `max-ttl`, for responses to commands.",
    }
    mode_or_null = _or_null(_schema("SamplingMode"))
    stored_period = _schema("StoredPeriod", "How long is counted together.")
    stored_since = _schema("StoredTimestamp", "When the counting begins.")
    stored = {
        "enabled": {"type": "boolean", "description": "Whether adapters serve its devices."},
        "alias": _text("Another name under which adapters find it."),
        "ext": _schema("StoredFreeForm"),
        "defaults": _schema("StoredFreeForm"),
        "adapters": _array(_schema("StoredAdapter"), "What the adapters listed may do; no others.", minItems=1),
        "minimum-message-size": {"type": "integer", "minimum": 1, "description": "Bytes."},
        "resource-limits": _schema("StoredResourceLimits"),
        "registration-limits": _schema("StoredRegistrationLimits"),
        "tracing": _schema("StoredTracing"),
        "trust-anchor-group": _text("Tenants of one group may trust the same CA."),
        "trusted-ca": _array(_schema("StoredTrustedCa"), "CAs whose certificates its devices may have.", minItems=1),
    }
    return {
        "Tenant": _object(
            {
                "enabled": _schema("Boolean", "Whether adapters serve its devices.", default=True),
                "alias": {
                    "description": "Another name under which adapters find it, such as the host name that its devices "
                    "connect to. No two tenants may have the same.",
                    "anyOf": [
                        {"type": "string", "pattern": "^[a-z0-9-]+$", "maxLength": MAX_IDENTIFIER_LENGTH},
                        {"type": ["integer", "boolean", "null"]},
                    ],
                },
                "ext": _schema("FreeForm", "Anything else; adapters get it, too."),
                "defaults": _schema("FreeForm", "What adapters put into messages of devices that do not say it."),
                "adapters": {
                    "description": "Which types of adapters may be used, each once. Left out, all of them may.",
                    "anyOf": [{"type": "array", "items": _schema("Adapter"), "minItems": 1}, {"type": "null"}],
                },
                "minimum-message-size": _schema(
                    "Count", "Bytes that every message is counted for at least.", default=0
                ),
                "resource-limits": _or_null(_schema("ResourceLimits")),
                "registration-limits": _or_null(_schema("RegistrationLimits")),
                "tracing": _or_null(_schema("Tracing")),
                "trust-anchor-group": _schema("Text", "Tenants of one group may trust the same CA."),
                "trusted-ca": {
                    "description": "CAs whose certificates its devices may have. No two may have the same `id`.",
                    "anyOf": [{"type": "array", "items": _schema("TrustedCa")}, {"type": "null"}],
                },
                "tenant-id": _schema("Ignored", "Not looked at; the path decides."),
            },
            description="A tenant as it is written. Every member may be left out.",
        ),
        "StoredTenant": _object(
            stored, ["enabled"], "A tenant as it is read. Members with nothing in them are left out."
        ),
        "FoundTenant": _object(
            {"id": _text("Id of the tenant."), **stored}, ["id", "enabled"], "A tenant as a search finds it."
        ),
        "Adapter": _object(
            adapter, ["type"], "What a tenant allows to one type of adapter. Further members are kept.", rest=True
        ),
        "StoredAdapter": _object(
            {
                "type": _text("Which adapters.", minLength=1),
                "enabled": {"type": "boolean"},
                "device-authentication-required": {"type": "boolean"},
                "ext": _schema("StoredFreeForm"),
            },
            ["type", "enabled", "device-authentication-required"],
            rest=True,
        ),
        "ResourceLimits": _object(
            {
                "max-connections": _schema("Limit", "Connections of all its devices together.", default=-1),
                **{name: _schema("LongLimit", text, default=-1) for name, text in ttls.items()},
                "data-volume": _or_null(_schema("DataVolume")),
                "connection-duration": _or_null(_schema("ConnectionDuration")),
                "ext": _schema("FreeForm", "Anything else."),
            },
            description="What the tenant's devices may use. The adapters see to it.",
        ),
        "StoredResourceLimits": _object(
            {
                "max-connections": {"type": "integer", "minimum": 0},
                **{name: {"type": "integer", "minimum": 0} for name in ttls},
                "data-volume": _object(
                    {
                        "effective-since": stored_since,
                        "max-bytes": {"type": "integer", "minimum": 0},
                        "period": stored_period,
                    },
                    ["effective-since", "period"],
                ),
                "connection-duration": _object(
                    {
                        "effective-since": stored_since,
                        "max-minutes": {"type": "integer", "minimum": 0},
                        "period": stored_period,
                    },
                    ["effective-since", "period"],
                ),
                "ext": _schema("StoredFreeForm"),
            },
            description="What is not limited is left out.",
        ),
        "DataVolume": _object(
            {
                "effective-since": since,
                "max-bytes": _schema("LongLimit", "Bytes that may be transferred in a period.", default=-1),
                "period": period,
            },
            ["effective-since"],
        ),
        "ConnectionDuration": _object(
            {
                "effective-since": since,
                "max-minutes": _schema("LongLimit", "Minutes that devices may be connected in a period.", default=-1),
                "period": period,
            },
            ["effective-since"],
        ),
        "Period": _object(
            {
                "mode": _any_case(
                    "days",
                    "monthly",
                    "unknown",
                    description="`days`, `monthly` or `unknown`, in any case.",
                    examples=["monthly"],
                ),
                "no-of-days": _schema("Count", "With `days`: how many.", default=0),
            },
            ["mode"],
        ),
        "StoredPeriod": _object(
            {"mode": {"enum": ["days", "monthly", "unknown"]}, "no-of-days": {"type": "integer", "minimum": 1}},
            ["mode"],
        ),
        "RegistrationLimits": _object(
            {
                "max-devices": _schema("Limit", "Devices that the tenant may have.", default=-1),
                "max-credentials-per-device": _schema("Limit", "Credentials that a device may have.", default=-1),
            },
            description="What may be registered. The registry sees to it.",
        ),
        "StoredRegistrationLimits": _object(
            {
                "max-devices": {"type": "integer", "minimum": -1, "description": "-1: any number."},
                "max-credentials-per-device": {"type": "integer", "minimum": -1, "description": "-1: any number."},
            },
            ["max-devices", "max-credentials-per-device"],
        ),
        "Tracing": _object(
            {
                "sampling-mode": mode_or_null | {"description": "Which of the tenant's messages are traced."},
                "sampling-mode-per-auth-id": {
                    "type": ["object", "null"],
                    "description": "As `sampling-mode`, for single devices by their auth-id.",
                    "additionalProperties": _schema("SamplingMode"),
                },
            },
        ),
        "SamplingMode": _any_case(
            "default", "all", "none", description="`default`, `all` or `none`, in any case.", examples=["all"]
        ),
        "StoredTracing": _object(
            {
                "sampling-mode": {"enum": ["default", "all", "none"]},
                "sampling-mode-per-auth-id": {
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": {"enum": ["default", "all", "none"]},
                },
            },
        ),
    }


_NO_CERTIFICATE: Final[Json] = {"type": "null", "description": "Left out: with a certificate this has another form."}


def _trust_schemas() -> Json:
    options: Json = {
        "id": _schema("Text", "Made by the registry unless given, anew with every update."),
        "auto-provisioning-enabled": _schema(
            "Boolean",
            "Whether an unknown device with a certificate of this CA is registered on first contact.",
            default=False,
        ),
        "auto-provision-as-gateway": _schema("Boolean", "Whether such a device becomes a gateway.", default=False),
        "auto-provisioning-device-id-template": _or_null(_schema("IdTemplate"))
        | {"description": "What such a device is called; a random id if left out."},
        "auth-id-template": _or_null(_schema("IdTemplate"))
        | {
            "description": "The auth-id of credentials that are made from a certificate of this CA; its subject if "
            "left out."
        },
        "ocsp-responder-uri": _schema("Text", "Where adapters ask whether a certificate is revoked."),
        "ocsp-responder-cert": _or_null(_schema("Binary"))
        | {"description": "The certificate of who answers there, in Base64."},
        "ocsp-nonce-enabled": _schema("Boolean", "Whether such a question carries a nonce.", default=False),
    }
    revocation = _schema("Boolean", "Whether adapters check for revoked certificates.", default=False)
    described = ("subject-dn", "public-key", "not-before", "not-after")
    return {
        "TrustedCa": {
            "description": "A CA, in one of two forms.",
            "anyOf": [_schema("CertifiedCa"), _schema("DescribedCa")],
        },
        "CertifiedCa": _object(
            {
                "cert": _schema("Certificate", "Everything is taken from it; the certificate itself is not kept."),
                **options,
                "ocsp-revocation-enabled": revocation,
                **{name: _schema("Ignored") for name in (*described, "subject-dn-bytes", "algorithm")},
            },
            ["cert"],
            "A CA by its certificate.",
        ),
        "DescribedCa": _object(
            {
                "subject-dn": _schema("DistinguishedName"),
                "public-key": _schema("PublicKey"),
                "algorithm": {
                    "description": "Of the key: `RSA`, `RSASSA-PSS`, `EC`, `DSA`, `EdDSA`, `Ed25519` or `Ed448`, in "
                    "any case.",
                    "anyOf": [_any_case(*KEY_ALGORITHMS), {"type": "null"}],
                    "default": "RSA",
                },
                "not-before": _schema("Timestamp", "Since when it is valid."),
                "not-after": _schema("Timestamp", "Until when it is valid."),
                "subject-dn-bytes": _or_null(_schema("Binary"))
                | {"description": "The subject in DER, in Base64; must be the same name."},
                **options,
                "ocsp-revocation-enabled": revocation,
                "cert": _NO_CERTIFICATE,
            },
            described,
            "A CA by its members. Revocation checks need the `ocsp-responder-cert`.",
            anyOf=[
                {"properties": {"ocsp-revocation-enabled": {"enum": [False, 0, "false", "False", "FALSE", None]}}},
                {
                    "properties": {"ocsp-responder-cert": {"type": "string", "minLength": 2}},
                    "required": ["ocsp-responder-cert"],
                },
            ],
        ),
        "StoredTrustedCa": _object(
            {
                "id": _text("Id of the entry.", minLength=1),
                "subject-dn": _text("Its name, as Java spells it (RFC 2253)."),
                "subject-dn-bytes": _schema("Binary", "Its name in DER, in Base64."),
                "public-key": _schema("Binary", "Its key as SubjectPublicKeyInfo in DER, in Base64."),
                "algorithm": _text("Of the key; `RSA` if left out."),
                "not-before": _schema("StoredTimestamp", "Since when it is valid."),
                "not-after": _schema("StoredTimestamp", "Until when it is valid."),
                "auto-provisioning-enabled": {"type": "boolean"},
                "auto-provision-as-gateway": {"type": "boolean"},
                "auto-provisioning-device-id-template": _text("As given."),
                "auth-id-template": _text("As given."),
                "ocsp-revocation-enabled": {"const": True},
                "ocsp-responder-uri": _text("As given."),
                "ocsp-responder-cert": _schema("Binary"),
                "ocsp-nonce-enabled": {"const": True},
            },
            ["id", *described, "auto-provisioning-enabled", "auto-provision-as-gateway"],
        ),
    }


def _device_schemas() -> Json:
    empty = {"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]}
    stored = {
        "enabled": {"type": "boolean", "description": "Whether adapters serve it."},
        "ext": _schema("StoredFreeForm"),
        "defaults": _schema("StoredFreeForm"),
        "via": _array({"type": "string"}, "Ids of its gateways.", minItems=1),
        "viaGroups": _array({"type": "string"}, "Groups of its gateways.", minItems=1),
        "memberOf": _array({"type": "string"}, "Groups that this gateway belongs to.", minItems=1),
        "authorities": _array({"type": "string"}, "Each once.", minItems=1, uniqueItems=True),
        "downstream-message-mapper": _text("As given.", minLength=1),
        "upstream-message-mapper": _text("As given.", minLength=1),
        "command-endpoint": _object(
            {
                "uri": _text("As given.", minLength=1),
                "headers": {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}},
                "payload-properties": _schema("StoredFreeForm"),
            },
            ["uri"],
        ),
        "status": _schema("DeviceStatus"),
    }
    return {
        "Device": _object(
            {
                "enabled": _schema("Boolean", "Whether adapters serve it.", default=True),
                "ext": _schema("FreeForm", "Anything else."),
                "defaults": _schema("FreeForm", "What adapters put into its messages; goes before the tenant's."),
                "via": _schema("Texts", "Ids of gateways that may act for it. They need not be registered yet."),
                "viaGroups": _schema("Texts", "Groups of gateways that may act for it."),
                "memberOf": _schema(
                    "Texts", "Groups that this gateway belongs to. Goes neither with `via` nor with `viaGroups`."
                ),
                "authorities": {
                    "description": "Rights of a gateway; `auto-provisioning-enabled` lets it register devices.",
                    "anyOf": [
                        {"type": "array", "items": {"type": ["string", "number", "boolean"]}},
                        {"type": "null"},
                    ],
                },
                "downstream-message-mapper": _schema("Text", "Name of what adapters convert its messages with."),
                "upstream-message-mapper": _schema("Text", "Name of what adapters convert commands with."),
                "command-endpoint": _or_null(_schema("CommandEndpoint")),
                "device-id": _schema("Ignored", "Not looked at; the path decides."),
                "status": _schema("Ignored", "Not looked at, so that what was read can be written back."),
            },
            description="A device as it is written. Every member may be left out.",
            anyOf=[
                {"properties": {"memberOf": empty}},
                {"properties": {"via": empty, "viaGroups": empty}},
            ],
        ),
        "CommandEndpoint": _object(
            {
                "uri": _schema("NonEmptyText", "Where to; `{{deviceId}}` stands for the id of the device."),
                "headers": {
                    "type": ["object", "null"],
                    "description": "Sent with every command.",
                    "additionalProperties": {"type": ["string", "number", "boolean"]},
                },
                "payload-properties": _schema("FreeForm", "Added to the payload of every command."),
            },
            ["uri"],
            "Where an adapter sends commands for the device.",
        ),
        "StoredDevice": _object(
            stored, ["enabled", "status"], "A device as it is read. Members with nothing in them are left out."
        ),
        "FoundDevice": _object(
            {"id": _text("Id of the device."), **stored}, ["id", "enabled", "status"], "A device as a search finds it."
        ),
        "DeviceStatus": _object(
            {
                "created": _schema("StoredTimestamp", "When it was registered."),
                "updated": _schema("StoredTimestamp", "When it was replaced for the last time, if ever."),
                "auto-provisioned": {"const": True, "description": "It has registered itself, or a gateway has."},
                "auto-provisioning-notification-sent": {
                    "const": True,
                    "description": "Applications have been told about it.",
                },
                "last-user": _text("Who used it last, if known."),
            },
            ["created"],
            "What the registry keeps about the device itself.",
        ),
    }


def _credential_schemas(identifiers: Identifiers) -> Json:
    common: Json = {
        "enabled": _schema("Boolean", "Whether devices can authenticate with it.", default=True),
        "comment": _schema("Text", "For people."),
        "ext": _schema("FreeForm", "Anything else; a `client-id` here must be that of the device."),
        "device-id": _schema("Ignored", "Not looked at; the path decides."),
    }
    secret: Json = {
        "id": _schema("Text", "Names a secret that is stored already; a new one gets an id from the registry."),
        "enabled": _schema("Boolean", "Whether it can be used.", default=True),
        "not-before": _schema("OptionalTimestamp", "Since when it can be used."),
        "not-after": _schema("OptionalTimestamp", "Until when it can be used; not before `not-before`."),
        "comment": _schema("Text", "For people."),
    }
    reference: Json = secret | {"id": _schema("NonEmptyText", "Of a secret that is stored already; it stays as it is.")}
    auth_id = {
        "description": "What the device calls itself. No two devices of a tenant may have the same with the same type.",
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": MAX_IDENTIFIER_LENGTH},
            {"type": ["number", "boolean"]},
        ],
    }

    def credential(type_: str, auth_id: Json, secret: str, description: str) -> Json:
        return _object(
            {
                "type": {"const": type_},
                "auth-id": auth_id,
                **common,
                "secrets": _array(_schema(secret), "At least one; each `id` once.", minItems=1),
            },
            ["type", "auth-id", "secrets"],
            description,
        )

    not_text = _schema("NoText")
    stored_secret: Json = {
        "id": _text("To refer to it.", minLength=1),
        "enabled": {"type": "boolean", "description": "If it was given."},
        "not-before": _schema("StoredTimestamp", "If it was given."),
        "not-after": _schema("StoredTimestamp", "If it was given."),
        "comment": _text("If it was given."),
    }
    return {
        "Credentials": {
            "description": "All credentials of a device; one by itself counts as a list of one. No two may have the "
            "same type and auth-id.",
            "anyOf": [{"type": "array", "items": _schema("Credential")}, _schema("Credential")],
        },
        "Credential": {
            "description": "One credential; its `type` says which of these.",
            "anyOf": [
                _schema(name)
                for name in (
                    "PasswordCredential",
                    "PskCredential",
                    "SubjectCredential",
                    "CertificateCredential",
                    "PublicKeyCredential",
                    "CustomCredential",
                )
            ],
        },
        "PasswordCredential": credential(
            "hashed-password",
            {
                "description": "The user name. No two devices of a tenant may have the same with the same type.",
                "anyOf": [
                    {
                        "type": "string",
                        "pattern": _whole(identifiers.auth_id_pattern.pattern),
                        "minLength": 1,
                        "maxLength": MAX_IDENTIFIER_LENGTH,
                    },
                    {"type": ["number", "boolean"]},
                ],
            },
            "PasswordSecret",
            "User name and password.",
        ),
        "PasswordSecret": {
            "description": "A password in one of three forms.",
            "anyOf": [_schema("PlainPassword"), _schema("HashedPassword"), _schema("PasswordReference")],
        },
        "PlainPassword": _object(
            {
                "pwd-plain": {
                    "description": f"The password, of {MAX_PASSWORD_SIZE} bytes in UTF-8 at most. Only a bcrypt hash "
                    "of it is kept.",
                    "anyOf": [
                        {"type": "string", "minLength": 1, "maxLength": MAX_PASSWORD_SIZE},
                        {"type": ["number", "boolean"]},
                    ],
                    "writeOnly": True,
                },
                **secret,
                **{name: _schema("Ignored") for name in ("hash-function", "pwd-hash", "salt")},
            },
            ["pwd-plain"],
            "A password in the clear.",
        ),
        "HashedPassword": _object(
            {
                "hash-function": _schema("NonEmptyText", "`bcrypt`, `sha-512`, `sha-256`, or what else adapters know."),
                "pwd-hash": _schema(
                    "NonEmptyText",
                    "The hash: of bcrypt with prefix `$2a$` and a cost that is not beyond the configured one, of the "
                    "others Base64.",
                ),
                "salt": _schema("Text", "Base64, for the sha functions."),
                "pwd-plain": not_text,
                **secret,
            },
            ["hash-function", "pwd-hash"],
            "A password that is hashed already.",
            anyOf=[
                {
                    "properties": {
                        "hash-function": {"const": "bcrypt"},
                        "pwd-hash": {"type": "string", "pattern": r"^\$2a\$[0-3][0-9]\$[./A-Za-z0-9]{53}$"},
                    }
                },
                {"properties": {"hash-function": {"not": {"const": "bcrypt"}}}},
            ],
        ),
        "PasswordReference": _object(
            {
                **reference,
                "salt": _schema("Text", "Not looked at."),
                **dict.fromkeys(("pwd-plain", "hash-function", "pwd-hash"), not_text),
            },
            ["id"],
            "A stored password that stays.",
        ),
        "PskCredential": credential("psk", auth_id, "PskSecret", "A pre-shared key; the auth-id is the PSK identity."),
        "PskSecret": {
            "description": "A key, or a stored one that stays.",
            "anyOf": [
                _object({"key": _schema("Binary", "At least one byte.", minLength=2), **secret}, ["key"], "A key."),
                _object({**reference, "key": not_text}, ["id"], "A stored key that stays."),
            ],
        },
        "SubjectCredential": _object(
            {
                "type": {"const": "x509-cert"},
                "auth-id": {
                    "description": "The subject of the certificate, as text; kept in the spelling of Java (RFC 2253).",
                    "anyOf": [
                        {"type": "string", "minLength": 1, "maxLength": MAX_DN_LENGTH},
                        {"type": ["number", "boolean"]},
                    ],
                },
                **common,
                "secrets": _array(
                    _object(secret), "Exactly one; there is nothing secret in it.", minItems=1, maxItems=1
                ),
                "cert": _NO_CERTIFICATE,
            },
            ["type", "auth-id", "secrets"],
            "A client certificate, by its subject.",
        ),
        "CertificateCredential": _object(
            {
                "type": {"const": "x509-cert"},
                "cert": _schema("Certificate", "Subject and validity are taken from it; it is not kept."),
                **common,
                **{name: _schema("Ignored") for name in ("auth-id", "secrets")},
            },
            ["type", "cert"],
            "A client certificate, as it is.",
        ),
        "PublicKeyCredential": credential("rpk", auth_id, "PublicKeySecret", "A raw public key, for signed tokens."),
        "PublicKeySecret": {
            "description": "A public key, by itself or in a certificate, or a stored one that stays.",
            "anyOf": [
                _object(
                    {
                        "key": _schema("PublicKey"),
                        "algorithm": {"enum": ["RSA", "EC", "", None], "default": "RSA"},
                        "cert": _NO_CERTIFICATE,
                        **secret,
                    },
                    ["key"],
                    "A key.",
                ),
                _object(
                    {
                        "cert": _schema("Certificate", "Key and validity are taken from it; it is not kept."),
                        **secret,
                        **{name: _schema("Ignored") for name in ("key", "algorithm")},
                    },
                    ["cert"],
                    "The key of a certificate.",
                ),
                _object(
                    {
                        **reference,
                        "key": not_text,
                        "cert": _NO_CERTIFICATE,
                        "algorithm": {"enum": ["RSA", "EC", "", None]},
                    },
                    ["id"],
                    "A stored key that stays.",
                ),
            ],
        },
        "CustomCredential": _object(
            {
                "type": {
                    "description": "Any other type.",
                    "anyOf": [
                        {
                            "type": "string",
                            "pattern": "^[a-z0-9-]+$",
                            "maxLength": MAX_IDENTIFIER_LENGTH,
                            "not": {"enum": ["hashed-password", "psk", "x509-cert", "rpk"]},
                        },
                        {"type": ["integer", "boolean"]},
                    ],
                },
                "auth-id": auth_id,
                **common,
                "secrets": _array(
                    _object(secret, description="Further members are kept, and shown to everybody.", rest=True),
                    "At least one; each `id` once.",
                    minItems=1,
                ),
            },
            ["type", "auth-id", "secrets"],
            "A type that only devices and adapters understand. Further members are kept.",
            rest=True,
        ),
        "StoredCredentials": _array(_schema("StoredCredential"), "In the order in which they were written."),
        "StoredCredential": _object(
            {
                "type": _text("See `Credential`.", pattern="^[a-z0-9-]+$"),
                "auth-id": _text("What the device calls itself.", minLength=1),
                "enabled": {"type": "boolean"},
                "comment": _text("As given."),
                "ext": _schema("StoredFreeForm"),
                "secrets": _array(_schema("StoredSecret"), "In the order in which they were written.", minItems=1),
            },
            ["type", "auth-id", "enabled", "secrets"],
            "A credential as it is read. Custom types have further members.",
            rest=True,
            **{
                "if": {"properties": {"type": {"const": "hashed-password"}}},
                "then": {"properties": {"secrets": {"items": _schema("StoredPassword")}}},
            },
        ),
        "StoredPassword": _object(stored_secret, ["id"], "A password as it is read: nothing of it is shown."),
        "StoredSecret": _object(
            stored_secret,
            ["id"],
            "A secret as it is read: without passwords and their hashes. Those of type `rpk` have `key` and "
            "`algorithm`, those of type `psk` a `key` if the caller may see it, custom ones all their members.",
            rest=True,
        ),
    }


def _search_schemas() -> Json:
    pointer = {
        "type": "string",
        "maxLength": MAX_POINTER_LENGTH,
        "pattern": "^(?:/(?:[^~/]|~[01])*)*$",
        "format": "json-pointer",
        "description": "Which member, as a JSON pointer (RFC 6901) into what a search returns.",
        "examples": ["/ext/serial"],
    }

    def page(schema: str) -> Json:
        return _object(
            {
                "total": {"type": "integer", "minimum": 0, "description": "How many match, on all pages together."},
                "result": _array(_schema(schema), "Those of this page.", maxItems=MAX_PAGE_SIZE),
            },
            ["total", "result"],
        )

    return {
        "TenantPage": page("FoundTenant"),
        "DevicePage": page("FoundDevice"),
        "Filter": _object(
            {
                "field": pointer,
                "value": {
                    "type": ["string", "number", "boolean"],
                    "description": "What the member, or one of its elements, must be equal to. In a text, `*` stands "
                    "for any characters and `?` for one.",
                },
                "op": _or_null(_any_case("eq")) | {"default": "eq"},
            },
            ["field", "value"],
            "A condition.",
        ),
        "Sort": _object(
            {
                "field": pointer,
                "direction": _or_null(_any_case("asc", "desc", description="`asc` or `desc`, in any case."))
                | {"default": "asc"},
            },
            ["field"],
            "What to sort by.",
        ),
    }
