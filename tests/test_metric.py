"""Siamese, Matching, Prototypical and Relation networks, against loops written from their papers' equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metatutor import (
    ConvNet,
    Episode,
    EpisodeSpec,
    Matching,
    Prototypical,
    Relation,
    ResNet,
    Siamese,
    TrainConfig,
    train,
)
from metatutor.backbones import Normalization, backbone
from metatutor.embedding import EmbeddingLearner
from metatutor.metric.prototypical import Distance, similarity
from metatutor.testing import check_learner
from tests.tasks import Always, close

METHODS: dict[str, Callable[..., EmbeddingLearner]] = {
    "prototypical": Prototypical,
    "prototypical, euclidean": lambda network, **more: Prototypical(network, distance="euclidean", **more),
    "prototypical, cosine": lambda network, **more: Prototypical(network, distance="cosine", **more),
    "prototypical, in turn": lambda network, **more: Prototypical(network, in_turn=True, **more),
    "prototypical, in parts": lambda network, **more: Prototypical(network, in_turn=True, parts=4, **more),
    "matching": Matching,
    "matching, full context": lambda network, **more: Matching(network, full_context=True, **more),
    "relation": Relation,
    "relation, cross-entropy": lambda network, **more: Relation(network, objective="cross-entropy", **more),
    "siamese": Siamese,
}
SETS = [name for name in METHODS if "full context" not in name]  # methods for which the support set is a set
every_method = pytest.mark.parametrize("name", METHODS)


def small(normalization: Normalization = "batch") -> ConvNet:
    torch.manual_seed(0)
    network = ConvNet(filters=4, n_blocks=2, n_halving=1, image_size=8, pooling="max", normalization=normalization)
    return network.double()


def learner(name: str, **more) -> EmbeddingLearner:
    return METHODS[name](small(), **more).double().eval()


def episode(n_tasks: int = 3, n_way: int = 3, k_shot: int = 2, n_query: int = 2, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.arange(n_way).repeat_interleave(n).repeat(n_tasks, 1) for n in (k_shot, n_query)]
    images = [torch.rand(*of.shape, 1, 8, 8, generator=generator, dtype=torch.float64) for of in labels]
    return Episode(images[0], labels[0], images[1], labels[1], n_way)


def embeddings(of: EmbeddingLearner, task: Episode) -> tuple[Tensor, Tensor]:
    """Of the first task: support and query images in one call, as the batch normalisation wants it."""
    images = torch.cat([task.support_images[0], task.query_images[0]])
    n_support = task.support_images.shape[1]
    found = of.network.embed(images, n_support)
    return found[:n_support], found[n_support:]


# --- against the papers' equations, one number at a time -----------------------------------------------------


@pytest.mark.parametrize("distance", ["squared", "euclidean", "cosine"])
def test_prototypical_by_a_loop(distance):
    task, method = episode(1), Prototypical(small(), distance=distance)
    support, query = embeddings(method, task)
    expected = torch.zeros(len(query), task.n_way, dtype=torch.float64)
    for q, x in enumerate(query):
        for c in range(task.n_way):
            members = [s for s, label in zip(support, task.support_labels[0], strict=True) if label == c]
            prototype = torch.stack(members).mean(0)
            if distance == "cosine":
                expected[q, c] = 10 * (x @ prototype) / (x.norm() * prototype.norm())
            else:
                squared = ((x - prototype) ** 2).sum()
                expected[q, c] = -squared if distance == "squared" else -squared.sqrt()
    assert torch.allclose(method(task)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("k_shot", [1, 2])
def test_every_image_is_a_support_image_in_turn(k_shot: int, distance: Distance):
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    task = episode(2, k_shot=k_shot, n_query=3)
    method = Prototypical(small(), distance=distance, in_turn=True, loss=smooth)
    losses = []
    for i in range(2):
        support, query = embeddings(method, task.task(i))
        of_class = [torch.cat([support[k_shot * c :][:k_shot], query[3 * c :][:3]]) for c in range(3)]
        for turn in range(n := k_shot + 3):
            chosen = [(j - turn) % n for j in range(k_shot)]
            centres = [rows[chosen].mean(0) for rows in of_class]
            for c, rows in enumerate(of_class):
                for j in set(range(n)) - set(chosen):
                    logits = similarity(rows[j][None, None], torch.stack(centres)[None], distance)[0]
                    losses.append(smooth(logits, torch.tensor([c])))
    assert close(method.meta_loss(task), torch.stack(losses).mean())
    plain = Prototypical(method.network, distance=distance, loss=smooth)
    assert close(method(task), plain(task))  # answers are as ever, and so is fine-tuning
    assert close(method.finetune_loss(task), plain.finetune_loss(task))


class OnlyPart(nn.Module):
    """One of the equal parts of an embedding."""

    def __init__(self, network: nn.Module, part: int, of: int) -> None:
        super().__init__()
        self.network, self.part, self.of = network, part, of

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).chunk(self.of, dim=1)[self.part]


@pytest.mark.parametrize("in_turn", [False, True])
def test_in_training_every_part_of_an_embedding_answers_alone(in_turn: bool):
    task, network = episode(2), small()
    in_parts = Prototypical(network, in_turn=in_turn, parts=2)
    alone = [Prototypical(OnlyPart(network, i, 2), in_turn=in_turn) for i in range(2)]
    losses = [part.meta_loss(task) for part in alone]
    assert not close(*losses) and close(in_parts.meta_loss(task), torch.stack(losses).mean())
    assert close(in_parts(task), alone[0](task) + alone[1](task))  # together, their squared distances add up


@pytest.mark.usefixtures("unchecked_types")
def test_parts_are_equal():
    with pytest.raises(ValueError, match="an embedding of 64 numbers has no 3 equal parts; change parts"):
        Prototypical(small(), parts=3).meta_loss(episode(1))
    with pytest.raises(ValueError, match="parts must be a positive integer, got 0"):
        Prototypical(small(), parts=0)


@pytest.mark.usefixtures("unchecked_types")
def test_classes_of_unlike_size_cannot_take_turns():
    task = episode(1)
    uneven = replace(task, query_labels=task.query_labels.clamp(max=1))
    with pytest.raises(ValueError, match="in_turn needs equally many images of every class"):
        Prototypical(small(), in_turn=True).meta_loss(uneven)


def ends_in_a_layer() -> nn.Module:
    """Whose embeddings come in bfloat16 under autocast, and are far from zero."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 16)
    nn.init.constant_(layer.bias, 3.0)
    return nn.Sequential(nn.Flatten(), layer)


