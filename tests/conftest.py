"""Untrained embedded pipelines as saved folders, built once; tests load from them and may change what they loaded."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dqtk.resolve import call_kwargs_for

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Saved untrained pipelines by name: "pixart" and "sdxl", fp32."""
    from dqtk.pipelines.tiny.build import new_pixart, new_sdxl
    from dqtk.pipelines.tiny.train_vae import new_vae

    folders = {}
    for seed, (name, new) in enumerate({"pixart": new_pixart, "sdxl": new_sdxl}.items()):
        torch.manual_seed(seed)
        folders[name] = tmp_path_factory.mktemp("tiny") / name
        new(new_vae()).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def load_tiny(tiny_folders):
    """Function (name, dtype=float32) -> a pipeline of one's own."""
    from diffusers import DiffusionPipeline

    def load(name, dtype=torch.float32):
        pipe = DiffusionPipeline.from_pretrained(tiny_folders[name], dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="session")
def load_wan():
    """Function (dtype=float32) -> an untrained tiny-wan of one's own: it calls its denoiser once for each half of guidance."""
    from dqtk.pipelines.tiny.build_wan import new_wan
    from dqtk.pipelines.tiny.train_wan_vae import new_wan_vae

    torch.manual_seed(2)
    built = new_wan(new_wan_vae())
    for module in built.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)

    def load(dtype=torch.float32):
        pipe = copy.deepcopy(built)
        for module in (pipe.transformer, pipe.text_encoder, pipe.vae):
            torch.nn.Module.to(module, dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="session")
def small_clip():
    """How pipelines of ``load_wan`` are called: latents [B, 8, 2, 8, 8], three steps."""
    return {"height": 32, "width": 32, "num_frames": 3, "max_sequence_length": 20, "num_inference_steps": 3}


@pytest.fixture(scope="session")
def draw():
    """Function (pipe, **kwargs) -> latents of one guided denoising step from a fixed seed.

    Tensors are first moved to memory of their own: what safetensors maps from a file starts at any address, and torch's float32
    matmuls round differently by alignment (seen: 3e-5 between a plain pipeline and its own copy).
    """

    def call(pipe, **kwargs):
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.data = tensor.data.clone()
        pipe.set_progress_bar_config(disable=True)
        options = call_kwargs_for(pipe) | {"num_inference_steps": 1, "output_type": "latent"} | kwargs
        generator = torch.Generator().manual_seed(3)
        return pipe("a large red circle on a plain blue background", generator=generator, **options).images

    return call


@pytest.fixture(scope="session")
def launched():
    """Function (number of processes, *words of the command line) -> stdout of ``torchrun -m dqtk``, which must succeed.

    Not ``accelerate launch``, which starts one process on a CPU whatever it is asked for (1.15).
    """

    def run(num, *words):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num]
        command = [str(word) for word in (*command, "-m", "dqtk", *words)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=one_thread)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout

    return run


@pytest.fixture
def bare():
    """A small module of no library: what ``quantize`` takes besides pipelines."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64, bias=False), torch.nn.GELU(), torch.nn.Linear(64, 16)
    ).requires_grad_(False)


@pytest.fixture
def meta_pipe():
    """A stand-in for a pipeline: a bare transformer and a bare text encoder on the meta device."""
    with torch.device("meta"):
        blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"a": _attention(), "ff": _feed_forward()}) for _ in range(2)])
        transformer = torch.nn.ModuleDict({"proj_in": torch.nn.Linear(8, 64), "blocks": blocks, "proj_out": torch.nn.Linear(64, 8)})
        encoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([_attention()])})
    return SimpleNamespace(components={"transformer": transformer, "text_encoder": encoder, "scheduler": object()})


def _attention():
    projections = {name: torch.nn.Linear(64, 64) for name in ("to_q", "to_k", "to_v", "to_out")}
    return torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict(projections)})


def _feed_forward():
    return torch.nn.ModuleDict({"fc1": torch.nn.Linear(64, 256), "fc2": torch.nn.Linear(256, 64)})


@pytest.fixture(autouse=True)
def brief_learning(request, monkeypatch):
    """Learned rounding of whole models is cut short: their tests ask whether it runs, tests/methods and test_orderings how well."""
    if "methods" in request.path.parts or request.path.name == "test_orderings.py":
        return
    from dqtk.methods import adaround

    learn = adaround._learn

    def brief(weight, low, high, gram, solver):
        return learn(weight, low, high, gram, dataclasses.replace(solver, iterations=min(solver.iterations, 10)))

    monkeypatch.setattr(adaround, "_learn", brief)


@pytest.fixture(autouse=True)
def brief_books(request, monkeypatch):
    """The same of weights of vectors: words are drawn from the weight, and beams are narrow."""
    if {"methods", "nn", "refine"} & set(request.path.parts) or request.path.name == "test_orderings.py":
        return
    from dqtk.methods import shared_books, solve, vectors

    search = solve.beam_search

    def drawn(x, form, importance=None, beam=8):
        places = torch.randint(len(x), (form.books, form.words), generator=torch.Generator().manual_seed(0))
        return (x[places] / 2.0 ** torch.arange(form.books)[:, None, None]).half()

    def brief(weight, spec, inputs, solver, *rest):
        return search(weight, spec, inputs, dataclasses.replace(solver, beam=1, rounds=1), *rest)

    monkeypatch.setattr(vectors, "learned_books", drawn)
    monkeypatch.setattr(shared_books, "learned_books", drawn)
    monkeypatch.setattr(solve, "beam_search", brief)
