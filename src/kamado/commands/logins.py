"""`kamado identity` and `kamado operator`: who may log in over AMQP, and over HTTP."""

import asyncio
import json
from collections.abc import Awaitable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kamado.commands.configured import (
    ConfigOption,
    JsonOption,
    SetOption,
    load_configuration,
    with_passwords,
    with_store,
)
from kamado.terminal import WRONG_DATA, ask_secret, fail, print_table, read_first_line, say

if TYPE_CHECKING:
    from kamado.config import HttpConfig
    from kamado.passwords import PasswordHasher
    from kamado.store import Store

__all__ = ["identity_app", "operator_app"]

identity_app = typer.Typer(no_args_is_help=True, help="Who may log in over AMQP: add, list, remove, change a password.")
operator_app = typer.Typer(
    no_args_is_help=True, help="Who may use the management API: add, list, remove, change a password."
)

PasswordFileOption = Annotated[
    Path | None,
    typer.Option(
        "--password-file", metavar="FILE", help="Read the password from this file (first line); - is standard input."
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]
PromptOption = Annotated[bool, typer.Option("--prompt", help="Ask for the password on the terminal.")]


class Mechanism(StrEnum):
    """SASL mechanisms."""

    PLAIN = "PLAIN"
    EXTERNAL = "EXTERNAL"


@identity_app.command("add")
def identity_add(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="User name; with EXTERNAL the CN of the certificate.")],
    role: Annotated[
        list[str], typer.Option("--role", metavar="ROLE", help="protocol-adapter or command-router; repeatable.")
    ] = ["protocol-adapter"],  # noqa: B006 - typer copies it
    mechanism: Annotated[Mechanism, typer.Option("--mechanism", help="How it logs in.")] = Mechanism.PLAIN,
    password_file: PasswordFileOption = None,
    prompt: PromptOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Let somebody log in. A password that is not given is made and printed once."""
    settings = load_configuration(config, assignments).config
    authorities = _authorities(role)
    password = None
    if mechanism is Mechanism.PLAIN:
        password, made = _choose_password(password_file, prompt=prompt)
    elif password_file is not None or prompt:
        raise typer.BadParameter("EXTERNAL has no password")
    from kamado import auth

    async def add(store: "Store", passwords: "PasswordHasher") -> None:
        await auth.add_identity(
            store,
            passwords,
            principal=auth.LOCAL_OPERATOR,
            name=name,
            mechanism=auth.Mechanism(mechanism),
            password=password,
            authorities=authorities,
            now=datetime.now(UTC),
        )

    asyncio.run(with_passwords(settings, add, may_create=True))
    say(f"{name} may log in now.")
    if password is not None and made:
        typer.echo(f"username={name}\npassword={password}")


@identity_app.command("list")
def identity_list(*, as_json: JsonOption = False, config: ConfigOption = None, assignments: SetOption = None) -> None:
    """List who may log in, and what for."""
    settings = load_configuration(config, assignments).config
    identities = asyncio.run(
        with_store(
            settings, lambda store: store.read(lambda transaction: transaction.list_identities()), may_create=False
        )
    )
    from kamado.document import format_timestamp

    if as_json:
        entries = [
            {
                "name": identity.name,
                "mechanism": identity.mechanism,
                "roles": _roles(identity.authorities),
                "created": format_timestamp(identity.created),
            }
            for identity in identities
        ]
        typer.echo(json.dumps(entries, ensure_ascii=False, indent=2))
        return
    rows = [
        (identity.name, identity.mechanism, ", ".join(_roles(identity.authorities)), format_timestamp(identity.created))
        for identity in identities
    ]
    print_table(("name", "mechanism", "roles", "created"), rows)


@identity_app.command("remove")
def identity_remove(
    *,
    name: NameArgument,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Let somebody log in no more. Connections that are open end within auth.lifetime."""
    settings = load_configuration(config, assignments).config
    from kamado import auth

    def remove(store: "Store") -> Awaitable[None]:
        return auth.remove_identity(store, principal=auth.LOCAL_OPERATOR, name=name)

    asyncio.run(with_store(settings, remove, may_create=False))
    say(f"{name} may not log in any more.")