LOWER = [(name, "residual") for name in METHODS] + [(name, "linear") for name in METHODS if "relation" not in name]


@pytest.mark.parametrize(("name", "network"), LOWER)
def test_trains_in_lower_precision(name: str, network: str):
    """Embeddings may be rounded; what is made of them is exact, and stays near to what it was."""
    made = ResNet(widths=(8,), image_size=8) if network == "residual" else ends_in_a_layer()
    task, method = episode(2).to(torch.float32), METHODS[name](backbone(made, head="", image_shape=(1, 8, 8)))
    exact = method.meta_loss(task)
    with torch.autocast("cpu", torch.bfloat16):
        assert method.meta_loss(task).item() == pytest.approx(exact.item(), rel=0.05, abs=0.05)
    config = TrainConfig(2, tasks_per_step=2, warmup=0, precision="bfloat16")
    history = train(method, Always(task), EpisodeSpec(3, 2, 2), config, device="cpu", progress_bar=False)
    assert math.isfinite(history[-1]["meta_loss"])


def test_autocast_rounds_no_distance():
    """Of embeddings alone, far from zero, where eight bits would tell nothing apart."""
    query, prototypes = 100 + torch.rand(1, 6, 16), 100 + torch.rand(1, 3, 16)
    for distance in get_args(Distance):
        with torch.autocast("cpu", torch.bfloat16):
            found = similarity(query, prototypes, distance)
        expected = similarity(query.double(), prototypes.double(), distance)
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.1


