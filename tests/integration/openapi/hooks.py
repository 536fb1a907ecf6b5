"""What Schemathesis has to be told beside the description: values of its formats, and rules that no schema can say."""

import json
import re
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import schemathesis
from hypothesis import strategies as st
from tests.integration.vectors import CA_CERT, CA_SPKI, DEV_CERT, DEV_SPKI

NAMES = ["CN=plant-ca,OU=Line 7,O=Example GmbH", "cn=a", "O=Example; C=DE"]
PLACEHOLDERS = ["{{subject-dn}}", "{{subject-cn}}", "x-{{subject-ou}}-{{subject-o}}"]
POINTERS = ["", "/id", "/enabled", "/ext/a~1b", "/adapters/0/type", "/status/created", "/via"]

schemathesis.openapi.format("x509-certificate", st.sampled_from([CA_CERT, DEV_CERT]))
schemathesis.openapi.format("public-key", st.sampled_from([CA_SPKI, DEV_SPKI]))
schemathesis.openapi.format("distinguished-name", st.sampled_from(NAMES))
schemathesis.openapi.format("id-template", st.sampled_from(PLACEHOLDERS))
schemathesis.openapi.format(
    "json-filter",
    st.fixed_dictionaries(
        {"field": st.sampled_from(POINTERS), "value": st.text() | st.integers() | st.booleans()},
        optional={"op": st.sampled_from(["eq", "EQ", None])},
    ).map(json.dumps),
)
schemathesis.openapi.format(
    "json-sort",
    st.fixed_dictionaries(
        {"field": st.sampled_from(POINTERS)}, optional={"direction": st.sampled_from(["asc", "desc", "Desc", None])}
    ).map(json.dumps),
)

INEXPRESSIBLE = (
    # What the text of a 400 says -> the rule of management-api.md that a schema has no words for.
    ("occur(s)? twice", "4.2, 4.5, 6.8: types, ids, and pairs of type and auth-id are unique"),
    ("there is no such secret", "6.9: an id refers to a stored secret"),
    ("must not be later than not-after", "6.2"),
    ("not a valid public key of algorithm", "4.5, 6.6: key and algorithm belong together"),
    ("unknown key algorithm", "4.5: names are those of Java, in any case"),
    ("is another name than subject-dn", "4.5"),
    (r"subject-dn-bytes: ", "4.5: it is a name"),
    ("the offset is out of range", "3.12: 18 hours at most"),
    ("there is no such date or time", "3.12: years 1 to 9999 in UTC"),
    ("bytes in UTF-8", "6.3: a password has 72 bytes, not characters, at most"),
    ("must have a cost", "6.3"),
    ("goes neither with sortJson nor with a pageOffset", "7.1"),
)


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Accept that a request of the right form is refused for a rule that a schema cannot say."""
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code != 400:
        return True
    if case.method == "HEAD":
        # Whose 400 has no text; the same is asked with GET.
        return False
    text = response.json()["error"]
    return not any(re.search(pattern, text) for pattern, _ in INEXPRESSIBLE)


@schemathesis.check
def what_was_written_can_be_read_and_written_back(ctx: Any, response: Any, case: Any) -> None:
    """Read after each successful write, compare that with the description, and write it back (management 3.6, 6.9)."""
    if response.status_code not in {201, 204} or case.method not in {"POST", "PUT"}:
        return
    url = urljoin(response.request.url, response.headers.get("location", [response.request.url])[0])
    path = f"{urlsplit(url).path.split('/')[2]}"
    template = next(one for one in TEMPLATES if one.split("/")[2] == path)
    read = requests.get(url, timeout=TIMEOUT)
    assert read.status_code == 200, f"GET {url}: {read.status_code} {read.text}"
    case.operation.schema[template]["GET"].validate_response(read)
    written = requests.put(url, json=read.json(), timeout=TIMEOUT)
    assert written.status_code == 204, f"PUT {url} with {read.text}: {written.status_code} {written.text}"
    again = requests.get(url, timeout=TIMEOUT)
    assert without_status(again.json()) == without_status(read.json()), f"{read.text} became {again.text}"


TEMPLATES = ("/v1/tenants/{tenant}", "/v1/devices/{tenant}/{device}", "/v1/credentials/{tenant}/{device}")
TIMEOUT = 20


def without_status(document: Any) -> Any:
    """Leave out what the registry itself keeps about a device."""
    return {k: v for k, v in document.items() if k != "status"} if isinstance(document, dict) else document
