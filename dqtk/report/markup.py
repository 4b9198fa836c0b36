"""The few pieces of HTML that the page repeats. Text arguments are escaped here; ``body`` and cells are HTML already."""

from collections.abc import Sequence
from html import escape


def section(name: str, title: str, note: str, body: str) -> str:
    """A section with its heading and, unless ``note`` is empty, a small paragraph."""
    words = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>{words}{body}</section>'


def table(label: str, columns: Sequence[str], rows: Sequence[str], *, numbers_from: int = 1, style: str = "") -> str:
    """A table in a frame that scrolls by itself (so that the page never does), reachable by keyboard, named ``label``.

    ``columns`` are the headings (none: no head); those from index ``numbers_from`` on are right-aligned; ``rows`` come from
    ``row``.
    """
    heads = "".join(
        f'<th scope="col"{" class=number" if index >= numbers_from else ""}>{escape(name)}</th>'
        for index, name in enumerate(columns)
    )
    head = f"<thead><tr>{heads}</tr></thead>" if columns else ""
    frame = f'<div class="{" ".join(["scroll", *style.split()])}" tabindex="0" role="region" aria-label="{escape(label)}">'
    return f"{frame}<table>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def row(name: str, cells: Sequence[str] = (), *, small: str = "") -> str:
    """A table row: its heading with a small line below, and its cells."""
    below = f"<small>{escape(small)}</small>" if small else ""
    return f'<tr><th scope="row">{escape(name)}{below}</th>{"".join(cells)}</tr>'


def number(text: str, *, small: str = "") -> str:
    """A right-aligned cell, with a small line below."""
    below = f"<small>{escape(small)}</small>" if small else ""
    return f'<td class="number">{escape(text)}{below}</td>'


def text(words: str, *, mono: bool = False) -> str:
    """A left-aligned cell."""
    return f"<td{' class=mono' if mono else ''}>{escape(words)}</td>"


def folded(summary: str, body: str) -> str:
    """Content that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def plural(num: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"
