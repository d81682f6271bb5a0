"""What a user asks of any learner: name these pictures, keep what was learned, and say what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import metatutor
from metatutor import (
    MAML,
    MANN,
    SNAIL,
    ConvNet,
    EpisodeSpec,
    NearestPixels,
    Pixels,
    Prototypical,
    Relation,
    Reptile,
    Scratch,
    TrainConfig,
    backbone,
    evaluate,
    load,
    train,
)
from metatutor.data.images import from_arrays
from metatutor.episodes import Episode
from metatutor.learner import Learner, NetworkLearner

generator = torch.Generator().manual_seed(0)
PICTURES = (torch.rand(3, 1, 28, 28, generator=generator) < 0.2).float()  # ink on paper


@pytest.mark.parametrize("labels", [["cup", "bar", "dot"], [0, 2, 7], (1.5, None, "x"), torch.tensor([3, 1, 2])])
def test_labels_may_be_anything(labels: Any):
    expected = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    for learner in (NearestPixels(), Prototypical(ConvNet(filters=4)), MAML(ConvNet(3, filters=4))):
        assert set(learner.predict(PICTURES, labels, PICTURES)) <= set(expected)
    assert NearestPixels().predict(PICTURES, labels, PICTURES.flip(0)) == expected[::-1]


@pytest.mark.parametrize(
    "given",
    [
        PICTURES.double(),
        PICTURES[:, 0],
        PICTURES.numpy(),
        (255 * PICTURES).byte(),
        (255 * PICTURES).long().numpy(),
        PICTURES.bool(),
        list(PICTURES),
        [picture[0].numpy() for picture in PICTURES],
    ],
)
def test_pictures_are_taken_as_they_come(given: Any):
    assert NearestPixels().predict(given, "abc", PICTURES.flip(0)) == ["c", "b", "a"]
    assert NearestPixels().predict(PICTURES, "abc", given) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            255 * PICTURES,
            "support_images must be floats from 0 (paper) to 1 (ink) or bytes from 0 to 255, got torch.float",
        ),
        (2 * PICTURES - 1, "from -1 to 1; divide by 255, or undo the normalisation"),
        (PICTURES / 0, "support_images must be finite real numbers"),
        (1 - PICTURES, "support_images look like dark strokes on white paper, but here 0 is paper and 1 is ink"),
        (PICTURES.expand(3, 3, 28, 28).movedim(1, -1), "support_images are channels-last, [3, 28, 28, 3]"),
        (
            PICTURES[0, 0],
            "support_images must be [image, channel, height, width] or [image, height, width], got",
        ),
        ([PICTURES[0], PICTURES[1, :, :9]], "support_images must all be of one size, got [(1, 9, 28), (1, 28, 28)]"),
        ([], "support_images must all be of one size, got none"),
        ((65_535 * PICTURES.numpy()).astype(np.uint16), "from 0 to 65535; divide by 65535"),
        (
            [Image.fromarray(PICTURES[0, 0].byte().numpy())] * 3,
            "support_images are PIL images; give numpy.asarray(image) of each, or use FewShotClassifier for them",
        ),
        ("abc", "support_images must be tensors or arrays of numbers, got str"),
        (PICTURES.long(), "support_images are integers of 0 and 1, but bytes go up to 255 (ink); give images > 0"),
    ],
)
def test_pictures_that_cannot_be_taken(given: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        NearestPixels().predict(given, "abc", PICTURES)


def test_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="^3 support images but 2 labels; give one label per image$"):
        NearestPixels().predict(PICTURES, "ab", PICTURES)
    with pytest.raises(ValueError, match="^the network has 5 outputs but the episode is 3-way; build ConvNet"):
        MAML(ConvNet(5, filters=4)).predict(PICTURES, "abc", PICTURES)


@pytest.mark.usefixtures("unchecked_types")
def test_support_and_query_of_two_sizes():
    with pytest.raises(ValueError, match=r"^support images are \[1, 28, 28\] but query images \[1, 20, 20\]; give"):
        NearestPixels().predict(PICTURES, "abc", PICTURES[..., 4:24, 4:24])


def test_a_network_without_a_head_adapts_to_no_classes():
    headless = MAML(ConvNet(filters=4))
    for answer in (headless.predict, Scratch(ConvNet(filters=4)).predict):
        with pytest.raises(ValueError, match="^the network has 16 outputs but the episode is 3-way; build ConvNet"):
            answer(PICTURES, "abc", PICTURES)
    with pytest.raises(ValueError, match="^the network has 16 outputs but the episode is 2-way; build ConvNet"):
        images, labels = torch.rand(1, 2, 1, 28, 28), torch.tensor([[0, 1]])
        headless.meta_loss(Episode(images, labels, images, labels))
    own_loss = MAML(ConvNet(filters=4), loss=lambda outputs, labels: F.cross_entropy(outputs, labels))
    with pytest.raises(ValueError, match="^there are 3 classes but 16 outputs; give a network that has 3$"):
        own_loss.predict(PICTURES, "abc", PICTURES)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 28, 28)])
def test_pictures_of_another_size_than_the_networks(shape: tuple[int, ...]):
    others = torch.rand(3, *shape).clamp(max=0.5)
    message = f"^the network takes images of 1×28×28 .*, got {'×'.join(map(str, shape))}; resize the images or build"
    for learner in (MAML(ConvNet(3, filters=4)), Prototypical(ConvNet(filters=4))):
        with pytest.raises(ValueError, match=message):
            learner.predict(others, "abc", others)


def test_prediction_is_in_evaluation_mode_and_leaves_the_mode():
    learner = MAML(ConvNet(3, filters=4), inner_lr=0.1, test_inner_steps=20).double().train()
    named = learner.predict(PICTURES, "abc", PICTURES)
    assert learner.training
    episode = Episode(PICTURES[None].double(), torch.arange(3)[None], PICTURES[None].double())
    assert named == ["abc"[i] for i in learner.eval()(episode)[0].argmax(-1)]


# --- saved and loaded ------------------------------------------------------------------------------------------

SAVED = {
    "MAML": lambda: MAML(ConvNet(3, filters=4, hidden=(6,)), inner_steps=2, learned_lr="layer"),
    "Reptile": lambda: Reptile(ConvNet(3, filters=4), test_inner_steps=2),
    "Prototypical": lambda: Prototypical(ConvNet(filters=4, normalization="support"), distance="cosine"),
    "Relation": lambda: Relation(ConvNet(filters=4, n_halving=1), objective="cross-entropy", hidden=3),
    "MANN": lambda: MANN(Pixels(5), n_way=3, slots=8),
    "SNAIL": lambda: SNAIL(ConvNet(filters=4), n_way=3, attention=(4, 4)),
}


def answers(learner: Learner) -> Tensor:
    with torch.no_grad():
        return learner.eval()(Episode(PICTURES[None], torch.arange(3)[None], PICTURES[None]))


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path):
    torch.manual_seed(0)
    learner = SAVED[name]()
    learner.save(tmp_path / "learner")
    loaded = load(tmp_path / "learner")
    assert type(loaded) is type(learner) and not loaded.training
    assert loaded.arguments == learner.arguments
    assert torch.equal(answers(loaded), answers(learner))
    assert [path.name for path in tmp_path.iterdir()] == ["learner"]


def test_a_network_of_ones_own_is_given_to_load(tmp_path: Path):
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    learner, path = MAML(backbone(network(), head="3"), adapt="head"), tmp_path / "own"
    learner.save(path)
    with pytest.raises(ValueError, match="was saved with a network of your own; load it with load"):
        load(path)
    assert torch.equal(answers(load(path, backbone(network(), head="3"))), answers(learner))
    with pytest.raises(ValueError, match=r"holds another architecture: 'network\.module\.1\.bias' is"):
        load(path, nn.Sequential(nn.Flatten(), nn.Linear(784, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)))


class TwoHeads(nn.Module):
    """The layer that answers is not the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.other = nn.Linear(784, 3), nn.Linear(784, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images.flatten(1)) + 0 * self.other(images.flatten(1))


