"""What every optimization-based learner keeps to: what may depend on what, chunks, modes, errors, learning."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metatutor.backbones import MLP, ConvNet, Network, Normalization
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.optimization import (
    MAML,
    ImplicitMAML,
    ImplicitMAMLConfig,
    MAMLConfig,
    MetaLSTM,
    MetaLSTMConfig,
    Reptile,
    ReptileConfig,
)
from metatutor.optimization.base import AdaptingLearner
from metatutor.training import TrainConfig, train
from tests.conftest import ForgetfulReptile

Episodes = Callable[..., Episode]
METHODS: dict[str, Callable[..., AdaptingLearner]] = {
    "maml": MAML,
    "reptile": Reptile,
    "imaml": ImplicitMAML,
    "meta_lstm": MetaLSTM,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "maml": {"inner_lr": 0.3},
    "reptile": {"inner_lr": 0.1, "shots_per_step": 1, "test_inner_steps": None},
    "imaml": {"inner_lr": 0.2, "proximity": 1.0, "cg_steps": 3},
    "meta_lstm": {"hidden_size": 3},
}
NORMALIZATIONS: list[Normalization] = ["batch", "support", "group"]
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])
of_every_method = pytest.mark.parametrize("method", METHODS)


def with_network(method: str, network: Network, seed: int = 0, **options: Any) -> AdaptingLearner:
    """A learner in float64, every parameter random, also those of an LSTM."""
    kind: Any = ForgetfulReptile if method == "reptile" else METHODS[method]
    learner = kind(network, **{"inner_steps": 2} | OPTIONS[method] | options).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2
    return learner


def small(method: str, *, normalization: Normalization = "batch", **options: Any) -> AdaptingLearner:
    """A learner of 3-way tasks of 8×8 pixels."""
    network = ConvNet(3, filters=4, n_blocks=2, image_size=8, normalization=normalization)
    return with_network(method, network, **options)


def regression(seed: int = 0, n_tasks: int = 3) -> Episode:
    """Tasks of four support and five query points."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, n_tasks, 5, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    return Episode(x[0, :, :4], y[0, :, :4], x[1], y[1], n_way=1)


def loss_and_gradient(learner: AdaptingLearner, episode: Episode) -> Tensor:
    """The meta-loss and its gradient in all parameters, as one vector."""
    learner.zero_grad()
    loss = learner.meta_loss(episode)
    loss.backward()
    return flat([loss.detach(), *(p.grad for p in learner.parameters() if p.grad is not None)])


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)


# --- what may depend on what -----------------------------------------------------------------------------------


@of_every_method
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_permuted_queries_permute_the_logits(random_episode: Episodes, method: str, normalization: Normalization):
    episode, learner = random_episode(), small(method, normalization=normalization)
    permuted = replace(
        episode, query_images=episode.query_images[:, ORDER], query_labels=episode.query_labels[:, ORDER]
    )
    assert close(learner(permuted), learner(episode)[:, ORDER])
    assert not close(learner(permuted), learner(episode), 1e-3)
    assert close(learner.meta_loss(permuted), learner.meta_loss(episode))


@of_every_method
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_permuted_support_leaves_the_logits(random_episode: Episodes, method: str, normalization: Normalization):
    """Where a step sees the whole support set, as it always does but with Reptile's mini-batches."""
    whole: dict[str, Any] = {"shots_per_step": None} if method == "reptile" else {}
    episode, learner = random_episode(), small(method, normalization=normalization, **whole)
    permuted = replace(
        episode, support_images=episode.support_images[:, ORDER], support_labels=episode.support_labels[:, ORDER]
    )
    assert close(learner(permuted), learner(episode))
    wrongly = replace(permuted, support_labels=episode.support_labels)
    assert not close(learner(wrongly), learner(episode), 1e-4)


@of_every_method
@pytest.mark.parametrize("training", [True, False])
def test_query_labels_are_not_read(random_episode: Episodes, method: str, training: bool):
    episode, learner = random_episode(), small(method).train(training)
    poisoned = replace(episode, query_labels=torch.full_like(episode.query_labels, 10**6))
    assert torch.equal(learner(poisoned), learner(episode))


@of_every_method
def test_query_images_are_not_adapted_to(random_episode: Episodes, method: str):
    episode, learner = random_episode(), small(method)
    other = replace(episode, query_images=torch.full_like(episode.query_images, torch.nan))
    adapted, again = learner.adapt(episode), learner.adapt(other)
    assert adapted.keys() == dict(learner.network.named_parameters()).keys()
    assert all(torch.equal(adapted[name], again[name]) for name in adapted)


