"""The command line: ``dqtk explain | calibrate | allocate | quantize | generate | compare | bench | evaluate | run``.

MODEL is an embedded pipeline's name (tiny-pixart, tiny-sdxl, tiny-wan), a local diffusers folder, or a hub id. Errors that a person
can mend are one line on stderr and exit status 2; Ctrl-C exits with 130 and leaves no half-written output.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .allocate.command import choices_from_logs, plan_from_model
from .arguments import BATCH_SIZE, parser
from .calibrate import Stats
from .calibrate import calibrate as run_calibrate
from .calibrate.placement import Placement
from .calls import call_arguments, denoisers
from .checkpoint import check_output, written_whole
from .checks import batch_for, check_asked, check_runs
from .explain import human, totals
from .installed import installed_plan, summary
from .native.library import converts_bfloat16
from .nn import keep_decoded
from .nn.kept import size_of
from .plan import Plan
from .processes import processes
from .prompt_sets import read_prompts
from .quantize import STATS, quantize, save
from .quantize import plan as make_plan
from .recipes import recipe_named
from .report.rounding import check_rounding
from .resolve import oracle_for
from .solved import calibrate_together
from .sources import find_device, load_pipeline, local_folder, meta_pipeline, meta_target, read_json, readable
from .spec import Refiner
from .streaming import quantize_folder
from .wanted import PLANNING, flags_of, given, placement_of, planning_of, refiner_of

LARGE = 10**8  # weights


@contextmanager
def _plain_warnings(verb: str) -> Iterator[None]:
    """While open, a warning is one line as an error is. The place in the code is said of those that are not for users."""

    def said(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        text = " ".join(str(message).split())
        if category is UserWarning:
            return f"dqtk {verb}: warning: {text}\n"
        return f"dqtk {verb}: {category.__name__}: {text} ({filename}:{lineno})\n"

    before, warnings.formatwarning = warnings.formatwarning, said
    try:
        yield
    finally:
        warnings.formatwarning = before


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    run = {
        "explain": _explain,
        "calibrate": _calibrate,
        "allocate": _allocate,
        "quantize": _quantize,
        "generate": _generate,
        "compare": _compare,
        "bench": _bench,
        "evaluate": _evaluate,
        "run": _run,
    }
    try:
        signal.signal(signal.SIGTERM, _terminate)  # as Ctrl-C: what is half-written is removed on the way out
        with _plain_warnings(options.verb):
            status = run[options.verb](options, shlex.join(["dqtk", *words]))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, SafetensorError) as error:
        print(f"dqtk {options.verb}: error: {error}", file=sys.stderr)
        return 2
    except (_Terminated, KeyboardInterrupt) as stop:
        said, status = ("terminated", 143) if isinstance(stop, _Terminated) else ("interrupted", 130)
        keeps = getattr(options, "stream", False) or getattr(options, "checkpoint", None) is not None
        goes_on = keeps or options.verb in ("calibrate", "allocate", "run")
        left = "run the same command again to go on" if goes_on else "nothing half-written was left"
        print(f"dqtk {options.verb}: {said}; {left}", file=sys.stderr)
        return status
    return status or 0


def _call_kwargs(options: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    kwargs = call_arguments(pipe, None)
    if options.steps is not None:
        kwargs["num_inference_steps"] = options.steps
    if options.guidance is not None:
        kwargs["guidance_scale"] = options.guidance
    return kwargs


def _check_new_file(path: Path, verb: str) -> None:
    if path.exists():
        raise ValueError(f"{verb}: output must be a new file, got {path}, which exists. Choose another, or remove it.")


def _check_writable(path: Path, verb: str) -> None:
    """An error at once, and with the path that was given, where nothing can be written; not after hours of work."""
    there = next(part for part in path.absolute().parents if part.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{verb}: output must be where one can write, got {path}: {there} is not. Choose another.")


def _explain(options: argparse.Namespace, command: str) -> None:
    if options.output is not None:
        _check_new_file(options.output, "explain")
        _check_writable(options.output, "explain")
    planning = None if options.recipe is None else planning_of(options)
    pipe = meta_pipeline(options.model)
    plan = installed_plan(pipe)
    if planning is not None or not plan.components:
        plan = make_plan(pipe, **(planning or planning_of(options)))
    elif given(options, PLANNING):
        raise ValueError(f"{flags_of(PLANNING[1:])} must come with --recipe, got none. {options.model} is quantized.")
    print(plan.explain(sites=not options.roles))
    if options.output is not None:
        _write_json(options.output, plan.to_json())


def _write_json(path: Path, data: Any) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(data, indent=1))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _calibrate(options: argparse.Namespace, command: str) -> None:
    _check_writable(options.output, "calibrate")
    prompts, placement = read_prompts(options.prompts, options.num_prompts), placement_of(options.placement)
    planning = planning_of(options)
    pipe = load_pipeline(options.model, options.dtype, find_device(options.device))
    plan = make_plan(pipe, **planning)
    if not plan.needs_stats:
        print(f"recipe {plan.recipe} needs no calibration; nothing was written")
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"seed": options.seed, "batch_size": options.batch_size, "placement": placement}
    stats = run_calibrate(pipe, prompts, plan, **how, call_kwargs=_call_kwargs(options, pipe), output=options.output)
    sites = len({key.site for key in stats.inputs})
    print(f"{options.output}: {stats.num_prompts} prompts, ranges of {sites} inputs, {len(stats.calls)} calls to learn from")


def _allocate(options: argparse.Namespace, command: str) -> None:
    _check_new_file(options.output, "allocate")
    _check_writable(options.output, "allocate")
    if options.model is None:
        chosen = choices_from_logs(options)
        _write_json(options.output, chosen.to_json())
        print(f"{chosen.table()}\n{options.output}: the choices")
        return
    from .report.allocation import write_allocation

    made = plan_from_model(options, _call_kwargs)
    if made is None:  # one of several processes, and not the first
        return
    _write_json(options.output, made.to_json())
    folder = options.output.with_name(f"{options.output.stem}-sensitivity")
    page = write_allocation(made, folder / "page.html", options.model, command)
    print(f"{made.table()}\n{options.output}: the plan; {page}: what other budgets would buy")


def _quantize(options: argparse.Namespace, command: str) -> None:
    check_output(options.output, "quantize")
    _check_writable(options.output, "quantize")
    learning = ("prompts", "stats", "sequential", "correct", "refine")
    if options.stream and any(getattr(options, name) for name in learning):
        flags = ", ".join(f"--{name}" for name in learning[:-1])
        raise ValueError(f"--stream must stand without {flags} and --refine, got one. It learns nothing.")
    refine, placement = refiner_of(options), placement_of(options.placement)
    if options.stream and options.during:
        raise ValueError(
            "--during must be left out with --stream, got both. The times of a run are found with the whole pipeline: quantize in "
            "memory, or stream a --plan whose times dqtk.policy.fixed has found."
        )
    if options.placement and (options.stream or options.stats or not options.prompts):
        raise ValueError("--placement must come with --prompts alone, got it without, or with --stats. It is of calibration.")
    if options.stream and options.checkpoint:
        raise ValueError("--checkpoint must be left out with --stream, which keeps what is done beside its output, got both.")
    if options.plan is None:
        planning = planning_of(options)
        meta = meta_target(options.model) if options.stream else meta_pipeline(options.model)
        plan = make_plan(meta, **planning)  # patterns that match nothing fail before any weight is read
    elif given(options, PLANNING):
        raise ValueError(f"--plan must stand alone, got {flags_of(PLANNING, 'or')} too. A plan has decided already.")
    else:
        plan = Plan.from_json(read_json(options.plan, "--plan"), str(options.plan))
    if options.stream:
        dtype = None if options.dtype == "stored" else getattr(torch, options.dtype)
        device = find_device(options.device) if options.device else None
        quantize_folder(options.model, options.output, plan, dtype=dtype, device=device)
        made = plan
    else:
        made = _quantize_in_memory(options, plan, refine, placement)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
        print(totals(made))
        print(f"{options.output}: recipe {plan.recipe}, plan {plan.hash}")


def _quantize_in_memory(options: argparse.Namespace, plan: Plan, refine: Refiner | None, placement: Placement) -> Plan:
    """The plan, with the attention that came out of it: orders, blocks and densities as calibration found them."""
    prompts = read_prompts(options.prompts, options.num_prompts) if options.prompts else None
    stats = _read_stats(options.stats) if options.stats else None
    me = processes()
    if me.world > 1 and options.checkpoint is None:
        raise ValueError("--checkpoint FOLDER must be given where several processes share the work, got none.")
    taught = options.correct or refine is not None
    calibrated = plan.needs_stats or taught
    if calibrated and stats is None and prompts is None:
        what = f"recipe {plan.recipe}" if plan.needs_stats else "--correct" if options.correct else "--refine"
        raise ValueError(f"--prompts or --stats must be given for {what}, got neither. It is calibrated.")
    if options.placement and not calibrated:
        raise ValueError(
            f"--placement must be left out for recipe {plan.recipe}, got {options.placement}. It learns nothing from inputs."
        )
    if stats is not None and not calibrated:
        raise ValueError(f"--stats must be left out for recipe {plan.recipe}, got {options.stats}. It learns nothing from inputs.")
    batch = options.batch_size or batch_for(len(prompts or ()), BATCH_SIZE, taught)
    if taught and stats is None and prompts is not None:
        check_runs(plan, prompts, batch)
    pipe = load_pipeline(
        options.model, options.dtype, me.device if me.world > 1 and not options.device else find_device(options.device)
    )
    kwargs, memory = _call_kwargs(options, pipe), int(options.max_memory * 2**30)
    asked: dict[str, Any] = {"correct": options.correct, "refine": refine, "sequential": options.sequential, "max_memory": memory}
    check_asked(pipe, plan, **asked, checkpoint=options.checkpoint, world=me.world, call_kwargs=kwargs)
    if calibrated and options.dtype == "stored":
        _say_slow(pipe)
    if calibrated and stats is None and prompts is not None:
        how: dict[str, Any] = {"seed": options.seed, "batch_size": batch, "keep_calls": taught}
        how |= {"call_kwargs": kwargs, "placement": placement}
        if options.checkpoint is None:
            stats = run_calibrate(pipe, prompts, plan, **how)
        else:
            stats = calibrate_together(pipe, prompts, plan, options.checkpoint / STATS, me, **how)
    quantize(pipe, plan, stats, **asked, checkpoint=options.checkpoint, call_kwargs=kwargs)
    if me.first:
        save(pipe, options.output)
    me.wait()
    return replace(plan, attention=installed_plan(pipe).attention) if plan.attention else plan


def _say_slow(pipe: Any) -> None:
    """A hint where a large model is about to learn in a dtype that this CPU has no units for."""
    large = sum(p.numel() for part in denoisers(pipe).values() for p in part.parameters()) >= LARGE
    if large and (pipe.device.type, pipe.dtype) == ("cpu", torch.bfloat16) and converts_bfloat16():
        print("dqtk quantize: this CPU has no bfloat16 units: --dtype float32 is faster, in twice the memory", file=sys.stderr)


def _read_stats(path: Path) -> Stats:
    if not path.is_file():
        raise ValueError(f"--stats: file must exist, got {path}. Write it with dqtk calibrate.")
    with readable(f"--stats: {path}", "a file written by dqtk calibrate"):
        return Stats.load(path)


def _generate(options: argparse.Namespace, command: str) -> None:
    from .report.generate import generate_frames, make_tasks

    check_output(options.output, "generate")
    _check_writable(options.output, "generate")
    prompts = read_prompts(options.prompts, options.num_prompts)
    if options.keep_decoded is not None:
        size_of(options.keep_decoded)  # a wrong size fails before any weight is read
    pipe = load_pipeline(options.model, options.dtype, find_device(options.device))
    if options.keep_decoded is not None:
        kept = keep_decoded(pipe, options.keep_decoded)
        print(f"decoded weights kept: {human(kept.num_bytes)}, of {len(kept.paths)} layers; {len(kept.left)} found no room")
    tasks = make_tasks(prompts, options.seed, 1)
    lines = []
    with written_whole(options.output, "generate") as folder:
        for start in range(0, len(tasks), options.batch_size):
            part = tasks[start : start + options.batch_size]
            for frame in generate_frames(pipe, part, _call_kwargs(options, pipe)):
                frame.image.save(folder / f"{frame.name}.png")
                whose = {"clip": frame.task.id} if frame.name != frame.task.id else {}
                lines.append(json.dumps({"id": frame.name, **whose, "prompt": frame.task.prompt, "seed": frame.task.seed}))
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    clips = "" if len(lines) == len(tasks) else f", frames of {len(tasks)} {'clip' if len(tasks) == 1 else 'clips'}"
    print(f"{options.output}: {len(lines)} {'picture' if len(lines) == 1 else 'pictures'}{clips}")


def _compare(options: argparse.Namespace, command: str) -> None:
    from .report.compare import compare
    from .report.page import write_page

    prompts = read_prompts(options.prompts, options.num_prompts)
    beside = options.output.with_name(f"{options.output.stem}-records")
    check_output(beside, "compare")
    _check_new_file(options.output, "compare")
    _check_writable(options.output, "compare")
    device = find_device(options.device)
    _check_floor(options)  # before any weight is read
    check_rounding("compare", options.floor, device)
    reference, candidate = (load_pipeline(model, options.dtype, device) for model in (options.reference, options.candidate))
    floor, floor_name = _floor(options, device)
    folders = [local_folder(model) for model in (options.reference, options.candidate)]
    result = compare(
        reference,
        candidate,
        prompts,
        seed=options.seed,
        batch_size=options.batch_size,
        call_kwargs=_call_kwargs(options, reference),
        oracle=oracle_for(reference, prompts),
        floor=floor,
        floor_name=floor_name,
        reference_name=options.reference,
        candidate_name=options.candidate,
        reference_folder=folders[0],
        candidate_folder=folders[1],
        plan_summary=summary(candidate),
        lpips_weights=options.lpips_weights,
    )
    result.save(beside)
    write_page(result, options.output, command=command)
    print(result.table())
    print(f"{options.output}: page; {beside}: records and pictures")


def _check_floor(options: argparse.Namespace) -> None:
    if options.floor == "bfloat16" and options.dtype != "float32":
        raise ValueError(
            f"compare: --floor bfloat16 must come with --dtype float32, got {options.dtype}. Take kernels, or leave it out."
        )


def _floor(options: argparse.Namespace, device: Any) -> tuple[Any, str]:
    """The third pipeline of ``compare`` and its name. By default bf16, and none where that is no finer rounding's floor."""
    if options.floor == "none" or (options.floor is None and options.dtype != "float32"):
        return None, ""
    if options.floor in (None, "bfloat16"):
        return load_pipeline(options.reference, "bfloat16", device), "bf16 against fp32"
    return options.floor, f"other {options.floor}"