@identity_app.command("passwd")
def identity_passwd(
    *,
    name: NameArgument,
    password_file: PasswordFileOption = None,
    prompt: PromptOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Change a password. A password that is not given is made and printed once."""
    settings = load_configuration(config, assignments).config
    password, made = _choose_password(password_file, prompt=prompt)
    from kamado import auth

    def change(store: "Store", passwords: "PasswordHasher") -> Awaitable[None]:
        return auth.change_identity_password(
            store, passwords, principal=auth.LOCAL_OPERATOR, name=name, password=password
        )

    asyncio.run(with_passwords(settings, change, may_create=False))
    say(f"{name} has a new password.")
    if made:
        typer.echo(f"username={name}\npassword={password}")


@operator_app.command("add")
def operator_add(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="User name of HTTP Basic.")],
    reveal_secrets: Annotated[
        bool, typer.Option("--reveal-secrets", help="Show this operator the pre-shared keys of devices.")
    ] = False,
    password_file: PasswordFileOption = None,
    prompt: PromptOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Add an account for the management API. A password that is not given is made and printed once."""
    settings = load_configuration(config, assignments).config
    password, made = _choose_password(password_file, prompt=prompt)
    from kamado import auth, operators

    async def add(store: "Store", passwords: "PasswordHasher") -> bool:
        is_first = not await store.lookups.has_operators()
        await operators.add_operator(
            store,
            passwords,
            principal=auth.LOCAL_OPERATOR,
            name=name,
            password=password,
            may_reveal_secrets=reveal_secrets,
            now=datetime.now(UTC),
        )
        return is_first

    is_first = asyncio.run(with_passwords(settings, add, may_create=True))
    say(f"{name} may use the management API now." + (" From now on everybody has to log in." if is_first else ""))
    if made:
        typer.echo(f"username={name}\npassword={password}")


@operator_app.command("list")
def operator_list(*, as_json: JsonOption = False, config: ConfigOption = None, assignments: SetOption = None) -> None:
    """List who may use the management API."""
    settings = load_configuration(config, assignments).config
    found = asyncio.run(
        with_store(
            settings, lambda store: store.read(lambda transaction: transaction.list_operators()), may_create=False
        )
    )
    from kamado.document import format_timestamp

    if as_json:
        entries = [
            {
                "name": operator.name,
                "reveal-secrets": operator.may_reveal_secrets,
                "created": format_timestamp(operator.created),
            }
            for operator in found
        ]
        typer.echo(json.dumps(entries, ensure_ascii=False, indent=2))
        return
    rows = [
        (operator.name, "yes" if operator.may_reveal_secrets else "no", format_timestamp(operator.created))
        for operator in found
    ]
    print_table(("name", "reveals secrets", "created"), rows)


@operator_app.command("remove")
def operator_remove(*, name: NameArgument, config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Remove an account; its next request is refused."""
    settings = load_configuration(config, assignments).config
    from kamado import auth, operators

    def remove(store: "Store") -> Awaitable[bool]:
        return operators.remove_operator(store, principal=auth.LOCAL_OPERATOR, name=name)

    is_any_left = asyncio.run(with_store(settings, remove, may_create=False))
    say(f"{name} may not use the management API any more.")
    if not is_any_left:
        say(f"No account is left: {_consequence(settings.http)}.")


def _consequence(config: "HttpConfig") -> str:
    """Say who may use the management API, now that there is no account."""
    if config.is_local:
        return "nobody has to log in, since only this machine reaches the management API"
    if config.auth.allow_anonymous:
        return "whoever reaches the management API may use it (http.auth.allow_anonymous)"
    return "nobody may use the management API until there is one, and kamado serve does not start"


@operator_app.command("passwd")
def operator_passwd(
    *,
    name: NameArgument,
    password_file: PasswordFileOption = None,
    prompt: PromptOption = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Change a password. A password that is not given is made and printed once."""
    settings = load_configuration(config, assignments).config
    password, made = _choose_password(password_file, prompt=prompt)
    from kamado import auth, operators

    def change(store: "Store", passwords: "PasswordHasher") -> Awaitable[None]:
        return operators.change_operator_password(
            store, passwords, principal=auth.LOCAL_OPERATOR, name=name, password=password
        )

    asyncio.run(with_passwords(settings, change, may_create=False))
    say(f"{name} has a new password.")
    if made:
        typer.echo(f"username={name}\npassword={password}")


def _choose_password(password_file: Path | None, *, prompt: bool) -> tuple[str, bool]:
    """Return the password, and whether it was made here."""
    if password_file is not None and prompt:
        raise typer.BadParameter("use either --password-file or --prompt")
    if prompt:
        return ask_secret("--password-file", confirm=True), False
    if password_file is None:
        import secrets

        return secrets.token_urlsafe(24), True
    password = read_first_line(password_file)
    if not password:
        fail("the password is empty", WRONG_DATA)
    return password, False


def _authorities(roles: list[str]) -> Mapping[str, str]:
    from kamado.auth import ROLES, Authorities

    united = Authorities()
    for role in roles:
        if role not in ROLES:
            raise typer.BadParameter(f"there is no role {role}; the roles are: {', '.join(ROLES)}")
        united = united.united(Authorities(ROLES[role]))
    return united.claims


def _roles(authorities: Mapping[str, str]) -> list[str]:
    """Name the roles whose rights are all there."""
    from kamado.auth import ROLES

    def covers(role: Mapping[str, str]) -> bool:
        return all(set(letters) <= set(authorities.get(key, "")) for key, letters in role.items())

    return [name for name, role in ROLES.items() if covers(role)]
