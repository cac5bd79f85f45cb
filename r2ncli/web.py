"""HTTP: what every part of the package that uses the web shares."""

from __future__ import annotations


def without_password(address: str) -> str:
    """An address as it may be shown and logged."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
