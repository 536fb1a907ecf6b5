"""Which registry the operator's commands talk to, and as whom: options, environment, profile file.

Each value comes from the first of these that has it. The login and the CA of a profile belong to its URL, though: with
a URL from elsewhere they do not count, so that no password goes to a host it was not made for.
"""

import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import platformdirs

__all__ = [
    "DEFAULT_URL",
    "Profile",
    "ProfileError",
    "Target",
    "WrongOption",
    "check_url",
    "profiles_file",
    "read_profiles",
    "resolve",
]

DEFAULT_URL: Final = "http://127.0.0.1:8080"
DEFAULT_PROFILE: Final = "default"
"""Counts when no profile is named."""

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")


class ProfileError(Exception):
    """A profile, or a URL, that cannot be used; the text says why."""


class WrongOption(ProfileError):
    """An option that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One table of the profile file."""

    url: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None
    ca_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A registry and a login; the password is still to be asked for if there are a name and neither of the last two."""

    url: str
    origin: str
    """Where the URL comes from, for people."""
    ca_file: Path | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None


def check_url(text: str) -> str:
    """Return a URL without a slash at its end.

    Raises:
        ProfileError: Of another form than http[s]://HOST[:PORT][/PATH]. A login in it is refused, too: command lines
            and environments are visible to others.
    """
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or parts.query or parts.fragment:
        raise ProfileError(f"a URL has the form http://HOST:PORT or https://HOST:PORT, not {text!r}")
    if "@" in parts.netloc:
        raise ProfileError("a URL must not hold a login; there are --username and --password-file")
    return text.rstrip("/")


def profiles_file(environment: Mapping[str, str]) -> Path:
    """Where profiles are kept."""
    named = environment.get("KAMADO_PROFILES")
    return Path(named) if named else platformdirs.user_config_path("kamado", appauthor=False) / "profiles.toml"


def read_profiles(path: Path) -> dict[str, Profile]:
    """Read the profile file: a table for each profile. No file, no profiles.

    Raises:
        ProfileError: It cannot be read, has a member that no profile has, or holds a password and others may read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            tables = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} is no TOML: {error}") from None
    profiles = {name: _profile(f"{path}: {name}", name, table, path.parent) for name, table in tables.items()}
    if mode & 0o077 and any(profile.password is not None for profile in profiles.values()):
        raise ProfileError(f"{path} holds a password, and others may read it: chmod 600 {path}")
    return profiles


def _profile(where: str, name: str, table: object, directory: Path) -> Profile:
    if not _NAME.fullmatch(name):
        raise ProfileError(f"{where}: the name of a profile must match {_NAME.pattern}")
    if not isinstance(table, dict):
        raise ProfileError(f"{where}: must be a table, [{name}], with the members of a profile")
    known = [one.name for one in fields(Profile)]
    for key, value in table.items():
        if key not in known:
            raise ProfileError(f"{where}.{key}: there is no such member; the members are: {', '.join(known)}")
        if not isinstance(value, str) or not value:
            raise ProfileError(f"{where}.{key}: must be a text that is not empty")
    if "password" in table and "password_file" in table:
        raise ProfileError(f"{where}: has a password and a password_file; only one of them may be")
    files = {key: directory / Path(table[key]).expanduser() for key in ("password_file", "ca_file") if key in table}
    profile = Profile(**{**table, **files})
    if profile.url is not None:
        try:
            check_url(profile.url)
        except ProfileError as error:
            raise ProfileError(f"{where}.url: {error}") from None
    return profile


def resolve(
    environment: Mapping[str, str],
    *,
    url: str | None = None,
    username: str | None = None,
    password_file: Path | None = None,
    ca_file: Path | None = None,
    profile: str | None = None,
) -> Target:
    """Work out which registry is meant and as whom.

    Args:
        environment: Variables; empty ones count as unset.
        url: Option, and so are the others.

    Raises:
        WrongOption: Of the form of a URL, or a password for nobody.
        ProfileError: See above; or a profile is named that does not exist.
    """
    named = profile or environment.get("KAMADO_PROFILE") or None
    path = profiles_file(environment)
    profiles = read_profiles(path)
    if named is not None and named not in profiles:
        known = f"; there are: {', '.join(profiles)}" if profiles else ""
        raise ProfileError(f"{path} has no profile {named}{known}")
    name = named or DEFAULT_PROFILE
    chosen = profiles.get(name, Profile())
    if url is not None:
        found, origin = url, "--url"
    elif environment.get("KAMADO_URL"):
        found, origin = environment["KAMADO_URL"], "KAMADO_URL"
    elif chosen.url is not None:
        found, origin = chosen.url, f"profile {name}"
    else:
        found, origin = DEFAULT_URL, "the default"
    try:
        found = check_url(found)
    except ProfileError as error:
        raise (WrongOption if url is not None else ProfileError)(f"{origin}: {error}") from None
    if found != (chosen.url or DEFAULT_URL).rstrip("/"):
        chosen = Profile()
    user = username or environment.get("KAMADO_USERNAME") or chosen.username
    # The password of a profile is that of its user.
    login = chosen if user is not None and user == chosen.username else Profile()
    if user is None and password_file is not None:
        raise WrongOption("--password-file needs a --username")
    password = environment.get("KAMADO_PASSWORD") or login.password
    if password_file is None and not password:
        password_file = login.password_file
    return Target(
        url=found,
        origin=origin,
        ca_file=ca_file or chosen.ca_file,
        username=user,
        password=password if user is not None and password_file is None else None,
        password_file=password_file if user is not None else None,
    )
