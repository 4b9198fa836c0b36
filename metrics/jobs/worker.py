"""A worker: scores of pictures or clips, computed in an environment of their own, for ``dqtk run`` and ``dqtk evaluate``.

    python -m venv /opt/image-reward && /opt/image-reward/bin/pip install image-reward
    dqtk evaluate A B --metrics psnr --worker image_reward="/opt/image-reward/bin/python worker.py image_reward" --output OUT

Needs nothing but Python and what the score itself needs; copy it, and write a function like those below for another score. What
``dqtk`` and a worker say to each other is in docs/preference.md.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence

Score = Callable[[Sequence[list[str]], Sequence[str | None]], Sequence[float]]


def serve(score: Score, *, name: str, version: str, of: str = "pictures", higher_is_better: bool = True, **more: object) -> None:
    """Answer until the input ends. ``score(files, prompts)``: files per sample, one of a picture, all frames of a clip."""
    out = _answers()
    greeting = {"protocol": 1, "name": name, "version": version, "of": of, "higher_is_better": higher_is_better, **more}
    print(json.dumps(greeting), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            values = score([s["files"] for s in asked["samples"]], [s["prompt"] for s in asked["samples"]])
            answer: dict[str, object] = {"values": [float(value) for value in values]}
        except Exception as error:  # noqa: BLE001 - whatever a model raises is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"id": asked["id"], **answer}), file=out, flush=True)


def _answers() -> object:
    """Standard output for answers alone: whatever a library prints goes to standard error from here on."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def brightness() -> None:
    """The mean grey of a picture, 0 to 255: to see that all is connected. Needs Pillow."""
    from PIL import Image, ImageStat

    def score(files: Sequence[list[str]], prompts: Sequence[str | None]) -> list[float]:
        return [ImageStat.Stat(Image.open(file).convert("L")).mean[0] for (file,) in files]

    serve(score, name="brightness", version="1", label="Brightness", digits=2)


def image_reward() -> None:
    """ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977). ``pip install image-reward``, with the versions that it pins."""
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0")

    def score(files: Sequence[list[str]], prompts: Sequence[str | None]) -> list[float]:
        return [model.score(prompt or "", file) for (file,), prompt in zip(files, prompts, strict=True)]

    serve(score, name="ImageReward-v1.0", version=importlib.metadata.version("image-reward"), label="ImageReward")


def hpsv3() -> None:
    """HPSv3 (Ma et al. 2025, arXiv 2508.03789). ``pip install hpsv3``; a GPU."""
    from hpsv3 import HPSv3RewardInferencer

    model = HPSv3RewardInferencer(device="cuda")

    def score(files: Sequence[list[str]], prompts: Sequence[str | None]) -> list[float]:
        found = model.reward(image_paths=[file for (file,) in files], prompts=[prompt or "" for prompt in prompts])
        return [row[0].item() for row in found]  # mean and spread

    serve(score, name="HPSv3", version=importlib.metadata.version("hpsv3"), label="HPSv3", digits=3)


def q_align() -> None:
    """Q-Align's quality of single pictures (Wu et al. 2023, arXiv 2312.17090). ``pip install pyiqa``; a GPU."""
    import pyiqa

    model = pyiqa.create_metric("qalign", device="cuda")

    def score(files: Sequence[list[str]], prompts: Sequence[str | None]) -> list[float]:
        return [float(model(file)) for (file,) in files]

    serve(score, name="Q-Align quality", version=importlib.metadata.version("pyiqa"), label="Q-Align", digits=3)


SCORES = {function.__name__: function for function in (brightness, image_reward, hpsv3, q_align)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("score", choices=SCORES)
    SCORES[parser.parse_args().score]()