@of_every_method
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_query_sees_other_queries_only_where_the_learner_says_so(
    random_episode: Episodes, method: str, normalization: Normalization
):
    episode, learner = random_episode(), small(method, normalization=normalization)
    images = episode.query_images.clone()
    images[:, 2] = 1 - images[:, 2]
    changed = (learner(replace(episode, query_images=images)) != learner(episode)).any(-1).any(0)
    assert changed.tolist() == ([True] * 6 if learner.transductive else [False, False, True, False, False, False])
    assert learner.transductive == (normalization == "batch")
    assert learner.normalization == normalization


@of_every_method
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_task_sees_another(random_episode: Episodes, method: str, normalization: Normalization):
    episode, learner = random_episode(), small(method, normalization=normalization)
    other = replace(episode, support_images=episode.support_images.clone(), query_images=episode.query_images.clone())
    other.support_images[1] = 1 - other.support_images[1]
    other.query_images[1] = 1 - other.query_images[1]
    changed = (learner(other) != learner(episode)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


# --- tasks side by side ----------------------------------------------------------------------------------------


@of_every_method
@pytest.mark.parametrize("n_tasks", [1, 3])
def test_a_batch_of_tasks_is_the_tasks_one_by_one(random_episode: Episodes, method: str, n_tasks: int):
    episode, learner = random_episode(n_tasks=n_tasks), small(method)
    tasks = [episode.task(i) for i in range(n_tasks)]
    assert close(learner(episode), torch.cat([learner(task) for task in tasks]))
    found = torch.stack([loss_and_gradient(learner, task) for task in tasks])
    assert close(loss_and_gradient(learner, episode), found.mean(0))
    assert found[:, 1:].norm() > 1e-3


@of_every_method
@pytest.mark.parametrize("tasks_per_chunk", [1, 2, 4])
def test_chunks_change_nothing(random_episode: Episodes, method: str, tasks_per_chunk: int):
    """Three tasks one by one, in chunks of two and one, and whole."""
    episode = random_episode(n_tasks=3)
    whole, chunked = small(method), small(method, tasks_per_chunk=tasks_per_chunk)
    assert [len(chunk) for chunk in chunked.chunks(episode)] == {1: [1, 1, 1], 2: [2, 1], 4: [3]}[tasks_per_chunk]
    assert close(chunked(episode), whole(episode))
    expected = loss_and_gradient(whole, episode)
    assert close(loss_and_gradient(chunked, episode), expected)
    with torch.no_grad():
        assert close(chunked.meta_loss(episode), expected[0])


@of_every_method
@pytest.mark.parametrize("tasks_per_chunk", [None, 2])
def test_compiled_is_plain(
    random_episode: Episodes, monkeypatch: pytest.MonkeyPatch, method: str, tasks_per_chunk: int | None
):
    """What is traced for the compiler gives the same gradient, for other parameters and tasks too."""
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda graph: compiled.append(graph) or graph)
    learners = [small(method, compile=on, tasks_per_chunk=tasks_per_chunk) for on in (True, False)]
    for seed in range(2):
        found, expected = (loss_and_gradient(learner, random_episode(seed=seed)) for learner in learners)
        assert close(found, expected, 1e-8)
        for learner in learners:
            for parameter in learner.parameters():
                parameter.data += 0.01
    assert len(compiled) == (1 if tasks_per_chunk is None else 2)  # one for every size of chunk
    found, expected = (loss_and_gradient(learner.eval(), random_episode()) for learner in learners)
    assert close(found, expected, 1e-8)


@of_every_method
@pytest.mark.parametrize("tasks_per_chunk", [None, 2])
def test_a_meta_loss_is_part_of_a_larger_one(random_episode: Episodes, method: str, tasks_per_chunk: int | None):
    """Its gradient is scaled, and adds to what other terms give, as any loss's."""
    episode, learner = random_episode(), small(method, tasks_per_chunk=tasks_per_chunk)
    alone, parameters = loss_and_gradient(learner, episode)[1:], list(learner.parameters())
    loss = 3 * learner.meta_loss(episode) + sum(p.pow(2).sum() for p in parameters)
    together = flat(torch.autograd.grad(loss, parameters))
    assert close(together, 3 * alone + 2 * flat(parameters))


# --- adaptation ------------------------------------------------------------------------------------------------


