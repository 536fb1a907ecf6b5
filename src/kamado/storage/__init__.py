"""Opens the database that a URL names.

The one door into this package: nobody outside names an engine.
"""

from kamado.connections import Connections
from kamado.storage import postgresql_url
from kamado.storage.sql import NewerSchema, OlderSchema, StorageError, StoreSettings, UnfinishedCopy
from kamado.store import Store

__all__ = [
    "NewerSchema",
    "OlderSchema",
    "StorageError",
    "StoreSettings",
    "UnfinishedCopy",
    "migrate",
    "open_connections",
    "open_store",
    "shown_url",
]


async def open_store(url: str, settings: StoreSettings | None = None) -> Store:
    """Open the database, on the event loop that will use it; close it with `Store.close`.

    A SQLite file (and its directory) is created if absent; a PostgreSQL database must be there.

    Args:
        url: `sqlite:////absolute/path.db`, `sqlite:///relative/path.db`, or `postgresql://user@host:5432/database` with
            several hosts, separated by commas, and libpq's options (`sslmode`, `target_session_attrs`), as you like.
        settings: The defaults if omitted.

    Raises:
        NewerSchema: A later version of Kamado has migrated the database.
        OlderSchema: The database needs a migration and `settings.auto_migrate` is off.
        UnfinishedCopy: The database is an unfinished copy of another one, and `settings.may_be_unfinished` is off.
        StorageError: Anything else that is in the way: the text says what, for the operator.
    """
    settings = settings or StoreSettings()
    # Imported here, so that this package's own modules may import from it while it is being imported.
    if _is_postgresql(url):
        from kamado.storage.postgresql import open_postgresql

        return await open_postgresql(url, settings)
    path = _sqlite_path(url)
    from kamado.storage.sqlite import open_sqlite

    store = await open_sqlite(path, settings)
    try:
        if not settings.may_be_unfinished and await store.read(lambda transaction: transaction.find_copy()) is not None:
            raise UnfinishedCopy(url)
    except BaseException:
        await store.close()
        raise
    return store


async def open_connections(url: str, settings: StoreSettings | None = None) -> Connections:
    """Open what is kept of device connections beside the database; close it with `Connections.close`.

    With PostgreSQL these are tables of the database. With SQLite that is a second file, which never keeps the registry
    from starting: what is wrong with it is logged, and until it is mended requests are `Unavailable`.

    Args:
        url: As for `open_store`.
        settings: The defaults if omitted.

    Raises:
        StorageError: The URL is wrong.
    """
    if _is_postgresql(url):
        from kamado.storage.postgresql import open_postgresql_connections

        return await open_postgresql_connections(url, settings or StoreSettings())
    path = _sqlite_path(url)
    from kamado.storage.volatile import open_sqlite_connections

    return await open_sqlite_connections(path, (settings or StoreSettings()).observe)


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
    if _is_postgresql(url):
        from kamado.storage.postgresql import migrate_postgresql

        return await migrate_postgresql(url, settings or StoreSettings())
    path = _sqlite_path(url)
    from kamado.storage.sqlite import migrate_sqlite

    return await migrate_sqlite(path, settings or StoreSettings())


def _is_postgresql(url: str) -> bool:
    return url.startswith(("postgresql://", "postgres://"))


def _sqlite_path(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if scheme != "sqlite" or not separator:
        shown = f"scheme {scheme!r}" if separator else "a text without a scheme"
        raise StorageError(
            f"storage.url: {shown} is not known; the schemes are: sqlite (sqlite:////absolute/path.db) and "
            "postgresql (postgresql://user@host/database)"
        )
    # sqlite://host/path has a host that means nothing; sqlite:// and sqlite:/// name no file.
    if not rest.startswith("/") or len(rest) < 2:
        raise StorageError("storage.url: write sqlite:////absolute/path.db or sqlite:///relative/path.db")
    path = rest[1:]
    if "\0" in path:
        raise StorageError("storage.url: the path has a NUL character")
    if "?" in path or "#" in path:
        raise StorageError("storage.url: a SQLite URL has no options; the path must not have ? or #")
    return path


def shown_url(url: str) -> str:
    """Return a URL without the secrets that may be in it."""
    # One of SQLite has none.
    return postgresql_url.shown_url(url) if _is_postgresql(url) else url
