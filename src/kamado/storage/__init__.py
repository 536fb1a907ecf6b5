"""Opens the database that a URL names.

The one door into this package: nobody outside names an engine.
"""

from kamado.connections import Connections
from kamado.storage.sql import NewerSchema, ObserveCommit, OlderSchema, StorageError, StoreSettings
from kamado.store import Store

__all__ = ["NewerSchema", "OlderSchema", "StorageError", "StoreSettings", "migrate", "open_connections", "open_store"]


async def open_store(url: str, settings: StoreSettings | None = None) -> Store:
    """Open the database, on the event loop that will use it; close it with `Store.close`.

    A SQLite file (and its directory) is created if absent.

    Args:
        url: `sqlite:////absolute/path.db` or `sqlite:///relative/path.db`.
        settings: The defaults if omitted.

    Raises:
        NewerSchema: A later version of Kamado has migrated the database.
        OlderSchema: The database needs a migration and `settings.auto_migrate` is off.
        StorageError: Anything else that is in the way: the text says what, for the operator.
    """
    path = _sqlite_path(url)
    # Imported here, so that this package's own modules may import from it while it is being imported.
    from kamado.storage.sqlite import open_sqlite

    return await open_sqlite(path, settings or StoreSettings())


async def open_connections(url: str, observe: ObserveCommit = lambda *_: None) -> Connections:
    """Open what is kept of device connections beside the database; close it with `Connections.close`.

    With SQLite that is a second file, which never keeps the registry from starting: what is wrong with it is logged,
    and until it is mended requests are `Unavailable`.

    Args:
        url: As for `open_store`.
        observe: See `StoreSettings.observe`.

    Raises:
        StorageError: The URL is wrong.
    """
    path = _sqlite_path(url)
    from kamado.storage.volatile import open_sqlite_connections

    return await open_sqlite_connections(path, observe)


async def migrate(url: str, settings: StoreSettings | None = None) -> tuple[int, int]:
    """Create or upgrade the schema.

    Args:
        url: As for `open_store`.
        settings: The defaults if omitted; `auto_migrate` is not looked at.

    Returns:
        The schema's version before and after; 0 stands for no schema.

    Raises:
        NewerSchema: A later version of Kamado has migrated the database.
        StorageError: Anything else that is in the way: the text says what, for the operator.
    """
    path = _sqlite_path(url)
    from kamado.storage.sqlite import migrate_sqlite

    return await migrate_sqlite(path, settings or StoreSettings())


def _sqlite_path(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if scheme in {"postgresql", "postgres"} and separator:
        raise StorageError("storage.url: this version stores in SQLite only; write sqlite:////absolute/path.db")
    if scheme != "sqlite" or not separator:
        shown = f"scheme {scheme!r}" if separator else "a text without a scheme"
        raise StorageError(f"storage.url: {shown} is not known; the schemes are: sqlite (sqlite:////absolute/path.db)")
    # sqlite://host/path has a host that means nothing; sqlite:// and sqlite:/// name no file.
    if not rest.startswith("/") or len(rest) < 2:
        raise StorageError("storage.url: write sqlite:////absolute/path.db or sqlite:///relative/path.db")
    path = rest[1:]
    if "\0" in path:
        raise StorageError("storage.url: the path has a NUL character")
    if "?" in path or "#" in path:
        raise StorageError("storage.url: a SQLite URL has no options; the path must not have ? or #")
    return path
