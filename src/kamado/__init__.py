"""Kamado, a device registry for IoT platforms that speaks the interfaces of Eclipse Hono."""

__all__ = ["__version__"]

__version__ = "0.1.0"
