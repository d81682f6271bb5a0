"""What every optimization-based learner keeps to, besides the contract of all learners: chunks, modes, losses."""

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
from metatutor.optimization import MAML, ImplicitMAML, MetaLSTM, Reptile
from metatutor.optimization.base import AdaptingLearner
from metatutor.training import TrainConfig, accumulate, train
from tests.gradients import close, drawn, flat, gradient_of, regression

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
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    "first order": ("maml", {"first_order": True}),
    "anil": ("maml", {"adapt": "head"}),
    "recompute": ("maml", {"recompute": True}),
    "maml++": ("maml", {"learned_lr": "layer", "multi_step_iterations": 3}),
    "maml++, recompute": ("maml", {"learned_lr": "layer", "multi_step_iterations": 3, "recompute": True}),
    "fixed head": ("imaml", {"fixed_head": True}),
}
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])
of_every_method = pytest.mark.parametrize("method", METHODS)


def with_network(method: str, network: Network, **options: Any) -> AdaptingLearner:
    """A learner in float64, every parameter random, also those of an LSTM."""
    return drawn(METHODS[method](network, **{"inner_steps": 2} | OPTIONS[method] | options))


def small(method: str, *, normalization: Normalization = "batch", **options: Any) -> AdaptingLearner:
    """A learner of 3-way tasks of 8×8 pixels."""
    network = ConvNet(3, filters=4, n_blocks=2, image_size=8, normalization=normalization)
    return with_network(method, network, **options)


# --- what may depend on what -----------------------------------------------------------------------------------


@of_every_method
@pytest.mark.parametrize("normalization", ["batch", "support", "group"])
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
def test_query_images_are_not_adapted_to(random_episode: Episodes, method: str):
    episode, learner = random_episode(), small(method)
    other = replace(episode, query_images=torch.full_like(episode.query_images, torch.nan), query_labels=None)
    adapted, again = learner.adapt(episode), learner.adapt(other)
    assert adapted.keys() == dict(learner.network.named_parameters()).keys()
    assert all(torch.equal(adapted[name], again[name]) for name in adapted)


# --- gradients that add up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_chunks_add_up(random_episode: Episodes, variant: str):
    """To those of all tasks at once, and to what is there already."""
    method, options = VARIANTS[variant]
    episode, found = random_episode(n_tasks=3), []
    for at_once in (None, 1, 2):
        learner = small(method, **options)
        assert [len(part) for part in learner.chunks(episode, at_once)] == {None: [3], 1: [1, 1, 1], 2: [2, 1]}[at_once]
        loss = accumulate(learner, episode, at_once)
        found.append(flat([loss, *(p.grad for p in learner.parameters() if p.grad is not None)]))
    assert torch.equal(found[0], flat([learner.meta_loss(episode).detach(), gradient_of(learner, episode)]))
    assert all(close(other, found[0], 1e-12) for other in found[1:])
    assert found[0][1:].norm() > 1e-3
    accumulate(learner, episode)
    assert close(flat(p.grad for p in learner.parameters() if p.grad is not None), 2 * found[0][1:], 1e-12)


@pytest.mark.parametrize("variant", [*METHODS, "recompute"])
def test_a_meta_loss_is_part_of_a_larger_one(random_episode: Episodes, variant: str):
    """Its gradient is scaled, and adds to what other terms give, as any loss's."""
    method, options = VARIANTS[variant]
    episode, learner = random_episode(), small(method, **options)
    alone, parameters = gradient_of(learner, episode), list(learner.parameters())
    loss = 3 * learner.meta_loss(episode) + sum(p.pow(2).sum() for p in parameters)
    together = flat(torch.autograd.grad(loss, parameters))
    assert close(together, 3 * alone + 2 * flat(parameters))


# --- adaptation ------------------------------------------------------------------------------------------------


