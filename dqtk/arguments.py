"""The words of the command line: all verbs and flags. ``tests/test_cli.py`` freezes them; ``cli.py`` does what they say."""

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

from .allocate.budget import Budget, parse_budget
from .allocate.from_logs import LOSSES
from .recipes import ATTENTION, DENSITY, RECIPES, SEARCHES
from .report.rounding import ROUNDINGS

BATCH_SIZE = 8  # prompts of one call of a pipeline
FLOORS = ("bfloat16", *ROUNDINGS)


def parser() -> argparse.ArgumentParser:
    """All verbs and flags."""
    top = argparse.ArgumentParser(prog="dqtk", description="Post-training quantization for diffusers pipelines.")
    top.add_argument("--version", action="version", version=f"dqtk {importlib.metadata.version('dqtk')}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    explain = verbs.add_parser("explain", help="show what a recipe would do, or what was done to MODEL; reads no weights")
    _model_and_plan(explain)
    explain.add_argument("--roles", action="store_true", help="one row per role instead of per site")
    explain.add_argument("--output", type=Path, help="also write the plan as JSON")

    calibrate = verbs.add_parser("calibrate", help="watch the inputs of the layers that need it; resumes an existing file")
    _model_and_plan(calibrate)
    _sampling(calibrate, dtype="stored")
    _placing(calibrate)
    calibrate.add_argument("--output", type=Path, required=True, help="statistics file (.safetensors)")

    quant = verbs.add_parser("quantize", help="quantize and save a pipeline")
    _model_and_plan(quant)
    _sampling(quant, prompts_required=False, dtype="stored")
    _placing(quant)
    quant.set_defaults(batch_size=None)  # 8, or fewer: --correct and --refine need two calls at least
    quant.add_argument("--plan", type=Path, help="a plan written by explain --output, in place of a recipe")
    quant.add_argument("--stats", type=Path, help="statistics written by calibrate, in place of prompts")
    quant.add_argument("--sequential", action="store_true", help="solvers see inputs of the model as it is quantized so far")
    quant.add_argument("--correct", action="store_true", help="correct the output per noise level where that helps unseen prompts")
    quant.add_argument(
        "--refine", choices=("distill", "blocks"), help="then train it on the original's answers, where unseen prompts confirm it"
    )
    quant.add_argument("--iterations", type=_positive, metavar="N", help="of --refine (default: its own number)")
    quant.add_argument(
        "--refine-batch", type=_positive, metavar="N", help="calls per iteration of --refine distill; processes share them"
    )
    quant.add_argument(
        "--refine-guidance",
        type=float,
        metavar="SCALE",
        help="with --refine distill: lower the error of guided steps of this scale",
    )
    quant.add_argument(
        "--candidates", type=_positive, metavar="N", help="words among which vectors choose, with --refine blocks (VQ4DiT takes 2)"
    )
    quant.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="for what takes long: an interrupted run goes on, and processes share it"
    )
    quant.add_argument("--max-memory", type=float, default=2, metavar="GIB", help="of input statistics (%(default)s)")
    quant.add_argument("--stream", action="store_true", help="a layer at a time, for models larger than memory; resumes")
    quant.add_argument("--output", type=Path, required=True, help="folder for the quantized pipeline; new or empty")

    alloc = verbs.add_parser("allocate", help="which layer gets which bits within a budget")
    _allocation(alloc)

    generate = verbs.add_parser("generate", help="write one PNG per prompt, or per frame of a clip")
    generate.add_argument("model", metavar="MODEL")
    _sampling(generate)
    generate.add_argument("--keep-decoded", metavar="SIZE", help="keep decoded weights in memory, up to SIZE such as 2GiB: faster")
    generate.add_argument("--output", type=Path, required=True, help="folder for the pictures; new or empty")

    compare = verbs.add_parser("compare", help="same prompts and seeds through two pipelines: scores, sizes, times, a page")
    compare.add_argument("reference", metavar="REFERENCE")
    compare.add_argument("candidate", metavar="CANDIDATE")
    _sampling(compare)
    compare.add_argument("--output", type=Path, required=True, help="the page (NAME.html); records and pictures go to NAME-records")
    compare.add_argument(
        "--floor",
        choices=(*FLOORS, "none"),
        help="the noise floor: the reference in bf16, with other kernels or threads (default: bfloat16 for --dtype float32)",
    )
    compare.add_argument("--lpips-weights", type=Path, help="backbone weights for LPIPS (a torchvision AlexNet .pth)")

    bench = verbs.add_parser("bench", help="time, memory and disk of one step with each recipe, beside 16 bits and float32")
    _speed(bench)

    evaluate = verbs.add_parser("evaluate", help="two folders of pictures, without any model: pairs by name, or sets")
    evaluate.add_argument("reference", metavar="A")
    evaluate.add_argument("candidate", metavar="B")
    evaluate.add_argument("--metrics", nargs="+", metavar="NAME", default=["psnr", "ssim", "ms_ssim"], help="(%(default)s)")
    evaluate.add_argument(
        "--extractors", nargs="+", metavar="NAME", default=[], help="tiny-clip, inception2015, open_clip:WHERE, ..."
    )
    evaluate.add_argument(
        "--worker", metavar="NAME=COMMAND", action="append", default=[], help="a score that a program of yours computes; repeatable"
    )
    evaluate.add_argument("--unpaired", action="store_true", help="compare the sets only; names need not match")
    evaluate.add_argument("--fps", type=float, metavar="RATE", help="frames per second that clips are meant for")
    evaluate.add_argument("--output", type=Path, required=True, help="folder for results; an earlier one's features are used again")
    _gates(evaluate)

    job = verbs.add_parser("run", help="a batch job from a YAML file; resumes; torchrun -m dqtk run JOB uses many processes")
    job.add_argument("job", metavar="JOB", type=Path)
    job.add_argument("--presets", action=_Presets, help="what a job file may name as its preset: protocols of papers; and end")
    _gates(job)
    return top


