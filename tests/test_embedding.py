"""Learners that embed: with anybody's network, on a GPU's path too, and fine-tuned on each support set."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from metatutor import Matching, MetaNet, PretrainedCosine, PretrainedFinetuned, Prototypical, Relation, Scratch, Siamese
from metatutor.backbones import ConvNet, Network, Normalization, backbone
from metatutor.embedding import EmbeddingLearner
from metatutor.episodes import Episode
from metatutor.evaluation import scores
from metatutor.learner import Learner, load
from metatutor.memory import MANN, SNAIL, FeedForward, PlainLSTM
from metatutor.testing import check_learner
from tests.networks import NETWORKS, SIZE, frozen, sequential, with_running_statistics
from tests.tasks import Always, close

Build = Callable[..., EmbeddingLearner]
Episodes = Callable[..., Episode]
METRIC: dict[str, Build] = {
    "prototypical": Prototypical,
    "matching": Matching,
    "matching, full context": partial(Matching, full_context=True, reading_steps=2),
    "relation": Relation,
    "siamese": Siamese,
}
SETS: dict[str, Build] = {
    "metanet": partial(MetaNet, n_way=3, hidden_size=6, generator_size=4, n_gradients=3),
    "snail": partial(SNAIL, n_way=3, max_shot=2, embedding=6, filters=4, attention=(4, 4)),
}
STREAMS: dict[str, Build] = {
    "mann": partial(MANN, n_way=3, hidden_size=8, slots=5, width=4, heads=2),
    "mann, letters": partial(MANN, n_way=3, hidden_size=8, slots=5, width=4, heads=2, labels="letters"),
    "plain lstm": partial(PlainLSTM, n_way=3, hidden_size=8),
    "feed-forward": partial(FeedForward, n_way=3, hidden_size=8),
}
METHODS = METRIC | SETS | STREAMS
every_method = pytest.mark.parametrize("name", METHODS)


def small(normalization: Normalization = "group") -> ConvNet:
    torch.manual_seed(3)
    return ConvNet(filters=4, n_blocks=2, n_halving=1, pooling="max", image_size=SIZE, normalization=normalization)


def learner(name: str, normalization: Normalization = "group", **more: Any) -> EmbeddingLearner:
    return METHODS[name](small(normalization), **more).double().eval()


def policies() -> pytest.MarkDecorator:
    """Every method with the policies that suit it."""
    sets = [(name, policy) for name in METRIC | SETS for policy in ("batch", "support", "group")]
    return pytest.mark.parametrize(("name", "normalization"), sets + [(name, "group") for name in STREAMS])


# --- images that come again -----------------------------------------------------------------------------------------


def counted(method: EmbeddingLearner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the network's `embed` is given from now on."""
    sizes: list[int] = []
    embed = method.network.embed

    def counting(images: Tensor, n_support: int | None = None) -> Tensor:
        sizes.append(len(images))
        return embed(images, n_support)

    monkeypatch.setattr(method.network, "embed", counting)
    return sizes


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"relation"}))  # which compares feature maps
def test_while_it_is_evaluated_no_image_is_embedded_twice(
    name: str, random_episode: Episodes, monkeypatch: pytest.MonkeyPatch
):
    method, tasks = learner(name), random_episode(3)
    n_images = tasks.support_labels.numel() + tasks.query_labels.numel()
    sizes, found = counted(method, monkeypatch), scores(method, Always(tasks), 6, tasks_per_batch=3)
    assert sum(sizes) == n_images
    monkeypatch.setattr(EmbeddingLearner, "remembering", Learner.remembering)
    assert close(scores(method, Always(tasks), 6, tasks_per_batch=3), found)
    assert sum(sizes) == n_images + 2 * n_images


@pytest.mark.parametrize(
    ("normalization", "more"), [("batch", {}), ("support", {}), ("group", {"finetune_steps": 1}), ("group", {})]
)
def test_nothing_is_remembered_where_more_than_the_image_matters(
    normalization: Normalization, more: dict[str, int], random_episode: Episodes, monkeypatch: pytest.MonkeyPatch
):
    method, tasks = learner("prototypical", normalization, **more), random_episode(2)
    sizes = counted(method, monkeypatch)
    with method.remembering():
        first = method(tasks)
        once = sum(sizes)
        assert close(method(tasks), first)
    assert sum(sizes) == once * (1 if (normalization, more) == ("group", {}) else 2)
    method(tasks)
    assert sum(sizes) > once, "and nothing afterwards"


