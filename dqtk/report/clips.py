"""The section of the report page with pairs of clips: a player each, and how the score runs over the frames of all of them."""

import math
import statistics
from collections.abc import Sequence
from html import escape

from .charts import Line, legend, line_chart
from .comparison import Comparison, Measure, Row
from .film import frame_size
from .markup import folded, number, row, section, table
from .numbers import DASH, MINUS, TIMES
from .player import MAX_BYTES, RATE, FrameValues, player_html, stride_of
from .sections import NAMES, facts_html, png_size

MAX_PAGE = 8 * MAX_BYTES  # of all sheets on a page


def clips_section(comparison: Comparison, max_pairs: int) -> str:
    """The worst pairs as players; empty for ``max_pairs`` 0."""
    rows = comparison.worst_first()
    shown = _fitting(rows[:max_pairs])
    if not shown:
        return ""
    score = next(iter(shown[0].frame_scores), None)
    which = "All pairs" if len(shown) == len(rows) else f"The {len(shown)} worst of {len(rows)} pairs"
    words = f"{which}, worst first" + (f" by {NAMES.get(score, score)}." if score else ".")
    words += f" Both clips and |original {MINUS} candidate|, {TIMES}4, move together, {RATE} frames a second;"
    words += " the line above each scrubber is the score of each frame."
    if any(_stride(pair) > 1 for pair in shown):
        words += " Long clips are shown in some of their frames, lossless; all of them are in the records."
    cards = "".join(_card(pair, score, comparison, index) for index, pair in enumerate(shown, start=1))
    return section("pairs", "Clips", "", gallery(words, cards))


def gallery(words: str, cards: str) -> str:
    """A note with a button that plays all, and the cards."""
    button = '<button type="button" class="play-all" aria-pressed="false" hidden>Play all</button>'
    return f'<div class="bar-row"><p class="note">{escape(words)}</p>{button}</div><ol class="clips">{cards}</ol>'


def _fitting(rows: Sequence[Row]) -> list[Row]:
    """The first of them, as many as a page can carry, at least one."""
    found: list[Row] = []
    total = 0
    for pair in rows:
        total += (len(pair.images["reference"]) + len(pair.images["candidate"])) // _stride(pair)
        if found and total > MAX_PAGE:
            break
        found.append(pair)
    return found


def _stride(pair: Row) -> int:
    return stride_of(len(pair.images["reference"]) + len(pair.images["candidate"]), pair.num_frames)


def _card(pair: Row, score: str | None, comparison: Comparison, index: int) -> str:
    line = None
    if score is not None:
        unit = next((m.unit for m in comparison.measures if m.name == score), "")
        line = FrameValues(name=NAMES.get(score, score), values=pair.frame_scores[score], unit=unit)
    films = [("original", pair.images["reference"]), ("candidate", pair.images["candidate"])]
    size = frame_size(png_size(pair.images["reference"]), pair.num_frames)
    words = f"pair {index}: {pair.prompt}"
    stage = player_html(films, pair.num_frames, size, words=words, difference=True, score=line)
    return f'<li class="clip">{stage}<div class="words"><p class="prompt">{escape(pair.prompt)}</p>{facts_html(pair)}</div></li>'


def frames_section(comparison: Comparison) -> str:
    """The first score over the frames, mean over clips, as a chart and as a table; empty for pictures."""
    rows = comparison.rows
    name = next(iter(rows[0].frame_scores), None) if rows else None
    measure = next((m for m in comparison.measures if m.name == name), None)
    if name is None or measure is None:
        return ""
    label = NAMES.get(name, measure.label)
    lines = [Line(label="mean over clips", style="own", values=_means([r.frame_scores[name] for r in rows], measure))]
    if len(rows) > 1:
        worst = comparison.worst_first()[0].frame_scores[name]
        lines.append(Line(label="the worst clip", style="same", values=_means([worst], measure)))
    axis = f"{label}, {measure.unit}" if measure.unit else label
    chart = line_chart(f"{label} per frame", "frame", axis, lines)
    columns = list(lines)  # the floor is far above, and would flatten the curves
    if rows[0].frame_floor:
        columns.append(Line(label="noise floor", style="", values=_means([r.frame_floor[name] for r in rows], measure)))
    cells = [
        row(str(i + 1), [number(DASH if not math.isfinite(line.values[i]) else f"{line.values[i]:.2f}") for line in columns])
        for i in range(len(lines[0].values))
    ]
    listed = table("Score per frame", ("Frame", *(line.label for line in columns)), cells, style="tall dense")
    note = "Each frame's score: a fall towards the end is drift, a wave follows the groups of frames that the autoencoder packs."
    body = f'{legend(lines)}<div class="charts"><figure>{chart}</figure></div>{folded("Score per frame as a table", listed)}'
    return section("frames", "Score over the frames", note, body)


def _means(values: Sequence[tuple[float, ...]], measure: Measure) -> tuple[float, ...]:
    """Per frame the mean over clips, equal frames counted as the score's cap."""
    cap = measure.detail.get("cap", math.inf)
    return tuple(statistics.fmean(min(value, cap) for value in frame) for frame in zip(*values, strict=True))