@of_every_method
def test_works_without_gradients(random_episode: Episodes, method: str):
    episode, learner = random_episode(), small(method)
    loss = learner.meta_loss(episode)
    with torch.no_grad():
        without = learner.meta_loss(episode)
        assert not any(tensor.requires_grad for tensor in learner.adapt(episode).values())
        assert not torch.is_grad_enabled()
    assert not without.requires_grad
    assert close(without, loss.detach())
    assert all(p.grad is None and p.requires_grad for p in learner.parameters())


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
def test_a_regression_is_measured_by_its_steps(method: str):
    episode, learner = regression(), with_network(method, MLP(1, 1, hidden=(3,)), test_inner_steps=3).eval()
    with torch.no_grad():
        errors = learner.measure(episode)
        paths = [learner.adaptation_path(task) for task in episode]
    assert errors.shape == (3, 4)
    for task, path, of_task in zip(episode, paths, errors, strict=True):
        for parameters, error in zip(path, of_task, strict=True):
            outputs = learner.query_logits(task, parameters)
            assert error.item() == pytest.approx(F.mse_loss(outputs, task.query_labels).item(), rel=1e-12)


# --- losses ----------------------------------------------------------------------------------------------------


WEIGHTED = {"weight": torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), "label_smoothing": 0.2}


@pytest.mark.filterwarnings("ignore:tasks are computed one by one")  # both of its options at once are beyond vmap
@of_every_method
def test_a_loss_that_is_a_module(random_episode: Episodes, method: str):
    """Class weights and smoothing count in both loops (Reptile has no query loss)."""
    episode, criterion = random_episode(), nn.CrossEntropyLoss(**WEIGHTED)
    usual, own = (small(method, loss=loss, **short_steps(method)) for loss in (None, criterion))
    found = own.support_losses(episode, own.adapt(episode, inner_steps=0))
    of_tasks = list(zip(episode.support_images, episode.support_labels, strict=True))
    expected = torch.stack([F.cross_entropy(own.network(x), y, **WEIGHTED) for x, y in of_tasks])
    assert close(found, expected)
    assert not close(found, usual.support_losses(episode, usual.adapt(episode, inner_steps=0)), 1e-2)
    assert not close(own(episode), usual(episode), 1e-6)
    if not isinstance(own, Reptile):
        expected = F.cross_entropy(own(episode).flatten(0, 1), episode.query_labels.flatten(), **WEIGHTED)
        assert close(own.meta_loss(episode), expected)
    assert torch.equal(own.state_dict()["loss.weight"], WEIGHTED["weight"])
    assert "loss" not in own.arguments or own.arguments["loss"] is None


@of_every_method
@pytest.mark.parametrize("loss", [F.huber_loss, F.l1_loss])
def test_a_loss_that_is_a_function(method: str, loss: Callable[[Tensor, Tensor], Tensor]):
    """It is what adaptation descends, and the mean over queries is what is reported."""
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


@pytest.mark.parametrize("method", ["maml", "imaml", "meta_lstm"])
@pytest.mark.parametrize("inner", [lambda outputs, y: -100 * F.mse_loss(outputs, y), nn.HuberLoss(delta=0.1)])
def test_another_loss_inside_than_outside(method: str, inner: Callable[[Tensor, Tensor], Tensor]):
    """Tasks adapt as with the inner loss alone; what the outer loop minimises is the outer one."""
    episode, network = regression(), drawn(MLP(1, 1, hidden=(3,)))
    both, inside, outside = (
        with_network(method, network, **short_steps(method), **losses)
        for losses in ({"loss": F.l1_loss, "inner_loss": inner}, {"loss": inner}, {"loss": F.l1_loss})
    )
    assert torch.equal(both(episode), inside(episode))
    assert not close(both(episode), outside(episode), 1e-6)
    assert close(both.meta_loss(episode), F.l1_loss(both(episode), episode.query_labels))


@pytest.mark.parametrize("method", ["reptile", "imaml"])
def test_a_loss_that_would_not_be_learned_is_refused(method: str):
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * logits, labels)

    message = f"{METHODS[method].__name__} learns parameters of the network only; freeze those of the loss"
    with pytest.raises(ValueError, match=f"^{message}$"):
        METHODS[method](ConvNet(3), loss=Temperature())
    METHODS[method](ConvNet(3), loss=Temperature().requires_grad_(False))


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
        accumulate(learner, episode)
        optimizer.step()
        learner.after_step()
    loss, accuracy = answer()
    assert loss < 0.2 and accuracy == 1


class InDoublePrecision(EpisodeSampler):
    """Tasks in float64."""

    def sample(self, n_tasks: int) -> Episode:
        return super().sample(n_tasks).to(torch.float64)


