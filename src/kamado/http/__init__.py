"""The management API over HTTP, both sides of it, and the health checks."""
