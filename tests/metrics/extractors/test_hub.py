"""Model folders: a path, $DQTK_WEIGHTS, a cached hub id; and never the network."""

import json

import pytest
from dqtk.metrics.extractors.hub import find_folder, find_weights_in
from dqtk.metrics.extractors.weights import MissingWeights
from huggingface_hub import constants


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache; no connection is possible."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a connection was opened"))
    monkeypatch.delenv("DQTK_WEIGHTS", raising=False)
    return tmp_path / "hub"


def folder_with(folder, *files):
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_a_path_is_taken_as_it_is(cache, tmp_path):
    folder = folder_with(tmp_path / "mine", "config.json")
    assert find_folder("clip", folder, "config.json") == folder
    assert find_folder("clip", str(folder), "config.json") == folder


def test_own_folder_comes_before_the_cache(cache, tmp_path, monkeypatch):
    snapshot = folder_with(cache / "models--owner--name" / "snapshots" / "abc", "config.json")
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert find_folder("clip", "owner/name", "config.json") == snapshot
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path / "own"))
    assert find_folder("clip", "owner/name", "config.json") == snapshot
    own = folder_with(tmp_path / "own" / "owner" / "name", "config.json")
    assert find_folder("clip", "owner/name", "config.json") == own


def test_missing_says_how_to_get_it(cache, tmp_path):
    with pytest.raises(
        MissingWeights, match=r"clip: model must be a folder or a hub id in the cache, got 'owner/none' \(not there\)\. Run "
    ):
        find_folder("clip", "owner/none", "config.json")
    with pytest.raises(MissingWeights, match=r"got '.*/none' \(not there\)\. Pass the path of a folder or a hub id"):
        find_folder("clip", tmp_path / "none", "config.json")


def test_folder_of_something_else(cache, tmp_path):
    folder = folder_with(tmp_path / "mine", "a.txt", "b.txt")
    with pytest.raises(ValueError, match=r"mine must be a model folder with config\.json, got a\.txt, b\.txt\. Check the path\."):
        find_folder("clip", folder, "config.json")


def test_weights_in_order_and_shards(tmp_path):
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    folder = folder_with(tmp_path / "mine", "pytorch_model.bin")
    assert find_weights_in("clip", folder, names) == [folder / "pytorch_model.bin"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}))
    with pytest.raises(MissingWeights, match=r"must have all shards of .*, got none of \['1\.safetensors', '2\.safetensors'\]"):
        find_weights_in("clip", folder, names)
    for name in "12":
        (folder / f"{name}.safetensors").touch()
    assert find_weights_in("clip", folder, names) == [folder / "1.safetensors", folder / "2.safetensors"]
    with pytest.raises(MissingWeights, match=r"must have one of x\.bin, got 1\.safetensors, 2\.safetensors, model\."):
        find_weights_in("clip", folder, ("x.bin",))