def test_memory_has_an_end(random_episode: Episodes, monkeypatch: pytest.MonkeyPatch):
    method, (first, second) = learner("prototypical"), (random_episode(1, seed=seed) for seed in (0, 1))
    monkeypatch.setattr("metatutor.embedding._MOST_REMEMBERED", 1)
    sizes, expected = counted(method, monkeypatch), [method(first), method(second)]
    once = sum(sizes) // 2
    with method.remembering():
        for task, logits in ((first, expected[0]), (second, expected[1])) * 2:
            assert close(method(task), logits)
    assert sum(sizes) == 2 * once + once + 2 * once, "only the first task is remembered"


# --- task by task -------------------------------------------------------------------------------------------------


@policies()
def test_tasks_side_by_side_are_tasks_in_turn(
    name: str, normalization: Normalization, random_episode: Episodes, monkeypatch: pytest.MonkeyPatch
):
    """What a GPU does, and what a CPU does; and the loss of a batch is the mean of its tasks'."""
    method, tasks = learner(name, normalization), random_episode(3)
    in_turn, loss = method(tasks), method.meta_loss(tasks)
    assert close(in_turn, torch.cat([method(task) for task in tasks]))
    assert close(loss, torch.stack([method.meta_loss(task) for task in tasks]).mean())
    monkeypatch.setattr(EmbeddingLearner, "of_tasks", lambda self, *given: self.map_tasks(*given))
    assert close(method(tasks), in_turn)
    assert close(method.meta_loss(tasks), loss)
    assert method.map_tasks.side_by_side


@policies()
def test_it_is_transductive_if_its_network_is(name: str, normalization: Normalization, random_episode: Episodes):
    method, task = learner(name, normalization), random_episode(1)
    assert method.transductive == (normalization == "batch")
    assert method.normalization == normalization
    images = task.query_images.clone()
    images[:, 0] = images[:, 0] ** 3
    change = (method(replace(task, query_images=images)) - method(task)).abs().amax((0, 2))
    assert change[0] > 1e-9
    assert (change[1:] > 1e-9).any() == method.transductive


# --- anybody's network --------------------------------------------------------------------------------------------


COMBINATIONS = [(name, kind) for name in METRIC | SETS for kind in NETWORKS if name != "relation"]
COMBINATIONS += [(name, "sequential") for name in STREAMS]
COMBINATIONS += [(name, kind) for name in ("mann", "plain lstm") for kind in ("frozen", "tied", "recurrent")]


@pytest.mark.filterwarnings("ignore:tasks are computed one by one")
@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_any_network_keeps_the_contract(name: str, kind: str):
    torch.manual_seed(0)
    check_learner(METHODS[name](NETWORKS[kind](9)), image_shape=(1, SIZE, SIZE))


@pytest.mark.parametrize("layer", ["0", "1", "2"])
def test_relation_compares_the_feature_maps_of_any_layer(layer: str):
    torch.manual_seed(0)
    network = backbone(with_running_statistics(9), features=layer, image_shape=(1, SIZE, SIZE))
    assert network.feature_shape == (4, 4, 4)
    check_learner(Relation(network), image_shape=(1, SIZE, SIZE))


@pytest.mark.parametrize("name", METRIC)
def test_a_resnet_embeds_photos(name: str, photos: Episode, resnet: nn.Module):
    """In training and in evaluation: by the statistics of the task, then by those that were seen."""
    network = backbone(resnet, head="fc", features="layer3", image_shape=(3, 84, 84))
    method = METRIC[name](resnet if name in ("prototypical", "matching", "siamese") else network)
    method.train().meta_loss(photos).backward()
    gradients = [p.grad for p in resnet.parameters() if p.grad is not None]
    assert len(gradients) >= 30 and all(gradient.isfinite().all() for gradient in gradients)
    assert method.train()(photos).shape == method.eval()(photos).shape == (1, 2, 2)
    assert method.normalization == "running" and not method.transductive
    resnet.zero_grad()