@of_every_method
@pytest.mark.parametrize("tasks_per_chunk", [None, 2])
def test_works_without_gradients_and_leaves_no_trace(
    random_episode: Episodes, method: str, tasks_per_chunk: int | None
):
    episode, learner = random_episode(), small(method, tasks_per_chunk=tasks_per_chunk)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    expected, loss = learner(episode).detach(), learner.meta_loss(episode).detach()
    with torch.no_grad():
        logits, loss_again = learner(episode), learner.meta_loss(episode)
        assert not any(tensor.requires_grad for tensor in learner.adapt(episode).values())
        assert not torch.is_grad_enabled()
    assert not logits.requires_grad
    assert not loss_again.requires_grad
    assert close(logits, expected)
    assert close(loss_again, loss)
    assert close(learner(episode), expected)  # a second time as the first: nothing was remembered
    assert all(p.grad is None and p.requires_grad for p in learner.parameters())
    assert learner.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())


@of_every_method
def test_test_inner_steps_are_for_evaluation_mode(random_episode: Episodes, method: str):
    whole: dict[str, Any] = {"shots_per_step": None} if method == "reptile" else {}  # no other difference of modes
    episode, learner = random_episode(), small(method, inner_steps=1, test_inner_steps=3, **whole)
    one, three = small(method, inner_steps=1, **whole), small(method, inner_steps=3, **whole)
    assert torch.equal(learner(episode), one(episode))
    assert torch.equal(learner.eval()(episode), three(episode))
    assert torch.equal(learner.train()(episode), one(episode))
    assert torch.equal(one.eval()(episode), one.train()(episode))  # None: the same
    assert not close(one(episode), three(episode), 1e-3)
    never = small(method, inner_steps=3, test_inner_steps=0).eval()
    assert torch.equal(never(episode), small(method, inner_steps=0)(episode))


@of_every_method
@pytest.mark.parametrize("gradients", [True, False])
def test_the_path_of_adaptation(random_episode: Episodes, method: str, gradients: bool):
    episode, learner = random_episode(), small(method, inner_steps=2)
    with torch.set_grad_enabled(gradients):
        path = learner.adaptation_path(episode)
        assert len(path) == 3
        assert len(learner.adaptation_path(episode, inner_steps=5)) == 6
        assert len(learner.adaptation_path(episode, inner_steps=0)) == 1
        for steps, parameters in enumerate(path):
            adapted = learner.adapt(episode, inner_steps=steps)
            assert all(torch.equal(parameters[name], adapted[name]) for name in adapted)
        for name, parameter in learner.network.named_parameters():
            assert path[0][name].shape == (len(episode), *parameter.shape)
            assert all(torch.equal(of_task, parameter) for of_task in path[0][name])
        assert torch.equal(learner.query_logits(episode, path[-1]), learner(episode))


@of_every_method
def test_the_loss_of_every_task_falls_in_a_step(random_episode: Episodes, method: str):
    episode, learner = random_episode(), small(method, **short_steps(method))
    if isinstance(learner, MetaLSTM):
        be_gradient_descent(learner)
    path = learner.adaptation_path(episode, inner_steps=1)
    before, after = (learner.support_losses(episode, parameters) for parameters in path)
    assert before.shape == (len(episode),)
    assert (after < before).all()


def short_steps(method: str) -> dict[str, Any]:
    options: dict[str, dict[str, Any]] = {"meta_lstm": {}, "reptile": {"inner_lr": 0.01, "shots_per_step": None}}
    return options.get(method, {"inner_lr": 0.01})


def be_gradient_descent(learner: MetaLSTM) -> None:
    """All is kept and a hundredth of the gradient enters."""
    for gate, bias in ((learner.forget, 40.0), (learner.enter, -4.6)):
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, bias)


@of_every_method
@pytest.mark.parametrize("loss", [F.huber_loss, F.l1_loss])
def test_a_loss_of_ones_own(method: str, loss: Callable[[Tensor, Tensor], Tensor]):
    """It is what adaptation descends, and the mean over queries is what is reported (Reptile has no query loss)."""
    episode = regression()
    usual, own = (
        with_network(method, MLP(1, 1, hidden=(3,)), loss=criterion, **short_steps(method))
        for criterion in (None, loss)
    )
    found = own.support_losses(episode, own.adapt(episode, inner_steps=0))
    of_tasks = zip(episode.support_images, episode.support_labels, strict=True)
    assert close(found, torch.stack([loss(own.network(x), y) for x, y in of_tasks]))
    assert not close(own(episode), usual(episode), 1e-6)
    if not isinstance(own, Reptile):
        for learner, criterion in ((own, loss), (usual, F.mse_loss)):
            expected = criterion(learner(episode), episode.query_labels)
            assert close(learner.meta_loss(episode), expected)


