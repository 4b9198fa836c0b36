"""The table of a model's VBench results, from its own files and those of VBench's program together.

python -m dqtk.metrics.vbench out/vbench/w4a4_eval_results.json official_eval_results.json --original
out/vbench/fp_eval_results.json
"""

import argparse
import sys
from collections.abc import Sequence

from .changes import paired_changes
from .protocols import EIGHT
from .results import combined, read_results
from .suite import DIMENSIONS
from .totals import totals


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dqtk.metrics.vbench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", metavar="EVAL_RESULTS", help="files of one model, each with other dimensions")
    parser.add_argument("--original", nargs="+", default=[], metavar="EVAL_RESULTS", help="those of the model it is made from")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(table(options.results, options.original)))
    except ValueError as error:
        print(f"vbench: error: {error}", file=sys.stderr)
        return 2
    return 0


def table(files: Sequence[str], original: Sequence[str] = ()) -> list[str]:
    """Markdown: a line per dimension with its paired change where there is an original, the totals or what they lack."""
    mine = combined([read_results(file) for file in files])
    changes = paired_changes(mine, combined([read_results(file) for file in original])) if original else {}
    lines = ["| dimension | raw | change | videos |", "| --- | --- | --- | --- |"]
    for name in DIMENSIONS:
        if name in mine:
            cells = [name, f"{mine[name].score:.4f}", "", str(len(mine[name].videos))]
            if (change := changes.get(name)) is not None:
                found = change.interval
                span = "" if found.low is None else f" ({found.low:+.4f} to {found.high:+.4f})"
                cells[2] = f"{found.estimate:+.4f}{span}" + (f", {change.num_unmatched} unmatched" if change.num_unmatched else "")
            lines.append(f"| {' | '.join(cells)} |")
    raw = {name: scored.score for name, scored in mine.items()}
    found_totals = totals(raw)
    for word in ("quality", "semantic", "total"):
        value = getattr(found_totals, word)
        lines.append(f"| **{word}** | {'not measured' if value is None else f'{value:.4f}'} | | |")
    row, lacking = EIGHT.row(raw)
    shown = " / ".join("-" if value is None else f"{value:.2f}" for value in row)
    lines += ["", f"{EIGHT.name}: {shown}" + (f" (without {', '.join(lacking)})" if lacking else "")]
    if found_totals.missing:
        lines.append(f"missing: {', '.join(found_totals.missing)}")
        lines.append(f"mean_of_reported (of {len(found_totals.reported)} raw scores): {found_totals.mean_of_reported:.4f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
