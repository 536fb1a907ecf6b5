"""The walk of the README, command by command, and what `make serve` promises around it."""

import stat
from pathlib import Path

import pytest
from tests.databases import Databases
from tests.integration.pages import PROJECT, Example, Step, assert_shown, read_steps

PAGE = PROJECT / "README.md"


@pytest.mark.parametrize("step", read_steps(PAGE), ids=lambda step: f"line-{step.line}")
def test_commands_print_what_the_page_shows(example: Example, step: Step) -> None:
    assert_shown(step, example.run(step))


def test_start_up_lines_say_what_runs_where(example: Example) -> None:
    text = example.registry.log.read_text()
    for address in example.registry.addresses.values():
        assert address in text
    assert str(example.registry.credentials_file) in text
    assert example.database in text
    assert "kamado ask tenant DEFAULT_TENANT --config" in text
    assert example.registry.password not in text


def test_example_data(databases: Databases, tmp_path: Path) -> None:
    """Issue 3, item 8: what is there after the first start, and that the second one goes on with it."""
    example = Example(tmp_path, databases.create(tmp_path / "var" / "guide"))
    example.start()
    registry = example.registry
    try:
        for tenant_id in ("DEFAULT_TENANT", "HTTP_TENANT", "FACTORY"):
            assert registry.request("GET", f"/v1/tenants/{tenant_id}").status == 200
        for device_id in ("4710", "4720", "4730", "gw-1"):
            assert registry.request("GET", f"/v1/devices/DEFAULT_TENANT/{device_id}").status == 200
        assert registry.request("GET", "/v1/devices/DEFAULT_TENANT/4711").status == 404
        assert example.get("/v1/devices/DEFAULT_TENANT/4730")["via"] == ["gw-1"]
        types = {
            credential["type"]
            for device_id in ("gw-1", "4730")
            for credential in registry.request("GET", f"/v1/credentials/DEFAULT_TENANT/{device_id}").array
        }
        assert types == {"hashed-password", "psk", "x509-cert"}
        anchors = registry.request("GET", "/v1/tenants/FACTORY").object["trusted-ca"]
        assert isinstance(anchors, list)
        assert [anchor["auto-provisioning-enabled"] for anchor in anchors] == [True]
        assert stat.S_IMODE((registry.data_dir / "ca.key").stat().st_mode) == 0o600
        assert stat.S_IMODE(registry.credentials_file.stat().st_mode) == 0o600

        assert registry.request("DELETE", "/v1/devices/DEFAULT_TENANT/4720").status == 204
        password = registry.password
        registry.stop()
        example.start()
        assert registry.request("GET", "/v1/devices/DEFAULT_TENANT/4710").status == 200
        assert registry.request("GET", "/v1/devices/DEFAULT_TENANT/4720").status == 404
        assert registry.password == password
        registry.stop()
    finally:
        registry.kill()