def test_squared_distances_make_a_linear_classifier():
    """Snell et al. (2017), equation 8: logits = 2 prototype · f(query) - |prototype|², up to a shared term."""
    task, method = episode(1), Prototypical(small())
    support, query = embeddings(method, task)
    prototypes = support.unflatten(0, (3, 2)).mean(1)
    linear = 2 * query @ prototypes.T - prototypes.pow(2).sum(1)
    assert close(method(task)[0].softmax(-1), linear.softmax(-1))
    assert not close(Prototypical(method.network, distance="euclidean")(task)[0].softmax(-1), linear.softmax(-1))


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_matching_by_a_loop(scale: float):
    task, method = episode(1), Matching(small(), scale=scale)
    support, query = embeddings(method, task)
    for q, x in enumerate(query):
        weights = [math.exp(scale * F.cosine_similarity(x, s, dim=0).item()) for s in support]
        for c in range(task.n_way):
            of_class = [w for w, label in zip(weights, task.support_labels[0], strict=True) if label == c]
            assert math.isclose(method(task)[0, q, c].exp().item(), sum(of_class) / sum(weights), rel_tol=1e-9)


def test_full_context_by_a_loop():
    """Appendix A: the attention LSTM with state [h, read], its gates written out; a bidirectional LSTM of PyTorch."""
    task, method = episode(1), learner("matching, full context")
    assert isinstance(method, Matching) and method.context is not None
    context, (support, query) = method.context, embeddings(method, task)
    size = support.shape[1]
    both, _ = context.over_support(support)
    g = [both[i, :size] + both[i, size:] + support[i] for i in range(len(support))]
    for q, x in enumerate(query):
        h, c = x, torch.zeros(size, dtype=torch.float64)
        for _ in range(5):
            scores = [(h @ s).item() for s in g]
            weights = [math.exp(score - max(scores)) for score in scores]
            read = torch.stack([w * s for w, s in zip(weights, g, strict=True)]).sum(0) / sum(weights)
            z = context.gates.weight @ torch.cat([x, h, read]) + context.gates.bias
            enter, keep, show, new = z[:size], z[size : 2 * size], z[2 * size : 3 * size], z[3 * size :]
            c = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(new)
            h = torch.sigmoid(show) * torch.tanh(c) + x
        cosines = torch.stack([F.cosine_similarity(h, s, dim=0) for s in g])
        attention = cosines.softmax(0)
        for label in range(task.n_way):
            of_class = attention[task.support_labels[0] == label].sum()
            assert torch.isclose(method(task)[0, q, label].exp(), of_class, rtol=1e-9)


@pytest.mark.parametrize("over_shots", ["mean", "sum"])
def test_relation_by_a_loop(over_shots: Literal["mean", "sum"]):
    task, method = episode(1), learner("relation", over_shots=over_shots)
    assert isinstance(method, Relation)
    images = torch.cat([task.support_images[0], task.query_images[0]])
    features = method.network.features(images)
    support, query = features[:6], features[6:]
    pairs = []
    for x in query:
        for c in range(task.n_way):
            members = [s for s, label in zip(support, task.support_labels[0], strict=True) if label == c]
            shots = len(members) if over_shots == "mean" else 1
            pairs.append(
                torch.cat([torch.stack(members).sum(0) / shots, x])
            )  # channels of the class, then of the query
    found = torch.stack(pairs)
    for block in (method.first, method.second):
        found = block(found, None)
    scores = method.score(method.hidden(found.flatten(1)).relu()).sigmoid().view(len(query), task.n_way)
    assert close(method(task)[0].sigmoid(), scores)
    truth = torch.eye(3, dtype=torch.float64)[task.query_labels[0]]
    assert close(method.meta_loss(task), ((scores - truth) ** 2).mean())


def test_siamese_by_a_loop():
    task, method = episode(1), learner("siamese")
    assert isinstance(method, Siamese)
    support, query = embeddings(method, task)
    logits, losses = method(task)[0], []
    for q, x in enumerate(query):
        best = [-math.inf] * task.n_way
        for s, label in zip(support, task.support_labels[0].tolist(), strict=True):
            difference = (x - s).abs()
            logit = method.same.weight[0] @ difference + method.same.bias[0]
            best[label] = max(best[label], logit.item())
            if label == task.query_labels[0, q]:
                losses.append(-F.logsigmoid(logit))
            else:
                losses.append(-F.logsigmoid(-logit))
        assert torch.allclose(logits[q], torch.tensor(best, dtype=torch.float64))
    assert torch.isclose(method.meta_loss(task), torch.stack(losses).mean())


