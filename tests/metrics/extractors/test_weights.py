"""Weights files: the order of search, hashes, and what is said of files that are missing, damaged or something else."""

import hashlib
import subprocess
import sys

import pytest
import torch
from dqtk.metrics import lpips
from dqtk.metrics.extractors.weights import MissingWeights, check_names, find_weights, load_state, readable, sha256_of
from safetensors.torch import save_file

URL = "https://example.org/net-12345678.pth"
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def find(weights=None, files=("net.pth", "other.pth")):
    return find_weights("fid", "weights", files, URL, weights)


def test_search_order(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path / "own"))
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    with pytest.raises(MissingWeights) as missing:
        find()
    for part in (f"{tmp_path}/own/net.pth or {tmp_path}/own/other.pth or {hub}/net.pth", f"Download {URL}", "$DQTK_WEIGHTS"):
        assert part in str(missing.value)
    for path in (hub / "other.pth", hub / "net.pth", tmp_path / "own" / "other.pth", tmp_path / "mine.bin"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find(tmp_path / "mine.bin") == tmp_path / "mine.bin"
    assert find() == tmp_path / "own" / "other.pth"
    monkeypatch.setenv("DQTK_WEIGHTS", "")
    assert find() == hub / "net.pth"
    (hub / "net.pth").unlink()
    assert find() == hub / "other.pth"


def test_an_explicit_path_is_not_replaced_by_another_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path))
    (tmp_path / "net.pth").touch()
    with pytest.raises(MissingWeights, match=r"fid: weights must be a file, got .*mine\.pth \(not there\)\. Download https"):
        find(tmp_path / "mine.pth")


def test_lpips_has_the_same_exception():
    assert lpips.MissingWeights is MissingWeights


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_round_trip_with_hash(tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(STATE, path)
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    state, digest = load_state("fid", path, wanted[:8])
    assert digest == wanted == sha256_of(path)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_wrong_hash_is_refused_before_reading(tmp_path):
    path = tmp_path / "net.pth"
    path.write_bytes(b"not weights at all")
    with pytest.raises(
        ValueError, match=rf"fid: SHA-256 of .*net\.pth must begin with 12345678, got [0-9a-f]{{8}}\. Download {URL} "
    ):
        load_state("fid", path, "12345678", url=URL)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("part", [0, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path, suffix, part):
    path = tmp_path / f"net.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(STATE, path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"fid: .*net\.{suffix} must be readable weights, got: .+ Download or write it again\."):
        load_state("fid", path)


@pytest.mark.parametrize(
    ("content", "found"),
    [([1, 2], "list"), ({"state_dict": STATE}, r"a dict with keys \['state_dict'\]"), (torch.ones(2), "Tensor")],
)
def test_other_content_is_refused(tmp_path, content, found):
    path = tmp_path / "net.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"must hold a state dict \(names to tensors\), got {found}\. Save model\.state_dict"):
        load_state("fid", path)


def test_pickled_code_is_not_run(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"must be readable weights, got: Weights only load failed"):
        load_state("fid", path)


def test_shards_hash_to_one(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    one, two = tmp_path / "a", tmp_path / "b"
    assert len({sha256_of(one), sha256_of(two), sha256_of(one, two), sha256_of(two, one)}) == 4


def test_missing_weights_pass_through(tmp_path):
    with pytest.raises(MissingWeights, match="there is none"), readable("fid", tmp_path):
        raise MissingWeights("there is none")


def test_names_must_agree(tmp_path):
    check_names("fid", tmp_path, {"a", "b"}, {"b", "a"})
    with pytest.raises(
        ValueError, match=r"network's 2 tensors, got 1 missing \['b'\] and 1 unknown \['c'\]\. It is the file of another"
    ):
        check_names("fid", tmp_path, {"a", "b"}, {"a", "c"})


def test_the_package_stays_light():
    """Importing the contract and the weights loads no model library."""
    code = (
        "import sys, dqtk.metrics, dqtk.metrics.extractors.contract, dqtk.metrics.extractors.weights;"
        "print([name for name in ('torchvision', 'transformers', 'open_clip', 'torchmetrics') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
