"""A receiver of the provisioning hook: says which devices are wanted, from a list.

    python examples/hook/receiver.py --secret-file hook.secret --wanted wanted.txt

Nothing but the standard library. The list has a line for each device that is wanted: tenant, a space, and the auth-id
or (of a device through a gateway) the device id, with `*` for any text; what follows a tab is the id that a device by
certificate gets. It is read at each question, so a change counts at once.

The secret is shared with the registry (`provisioning.hook.secret_file`). To make one:

    (umask 077; echo "whsec_$(openssl rand -base64 32)" > hook.secret)
"""

import argparse
import base64
import hashlib
import hmac
import json
import time
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOLERANCE = 300
"""Seconds by which a timestamp may be off. Older requests may be somebody's who has recorded them."""
MAX_BODY_SIZE = 64 * 1024


def is_signed(secret: bytes, headers: dict[str, str], body: bytes, now: float) -> bool:
    """Check signature and timestamp, as standardwebhooks.com describes it."""
    request_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(now - int(timestamp)) > TOLERANCE:
        return False
    signed = f"{request_id}.{timestamp}.".encode() + body
    expected = base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()
    # There may be several, while a secret is being replaced.
    given = headers.get("webhook-signature", "").split()
    return any(hmac.compare_digest(f"v1,{expected}".encode(), one.encode()) for one in given)


def find_wanted(wanted: Path, question: dict[str, str]) -> dict[str, str] | None:
    """Look a device up in the list; return the answer, or nothing if it is not wanted."""
    name = question.get("auth-id", question["device-id"])
    for line in wanted.read_text().splitlines():
        pattern, _, device_id = line.partition("\t")
        tenant_id, _, name_pattern = pattern.partition(" ")
        if tenant_id == question["tenant-id"] and fnmatchcase(name, name_pattern):
            return {"device-id": device_id} if device_id and "auth-id" in question else {}
    return None


class Handler(BaseHTTPRequestHandler):
    """Answers one connection of the registry."""

    protocol_version = "HTTP/1.1"
    timeout = 5
    """Seconds for each read: nobody may hold a thread for ever."""
    wbufsize = -1
    """One packet for an answer: two would wait for each other."""
    secret: bytes
    wanted: Path

    def do_POST(self) -> None:
        """Answer one question."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_SIZE:
            self.close_connection = True
            return self.answer(413 if length.isdecimal() else 411)
        body = self.rfile.read(int(length))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if not is_signed(self.secret, headers, body, time.time()):
            return self.answer(401)
        try:
            wishes = find_wanted(self.wanted, json.loads(body))
        except OSError as error:
            self.log_error("the list cannot be read: %s", error)
            return self.answer(500)
        return self.answer(404) if wishes is None else self.answer(200, wishes)

    def answer(self, status: int, document: object = None) -> None:
        """Send an answer."""
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--wanted", type=Path, required=True, help="the list")
    parser.add_argument("--port", type=int, default=9009, help="on 127.0.0.1; 0 lets the system choose")
    arguments = parser.parse_args()
    if not arguments.wanted.is_file():
        parser.error(f"--wanted: there is no file {arguments.wanted}")
    Handler.secret = base64.b64decode(arguments.secret_file.read_text().strip().removeprefix("whsec_"))
    Handler.wanted = arguments.wanted
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