def test_load_knows_which_layer_of_ones_own_network_was_the_last(tmp_path: Path):
    learner = MAML(backbone(TwoHeads(), head="classifier"), adapt="head")
    learner.save(tmp_path / "two.safetensors")
    for network in (TwoHeads(), backbone(TwoHeads(), head="classifier")):
        again = load(tmp_path / "two.safetensors", network=network)
        assert again.moving == ["module.classifier.weight", "module.classifier.bias"]
        assert again.predict(PICTURES, "abc", PICTURES) == learner.predict(PICTURES, "abc", PICTURES)


def test_other_arguments_but_the_same_losses():
    def half(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels) / 2

    learner = MAML(ConvNet(3, filters=4), inner_loss=half).with_arguments(inner_lr=0.2)
    assert learner.inner_loss is half and learner.loss is not half
    learner = MAML(ConvNet(3, filters=4), loss=half).with_arguments(inner_lr=0.2)
    assert learner.inner_loss is half and learner.loss is half
    learner = MAML(ConvNet(3, filters=4), loss=half).with_arguments(loss=F.cross_entropy)
    assert learner.inner_loss is F.cross_entropy and learner.loss is F.cross_entropy


def test_a_learner_of_another_precision_is_evaluated_and_trained():
    classes = from_arrays(torch.rand(9, 28, 28), list("abcabcabc"))
    learner = MAML(ConvNet(3, filters=4)).double()
    evaluate(learner, classes, EpisodeSpec(3, 1, 1), n_episodes=2)
    train(learner, classes, EpisodeSpec(3, 1, 1), TrainConfig(iterations=1), device="cpu", progress_bar=False)