@of_every_method
@pytest.mark.parametrize("tasks_per_chunk", [None, 2])
def test_a_frozen_parameter_gets_no_gradient(random_episode: Episodes, method: str, tasks_per_chunk: int | None):
    """The others get what they got, also where the meta-gradient is computed beforehand; tasks adapt all of them."""
    episode, learner = random_episode(), small(method, tasks_per_chunk=tasks_per_chunk)
    logits = learner(episode)
    learner.meta_loss(episode).backward()
    expected = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    learner.zero_grad()
    learner.network.blocks.requires_grad_(False)
    assert close(learner(episode), logits)
    learner.meta_loss(episode).backward()
    for name, parameter in learner.named_parameters():
        if name.startswith("network.blocks."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert close(parameter.grad, expected[name]), name


# --- learning --------------------------------------------------------------------------------------------------


@of_every_method
def test_overfits_one_episode(random_episode: Episodes, method: str):
    """Reptile does not look at the queries in training, so there they are the support images."""
    options: dict[str, Any] = {}
    episode = random_episode(n_tasks=1)
    if method == "reptile":
        episode = replace(episode, query_images=episode.support_images, query_labels=episode.support_labels)
        options = {"inner_lr": 0.02}
    learner = small(method, **options)

    def answer() -> tuple[float, float]:
        with torch.no_grad():
            logits = learner(episode).flatten(0, 1)
        labels = episode.query_labels.flatten()
        return F.cross_entropy(logits, labels).item(), (logits.argmax(-1) == labels).double().mean().item()

    loss, accuracy = answer()
    assert loss > 0.5 and accuracy < 1
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        learner.meta_loss(episode).backward()
        optimizer.step()
    loss, accuracy = answer()
    assert loss < 0.2 and accuracy == 1


class InDoublePrecision:
    """The tasks of a sampler in float64."""

    def __init__(self, sampler: EpisodeSampler) -> None:
        self.sampler, self.generator = sampler, sampler.generator

    def sample(self, n_tasks: int) -> Episode:
        episode = self.sampler.sample(n_tasks)
        return replace(
            episode, support_images=episode.support_images.double(), query_images=episode.query_images.double()
        )


def short_run(learner: AdaptingLearner, classes: ClassImages, *, seed: int = 3, **options: Any) -> list[float]:
    """The meta-losses after every half of a few steps of training."""
    sampler = InDoublePrecision(EpisodeSampler(classes, EpisodeSpec(3, 2, 2), seed=seed))
    config = TrainConfig(**{"iterations": 4, "tasks_per_step": 2, "outer_lr": 0.02, "warmup": 2} | options)
    config = replace(config, log_every=config.iterations // 2)
    history = train(learner, sampler, config, progress_bar=False, device="cpu")
    return [row["meta_loss"] for row in history]


@of_every_method
def test_same_seed_same_weights(class_images: Callable[..., ClassImages], method: str):
    classes, runs = class_images(12, 6), []
    for seed in (3, 3, 4):
        torch.rand(3)  # the global generator is elsewhere each time
        learner = small(method)
        losses = short_run(learner, classes, seed=seed)
        runs.append((losses, flat(learner.parameters())))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])
    assert not torch.equal(runs[0][1], flat(small(method).parameters()))


@pytest.mark.parametrize(
    ("method", "losses"),  # after 10 and 20 steps
    [
        ("reptile", [1.864812995674105, 1.9128045470401105]),
        ("imaml", [0.782828507783036, 0.7285959699142175]),
        ("meta_lstm", [0.874564614156119, 0.7504023244501719]),
    ],
)
def test_twenty_steps_go_where_they_went(class_images: Callable[..., ClassImages], method: str, losses: list[float]):
    found = short_run(small(method), class_images(12, 6), iterations=20, warmup=5)
    assert found == pytest.approx(losses, rel=1e-6)


# --- errors ----------------------------------------------------------------------------------------------------


@of_every_method
def test_another_number_of_ways(random_episode: Episodes, method: str):
    name = type(small(method)).__name__
    message = (
        f"the network has 3 outputs but the episode is 4-way; {name} adapts one head, "
        "so build ConvNet(n_outputs=4) and train it"
    )
    whole, chunked = small(method), small(method, tasks_per_chunk=1)
    for refused in (whole.forward, whole.meta_loss, whole.adapt, whole.adaptation_path, chunked.meta_loss):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            refused(random_episode(n_way=4))


