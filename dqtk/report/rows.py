"""From one batch of every pipeline to rows: scores of each pair, what an oracle says of it, and the pixels themselves.

A clip is scored frame by frame, and counts as the mean over its frames, as papers do (Wan, VBench and the quantization papers all
average PSNR and SSIM of frames); a frame that is equal counts as the cap of its score, and a clip is equal when all its frames are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .comparison import OracleScore, Row
from .film import png_of, sheet_of
from .generate import Batch, Task, to_tensor
from .scores import ImageScore, mean_over_frames, one_per_picture, values_of_frames

Oracle = Callable[[Any, str], Any]


def rows_of(batch: list[Task], outputs: Mapping[str, Batch], scores: Sequence[ImageScore], oracle: Oracle | None) -> list[Row]:
    """A row per task. ``outputs``: what "reference", "candidate" and maybe "floor" made; scores of clips are left out of pictures.

    Raises ``ValueError`` where pipelines make clips of different lengths or sizes.
    """
    shapes = {side: (len(made.clips[0]), made.clips[0][0].size) for side, made in outputs.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{side} {num} of {width}x{height}" for side, (num, (width, height)) in shapes.items())
        raise ValueError(f"compare: pipelines must make equally many frames of one size, got {listed}. Pass num_frames and size.")
    num_frames = shapes["reference"][0]
    fit = [score for score in scores if num_frames > 1 or not score.clips]
    found = {
        side: {score.name: _values(score, made.clips, outputs["reference"].clips) for score in fit}
        for side, made in outputs.items()
        if side != "reference"
    }
    caps = {score.name: score.cap for score in fit}
    rows = []
    for i, task in enumerate(batch):
        clips = {side: made.clips[i] for side, made in outputs.items()}
        frames = {side: {name: tuple(values[i]) for name, values in of.items()} for side, of in found.items()}
        picked = {side: {name: mean_over_frames(values, caps[name]) for name, values in of.items()} for side, of in frames.items()}
        per_frame = {
            side: {name: values for name, values in of.items() if len(values) > 1} if num_frames > 1 else {}
            for side, of in frames.items()
        }
        rows.append(
            Row(
                id=task.id,
                prompt_index=task.prompt_index,
                repetition=task.repetition,
                prompt=task.prompt,
                seed=task.seed,
                scores=picked["candidate"],
                floor=picked.get("floor", {}),
                oracle={side: _judge(oracle, clip, task.prompt) for side, clip in clips.items()} if oracle is not None else {},
                images={side: png_of(sheet_of(clip)) for side, clip in clips.items()},
                num_frames=num_frames,
                frame_scores=per_frame["candidate"],
                frame_floor=per_frame.get("floor", {}),
            )
        )
    return rows


def _values(
    score: ImageScore, candidate: Sequence[Sequence[Image.Image]], reference: Sequence[Sequence[Image.Image]]
) -> list[list[float]]:
    """Of each pair: one value of a picture, one per frame of a clip, or one of the whole clip."""
    if score.clips:
        pairs = [tuple(to_tensor(clip)[None] for clip in pair) for pair in zip(candidate, reference, strict=True)]
        return [one_per_picture(score.name, score.function, score.function(a, b), 1).tolist() for a, b in pairs]
    length = len(reference[0])
    mine, theirs = ([frame for clip in clips for frame in clip] for clips in (candidate, reference))
    values = values_of_frames(score.name, score.function, len(mine), lambda part: (to_tensor(mine[part]), to_tensor(theirs[part])))
    return [values[start : start + length] for start in range(0, len(values), length)]


def _judge(oracle: Oracle, clip: Sequence[Image.Image], prompt: str) -> OracleScore:
    said = oracle(clip[0] if len(clip) == 1 else np.stack([np.asarray(frame) for frame in clip]), prompt)
    if isinstance(said, (int, float)):
        return OracleScore(mean=float(said), all_correct=None)
    return OracleScore(mean=float(said.mean), all_correct=bool(said.all_correct))
