"""The management API over HTTP, and the health checks."""

from kamado.http.api import Access, Api, ApiSettings
from kamado.http.server import Address, Health, HttpServer, HttpServerSettings

__all__ = ["Access", "Address", "Api", "ApiSettings", "Health", "HttpServer", "HttpServerSettings"]
