"""What `tlscale doctor` found of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What was found of one thing."""

    subject: str
    state: State
    """`ok`; `note`: a run works, slower or with less; `wrong`: it would stop one."""
    what: str
    remedy: str = ""
