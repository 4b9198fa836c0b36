"""What a model and an oracle are, by their contents."""

import importlib

import torch
from safetensors.torch import save_file

from dqtk.checkpoint import DIGESTS
from dqtk.jobs import identity
from dqtk.jobs.features import judge_identity


def test_a_model_is_the_contents_of_its_files_and_not_its_path(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
        save_file({"w": torch.ones(3)}, tmp_path / name / "unet" / "model.safetensors")
    (tmp_path / "b" / "README.md").write_text("a card")
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "x").write_text("y")
    plain = identity.model_identity(tmp_path / "a")
    assert identity.model_identity(tmp_path / "b") == plain
    (tmp_path / "b" / "model_index.json").write_text('{"scheduler": 1}')
    assert identity.model_identity(tmp_path / "b") != plain
    save_file({"w": torch.full((3,), 2.0)}, tmp_path / "a" / "unet" / "model.safetensors")
    assert identity.model_identity(tmp_path / "a") != plain


def test_hashes_that_others_made_are_believed_and_nothing_is_read_twice(tmp_path, monkeypatch):
    """Gigabytes: the hub names files by their SHA-256, dqtk writes digests of all tensors into the header."""
    read, sha256 = [], identity.sha256
    monkeypatch.setattr(identity, "sha256", lambda path: (read.append(path.name), sha256(path))[1])
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "blobs" / ("0" * 64)).write_text("weights")
    (tmp_path / "model" / "hub.safetensors").symlink_to(tmp_path / "blobs" / ("0" * 64))
    save_file({"w": torch.ones(3)}, tmp_path / "model" / "own.safetensors", metadata={DIGESTS: '{"w": "1"}'})
    (tmp_path / "model" / "config.json").write_text("{}")
    first = identity.model_identity(tmp_path / "model")
    assert identity.model_identity(tmp_path / "model") == first
    assert read == ["config.json"]
    save_file({"w": torch.ones(3)}, tmp_path / "model" / "own.safetensors", metadata={DIGESTS: '{"w": "2"}'})
    assert identity.model_identity(tmp_path / "model") != first


def test_an_oracle_is_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "an_oracle_of_tests.py").write_text("def judge(image, prompt): return 1\n")
    judge = importlib.import_module("an_oracle_of_tests").judge
    before = judge_identity(judge)
    assert judge_identity(judge) == before
    (tmp_path / "an_oracle_of_tests.py").write_text("def judge(image, prompt): return 0\n")
    assert judge_identity(judge) != before