def _allocation(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "model", metavar="MODEL", nargs="?", help="is measured, and the output is its plan; or none, and --sensitivity"
    )
    verb.add_argument("--budget", type=_budget, help="such as 4.5bits (average per weight), 300MB, 2TBOPs or 12ms")
    verb.add_argument("--search", metavar="NAME", help=f"recipe with a budget and candidates of its own: {', '.join(SEARCHES)}")
    verb.add_argument(
        "--widths",
        type=_positive,
        nargs="+",
        metavar="BITS",
        help="of weights, to choose among (2 3 4 5 6 8), or columns of the log (2 4 8)",
    )
    verb.add_argument(
        "--input-widths",
        type=_positive,
        nargs="+",
        metavar="BITS",
        help="of inputs, each with each of the weights' (8; 16: as they are); for budgets in BOPs or ms",
    )
    verb.add_argument("--recipes", nargs="+", metavar="NAME", help="to choose among, in place of --widths")
    verb.add_argument(
        "--around", metavar="NAME|PLAN", help="recipe or plan of the rest while a layer is measured (default: unquantized)"
    )
    verb.add_argument("--keep", metavar="PATTERN", action="append", default=[], help="keep matching sites at 16 bits; repeatable")
    verb.add_argument(
        "--group",
        metavar="GROUP=PATTERN",
        action="append",
        default=[],
        help="layers of a group (content, quality; of clips text, temporal, spatial), over their roles; repeatable",
    )
    verb.add_argument(
        "--score",
        metavar="GROUP=NAME",
        action="append",
        default=[],
        help="by which a group is measured: of pictures, such as ssim, of clips such as frame_changes (default: sqnr)",
    )
    verb.add_argument(
        "--ratio",
        nargs="+",
        metavar="NUMBER",
        help="share of 16 bits over the last group's, of the others or as GROUP=NUMBER (default: one program for all)",
    )
    verb.add_argument("--sweep", action="store_true", help="try ratios, and take the best by pictures of 8 of the prompts")
    verb.add_argument(
        "--switch",
        type=_count,
        metavar="N",
        help="then try N exchanges of levels between layers, judged on calls of their own (0: none, whatever the search has)",
    )
    verb.add_argument(
        "--parts",
        type=_positive,
        metavar="N",
        help="parts of a run (2 to 4) that may have inputs of their own; with --input-widths",
    )
    verb.add_argument("--weigh", action="store_true", help="count noise in each quarter of a run by its harm to what is painted")
    verb.add_argument("--protect", type=float, metavar="SCORE", help="keep layers at 16 bits whose best score is below")
    verb.add_argument("--costs", type=Path, metavar="FILE", help="times for a budget in ms, from bench --layers --output")
    verb.add_argument("--stats", type=Path, help="statistics written by calibrate --recipe w4a8, in place of prompts")
    _sampling(verb, prompts_required=False)
    verb.add_argument("--sensitivity", type=Path, metavar="LOG", help="YAML, layer: [score per width], higher is better; no MODEL")
    verb.add_argument("--sizes", type=Path, metavar="FILE", help="YAML, layer: number of weights; with --sensitivity")
    verb.add_argument(
        "--loss",
        choices=tuple(LOSSES),
        help="of the log; score: best sum of scores (the default), noise: scores are dB, least noise",
    )
    verb.add_argument("--output", type=Path, required=True, help="plan (or choices) as JSON; what was measured: NAME-sensitivity")