def test_a_resnet_is_finetuned_pretrained_and_trained_from_scratch(photos: Episode, resnet: nn.Module):
    """Which leaves it as it is."""
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    two_ways: Any = deepcopy(resnet)
    two_ways.fc = nn.Linear(512, 2)
    for method in (
        Prototypical(resnet, finetune_steps=1),
        PretrainedCosine(resnet),
        PretrainedFinetuned(resnet, steps=1, adapt="head"),
        Scratch(two_ways, steps=1),
    ):
        answers = method.eval()(photos)
        assert answers.shape == (1, 2, 2) and answers.isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in resnet.state_dict().items())


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet18()


@pytest.fixture(scope="module")
def photos() -> Episode:
    """One 2-way 1-shot task of colour images of 84×84 pixels."""
    images = torch.rand(1, 4, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 0]])
    return Episode(images[:, :2], labels, images[:, 2:], labels)


def test_the_whole_of_a_strangers_network_embeds_unless_its_head_is_named():
    network, images = sequential(9).eval(), torch.rand(4, 1, SIZE, SIZE)
    assert torch.equal(Prototypical(network).network.embed(images), network(images))
    before_the_last = Prototypical(backbone(network, head="4")).network.embed(images)
    assert torch.equal(before_the_last, network[:-1](images))  # pyright: ignore[reportIndexIssue]


def test_a_network_of_ones_own_is_saved_with_its_learner(tmp_path: Any, random_episode: Episodes):
    torch.manual_seed(0)
    episode, method = random_episode().to(torch.float32), Siamese(with_running_statistics(9), finetune_lr=0.5).eval()
    method.save(tmp_path / "siamese.safetensors")
    again = load(tmp_path / "siamese.safetensors", with_running_statistics(9))
    assert torch.equal(again(episode), method(episode)) and again.arguments == method.arguments
    with pytest.raises(ValueError, match=r"network of your own; load it with load\(path, network=that network\)"):
        load(tmp_path / "siamese.safetensors")


# --- or one sentence ----------------------------------------------------------------------------------------------


def no_linear_layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("prototypical", "matching", "relation")])
def test_a_length_that_is_not_known_is_asked_for(name: str):
    with pytest.raises(ValueError, match=r"must know the length of an embedding, .*; give it backbone\(network, im"):
        METHODS[name](no_linear_layer())
    told = METHODS[name](backbone(no_linear_layer(), image_shape=(1, SIZE, SIZE)))
    images, labels = torch.rand(1, 3, 1, SIZE, SIZE), torch.arange(3)[None]
    assert told(Episode(images, labels, images)).shape == (1, 3, 3)


@pytest.mark.parametrize("name", STREAMS)
def test_running_statistics_do_not_suit_a_stream(name: str):
    with pytest.raises(ValueError, match=r"image by image, .*'running' .*; take ConvNet\(normalization='group'\), nn"):
        METHODS[name](with_running_statistics(9))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            sequential(9),
            r"compares feature maps; say which layer's: backbone\(network, features=its name, image_shape=",
        ),
        (backbone(no_linear_layer(), features="1"), "compares feature maps; say which layer's"),
        (
            backbone(no_linear_layer(), features="1", image_shape=(1, 4, 4)),
            "2×2 pixels leave nothing to compare; .*square, 4×4 or larger: give a ConvNet n_halving=2, or name an",
        ),
        (backbone(no_linear_layer(), features="1", image_shape=(1, 16, 12)), "8×6 pixels leave nothing to compare"),
    ],
)
def test_relation_says_which_feature_maps_it_wants(network: nn.Module, message: str):
    with pytest.raises(ValueError, match=message):
        Relation(network)


class OnlyLogits(Network):
    n_outputs = 3

    def forward(self, images: Tensor, n_support: int | None = None) -> Tensor:
        return images.flatten(1)[:, :3]


@pytest.mark.parametrize("name", METHODS)
def test_a_network_that_says_nothing_of_embeddings_is_refused(name: str):
    with pytest.raises(ValueError, match="compares embeddings, and OnlyLogits does not say what enters its last"):
        METHODS[name](OnlyLogits())