def test_adapting_where_no_gradients_are_allowed():
    for learner in (MAML(ConvNet(3, filters=4)), Scratch(ConvNet(3, filters=4))):
        with (
            torch.inference_mode(),
            pytest.raises(ValueError, match=r"^adapting needs gradients, which .* rules out; use torch.no_grad\(\)$"),
        ):
            learner.predict(PICTURES, "abc", PICTURES)


def test_tied_parameters_are_saved(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(784, 784)
            self.two = nn.Linear(784, 784)
            self.two.weight = self.one.weight
            self.head = nn.Linear(784, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.two(self.one(images.flatten(1)).relu()))

    learner = Prototypical(Tied())
    learner.save(tmp_path / "tied")
    assert torch.equal(answers(load(tmp_path / "tied", Tied())), answers(learner))


def test_a_loss_is_not_saved(tmp_path: Path):
    learner = MAML(ConvNet(3, filters=4), loss=nn.CrossEntropyLoss(weight=torch.ones(3)))
    learner.save(tmp_path / "weighted")
    assert torch.equal(answers(load(tmp_path / "weighted")), answers(learner))


def test_files_that_are_something_else(tmp_path: Path):
    path = tmp_path / "file"
    for contents in (b"", b"nonsense", (np.zeros(100, dtype=np.uint8)).tobytes()):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not a file that learner.save wrote"):
            load(path)
    with pytest.raises(ValueError, match="is not a file that learner.save wrote"):
        load(tmp_path / "absent")

    class Foreign(NearestPixels):
        pass

    Foreign().save(path)
    with pytest.raises(ValueError, match="holds a Foreign, which metatutor does not export; build it and load_state_"):
        load(path)


def test_the_same_with_other_arguments():
    learner = MAML(ConvNet(3, filters=4), inner_steps=2, learned_lr="layer").train()
    more = learner.with_arguments(test_inner_steps=5)
    assert (more.test_inner_steps, more.inner_steps, more.training, learner.training) == (5, 2, False, True)
    assert more.network is learner.network and torch.equal(more.rates[0], learner.rates[0])
    with pytest.raises(ValueError, match="holds another architecture: 'rates.0' is"):
        learner.with_arguments(learned_lr="parameter")


# --- losses of one's own ---------------------------------------------------------------------------------------


def test_a_loss_that_is_a_module_counts_and_moves_along():
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1]))
    learner = Prototypical(ConvNet(filters=4), loss=weighted)
    assert isinstance(learner, NetworkLearner)
    episode = Episode(PICTURES[None], torch.arange(3)[None], PICTURES[None], torch.tensor([[1, 2, 0]]))
    expected = weighted(learner(episode)[0], episode.query_labels[0])
    assert torch.allclose(learner.meta_loss(episode), expected)
    assert weighted.weight is not None and learner.double() and weighted.weight.dtype == torch.float64


# --- what importing costs, and needs -----------------------------------------------------------------------------


def run(program: str) -> str:
    root = Path(metatutor.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_needs_nothing_that_only_unix_has():
    absent = dict.fromkeys(("resource", "fcntl", "pwd", "grp", "termios"))
    run(f"import sys; sys.modules.update({absent}); from metatutor import *")


def test_importing_takes_no_time_until_something_is_asked_for():
    assert run("import sys, metatutor; print('torch' in sys.modules, metatutor.__version__)") == "False 0.1.0\n"


def test_importing_imports_nothing_heavy():
    heavy = {"accelerate", "matplotlib", "pandas", "PIL", "pooch", "pydantic", "requests", "torchvision", "tyro"}
    heavy |= {"torch._dynamo", "torch._inductor", *(f"metatutor.{name}" for name in ("book", "config", "runs", "cli"))}
    loaded = run(
        "import sys, torch; before = set(sys.modules); from metatutor import *; print(*set(sys.modules) - before)"
    )
    assert heavy & set(loaded.split()) == set()
