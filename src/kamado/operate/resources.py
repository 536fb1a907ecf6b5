"""The commands `kamado tenant` and `kamado device`."""

from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from kamado.document import JsonObject
from kamado.operate.connection import Connect, registry, with_connection
from kamado.operate.documents import (
    DeviceArgument,
    EditOf,
    FileOption,
    IfMatchOption,
    JsonOption,
    LinesOption,
    NewIdArgument,
    QuietOption,
    TenantArgument,
    YesOption,
    check_optional_id,
    create_resource,
    get_resource,
    set_resource,
    with_device_edit,
    with_tenant_edit,
)
from kamado.operate.searches import (
    Column,
    ColumnOption,
    GatewaysOption,
    Listing,
    SearchOf,
    chosen_columns,
    chosen_form,
    list_resources,
    search_resources,
    with_search,
)
from kamado.terminal import REFUSED, confirm, fail, say, waiting

if TYPE_CHECKING:
    from kamado.http.client import RegistryClient

__all__ = ["device_app", "tenant_app"]

DELETE_ALL_TIMEOUT: Final = 3600.0
"""Seconds; the registry takes as long as it takes, and does not stop when nobody waits."""

tenant_app = typer.Typer(no_args_is_help=True, help="Manage tenants over the management API.")
device_app = typer.Typer(no_args_is_help=True, help="Manage the devices of a tenant over the management API.")


def _usable_adapters(tenant: JsonObject) -> object:
    adapters = cast(list[JsonObject] | None, tenant.get("adapters"))
    return "all" if adapters is None else [one.get("type") for one in adapters if one.get("enabled")]


_TENANT_COLUMNS = (
    Column.of("id", "id"),
    Column.of("enabled", "enabled"),
    Column.of("alias", "alias"),
    Column("adapters", _usable_adapters),
    Column.of("trusted CAs", "trusted-ca", "subject-dn"),
)
_DEVICE_COLUMNS = (
    Column.of("id", "id"),
    Column.of("enabled", "enabled"),
    Column.of("via", "via"),
    Column.of("via groups", "viaGroups"),
    Column.of("member of", "memberOf"),
    Column.of("created", "status", "created"),
    Column.of("updated", "status", "updated"),
)


# tenant


@tenant_app.command("create")
@with_tenant_edit
@with_connection
def tenant_create(
    *,
    tenant_id: NewIdArgument = None,
    file: FileOption = None,
    as_json: JsonOption = False,
    edit_of: EditOf,
    connect: Connect,
) -> None:
    """Create a tenant and print its id."""
    path = ("tenants",) if tenant_id is None else ("tenants", tenant_id)
    create_resource(connect, path, file, edit_of(), as_json=as_json)


@tenant_app.command("get")
@with_connection
def tenant_get(*, tenant_id: TenantArgument, as_json: JsonOption = False, connect: Connect) -> None:
    """Print a tenant as JSON, with its id and version."""
    get_resource(connect, ("tenants", tenant_id), as_json=as_json)


@tenant_app.command("set")
@with_tenant_edit
@with_connection
def tenant_set(
    *,
    tenant_id: TenantArgument,
    file: FileOption = None,
    if_match: IfMatchOption = None,
    as_json: JsonOption = False,
    edit_of: EditOf,
    connect: Connect,
) -> None:
    """Replace a tenant by the content of --file, or change the members that other options name and no others."""
    set_resource(connect, ("tenants", tenant_id), file, edit_of(), if_match, as_json=as_json)


@tenant_app.command("delete")
@with_connection
def tenant_delete(
    *, tenant_id: TenantArgument, if_match: IfMatchOption = None, yes: YesOption = False, connect: Connect
) -> None:
    """Delete a tenant; its devices and their credentials are out of reach from then on. Asks first."""
    with registry(connect) as client:
        if not yes:
            client.get("tenants", tenant_id)
            devices = _devices(_count_devices(client, tenant_id), "all its devices")
            if not confirm(f"Delete tenant {tenant_id} with {devices} and their credentials?"):
                fail("Nothing was deleted.", REFUSED)
        client.write("DELETE", "tenants", tenant_id, if_match=if_match)
    say(f"Tenant {tenant_id} was deleted.")


@tenant_app.command("list")
@with_connection
def tenant_list(
    *, column: ColumnOption = None, as_json: LinesOption = False, quiet: QuietOption = False, connect: Connect
) -> None:
    """List all tenants, sorted by id, however many there are."""
    listing = Listing(chosen_form(as_json=as_json, quiet=quiet), chosen_columns(_TENANT_COLUMNS, column))
    list_resources(connect, ("tenants",), listing)


@tenant_app.command("search")
@with_search
@with_connection
def tenant_search(
    *,
    column: ColumnOption = None,
    as_json: LinesOption = False,
    quiet: QuietOption = False,
    search_of: SearchOf,
    connect: Connect,
) -> None:
    """Search tenants by their members."""
    listing = Listing(chosen_form(as_json=as_json, quiet=quiet), chosen_columns(_TENANT_COLUMNS, column))
    search_resources(connect, ("tenants",), search_of(), listing, quiet=quiet)


