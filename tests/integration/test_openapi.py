"""The description of the management API against the running registry, and how it is served.

Schemathesis makes thousands of requests out of the description, good and bad ones, each alone and in sequences, and
compares every answer with it: statuses, headers, bodies, and whether what is accepted is what is described.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.conftest import NewRegistry
from tests.integration.registry import Registry

ROOT = Path(__file__).parents[2]
CONFIGURATION = Path(__file__).parent / "openapi" / "schemathesis.toml"


@pytest.mark.parametrize(
    ("phases", "settings"),
    [
        pytest.param("examples,coverage", "", id="every rule"),
        pytest.param("fuzzing,stateful", "", id="any data"),
        # Most ids that are made up do not exist, so that little more than 404 comes back.
        pytest.param("fuzzing", 'parameters = { tenant = "metering", device = "sensor-1" }\n', id="what exists"),
    ],
)
def test_every_answer_is_as_described(new_registry: NewRegistry, tmp_path: Path, phases: str, settings: str) -> None:
    registry = new_registry()
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(settings + CONFIGURATION.read_text())
    # From a file, since Schemathesis would leave out the path that it has the description from.
    file = tmp_path / "openapi.json"
    file.write_bytes(registry.request("GET", "/openapi.json").body)
    described = operations(file)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration), "run", str(file)]
    command += ["--url", registry.http_url, "--phases", phases]
    if settings:
        registry.create_device(registry.create_tenant("metering"), "sensor-1")
        command += ["--exclude-method", "DELETE", "--exclude-method", "HEAD", "--max-examples", "60"]
        described = [one for one in described if not one.startswith(("delete ", "head "))]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=registry.environment | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    generated = re.search(r"(\d+) generated", run.stdout)
    assert generated is not None, run.stdout
    assert int(generated[1]) > 20 * len(described)
    assert f"Tested: {len(described)}" in run.stdout


def operations(file: Path) -> list[str]:
    paths = json.loads(file.read_bytes())["paths"]
    return [f"{method} {path}" for path, item in paths.items() for method in item if method != "parameters"]


def test_page_forbids_everything_but_its_own_style(registry: Registry) -> None:
    response = registry.request("GET", "/docs")
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    rules = dict(rule.split(" ", 1) for rule in response.headers["Content-Security-Policy"].split("; "))
    style = re.search(r"<style>(.*?)</style>", response.body.decode(), re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_documents_are_sent_again_only_if_they_have_changed(registry: Registry, path: str) -> None:
    # RFC 9110, 13.1.2
    first = registry.request("GET", path)
    assert first.status == 200
    assert first.headers["Cache-Control"] == "private, no-cache"
    for tag in (first.etag, f"W/{first.etag}", f'"other", {first.etag}', "*"):
        again = registry.request("GET", path, headers={"If-None-Match": tag})
        assert (again.status, again.body, again.etag) == (304, b"", first.etag)
        assert "Content-Length" not in again.headers
    assert registry.request("GET", path, headers={"If-None-Match": '"other"'}).status == 200
    head = registry.request("HEAD", path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == str(len(first.body))


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_documents_are_guarded_like_everything_else(registry: Registry, path: str) -> None:
    # management-api 3.10, 3.11; decision 0005
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert registry.request("GET", path, headers=headers).status == 403
    response = registry.request("POST", path)
    assert response.status == 405
    assert response.headers["Allow"] == "GET, HEAD"


def test_documents_need_a_login_where_the_api_does(new_registry: NewRegistry) -> None:
    registry = new_registry()
    registry.run("operator", "add", "ann", "--password-file", "-", stdin="a-first-secret\n")
    login = {"Authorization": "Basic " + base64.b64encode(b"ann:a-first-secret").decode()}
    for path in ("/docs", "/openapi.json"):
        response = registry.request("GET", path)
        assert response.status == 401
        assert response.headers["WWW-Authenticate"].startswith("Basic realm=")
        assert registry.request("GET", path, headers=login).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs/x",
        "/docs//",
        "/Docs",
        "/docs.css",
        "/docs/../openapi.json",
        "/docs/%2e%2e/%2e%2e/etc/passwd",
        "/openapi.json/x",
        "/v1/docs",
        "/%2e%2e/docs",
    ],
)
def test_other_paths_do_not_exist(registry: Registry, path: str) -> None:
    # management-api 3.1
    response = registry.request("GET", path)
    assert response.status == 404
    assert isinstance(response.object["error"], str)


def test_description_is_that_of_the_configuration(new_registry: NewRegistry) -> None:
    registry = new_registry({"http.max_body_size": "4KiB", "ids.tenant_pattern": "[a-z]+"})
    description = json.loads(registry.request("GET", "/openapi.json").body)
    assert description["components"]["parameters"]["TenantId"]["schema"]["pattern"] == "^[a-z]+$"
    assert "4096 bytes" in description["info"]["description"]