# --- what every method keeps, besides the contract -----------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_the_order_of_the_support_set_does_not_matter(name: str):
    method, task = learner(name), episode()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    permuted = replace(task, support_images=task.support_images[:, order], support_labels=task.support_labels[:, order])
    assert close(method(permuted), method(task))


def test_with_full_context_it_does():
    method, task = learner("matching, full context"), episode()
    order = torch.arange(5, -1, -1)
    permuted = replace(task, support_images=task.support_images[:, order], support_labels=task.support_labels[:, order])
    assert not close(method(permuted), method(task))


@every_method
def test_renaming_the_classes_renames_the_logits(name: str):
    method, task = learner(name), episode()
    renamed = replace(task, support_labels=(task.support_labels + 1) % 3)
    assert close(method(renamed), method(task).roll(1, dims=-1))


@pytest.mark.parametrize(
    "name", ["prototypical, euclidean", "prototypical, cosine", "prototypical, in turn", "relation, cross-entropy"]
)
def test_variants_keep_the_contract_too(name: str):
    check_learner(learner(name))


@every_method
def test_learns_one_episode_by_heart(name: str):
    task, method = episode(1, 3, 1, 1), learner(name)
    config = TrainConfig(iterations=60, tasks_per_step=1, outer_lr=0.03, warmup=0)
    train(method, Always(task), EpisodeSpec(3, 1, 1), config, progress_bar=False, device="cpu")
    assert (method(task).argmax(-1) == task.query_labels).all()


# --- the loss is an argument ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name != "siamese" and ", in " not in name])
def test_a_loss_of_ones_own_counts(name: str):
    """A module too, such as cross-entropy with smoothed labels; in the meta-loss and in fine-tuning."""
    task, smooth = episode(2), nn.CrossEntropyLoss(label_smoothing=0.1)
    plain, method = learner(name), learner(name, loss=smooth, finetune_steps=1)
    expected = smooth(plain(task).flatten(0, 1), task.query_labels.flatten())
    assert close(method.meta_loss(task), expected)
    assert not close(plain.meta_loss(task), expected)
    assert not close(method(task), learner(name, finetune_steps=1)(task))
    assert method.state_dict().keys() == plain.state_dict().keys()
    assert "loss" not in method.arguments


def test_a_loss_may_weigh_the_classes():
    """Of a loss with a buffer the gradient is what cross-entropy of the first class alone has."""
    task = episode(1)
    weighted = Prototypical(small(), loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0, 0], dtype=torch.float64)))
    first = task.query_labels[0] == 0
    expected = F.cross_entropy(weighted(task)[0, first], task.query_labels[0, first])
    assert close(weighted.meta_loss(task), expected)


# --- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Prototypical(small(), distance="manhattan"),  # pyright: ignore[reportArgumentType]
            "distance must be 'squared', 'euclidean' or 'cosine', got 'manhattan'",
        ),
        (lambda: Prototypical(small(), finetune_steps=-1), "finetune_steps must not be negative, got -1"),
        (lambda: Siamese(small(), finetune_lr=0.0), "finetune_lr must be positive, got 0.0"),
        (lambda: Matching(small(), scale=0.0), "scale must be positive, got 0.0"),
        (lambda: Matching(small(), reading_steps=0), "reading_steps must be positive, got 0"),
        (lambda: Relation(small(), hidden=0), "hidden must be positive, got 0"),
        (
            lambda: Relation(small(), over_shots="max"),  # pyright: ignore[reportArgumentType]
            "over_shots must be 'mean' or 'sum', got 'max'",
        ),
        (
            lambda: Relation(small(), objective="mae"),  # pyright: ignore[reportArgumentType]
            "objective must be 'mse' or 'cross-entropy', got 'mae'",
        ),
        (lambda: Relation(ConvNet(filters=4)), "feature maps of 2×2 pixels leave nothing to compare; .* n_halving=2"),
    ],
)
def test_wrong_arguments_say_what_to_do(build: Callable[[], EmbeddingLearner], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_arguments_are_kept_by_name():
    method = Matching(small(), scale=3.0, full_context=True)
    assert method.arguments == {
        "scale": 3.0,
        "full_context": True,
        "reading_steps": 5,
        "finetune_steps": 0,
        "finetune_lr": 0.01,
        "loss": None,
    }
