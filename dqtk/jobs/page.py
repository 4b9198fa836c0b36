"""The page of a job: quality against size, every score, the pictures that lost most, what was not measured."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from dqtk.report.clips import gallery
from dqtk.report.film import png_of, sheet_of
from dqtk.report.markup import number, row, section, table
from dqtk.report.page import blank_page
from dqtk.report.plane import Dot, plane
from dqtk.report.player import player_html
from dqtk.report.records import Record
from dqtk.report.sections import again_section

from .asked import Shown
from .features import Picture, read_pictures
from .reduce import Values

MAX_SAMPLES, MAX_VARIANTS = 6, 8  # pictures are carried in the page


def page(
    job: Mapping[str, Any],
    shown: Sequence[Shown],
    records: Sequence[Record],
    values: Mapping[str, Values],
    facts: Mapping[str, Mapping[str, Any]],
    cells: tuple[list[str], list[list[str]]],
    warnings: Sequence[str],
) -> str:
    """One self-contained page. ``job``: what was asked for; ``cells``: head and rows of the main table, one row per variant."""
    name = str(job.get("name", "job"))
    num = len(shown[0].pictures)
    what = ("clip" if shown[0].of_clips else "picture") + ("" if num == 1 else "s")
    kicker = f"A job of {len(shown)} variants, {num} {what} each"
    body = [f"<header><p class='kicker'>{kicker}</p><h1>{escape(name)}</h1></header>"]
    score = next((r.name for r in records if r.name.endswith("@vs_original") and r.value is not None), None)
    if score is not None:
        body.append(_plane(score, records, facts))
    body.append(_scores(cells, {record.name: str(record.extra.get("label", "")) for record in records}))
    if warnings:
        body.append(section("warnings", "Beware", "", "<ul>" + "".join(f"<li>{escape(w)}</li>" for w in warnings) + "</ul>"))
    if score is not None:
        body += [_pictures(score, original, shown, records, values) for original in shown if original.role == "original"]
    missing = [r for r in records if r.not_measured is not None]
    unmeasured = [row(r.name, [f"<td>{escape(r.not_measured or '')}</td>"], small=r.model) for r in missing]
    if unmeasured:
        body.append(section("missing", "Not measured", "", table("Not measured", (), unmeasured)))
    body.append(_again(job, shown, records))
    return blank_page(name, "\n".join(body))


def _again(job: Mapping[str, Any], shown: Sequence[Shown], records: Sequence[Record]) -> str:
    """What one cites: how many prompts and pictures, seeds, settings, versions, machines, and what exact matches count for."""
    pictures = [picture for variant in shown for picture in variant.pictures]
    num_prompts = len({picture.prompt for picture in pictures if picture.prompt})
    settings: dict[str, Any] = {"prompts": num_prompts or "unknown", "pictures per variant": len(shown[0].pictures)}
    given = {key: value for key, value in job.items() if key not in ("name", "prompts", "call", "output")}
    settings |= {key.replace("_", " "): _listed(value) for key, value in given.items() if value not in (None, [], {})}
    settings |= dict(job.get("call", {}))
    dtypes = {f"computed in, {v.name}": v.made["dtype"] for v in shown if v.made is not None}
    caps = {
        r.name: f"{r.extra['cap']:g} {r.unit}".strip() for r in records if r.value is not None and r.extra.get("cap") is not None
    }
    exact = {
        f"equal pictures, {r.model}": f"{r.extra['exact_matches']} of {r.num_samples}"
        for r in records
        if r.value is not None and "exact_matches" in r.extra
    }
    tables: dict[str, Mapping[str, Any]] = {"Settings": settings}
    if dtypes:
        tables["Dtypes"] = dtypes
    if caps:
        tables["Equal pictures"] = {**{f"count in {name} as": cap for name, cap in caps.items()}, **exact}
    tables |= {"Versions": _joined(r.versions for r in records), "Machine": _joined(r.hardware for r in records)}
    words = (
        "Each picture has its own seed, in samples.parquet: a CPU generator with that seed gives its starting noise in any batch."
    )
    painted = any(picture.seed is not None for picture in pictures)
    return again_section(words if painted else "", "", tables)


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _joined(maps: Iterable[Mapping[str, str] | None]) -> dict[str, str]:
    """What all say, or everything that they say where they differ."""
    found: dict[str, dict[str, None]] = {}
    for known in maps:
        for key, value in (known or {}).items():
            found.setdefault(key, {})[value] = None
    return {key: " and ".join(values) for key, values in found.items()}


def _plane(score: str, records: Sequence[Record], facts: Mapping[str, Mapping[str, Any]]) -> str:
    dots = [
        Dot(label=r.model, x=facts[r.model]["bytes_at_16_bit"] / 1e6, y=r.value, low=r.low, high=r.high)
        for r in records
        if r.name == score and r.value is not None and facts.get(r.model, {}).get("bytes_at_16_bit")
    ]
    if not dots:
        return ""
    note = (
        "Weights in memory: packed codes and scales, and 16 bits for what is not quantized. Bars are 95 % intervals over prompts."
    )
    return section("plane", "Quality against size", note, plane(score, "weights, MB", score, dots))


def _scores(cells: tuple[list[str], list[list[str]]], labels: Mapping[str, str]) -> str:
    """A row per score and a column per variant: scores have long names, and there are more of them."""
    head, rows = cells
    lines = [
        row(head[i], [_number(line[i]) for line in rows], small=labels.get(head[i].split(" ")[0], "")) for i in range(1, len(head))
    ]
    note = "Small: 95 % bootstrap intervals over prompts. @change: paired difference from the original."
    note += " Scores of whole sets (Fréchet distances, KID, CMMD, precision and the like, Inception Score) have no interval."
    return section("scores", "Scores", note, table("Scores", ["score", *(line[0] for line in rows)], lines))


def _number(cell: str) -> str:
    value, _, interval = cell.partition(" (")
    return number(value, small=interval.removesuffix(")"))


def _pictures(score: str, original: Shown, shown: Sequence[Shown], records: Sequence[Record], values: Mapping[str, Values]) -> str:
    """The samples that some candidate lost most on, a row each: the original's picture, then every variant's with its score."""
    name = score.split("@")[0]
    others = [v for v in shown if v.original == original.name and name in values[v.name].pairs][:MAX_VARIANTS]
    candidates = [values[v.name].pairs[name] for v in others if v.role == "candidate"] or [
        values[v.name].pairs[name] for v in others
    ]
    if not candidates:
        return ""
    sign = 1 if next(r.higher_is_better for r in records if r.name == score) else -1
    worst = sorted(range(len(original.pictures)), key=lambda i: min(sign * found[i] for found in candidates))[:MAX_SAMPLES]
    note = f"The {len(worst)} of {len(original.pictures)} samples that lost most by {name}, worst first."
    if original.of_clips:
        cards = "".join(_player(index, name, original, others, values) for index in worst)
        return section(f"pictures-{original.name}", f"Clips of {original.name}", "", gallery(f"{note} All move together.", cards))
    lines = []
    for index in worst:
        picture = original.pictures[index]
        drawn = [_cell(picture, "")]
        drawn += [_cell(v.pictures[index], _words(name, values[v.name].pairs[name][index])) for v in others]
        lines.append(row(picture.prompt or picture.id, drawn, small=picture.id if picture.prompt else ""))
    heads = ["prompt", original.name, *(v.name for v in others)]
    body = table("Pictures", heads, lines, numbers_from=len(heads), style="pictures")
    return section(f"pictures-{original.name}", f"Pictures of {original.name}", note, body)


def _player(index: int, name: str, original: Shown, others: Sequence[Shown], values: Mapping[str, Values]) -> str:
    """One sample's clips, of the original and of every variant with its score, played together."""
    clip = original.pictures[index]
    shown = [(original.name, clip)]
    shown += [(f"{v.name}: {_words(name, values[v.name].pairs[name][index])}", v.pictures[index]) for v in others]
    films = [(label, _frames(sample)) for label, sample in shown]
    size = films[0][1][0].size
    sheets = [(label, png_of(sheet_of(frames))) for label, frames in films]
    words = clip.prompt or clip.id
    stage = player_html(sheets, len(clip.frames), size, words=f"{clip.id}: {words}", difference=len(sheets) == 2)
    return f'<li class="clip">{stage}<div class="words"><p class="prompt">{escape(words)}</p></div></li>'


def _frames(clip: Picture) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in read_pictures(clip.frames).permute(0, 2, 3, 1).contiguous().numpy()]


def _words(name: str, value: float) -> str:
    return "equal" if math.isinf(value) else f"{name} {value:.4g}"


def _cell(picture: Picture, words: str) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode()
    kind = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".bmp": "bmp"}.get(picture.file.suffix.lower(), "png")
    image = f'<img alt="{escape(picture.prompt or picture.id)}" src="data:image/{kind};base64,{data}">'
    return f"<td>{image}<small>{escape(words)}</small></td>"