def _bench(options: argparse.Namespace, command: str) -> None:
    from .bench import bench_step, record_step
    from .bench.timing import threads

    if options.size and (options.height or options.width):
        raise ValueError("--size must stand without --height and --width, got both. It is both sides of a square.")
    if options.output is not None:
        _check_new_file(options.output, "bench")
        _check_writable(options.output, "bench")
    device = find_device(options.device)
    for name in options.recipes:
        recipe_named(name)  # wrong names and sizes fail before any weight is read
    if options.keep_decoded is not None:
        size_of(options.keep_decoded)
    sides = {"height": options.height or options.size, "width": options.width or options.size}
    with threads(options.threads):
        # The pipeline is gone once its step is recorded: text encoders can be larger than the denoiser.
        step = record_step(
            load_pipeline(options.model, options.dtype, device), **sides, num_frames=options.num_frames, batch=options.batch
        )
        how: dict[str, Any] = {"repeats": options.repeats, "layers": options.layers, "kept_decoded": options.keep_decoded}
        found = bench_step(step, options.recipes, **how, model=options.model)
    print(found.table())
    if options.output is not None:
        _write_json(options.output, found.to_json() | {"command": command})
        print(f"{options.output}: the same as JSON")


def _evaluate(options: argparse.Namespace, command: str) -> int:
    from .jobs.evaluate import evaluate
    from .jobs.gates import parse_gate

    gates = [parse_gate(text) for text in options.fail_if]
    workers = {}
    for text in options.worker:
        name, equals, program = text.partition("=")
        if not equals:
            raise ValueError(f"--worker must be NAME=COMMAND, got {text!r}. For example image_reward='python worker.py'.")
        workers[name] = program
    records = evaluate(
        options.reference,
        options.candidate,
        options.output,
        metrics=options.metrics,
        extractors=options.extractors,
        unpaired=options.unpaired,
        gates=gates,
        fps=options.fps,
        workers=workers,
    )
    return _results(options.output, records, gates)


def _run(options: argparse.Namespace, command: str) -> int:
    from .jobs.gates import parse_gate
    from .jobs.run import run
    from .jobs.spec import read_job

    gates = [parse_gate(text) for text in options.fail_if]
    job = read_job(options.job)
    return _results(Path(job.output), run(job, gates), gates)


def _results(output: Path, records: Sequence[Any], gates: Sequence[Any]) -> int:
    """Print the table and what a gate says; 3 if one fails."""
    from .jobs.gates import tripped

    if os.environ.get("RANK", "0") != "0":
        return 0  # the first process says what came out, and decides
    print((output / "report.md").read_text(encoding="utf-8"))
    print(f"{output}: results.json, samples.parquet, report.md, report.tex, report.html")
    variants = read_json(output / "results.json", "results")["variants"]
    candidates = [name for name, facts in variants.items() if facts["role"] == "candidate"] or list(variants)
    failed = tripped(gates, records, candidates)
    for line in failed:
        print(f"fail: {line}", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
