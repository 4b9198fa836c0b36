"""``--fail-if "psnr < 30"``: conditions on results that turn into an exit code.

    NAME OP NUMBER      OP is < <= > >=. NAME is a record's (psnr@vs_original, frechet[tiny-clip]@vs_original(paired),
                        oracle_mean@change), or the part before @ where that is enough; .low and .high end its interval.

A condition is judged for every candidate. One that finds no number fails too: a score that could not be measured proves nothing.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dqtk.report.records import Record
from dqtk.spec import did_you_mean

_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_GATE = re.compile(r"\s*(?P<name>\S+?)(?P<end>\.low|\.high)?\s*(?P<op><=|>=|<|>)\s*(?P<number>[-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A parsed condition."""

    text: str
    name: str
    end: str
    op: str
    number: float


def parse_gate(text: str) -> Gate:
    """Raises ``ValueError`` for anything but ``NAME OP NUMBER``."""
    match = _GATE.fullmatch(text)
    if match is None:
        raise ValueError(f"--fail-if: condition must be NAME OP NUMBER with < <= > >=, got {text!r}. For example 'psnr < 30'.")
    end = (match["end"] or ".value")[1:]
    return Gate(text=text.strip(), name=match["name"], end=end, op=match["op"], number=float(match["number"]))


def tripped(gates: Iterable[Gate], records: Sequence[Record], candidates: Iterable[str]) -> list[str]:
    """What fails, in words; empty when nothing does. Raises ``ValueError`` for a name that no record has."""
    failed = []
    candidates = list(candidates)
    for gate in gates:
        named = [r for r in records if r.name == gate.name] or [r for r in records if r.name.split("@")[0] == gate.name]
        if not named:
            names = sorted({short for record in records for short in (record.name, record.name.split("@")[0])})
            raise ValueError(f"--fail-if: name must be that of a result, got {gate.name!r}.{did_you_mean(gate.name, names)}")
        for candidate in candidates:
            mine = [record for record in named if record.model == candidate and not record.name.endswith("@change")]
            mine = mine or [record for record in named if record.model == candidate]
            numbers = [getattr(record, gate.end) for record in mine]
            if not numbers or numbers[0] is None:
                failed.append(f"{candidate}: {gate.name} was not measured, so {gate.text!r} cannot be ruled out")
            elif _OPERATORS[gate.op](numbers[0], gate.number):
                failed.append(f"{candidate}: {gate.name} {gate.end} is {numbers[0]:.6g}, and {gate.text!r} fails the job")
    return failed