@pytest.mark.parametrize("images", [(1, 9, 9), (3, SIZE, SIZE)])
@every_method
def test_images_of_another_shape_are_refused_in_one_sentence(name: str, images: tuple[int, ...]):
    labels = torch.arange(3)[None]
    episode = Episode(torch.rand(1, 3, *images).double(), labels, torch.rand(1, 3, *images).double())
    with pytest.raises(ValueError, match=f"takes images of 1×8×8 .*, got {'×'.join(map(str, images))}; resize the im"):
        learner(name)(episode)


# --- fine-tuning --------------------------------------------------------------------------------------------------


def finetune_loss(name: str, own: EmbeddingLearner, asked: Episode) -> Tensor:
    """Of a method that is trained on streams, the cross-entropy of its answers; else what it is trained on."""
    if name in STREAMS:
        return F.cross_entropy(own.answer(asked)[0], asked.support_labels[0])
    return own.meta_loss(asked)


@every_method
def test_finetuning_by_hand(name: str, random_episode: Episodes):
    """Each task on its own copy: gradient descent on the support images, asked about themselves."""
    method, tasks = learner(name, finetune_steps=2, finetune_lr=0.1), random_episode(2)
    plain, expected = learner(name), []
    for task in tasks:
        own = deepcopy(plain)
        for _ in range(2):
            asked = replace(task, query_images=task.support_images, query_labels=task.support_labels)
            parameters = list(own.parameters())
            loss = finetune_loss(name, own, asked)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= 0.1 * g
        expected.append(own(task))
    assert close(method(replace(tasks, query_labels=None)), torch.cat(expected))
    with torch.no_grad():
        assert close(method(tasks), torch.cat(expected))
    assert not close(method(tasks), plain(tasks))
    assert all(torch.equal(p, q) for p, q in zip(method.parameters(), plain.parameters(), strict=True))


@every_method
def test_no_steps_and_training_are_not_finetuned(name: str, random_episode: Episodes):
    method, tasks = learner(name, finetune_steps=3), random_episode(2)
    plain = method.answer(tasks)
    assert not close(method(tasks), plain)
    assert torch.equal(learner(name, finetune_steps=0)(tasks), plain)
    assert torch.equal(method.train()(tasks), plain)
    assert torch.equal(method.meta_loss(tasks), learner(name).meta_loss(tasks))
    assert torch.equal(method.eval().meta_loss(tasks), learner(name).meta_loss(tasks))


@pytest.mark.parametrize("kind", NETWORKS)
def test_finetuning_anybodys_network_moves_what_learns_and_nothing_else(kind: str, random_episode: Episodes):
    """On a copy of the parameters: frozen ones stay, running statistics too, and shared ones remain one."""
    torch.manual_seed(0)
    method, task = Matching(NETWORKS[kind](9), finetune_steps=2, finetune_lr=0.1).double().eval(), random_episode(1)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    answered, tuned = method(task), method.finetune(task)
    assert not close(answered, method.answer(task))
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert tuned.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    assert all(not torch.equal(p, before[name]) for name, p in tuned.items())
    method.load_state_dict(tuned, strict=False)
    assert close(method.answer(task), answered)


def test_frozen_layers_learn_in_no_loop(random_episode: Episodes):
    torch.manual_seed(0)
    method = Prototypical(frozen(9)).double()
    method.meta_loss(random_episode()).backward()
    assert {name for name, p in method.named_parameters() if p.grad is None} == {
        "network.module.1.weight",
        "network.module.1.bias",
    }


def test_in_training_a_stranger_normalises_by_the_task_and_remembers(random_episode: Episodes):
    """What torch does in training and evaluation, one task after another."""
    network, task = with_running_statistics(9).double(), random_episode(1)
    method, alone = Prototypical(network), deepcopy(network)
    support, query = method.train().embed(task)
    images = torch.cat([task.support_images[0], task.query_images[0]])
    assert close(torch.cat([support[0], query[0]]), alone.train()(images))
    assert all(torch.equal(one, other) for one, other in zip(network.buffers(), alone.buffers(), strict=True))
    support, query = method.eval().embed(task)
    assert close(torch.cat([support[0], query[0]]), alone.eval()(images))


def test_dropout_is_in_training_only(random_episode: Episodes):
    torch.manual_seed(0)
    method, task = Prototypical(sequential(9)).double().eval(), random_episode(1)
    assert torch.equal(method(task), method(task))
    assert not torch.equal(method.train()(task), method(task))
