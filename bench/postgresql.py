"""Measure the registry on a PostgreSQL server that is started for it, with durable commits.

    make bench-postgresql                               everything
    make bench-postgresql BENCH="--only assert"         options as of `make bench`

The server's programs come from the same package as for the tests. Its settings are those of a small server: 1 GiB of
shared buffers, 4 GiB of log between checkpoints, everything else as PostgreSQL has it.
"""

import sys

import typer
from bench import run
from tests.postgresql import PostgresqlServer

SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "autovacuum": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "4GB",
}


def main() -> None:
    """Start the server, measure, stop it."""
    with PostgresqlServer(settings=SETTINGS) as server:
        sys.argv += ["--url", server.create_database()]
        typer.run(run.main)


if __name__ == "__main__":
    main()
