"""FID's Inception on random weights under the published names: blocks, heads, preprocessing, and files that must be refused."""

import pytest
import torch
from torch import nn

torchvision = pytest.importorskip("torchvision", reason="the blocks are torchvision's; pip install 'dqtk[clip]'")
from dqtk.metrics.extractors.contract import Extractor, checked_rows  # noqa: E402
from dqtk.metrics.extractors.inception import FILES, HEADS, SHA256_PREFIX, Inception, InceptionNetwork  # noqa: E402
from dqtk.metrics.extractors.resize import resize_clean, resize_legacy, resize_pytorch  # noqa: E402
from dqtk.metrics.extractors.weights import MissingWeights, sha256_of  # noqa: E402
from torchvision.models import inception as blocks  # noqa: E402


@pytest.fixture(scope="module")
def state():
    """Random tensors that keep activations of order one, batch norms that do something."""
    torch.manual_seed(0)
    network = InceptionNetwork()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    nn.init.constant_(network.fc.bias, 7.0)
    return network.state_dict()


@pytest.fixture(scope="module")
def path(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / FILES[0]
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(path):
    return Inception(path, check=False)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 40, 52), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def features(extractor, images):
    return extractor.encode_all(images)


def test_names_and_shapes_are_the_published_ones(state):
    """From pytorch-fid's file: torchvision's names without the auxiliary head, 1008 classes."""
    assert len(state) == 566
    shapes = {
        "Conv2d_1a_3x3.conv.weight": [32, 3, 3, 3],
        "Mixed_5b.branch1x1.conv.weight": [64, 192, 1, 1],
        "Mixed_5d.branch_pool.bn.running_var": [64],
        "Mixed_6a.branch3x3dbl_3.conv.weight": [96, 96, 3, 3],
        "Mixed_6d.branch7x7dbl_2.conv.weight": [160, 160, 7, 1],
        "Mixed_7a.branch7x7x3_4.bn.bias": [192],
        "Mixed_7c.branch3x3dbl_3b.conv.weight": [384, 384, 3, 1],
        "fc.weight": [1008, 2048],
        "fc.bias": [1008],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes


def test_shapes_of_the_heads(features):
    assert {head: list(getattr(features, head).shape) for head in HEADS} == {head: [3, dim] for head, dim in HEADS.items()}
    for head in HEADS:
        rows = getattr(features, head)
        assert rows.dtype == torch.float32
        assert rows.std(dim=0).mean() > 1e-3  # the three images are told apart


def test_batch_of_one_equals_batch_of_three(extractor, images, features):
    for i in range(3):
        one = extractor.encode_all(images[i : i + 1])
        for head in HEADS:
            assert torch.allclose(getattr(one, head)[0], getattr(features, head)[i], rtol=1e-5, atol=1e-5)


def test_blocks_are_torchvisions_but_for_the_pools(state, monkeypatch):
    """Torchvision's own blocks, their pooling function exchanged from outside, give the same maps."""
    reference = blocks.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    reference.load_state_dict(state)
    ours = InceptionNetwork()
    ours.load_state_dict(state)
    reference.eval(), ours.eval()
    mean, largest = torch.nn.functional.avg_pool2d, torch.nn.functional.max_pool2d

    def tensorflow_mean(x, **kwargs):
        return mean(x, count_include_pad=False, **kwargs)

    cases = {"Mixed_5c": 256, "Mixed_6a": 288, "Mixed_6d": 768, "Mixed_7a": 768, "Mixed_7b": 1280, "Mixed_7c": 2048}
    for name, channels in cases.items():
        x = torch.rand(2, channels, 9, 7)
        with torch.no_grad():
            got, plain = getattr(ours, name)(x), getattr(reference, name)(x)
            with monkeypatch.context() as patch:
                patch.setattr(blocks.F, "avg_pool2d", largest if name == "Mixed_7c" else tensorflow_mean)
                expected = getattr(reference, name)(x)
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5), name
        assert torch.equal(got, plain) == name.endswith("a")  # the reductions pool by maximum in both


