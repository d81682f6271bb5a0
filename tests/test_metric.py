"""Siamese, Matching, Prototypical and Relation networks, against loops written from their papers' equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.autograd import gradcheck

from metatutor import learner as learner_module
from metatutor.backbones import ConvNet, Normalization
from metatutor.episodes import Episode
from metatutor.metric import Matching, Prototypical, Relation, Siamese, relation
from metatutor.metric.base import MetricLearner
from metatutor.training import TrainConfig, train

Build = Callable[..., MetricLearner]
METHODS: dict[str, Build] = {
    "prototypical": Prototypical,
    "prototypical, euclidean": lambda network, **more: Prototypical(network, distance="euclidean", **more),
    "prototypical, cosine": lambda network, **more: Prototypical(network, distance="cosine", **more),
    "matching": Matching,
    "matching, full context": lambda network, **more: Matching(network, full_context=True, **more),
    "relation": Relation,
    "relation, cross-entropy": lambda network, **more: Relation(network, loss="cross-entropy", **more),
    "siamese": Siamese,
}
SETS = [name for name in METHODS if "full context" not in name]  # methods for which the support set is a set
every_method = pytest.mark.parametrize("name", METHODS)


def small(normalization: Normalization = "batch") -> ConvNet:
    torch.manual_seed(0)
    network = ConvNet(filters=4, n_blocks=2, n_halving=1, image_size=8, pooling="max", normalization=normalization)
    return network.double()


def learner(name: str, normalization: Normalization = "batch", **more) -> MetricLearner:
    network = small(normalization)
    return METHODS[name](network, **more).double().eval()


def episode(n_tasks: int = 3, n_way: int = 3, k_shot: int = 2, n_query: int = 2, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.arange(n_way).repeat_interleave(n).repeat(n_tasks, 1) for n in (k_shot, n_query)]
    images = [torch.rand(*of.shape, 1, 8, 8, generator=generator, dtype=torch.float64) for of in labels]
    return Episode(images[0], labels[0], images[1], labels[1], n_way)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def embeddings(of: MetricLearner, task: Episode) -> tuple[Tensor, Tensor]:
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
        for _ in range(method.config.reading_steps):
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


# --- what every method keeps ---------------------------------------------------------------------------------


@every_method
def test_a_batch_of_tasks_is_the_tasks_one_by_one(name: str):
    method, tasks = learner(name), episode(3)
    alone = [tasks.tasks(slice(i, i + 1)) for i in range(3)]
    assert close(method(tasks), torch.cat([method(task) for task in alone]))
    assert close(method.meta_loss(tasks), torch.stack([method.meta_loss(task) for task in alone]).mean())


@every_method
@pytest.mark.parametrize("normalization", ["batch", "support", "group"])
def test_tasks_side_by_side_are_tasks_in_turn(name: str, normalization: Normalization, monkeypatch):
    """What a GPU does, and what a CPU does."""
    method, tasks = learner(name, normalization), episode(3)
    in_turn, loss = method(tasks), method.meta_loss(tasks)
    side_by_side = partial(learner_module.each_task, side_by_side=True)
    monkeypatch.setattr(learner_module, "each_task", side_by_side)
    monkeypatch.setattr(relation, "each_task", side_by_side)
    assert close(method(tasks), in_turn)
    assert close(method.meta_loss(tasks), loss)


@every_method
def test_permuting_queries_permutes_logits(name: str):
    method, task = learner(name, "group"), episode()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    permuted = replace(task, query_images=task.query_images[:, order], query_labels=task.query_labels[:, order])
    assert close(method(permuted), method(task)[:, order])


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


@every_method
@pytest.mark.parametrize("steps", [0, 2])
def test_query_labels_are_not_read(name: str, steps: int):
    method, task = learner(name, finetune_steps=steps), episode()
    assert close(method(replace(task, query_labels=torch.full_like(task.query_labels, -1))), method(task))


@every_method
@pytest.mark.parametrize("normalization", ["support", "group"])
def test_inductive_a_query_never_changes_anothers_logits(name: str, normalization: Normalization):
    method, task = learner(name, normalization), episode()
    images = task.query_images.clone()
    images[:, 0] = 1 - images[:, 0]
    changed = method(replace(task, query_images=images))
    assert close(changed[:, 1:], method(task)[:, 1:])
    assert not close(changed[:, 0], method(task)[:, 0])


@every_method
@pytest.mark.parametrize(("n_way", "k_shot"), [(2, 1), (5, 3)])
def test_any_way_and_shot(name: str, n_way: int, k_shot: int):
    assert learner(name)(episode(2, n_way, k_shot)).shape == (2, 2 * n_way, n_way)


@every_method
def test_gradients_against_finite_differences(name: str):
    method, task = learner(name), episode(1, 2, 1, 1)
    names = [n for n, p in method.named_parameters() if p.numel() < 200]
    parameters = [p.detach().clone().requires_grad_() for n, p in method.named_parameters() if n in names]

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Loss(method), {f"of.{n}": v for n, v in zip(names, values, strict=True)}, task
        )

    assert gradcheck(loss, parameters, atol=1e-4)


class _Loss(nn.Module):
    def __init__(self, of: MetricLearner) -> None:
        super().__init__()
        self.of = of

    def forward(self, task: Episode) -> Tensor:
        return self.of.meta_loss(task)


@every_method
def test_learns_one_episode_by_heart(name: str):
    task = episode(1, 3, 1, 1)

    class Same:
        generator = torch.Generator()

        def sample(self, n_tasks: int) -> Episode:
            return task

    method = learner(name)
    config = TrainConfig(iterations=150, tasks_per_step=1, outer_lr=0.02, warmup=0)
    train(method, Same(), config, progress_bar=False, device="cpu")
    assert (method(task).argmax(-1) == task.query_labels).all()


# --- fine-tuning ---------------------------------------------------------------------------------------------


@every_method
def test_finetuning_descends_on_the_support_set(name: str):
    """One step by hand, and the learner's own parameters stay."""
    method, task = learner(name, finetune_steps=1, finetune_lr=0.05), episode(1)
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    tuned = method.finetune(task)
    asked = replace(task, query_images=task.support_images, query_labels=task.support_labels)
    method.meta_loss(asked).backward()
    for n, p in method.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        assert close(tuned[n], before[n] - 0.05 * gradient)
        assert torch.equal(p, before[n])
    plain = learner(name)
    assert not close(method(task), plain(task))
    plain.load_state_dict(tuned)
    assert close(method(task), plain(task))


@every_method
def test_training_is_not_finetuned(name: str):
    method, task = learner(name, finetune_steps=3), episode(1)
    assert close(method.train()(task), learner(name).train()(task))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Prototypical(small(), distance="manhattan"), "distance"),  # pyright: ignore[reportArgumentType]
        (lambda: Prototypical(small(), finetune_steps=-1), "finetune_steps must not be negative"),
        (lambda: Siamese(small(), finetune_lr=0.0), "finetune_lr must be positive"),
        (lambda: Matching(small(), scale=0.0), "scale must be positive"),
        (lambda: Matching(small(), reading_steps=0), "reading_steps must be positive"),
        (lambda: Relation(small(), hidden=0), "hidden must be positive"),
        (lambda: Relation(small(), over_shots="max"), "over_shots"),  # pyright: ignore[reportArgumentType]
        (lambda: Relation(small(), loss="mae"), "loss"),  # pyright: ignore[reportArgumentType]
        (lambda: Relation(ConvNet(filters=4)), "leave nothing to compare"),
    ],
)
def test_wrong_arguments_say_what_to_do(build: Callable[[], MetricLearner], message: str):
    with pytest.raises((ValueError, TypeCheckError), match=message):  # the latter: an option that is no option
        build()
