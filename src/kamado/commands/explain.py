"""`kamado explain`: why a look-up is refused, straight from the database."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from kamado.commands.configured import ConfigOption, JsonOption, SetOption, load_configuration, with_store
from kamado.commands.questions import (
    AuthIdArgument,
    CertificateOption,
    DeviceArgument,
    SubjectDnOption,
    TenantArgument,
    TenantCriterion,
    TypeArgument,
    ViaOption,
    credentials_criterion,
    exit_status,
    tenant_criterion,
)

if TYPE_CHECKING:
    from kamado.explain import Explainer, Explanation
    from kamado.store import Store

__all__ = ["explain_app"]

explain_app = typer.Typer(
    no_args_is_help=True, help="Say why a look-up is refused, straight from the database; nothing is changed."
)


def _explain(
    config: Path | None,
    assignments: list[str] | None,
    question: Callable[["Explainer"], Awaitable["Explanation"]],
    *,
    as_json: bool,
) -> NoReturn:
    """Ask the database itself, undo what that wrote, say what came of it."""
    from kamado.app import build_core
    from kamado.explain import DryRunHook, DryRunStore, Explainer

    settings = load_configuration(config, assignments).config

    async def explain(store: "Store") -> "Explanation":
        hook = None if settings.provisioning.hook.url is None else DryRunHook()
        core = build_core(settings, DryRunStore(store), hook=hook)
        try:
            return await question(Explainer(core.lookup, hook))
        finally:
            core.passwords.close()

    explanation = asyncio.run(with_store(settings, explain, may_create=False))
    if as_json:
        typer.echo(json.dumps(explanation.as_json(), ensure_ascii=False))
    else:
        typer.echo(explanation.headline)
        typer.echo(explanation.text)
    raise typer.Exit(exit_status(explanation.status))


@explain_app.command("tenant")
def explain_tenant(
    *,
    tenant_id: TenantCriterion = None,
    subject_dn: SubjectDnOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Why a tenant is not found."""
    body = tenant_criterion(tenant_id, subject_dn)
    _explain(config, assignments, lambda explainer: explainer.explain_tenant(body), as_json=as_json)


@explain_app.command("assert")
def explain_assert(
    *,
    tenant_id: TenantArgument,
    device_id: DeviceArgument,
    gateway_id: ViaOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Why a device is not asserted."""
    _explain(
        config,
        assignments,
        lambda explainer: explainer.explain_assert(tenant_id, device_id, gateway_id),
        as_json=as_json,
    )


@explain_app.command("credentials")
def explain_credentials(
    *,
    tenant_id: TenantArgument,
    type_: TypeArgument,
    auth_id: AuthIdArgument = None,
    certificate: CertificateOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Why credentials are not found, or a device is not provisioned."""
    body = credentials_criterion(type_, auth_id, certificate)
    _explain(
        config,
        assignments,
        lambda explainer: explainer.explain_credentials(tenant_id, body),
        as_json=as_json,
    )