# device


@device_app.command("create")
@with_device_edit
@with_connection
def device_create(
    *,
    tenant_id: TenantArgument,
    device_id: NewIdArgument = None,
    file: FileOption = None,
    as_json: JsonOption = False,
    edit_of: EditOf,
    connect: Connect,
) -> None:
    """Create a device and print its id."""
    path = ("devices", tenant_id) if device_id is None else ("devices", tenant_id, device_id)
    create_resource(connect, path, file, edit_of(), as_json=as_json)


@device_app.command("get")
@with_connection
def device_get(
    *, tenant_id: TenantArgument, device_id: DeviceArgument, as_json: JsonOption = False, connect: Connect
) -> None:
    """Print a device as JSON, with its id and version."""
    get_resource(connect, ("devices", tenant_id, device_id), as_json=as_json)


@device_app.command("set")
@with_device_edit
@with_connection
def device_set(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    file: FileOption = None,
    if_match: IfMatchOption = None,
    as_json: JsonOption = False,
    edit_of: EditOf,
    connect: Connect,
) -> None:
    """Replace a device by the content of --file, or change the members that other options name and no others."""
    set_resource(connect, ("devices", tenant_id, device_id), file, edit_of(), if_match, as_json=as_json)


@device_app.command("delete")
@with_connection
def device_delete(
    *,
    tenant_id: TenantArgument,
    device_id: Annotated[str | None, typer.Argument(metavar="DEVICE", callback=check_optional_id)] = None,
    all_: Annotated[bool, typer.Option("--all", help="All devices of the tenant; asks first.")] = False,
    if_match: IfMatchOption = None,
    yes: YesOption = False,
    connect: Connect,
) -> None:
    """Delete a device, or all devices of a tenant, with their credentials."""
    if (device_id is not None) == all_:
        raise typer.BadParameter("name either a DEVICE, or --all for all devices of the tenant")
    if device_id is not None:
        with registry(connect) as client:
            client.write("DELETE", "devices", tenant_id, device_id, if_match=if_match)
        say(f"Device {device_id} of tenant {tenant_id} was deleted.")
        return
    if if_match is not None:
        raise typer.BadParameter("--if-match is for one device")
    with registry(connect) as client:
        count = _count_devices(client, tenant_id)
        if count == 0:
            say(f"Tenant {tenant_id} has no devices.")
            return
        devices = _devices(count, "all devices")
        if not yes and not confirm(f"Delete {devices} of tenant {tenant_id} and their credentials?"):
            fail("Nothing was deleted.", REFUSED)
        with waiting(f"Deleting {devices} ..."):
            client.write("DELETE", "devices", tenant_id, timeout=DELETE_ALL_TIMEOUT)
    if count is None:
        # A deleted tenant leaves its devices behind, where nobody can count them.
        say(f"Tenant {tenant_id}: all devices deleted, if there were any; whether there were, nobody can tell here.")
    else:
        say(f"Tenant {tenant_id}: {devices} deleted.")


def _count_devices(client: "RegistryClient", tenant_id: str) -> int | None:
    """Count the devices of a tenant; `None` if that cannot be said: they may be there though the tenant is not."""
    from kamado.http.client import ErrorAnswer

    try:
        return client.count("devices", tenant_id)
    except ErrorAnswer as error:
        if error.status != 404:
            # A registry that cannot search can still delete.
            return None
    try:
        client.get("tenants", tenant_id)
    except ErrorAnswer as error:
        if error.status != 404:
            raise
        return None
    return 0


def _devices(count: int | None, otherwise: str) -> str:
    return otherwise if count is None else f"{count} device{'' if count == 1 else 's'}"


@device_app.command("list")
@with_connection
def device_list(
    *,
    tenant_id: TenantArgument,
    column: ColumnOption = None,
    as_json: LinesOption = False,
    quiet: QuietOption = False,
    connect: Connect,
) -> None:
    """List all devices of a tenant, sorted by id, however many there are."""
    listing = Listing(chosen_form(as_json=as_json, quiet=quiet), chosen_columns(_DEVICE_COLUMNS, column))
    list_resources(connect, ("devices", tenant_id), listing)


@device_app.command("search")
@with_search
@with_connection
def device_search(
    *,
    tenant_id: TenantArgument,
    gateways: GatewaysOption = None,
    column: ColumnOption = None,
    as_json: LinesOption = False,
    quiet: QuietOption = False,
    search_of: SearchOf,
    connect: Connect,
) -> None:
    """Search the devices of a tenant by their members."""
    listing = Listing(chosen_form(as_json=as_json, quiet=quiet), chosen_columns(_DEVICE_COLUMNS, column))
    more = [] if gateways is None else [("isGateway", "true" if gateways else "false")]
    search_resources(connect, ("devices", tenant_id), search_of(), listing, more=more, quiet=quiet)
