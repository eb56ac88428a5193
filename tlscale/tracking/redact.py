"""What may leave the machine: plain values without secrets.

Promise: what goes to a tracker, or into a note about one, went through here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_URL_USER = re.compile(r"(?<=://)[^/\s@]+@")
_URL_SECRET = re.compile(r"(?i)([?&][^=&\s]*(?:token|key|sig|secret|passw|credential)[^=&\s]*=)[^&\s]+")
_PLAIN_SECRET = re.compile(r"(?i)(?<!\S)([\w.-]*(?:api_?key|token|secret|passw|credential)[\w.-]*=)[^&\s]+")
_SECRET_KEY = re.compile(r"(?i)api_?key|token|secret|passw|credential")
REDACTED = "[redacted]"


def redact(value: Any) -> Any:  # noqa: ANN401 (plain YAML values)
    """Return plain values without secrets.

    That is without user-info and signing parameters in URLs, values of keys that look secret, and what follows such a
    key and '=' in a text.

    Keys are those that hold api_key, token, secret, passw or credential.
    """
    if isinstance(value, Mapping):
        return {
            key: REDACTED if isinstance(item, str) and _SECRET_KEY.search(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    for secret in (_URL_SECRET, _PLAIN_SECRET):
        value = secret.sub(rf"\1{REDACTED}", value)
    return _URL_USER.sub("", value)


def reason(error: Exception) -> str:
    """Return an exception in one redacted line of at most 200 characters."""
    first_line = (str(error).splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return str(redact(text))[:200]