class _Presets(argparse.Action):
    """Prints the presets and ends, whatever else was asked, as ``--help`` does."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *ignored: Any) -> None:
        from .jobs.presets import as_text

        print(as_text())
        parser.exit()


def _gates(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--fail-if", metavar="CONDITION", action="append", default=[], help="exit with 3 if so, e.g. 'psnr < 30'; repeatable"
    )


def _model_and_plan(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help="embedded name, local folder or hub id")
    verb.add_argument("--recipe", metavar="NAME", help=f"for the denoisers: {', '.join(RECIPES)}")
    verb.add_argument("--text-encoders", metavar="NAME", help="recipe for the text encoders (default: leave them)")
    verb.add_argument("--keep", metavar="PATTERN", action="append", default=[], help="keep matching sites at 16 bits; repeatable")
    verb.add_argument(
        "--set", metavar="PATTERN=RECIPE", action="append", default=[], help="another recipe for matching sites; repeatable"
    )
    verb.add_argument(
        "--during",
        metavar="BEGIN-END[=RECIPE]",
        action="append",
        default=[],
        help="another recipe in a part of a run, such as 0.9-1=w8a8 (0: most noise); none: inputs in 16 bits there; repeatable",
    )
    verb.add_argument("--attention", metavar="NAME", help=f"how denoisers attend to themselves: {', '.join(ATTENTION)}")
    verb.add_argument("--density", type=float, metavar="SHARE", help=f"of the blocks of attention that are computed ({DENSITY})")


def _sampling(verb: argparse.ArgumentParser, prompts_required: bool = True, dtype: str = "float32") -> None:
    verb.add_argument(
        "--prompts", nargs="+", metavar="FILE|TEXT", required=prompts_required, help="a text file, one per line, or prompts"
    )
    verb.add_argument("--num-prompts", type=_positive, metavar="N", help="use the first N")
    verb.add_argument("--steps", type=_positive, help="num_inference_steps (default: the pipeline's or its family file's)")
    verb.add_argument("--guidance", type=float, help="guidance_scale (default: the pipeline's)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--batch-size", type=_positive, default=BATCH_SIZE, metavar="N", help=f"prompts per call ({BATCH_SIZE})")
    verb.add_argument(
        "--dtype", choices=("stored", "float32", "bfloat16", "float16"), default=dtype, help="compute dtype (%(default)s)"
    )
    verb.add_argument("--device", help="such as cpu or cuda:1 (default: the CUDA device if there is one)")


def _placing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--placement", metavar="HOW", help="steps of a run that are learned from: evenly (the default), every or around:LEVEL (0.4)"
    )


def _speed(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help="embedded name, local folder or hub id")
    verb.add_argument(
        "--recipes", nargs="+", metavar="NAME", default=[], help="for the denoiser; none for a MODEL that is quantized already"
    )
    verb.add_argument("--size", type=_positive, metavar="PIXELS", help="height and width (default: the pipeline's own)")
    verb.add_argument("--height", type=_positive, metavar="PIXELS", help="in place of --size")
    verb.add_argument("--width", type=_positive, metavar="PIXELS", help="in place of --size")
    verb.add_argument("--num-frames", type=_positive, metavar="N", help="of a video pipeline (default: its own)")
    verb.add_argument("--batch", type=_positive, default=1, help="pictures or clips at once; guidance doubles it (%(default)s)")
    verb.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="compute dtype (%(default)s)")
    verb.add_argument("--repeats", type=_positive, metavar="N", default=7, help="rounds (%(default)s)")
    verb.add_argument("--threads", type=_positive, metavar="N", help="torch's threads (default: torch's own choice)")
    verb.add_argument("--device", help="such as cpu or cuda:1 (default: the CUDA device if there is one)")
    verb.add_argument("--keep-decoded", metavar="SIZE", help="also with decoded weights kept in memory, up to SIZE such as 2GiB")
    verb.add_argument("--layers", action="store_true", help="also every distinct layer by itself: the cost table")
    verb.add_argument("--output", type=Path, help="also write all of it as JSON; a new file")


def _budget(text: str) -> Budget:
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error  # argparse would not show the text of a ValueError


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"value must be a whole number from 0 up, got {text!r}.")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"value must be a positive integer, got {text!r}.")
    return int(text)
