"""`tlscale doctor`: say what on this machine would stop or slow a run, each with one remedy."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from tlscale.commands.doctor_checks import examine
from tlscale.commands.doctor_finding import Finding
from tlscale.tracking.console import Console

_MARKS = {"ok": "ok  ", "note": "note", "wrong": "WRONG"}
_INDENT = 25


def doctor(*, as_json: bool = False) -> bool:
    """Show all findings, and return whether nothing is wrong.

    Args:
        as_json: print them to standard output as JSON, and nothing else.
    """
    console, found = Console(enabled=not as_json), []
    for finding in examine():
        found.append(finding)
        _show(finding, console)
    wrong = sum(finding.state == "wrong" for finding in found)
    if as_json:
        click.echo(json.dumps({"wrong": wrong, "findings": [asdict(finding) for finding in found]}, indent=1))
    console.say(f"{wrong} of {len(found)} would stop a run" if wrong else "nothing would stop a run")
    return wrong == 0


def _show(finding: Finding, console: Console) -> None:
    style = {"ok": None, "note": "yellow", "wrong": "bold red"}[finding.state]
    console.say(f"{_MARKS[finding.state]:<6}{finding.subject:<18} {finding.what}", style, indent=_INDENT)
    if finding.remedy:
        console.say(f"{'':<{_INDENT}}{finding.remedy}", indent=_INDENT)