def test_order_of_the_layers(state, extractor, images, features):
    """Torchvision's forward pass through our blocks ends at the same pooled features and, but for the bias, logits."""
    reference = blocks.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        setattr(reference, f"Mixed_{name}", getattr(extractor.network, f"Mixed_{name}"))
    reference.load_state_dict(state)
    reference.eval()
    seen = {}
    reference.avgpool.register_forward_hook(lambda module, args, output: seen.update(pool=output.flatten(1)))
    hook = reference.Mixed_6d.register_forward_hook(lambda module, args, output: seen.update(map=output))
    with torch.no_grad():
        logits = reference((resize_clean(images, 299) - 128) / 128)
    hook.remove()
    assert torch.allclose(features.pool, seen["pool"], rtol=1e-5, atol=1e-5)
    assert torch.allclose(features.logits, logits - 7.0, rtol=1e-4, atol=1e-4)
    assert seen["map"].shape == (3, 768, 17, 17)
    # Row, column, channel: 7 channels of pixel (0, 0), then of (0, 1).
    assert torch.allclose(features.spatial[:, :7], seen["map"][:, :7, 0, 0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(features.spatial[:, 17 * 7 : 18 * 7], seen["map"][:, :7, 1, 0], rtol=1e-5, atol=1e-5)


def test_preprocesses(path, images, monkeypatch):
    """What reaches the network: resize and scale of each published variant."""
    wanted = {
        "clean": (resize_clean(images, 299) - 128) / 128,
        "legacy": (resize_legacy(images, 299) - 128) / 128,
        "pytorch": resize_pytorch(images, 299) / 127.5 - 1,
    }
    for name, expected in wanted.items():
        extractor = Inception(path, preprocess=name, check=False)
        seen = []
        monkeypatch.setattr(extractor, "network", lambda x, seen=seen: seen.append(x) or (x, x, x))
        extractor.encode_all(images)
        assert torch.allclose(seen[0], expected, atol=1e-6)
        assert extractor.preprocess == name


def test_identity_and_heads(extractor, images, features, path):
    assert isinstance(extractor, Extractor)
    assert (extractor.name, extractor.dim, extractor.preprocess) == ("inception2015", 2048, "clean")
    assert extractor.sha256 == sha256_of(path)
    assert extractor.source == str(path)
    assert extractor.comparable is extractor.sha256.startswith(SHA256_PREFIX) is False
    spatial = extractor.with_head("spatial")
    assert (spatial.name, spatial.dim) == ("inception2015[spatial]", 2023)
    assert spatial.network is extractor.network
    assert torch.allclose(checked_rows(spatial, images), features.spatial)
    assert extractor.name == "inception2015"
    with pytest.raises(ValueError, match=r"head must be one of \['pool', 'logits', 'spatial'\], got 'fid'\."):
        extractor.with_head("fid")


def test_images_outside_the_contract(extractor, images):
    with pytest.raises(ValueError, match=r"inception2015: images must be uint8, got torch\.float32\. Floats do not say"):
        extractor.encode_images(images / 255)


def test_a_file_without_counters_and_in_half_precision_loads(state, tmp_path, features, images):
    """Ports made before PyTorch counted batches lack ``num_batches_tracked``."""
    path = tmp_path / FILES[1]
    torch.save({name: value.half() for name, value in state.items() if "num_batches" not in name}, path)
    pool = Inception(path, check=False).encode_images(images[:1])
    assert torch.allclose(pool[0], features.pool[0], rtol=0.05, atol=0.02)


def test_unknown_hash_preprocess_and_place(path, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"inception2015: SHA-256 of .* must begin with 6726825d, got [0-9a-f]{8}\. Download https://"
    ):
        Inception(path)
    with pytest.raises(ValueError, match=r"preprocess must be one of \['clean', 'legacy', 'pytorch'\], got 'tf'\."):
        Inception(path, preprocess="tf")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("DQTK_WEIGHTS", raising=False)
    with pytest.raises(
        MissingWeights, match=rf"weights must be a file, got .*{FILES[0]} or .*{FILES[1]} \(not there\)\. Download "
    ):
        Inception()
    monkeypatch.setenv("DQTK_WEIGHTS", str(path.parent))
    assert Inception(check=False).source == str(path)


def test_truncated_and_other_networks_files(state, path, tmp_path):
    cut = tmp_path / "cut.pth"
    with path.open("rb") as file:
        cut.write_bytes(file.read(1 << 20))
    with pytest.raises(
        ValueError, match=r"inception2015: .*cut\.pth must be readable weights, got: .*\. Download or write it again"
    ):
        Inception(cut, check=False)
    other = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, other)
    with pytest.raises(
        ValueError, match=r"must hold the network's 472 tensors, got 472 missing .* and 1 unknown \['features\.0\.weight'\]"
    ):
        Inception(other, check=False)
    # Torchvision's ImageNet weights have the same names, but 1000 classes (and an auxiliary head).
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, other)
    with pytest.raises(
        ValueError, match=r"fc\.weight in .* must be \[1008, 2048\], got \[1000, 2048\]\. It is another network's file"
    ):
        Inception(other, check=False)
