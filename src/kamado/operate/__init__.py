"""The operator's commands `kamado tenant`, `kamado device` and `kamado credentials`, over the management API.

Each parses its options, makes a request or a few, and prints. Errors of requests become a line and an exit status in
`connection.py`, and only there.
"""

from kamado.operate.credentials import credentials_app
from kamado.operate.resources import device_app, tenant_app

__all__ = ["credentials_app", "device_app", "tenant_app"]
