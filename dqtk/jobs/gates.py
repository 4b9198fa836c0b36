"""``--fail-if "psnr < 30"``: conditions on results that turn into an exit code.

    NAME OP NUMBER      OP is < <= > >=. NAME is a record's (psnr@vs_original, frechet[tiny-clip]@vs_original(paired),
                        oracle_mean@change), or the part before [ or @ where only one score begins so (its @change aside);
                        .low and .high end its interval.

A condition is judged for every candidate. One that finds no number fails too: a score that could not be measured proves nothing.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dqtk.report.records import Record
from dqtk.spec import did_you_mean

_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_GATE = re.compile(
    r"\s*(?P<name>\S+?)(?P<end>\.low|\.high)?\s*(?P<op><=|>=|<|>)\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)


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


def check_gates(gates: Iterable[Gate], names: Iterable[str]) -> None:
    """Raises ``ValueError`` for a gate's name that none of these results has, or more than one."""
    names = list(names)
    for gate in gates:
        _full_name(gate.name, names)


def tripped(gates: Iterable[Gate], records: Sequence[Record], candidates: Iterable[str]) -> list[str]:
    """What fails, in words; empty when nothing does. Raises ``ValueError`` for a name that no record has, or more than one."""
    failed = []
    candidates = list(candidates)
    for gate in gates:
        name = _full_name(gate.name, [record.name for record in records])
        for candidate in candidates:
            numbers = [getattr(record, gate.end) for record in records if (record.name, record.model) == (name, candidate)]
            if not numbers or numbers[0] is None:
                failed.append(f"{candidate}: {gate.name} was not measured, so {gate.text!r} cannot be ruled out")
            elif _OPERATORS[gate.op](numbers[0], gate.number):
                failed.append(f"{candidate}: {gate.name} {gate.end} is {numbers[0]:.6g}, and {gate.text!r} fails the job")
    return failed


def _full_name(name: str, results: Iterable[str]) -> str:
    """The one record name that is meant: the name itself, or the only one that begins so."""
    names = dict.fromkeys(results)
    if name in names:
        return name
    found = [full for full in names if name in _short(full) and not full.endswith("@change")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"--fail-if: name must be that of one result, got {name!r} for {', '.join(found)}. Write the full name.")
    known = sorted({short for full in names for short in (full, *_short(full))})
    raise ValueError(f"--fail-if: name must be that of a result, got {name!r}.{did_you_mean(name, known)}")


def _short(name: str) -> tuple[str, str]:
    return name.rsplit("@", 1)[0], re.split(r"[\[@]", name, maxsplit=1)[0]