class Classes:
    """Classes whose tasks come in float64."""

    def __init__(self, images: ClassImages) -> None:
        self.images = images

    def sampler(self, spec: EpisodeSpec, *, seed: int) -> InDoublePrecision:
        return InDoublePrecision(self.images, spec, seed=seed)


def short_run(learner: AdaptingLearner, classes: ClassImages, k_shot: int = 2, **options: Any) -> list[float]:
    """The meta-losses after every half of a few steps of training."""
    config = TrainConfig(**{"iterations": 2, "tasks_per_step": 2, "outer_lr": 0.02, "warmup": 2, "seed": 3} | options)
    config = replace(config, log_every=config.iterations // 2)
    spec = EpisodeSpec(3, k_shot, 2)
    history = train(learner, Classes(classes), spec, config, progress_bar=False, device="cpu")
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


ONE_SHOT = {"k_shot": 1, "tasks_per_step": 4}


@pytest.mark.parametrize(
    ("method", "options", "run", "losses"),  # after 10 and 20 steps
    [
        ("maml", {"inner_steps": 1}, ONE_SHOT, [0.7827286994272906, 0.5967709322091785]),
        ("maml", {"inner_steps": 1, "first_order": True}, ONE_SHOT, [0.8278923954232955, 0.8062986436015036]),
        (
            "maml",
            {"normalization": "support"},
            {**ONE_SHOT, "tasks_at_once": 3},
            [0.6269739469688023, 0.42880839873533516],
        ),
        ("reptile", {}, {}, [2.1695295011924154, 2.9161177567274135]),
        ("imaml", {}, {}, [0.782828507783036, 0.7285959699142175]),
        ("meta_lstm", {}, {}, [0.874564614156119, 0.7504023244501719]),
    ],
)
def test_twenty_steps_go_where_they_went(
    class_images: Callable[..., ClassImages],
    method: str,
    options: dict[str, Any],
    run: dict[str, Any],
    losses: list[float],
):
    found = short_run(small(method, **options), class_images(12, 6), iterations=20, warmup=5, **run)
    assert found == pytest.approx(losses, rel=1e-6)


# --- errors and arguments --------------------------------------------------------------------------------------


@of_every_method
def test_another_number_of_ways(random_episode: Episodes, method: str):
    learner = small(method)
    message = "the network has 3 outputs but the episode is 4-way; build ConvNet(n_outputs=4) and train it"
    assert learner.ways == 3
    for refused in (learner.forward, learner.meta_loss, learner.adapt, learner.adaptation_path):
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
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        METHODS[method](ConvNet(3), **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("maml", {"inner_lr": 0.2, "test_inner_steps": 3, "learned_lr": "layer", "multi_step_iterations": 7}),
        ("maml", {"test_inner_lr": 0.2, "first_order": True, "adapt": "head", "recompute": True, "compiled": True}),
        ("reptile", {"inner_lr": 0.2, "test_inner_steps": 3, "shots_per_step": 4}),
        ("reptile", {"inner_lr": 0.2, "test_inner_steps": None, "shots_per_step": None}),
        ("imaml", {"inner_lr": 0.2, "test_inner_steps": 3, "proximity": 0.5, "cg_steps": 4, "cg_damping": 0.1}),
        ("meta_lstm", {"test_inner_steps": 3, "hidden_size": 4, "fixed_head": True}),
    ],
)
def test_arguments_are_kept_and_make_the_same_again(method: str, options: dict[str, Any]):
    """All arrive, each at its own place: no two are equal."""
    learner = METHODS[method](network := ConvNet(3), inner_steps=2, **options)
    assert learner.network is network
    assert {name: learner.arguments[name] for name in options} == options
    again = METHODS[method](network, **learner.arguments)
    assert again.arguments == learner.arguments
    for name, value in {"inner_steps": 2, **options}.items():
        if name not in ("adapt", "compiled", "hidden_size"):
            assert getattr(again, name) == value, name


def test_every_method_says_what_it_asks_of_a_network():
    for kind in (MAML, Reptile, ImplicitMAML, MetaLSTM):
        assert kind.outputs(n_way=5, n_train_classes=100) == 5
        assert (kind.learns, kind.reads_streams, kind.trains_on) == (True, False, "episodes")