WRONG_STEPS: list[tuple[dict[str, Any], str]] = [
    ({"inner_steps": -1, "test_inner_steps": None}, "inner steps must not be negative, got -1 and None"),
    ({"inner_steps": 2, "test_inner_steps": -2}, "inner steps must not be negative, got 2 and -2"),
]
WRONG_RATES: list[tuple[dict[str, Any], str]] = [
    ({"inner_lr": 0.0}, "inner_lr must be positive, got 0.0"),
    ({"inner_lr": -0.1}, "inner_lr must be positive, got -0.1"),
    ({"inner_lr": float("nan")}, "inner_lr must be positive, got nan"),
]
MISTAKES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "maml": WRONG_STEPS + WRONG_RATES,  # the others are in `test_maml.py`
    "reptile": [
        *WRONG_STEPS,
        *WRONG_RATES,
        ({"shots_per_step": 0}, "shots_per_step must be positive, got 0"),
        ({"shots_per_step": -1}, "shots_per_step must be positive, got -1"),
    ],
    "imaml": [
        *WRONG_STEPS,
        *WRONG_RATES,
        ({"proximity": 0.0}, "proximity must be positive, got 0.0"),
        ({"proximity": -1.0}, "proximity must be positive, got -1.0"),
        ({"proximity": float("nan")}, "proximity must be positive, got nan"),
        ({"cg_steps": -1}, "cg_steps must not be negative, got -1"),
        ({"cg_damping": -1.0}, "cg_damping must not be negative, got -1.0"),
    ],
    "meta_lstm": [*WRONG_STEPS, ({"hidden_size": 0}, "hidden_size must be positive, got 0")],
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [(method, *mistake) for method, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_mistakes_are_named(method: str, options: dict[str, Any], message: str):
    """By the learner, and by its config before there is one."""
    for build in (lambda: METHODS[method](ConvNet(3), **options), lambda: CONFIGS[method](**options)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            build()


@of_every_method
@pytest.mark.parametrize("tasks_per_chunk", [0, -1])
def test_a_chunk_holds_a_task(method: str, tasks_per_chunk: int):
    with pytest.raises(ValueError, match=f"^tasks_per_chunk must be positive, got {tasks_per_chunk}$"):
        METHODS[method](ConvNet(3), tasks_per_chunk=tasks_per_chunk)


# --- configs ---------------------------------------------------------------------------------------------------


CONFIGS: dict[str, Callable[..., Any]] = {
    "maml": MAMLConfig,
    "reptile": ReptileConfig,
    "imaml": ImplicitMAMLConfig,
    "meta_lstm": MetaLSTMConfig,
}


@pytest.mark.parametrize(
    "config",
    [
        MAMLConfig(inner_lr=0.2, inner_steps=2, test_inner_steps=3, learned_lr="layer", multi_step_iterations=7),
        MAMLConfig(inner_lr=0.2, inner_steps=2, first_order=True, adapt="head", recompute=True, compile=True),
        ReptileConfig(inner_lr=0.2, inner_steps=2, test_inner_steps=3, shots_per_step=4),
        ReptileConfig(inner_lr=0.2, inner_steps=2, test_inner_steps=None, shots_per_step=None),
        ImplicitMAMLConfig(inner_lr=0.2, inner_steps=2, test_inner_steps=3, proximity=0.5, cg_steps=4, cg_damping=0.1),
        MetaLSTMConfig(inner_steps=2, test_inner_steps=3, hidden_size=4),
    ],
    ids=lambda config: config.method,
)
def test_a_config_builds_its_learner(config: Any):
    """All arguments arrive, each at its own place: no two are equal."""
    learner = config.build(network := ConvNet(3))
    assert learner.config == config
    assert learner.network is network
    assert type(learner) is METHODS[config.method]
    assert (learner.inner_steps, learner.test_inner_steps) == (config.inner_steps, config.test_inner_steps)


@of_every_method
def test_learner_and_config_agree_on_the_defaults(method: str):
    learner, config = METHODS[method](ConvNet(3)), CONFIGS[method]()
    assert learner.config == config
    assert config.method == method
    assert (learner.inner_steps, learner.test_inner_steps) == (config.inner_steps, config.test_inner_steps)
    assert learner.tasks_per_chunk is None
