"""Where measurements of this folder go: results.jsonl, a line each, with when, what versions and what machine."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.jsonl"


def append(row: dict[str, Any], packages: dict[str, str] | None = None, device: str = "cpu") -> None:
    """Add a row, measured on a device; ``packages``: versions of more of them."""
    from dqtk.report.environment import hardware, now, versions  # not before: what measures memory stays small until then

    full = row | {"created": now(), "versions": versions() | (packages or {}), "hardware": hardware(device)}
    with RESULTS.open("a") as file:
        print(json.dumps(full), file=file)


def stored() -> list[dict[str, Any]]:
    """All rows, oldest first."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
