"""A bench as text: one table of the step, what ran, and one row per distinct layer where they were measured."""

from dqtk.costs import Cost, timed_as
from dqtk.explain import human, table
from dqtk.spec import canonical, describe

from .ceilings import Ceilings
from .run import Bench, Row
from .timing import Spread


def text_of(bench: Bench) -> str:
    """All tables of a bench."""
    blocks = [_head(bench), _steps(bench), *_notes(bench.rows), _ceilings(bench.ceilings)]
    if bench.costs is not None:
        blocks.append(_layers(bench))
    return "\n\n".join(block for block in blocks if block)


def _head(bench: Bench) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in bench.asked.items()) or "the pipeline's own size"
    calls = "one call" if bench.num_calls == 1 else f"{bench.num_calls} calls"
    where = ", ".join(bench.hardware[name] for name in ("accelerator", "processor") if name in bench.hardware)
    return (
        f"{bench.model} {bench.component} ({bench.class_name}): one step ({calls}), batch {bench.batch}, {sizes}, {bench.dtype}\n"
        f"{where}, {bench.hardware['threads']} threads, {bench.device}; torch {bench.versions['torch']}; "
        f"medians of {bench.repeats} rounds; {bench.codes}"
    )


def _steps(bench: Bench) -> str:
    half = bench.rows[0].name
    header = ["variant", "step", f"x {half}", "x float32", "disk", "weights", "in a step", "outside", "roofline"]
    return table(header, [_step(row) for row in bench.rows])


def _step(row: Row) -> list[str]:
    if row.seconds is None:
        return [row.name, "emulated", "", "", human(row.disk_bytes), "", "", "", ""]
    return [
        row.name,
        duration(row.seconds.median),
        _ratio(row.over_16_bit),
        _ratio(row.over_float32) + ("" if row.paired else " *"),
        human(row.disk_bytes),
        "" if row.weight_bytes is None else human(row.weight_bytes),
        "not measured" if row.memory_bytes is None else human(row.memory_bytes),
        "" if row.outside is None else f"{100 * row.outside:.0f} %",
        "" if row.roofline is None else f"{100 * row.roofline:.0f} %",
    ]


def duration(seconds: float) -> str:
    """``1.234 s`` or ``5.678 ms``."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.3f} ms"


def _ratio(spread: Spread | None) -> str:
    """``1.62 (1.58 to 1.66)``: median and quartiles."""
    return "" if spread is None else f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _notes(rows: tuple[Row, ...]) -> list[str]:
    """What ran in each variant, and what the table cannot say."""
    lines = [f"{row.name}: {num} x {kernel}" for row in rows for kernel, num in row.kernels.items()]
    lines += [f"{row.name}: {human(row.kept_bytes)} of its weights are decoded ones" for row in rows if row.kept_bytes]
    lines += [f"{row.name}: {row.note}" for row in rows if row.note]
    if any(not row.paired for row in rows):
        lines.append(
            "*: not in the same rounds as float32 (too large to stand beside it), but each in rounds with the 16-bit model"
        )
    lines.append(
        "in a step: weights and what a step takes beside them, workspaces included; outside: share of the step outside the layers "
        "that are quantized; roofline: least time of those layers by the ceilings, over their time"
    )
    return ["\n".join(lines)]


def _ceilings(ceilings: Ceilings) -> str:
    rates = [f"{name} {rate / 1e9:.0f} GFLOP/s ({ceilings.by[name]})" for name, rate in ceilings.rates.items()]
    return f"ceilings here: {', '.join(rates)}, memory {ceilings.bandwidth / 1e9:.1f} GB/s ({ceilings.by['bandwidth']})"


def _layers(bench: Bench) -> str:
    assert bench.costs is not None
    calls = [shape for shapes in bench.costs.calls.values() for shape in shapes]
    header = ["layer", "calls", "bits", "time", f"x {bench.rows[0].name}", "x float32", "kernel"]
    rows, seen = [], set()
    for cost in bench.costs.costs:
        key = cost.shape, canonical(timed_as(cost.spec))
        if key not in seen:
            rows.append(_layer(cost, calls.count(cost.shape)))
        seen.add(key)
    return table(header, rows)


def _layer(cost: Cost, num_calls: int) -> list[str]:
    ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in (cost.over_16_bit, cost.over_float32)]
    time = "emulated" if cost.milliseconds is None else duration(cost.milliseconds / 1e3)
    return [str(cost.shape), str(num_calls), describe(timed_as(cost.spec)), time, *ratios, cost.kernel]
