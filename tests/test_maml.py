"""MAML: the meta-gradient is exact, by hand, against a plain loop, and however it is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from shutil import which
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.backbones import MLP, ConvNet, Normalization, Pooling
from metatutor.episodes import Episode
from metatutor.functional import Parameters
from metatutor.optimization import MAML
from metatutor.training import accumulate
from tests.gradients import close, drawn, flat, gradient_of, regression, slopes

Episodes = Callable[..., Episode]


def small(
    *,
    pooling: Pooling = "stride",
    normalization: Normalization = "batch",
    hidden: tuple[int, ...] = (),
    n_blocks: int = 2,
    seed: int = 0,
    inner_lr: float = 0.3,
    **options: Any,
) -> MAML:
    """A learner of 3-way tasks of 8×8 pixels in float64, every parameter random."""
    network = ConvNet(
        3, filters=4, n_blocks=n_blocks, image_size=8, pooling=pooling, normalization=normalization, hidden=hidden
    )
    return MAML(drawn(network, seed), inner_lr=inner_lr, **options)


# --- by hand ---------------------------------------------------------------------------------------------------


class ThreeWeights(ConvNet):
    """Two logits, 0 and `w · x`, for images `x` of three pixels."""

    def __init__(self, weights: list[float]) -> None:
        nn.Module.__init__(self)
        self.n_outputs, self.normalization = 2, "group"
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, images: Tensor, n_support: int | None = None) -> Tensor:
        logit = images.flatten(1) @ self.weights
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


def of_three_pixels(*tasks: tuple[list[float], int, list[float], int]) -> Episode:
    """Tasks of one support and one query image: pixels, label, pixels, label."""

    def images(which: int) -> Tensor:
        return torch.tensor([task[which] for task in tasks], dtype=torch.float64).view(-1, 1, 1, 1, 3)

    def labels(which: int) -> Tensor:
        return torch.tensor([[task[which]] for task in tasks])

    return Episode.unchecked(images(0), labels(1), images(2), labels(3), n_way=2)  # no support image of the other


# Three weights w, one support image x with label 1, one query image q with label 1, s = sigmoid:
#
#   support loss        L(w) = -log s(w·x)              gradient  g(w) = -(1 - s) x      Hessian  H(w) = s (1 - s) x xᵀ
#   adapted weights     v = w - α g(w) = w + α (1 - s(w·x)) x
#   query loss          Q(v) = -log s(v·q)              gradient  ∇Q(v) = -(1 - s(v·q)) q
#   meta-gradient       dQ/dw = (I - α H(w)) ∇Q(v)      first order: ∇Q(v)
#
# At w = 0, s(w·x) = 1/2: v = α/2 x and H = x xᵀ / 4. With x = (1, 2, 0), q = (1, 0, 1), x·q = 1 and α = 2 log 3:
# v·q = log 3, so s(v·q) = 3/4, the query loss is log(4/3) and ∇Q(v) = -q/4. Then
#
#   meta-gradient = -1/4 (q - α/4 (x·q) x) = -1/4 (q - (log 3)/2 x) = (-1/4 + (log 3)/8, (log 3)/4, -1/4).
#
# A second task with support label 0 instead (x unchanged): L = -log s(-w·x), so v = -α/2 x and H the same. With the
# query q of label 0, v·q = -log 3 and by symmetry everything but the sign of ∇Q is the same.
TASK_OF_ONES = ([1.0, 2.0, 0.0], 1, [1.0, 0.0, 1.0], 1)
TASK_OF_ZEROS = ([1.0, 2.0, 0.0], 0, [1.0, 0.0, 1.0], 0)
SECOND_ORDER = torch.tensor([-1 / 4 + math.log(3) / 8, math.log(3) / 4, -1 / 4], dtype=torch.float64)
FIRST_ORDER = torch.tensor([-1 / 4, 0, -1 / 4], dtype=torch.float64)


@pytest.mark.parametrize(("first_order", "expected"), [(False, SECOND_ORDER), (True, FIRST_ORDER)])
def test_three_weights_by_hand(first_order: bool, expected: Tensor):
    learner = MAML(ThreeWeights([0, 0, 0]), inner_lr=2 * math.log(3), first_order=first_order)
    episode = of_three_pixels(TASK_OF_ONES)
    adapted = learner.adapt(episode)["weights"]
    assert close(adapted, math.log(3) * torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64))
    assert close(learner(episode), torch.tensor([[[0, math.log(3)]]], dtype=torch.float64))
    assert learner.meta_loss(episode).item() == pytest.approx(math.log(4 / 3), abs=1e-12)
    assert close(gradient_of(learner, episode), expected)
    assert close(gradient_of(learner, of_three_pixels(TASK_OF_ZEROS)), -expected)
    # the loss is the mean over tasks: opposite tasks cancel, and two of one and one of the other leave a third
    assert close(gradient_of(learner, of_three_pixels(TASK_OF_ONES, TASK_OF_ZEROS)), 0 * expected)
    assert close(gradient_of(learner, of_three_pixels(TASK_OF_ONES, TASK_OF_ZEROS, TASK_OF_ONES)), expected / 3)


def test_no_inner_step_is_plain_training():
    learner = MAML(ThreeWeights([0, 0, 0]), inner_steps=0)
    # at w = 0 the query has probability 1/2: the gradient is -q/2
    expected = torch.tensor([-0.5, 0, -0.5], dtype=torch.float64)
    assert close(gradient_of(learner, of_three_pixels(TASK_OF_ONES)), expected)


# --- against finite differences --------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": (5,), "pooling": "max"},  # the article's network
        {"normalization": "support"},
        {"normalization": "group", "pooling": "max"},
        {"adapt": "head"},
        {"learned_lr": "parameter"},
        {"learned_lr": "layer"},
        {"multi_step_iterations": 10**15},  # so many that the weights stay what they are
        {"recompute": True},
        {"recompute": True, "learned_lr": "layer", "multi_step_iterations": 10**15},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()) or "default",
)
def test_meta_gradient_against_finite_differences(random_episode: Episodes, options: dict[str, Any], inner_steps: int):
    """Central differences along random directions; the step is far too short to meet a kink of the ReLU."""
    for slope, found in slopes(small(inner_steps=inner_steps, **options), random_episode(), n_directions=3):
        assert slope == pytest.approx(found, rel=1e-6, abs=1e-7)


# --- against a plain loop --------------------------------------------------------------------------------------


def plain_logits(
    parameters: Parameters, images: Tensor, n_support: int, pooling: Pooling, normalization: Normalization
) -> Tensor:
    """The network of `small`, without `hidden`, in functions that PyTorch differentiates itself."""
    for i in range(2):
        weight, scale, shift = (parameters[f"blocks.{i}.{name}"] for name in ("weight", "scale", "shift"))
        images = F.conv2d(images, weight, stride=2 if pooling == "stride" else 1, padding=1)
        if normalization == "group":
            images = F.group_norm(images, 4, scale, shift)
        else:
            of_support = images[: n_support if normalization == "support" else len(images)]
            mean, variance = of_support.mean((0, 2, 3), keepdim=True), of_support.var((0, 2, 3), False, keepdim=True)
            images = scale.view(-1, 1, 1) * (images - mean) / (variance + 1e-5).sqrt() + shift.view(-1, 1, 1)
        images = images.relu() if pooling == "stride" else F.max_pool2d(images.relu(), 2)
    return images.flatten(1) @ parameters["head.weight"].T + parameters["head.bias"]


def plain_maml(
    learner: MAML, episode: Episode, pooling: Pooling, normalization: Normalization
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, meta-loss and meta-gradient by Finn et al.'s algorithm, task by task, step by step."""
    start, adapt = dict(learner.network.named_parameters()), learner.arguments["adapt"]
    all_logits, losses = [], []
    for task in range(len(episode)):
        support, labels = episode.support_images[task], episode.support_labels[task]
        parameters: Parameters = dict(start)
        for _ in range(learner.inner_steps):
            loss = F.cross_entropy(plain_logits(parameters, support, len(support), pooling, normalization), labels)
            moving = [name for name in parameters if adapt == "all" or name.startswith("head")]
            gradients = torch.autograd.grad(loss, [parameters[name] for name in moving], create_graph=True)
            for name, gradient in zip(moving, gradients, strict=True):
                gradient = gradient.detach() if learner.first_order else gradient
                parameters[name] = parameters[name] - learner.inner_lr * gradient
        queries, n_support = episode.query_images[task], 0
        if normalization == "support":
            queries, n_support = torch.cat([support, queries]), len(support)
        logits = plain_logits(parameters, queries, n_support, pooling, normalization)[n_support:]
        all_logits.append(logits)
        losses.append(F.cross_entropy(logits, episode.query_labels[task]))
    loss = torch.stack(losses).mean()
    return torch.stack(all_logits), loss, flat(torch.autograd.grad(loss, list(start.values())))


@pytest.mark.parametrize(
    ("pooling", "normalization"), [("stride", "batch"), ("max", "batch"), ("stride", "support"), ("max", "group")]
)
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapt", ["all", "head"])
def test_side_by_side_is_one_by_one(
    random_episode: Episodes,
    pooling: Pooling,
    normalization: Normalization,
    inner_steps: int,
    first_order: bool,
    adapt: Literal["all", "head"],
):
    episode = random_episode()
    learner = small(
        pooling=pooling, normalization=normalization, inner_steps=inner_steps, first_order=first_order, adapt=adapt
    )
    logits, loss, gradient = plain_maml(learner, episode, pooling, normalization)
    assert close(learner(episode), logits)
    assert close(learner.meta_loss(episode), loss)
    assert close(gradient_of(learner, episode), gradient)


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_first_order_is_another_gradient_of_the_same_loss(random_episode: Episodes, adapt: Literal["all", "head"]):
    episode = random_episode()
    second, first = small(adapt=adapt), small(adapt=adapt, first_order=True)
    assert torch.equal(second(episode), first(episode))
    assert second.meta_loss(episode).item() == first.meta_loss(episode).item()
    one, other = gradient_of(second, episode), gradient_of(first, episode)
    assert (one - other).norm() > 0.1 * one.norm()


def test_first_order_is_the_query_gradient_at_the_adapted_parameters(random_episode: Episodes):
    episode, learner = random_episode(), small(first_order=True, inner_steps=2)
    expected = torch.zeros(1, dtype=torch.float64)
    for task in range(len(episode)):
        adapted = {
            name: tensor[0].detach().requires_grad_() for name, tensor in learner.adapt(episode.task(task)).items()
        }
        logits = functional_call(learner.network, adapted, (episode.query_images[task],))
        loss = F.cross_entropy(logits, episode.query_labels[task]) / len(episode)
        expected = expected + flat(torch.autograd.grad(loss, list(adapted.values())))
    assert close(gradient_of(learner, episode), expected)


# --- learned step sizes, and the loss after every step -----------------------------------------------------------


def test_three_learned_rates_by_hand():
    """Meta-SGD: v = w - a g elementwise with g = -x/2 at w = 0, so dQ/da = -g ∇Q(v) = x/2 ∇Q(v), elementwise."""
    learner = MAML(ThreeWeights([0, 0, 0]), inner_lr=2 * math.log(3), learned_lr="parameter")
    of_weights, of_rates = gradient_of(learner, of_three_pixels(TASK_OF_ONES)).split(3)
    assert close(of_weights, SECOND_ORDER)
    x, gradient = torch.tensor(TASK_OF_ONES[0], dtype=torch.float64), FIRST_ORDER
    assert close(of_rates, x / 2 * gradient)
    learner.rates[0].data[:] = torch.tensor([1.0, 0.0, 3.0])
    assert close(learner.adapt(of_three_pixels(TASK_OF_ONES))["weights"][0], torch.tensor([0.5, 0, 0]).double())


@pytest.mark.parametrize("learned_lr", ["parameter", "layer"])
@pytest.mark.parametrize("adapt", ["all", "head"])
@pytest.mark.parametrize("n_calls", [None, 0, 3, 10])
def test_rates_and_step_losses_against_a_loop(
    random_episode: Episodes, learned_lr: Literal["parameter", "layer"], adapt: Literal["all", "head"], n_calls: int
):
    """Task by task, step by step, with other rates for each; the loss after every step, at several calls."""
    options: dict[str, Any] = {} if n_calls is None else {"multi_step_iterations": 10}
    learner, episode = small(inner_steps=3, learned_lr=learned_lr, adapt=adapt, **options), random_episode()
    generator = torch.Generator().manual_seed(2)
    for rates in learner.rates:
        rates.data = 0.5 * torch.rand(rates.shape, dtype=torch.float64, generator=generator)
    moving = [n for n, _ in learner.network.named_parameters() if adapt == "all" or n.startswith("head.")]
    loss = torch.zeros((), dtype=torch.float64)
    share = 0.0 if n_calls is None else (1 - n_calls / 10) / 3
    for task in range(len(episode)):
        parameters: Parameters = dict(learner.network.named_parameters())
        for step in range(3):
            of_support = F.cross_entropy(
                plain_logits(parameters, episode.support_images[task], 0, "stride", "batch"),
                episode.support_labels[task],
            )
            gradients = torch.autograd.grad(of_support, [parameters[n] for n in moving], create_graph=True)
            for name, rates, gradient in zip(moving, learner.rates, gradients, strict=True):
                rate = rates if learned_lr == "parameter" else rates[step]
                parameters = parameters | {name: parameters[name] - rate * gradient}
            of_query = F.cross_entropy(
                plain_logits(parameters, episode.query_images[task], 0, "stride", "batch"), episode.query_labels[task]
            )
            loss = loss + (share if step < 2 else 1 - 2 * share) * of_query / len(episode)
    expected = flat(torch.autograd.grad(loss, list(learner.parameters())))
    if n_calls is not None:
        learner.multi_step_calls.fill_(n_calls)
    assert close(gradient_of(learner, episode), expected)


def test_step_losses_end_as_the_last_one(random_episode: Episodes):
    """They move with the steps of the outer loop; however often it is asked between two of them, it says the same."""
    episode, learner = random_episode(), small(inner_steps=2, multi_step_iterations=4)
    mean = small(inner_steps=1).meta_loss(episode) / 2 + (last := small(inner_steps=2).meta_loss(episode)) / 2
    assert close(learner.eval().meta_loss(episode), last)
    learner.after_step()  # not in training
    with torch.no_grad():
        assert close(learner.train().meta_loss(episode), mean)
    for done in (0, 0.25, 0.5, 0.75, 1, 1):
        for at_once in (None, 1):
            assert close(accumulate(learner, episode, at_once), (mean + (last - mean) * done).detach())
        learner.after_step()
    assert learner.state_dict()["multi_step_calls"] == 6  # a resumed run goes on where it was


def test_steps_beyond_training_take_the_last_rate(random_episode: Episodes):
    episode, learner = random_episode(), small(inner_steps=2, test_inner_steps=4, learned_lr="layer")
    for rates in learner.rates:
        rates.data = torch.tensor([0.2, 0.1], dtype=torch.float64)
    longer = small(inner_steps=4, learned_lr="layer")
    for rates in longer.rates:
        rates.data = torch.tensor([0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert close(learner.eval()(episode), longer(episode))


# --- regression ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [None, F.huber_loss])
def test_any_loss_of_any_network(loss: Callable[[Tensor, Tensor], Tensor] | None):
    episode, network = regression(), MLP(1, 1, hidden=(3,)).double()
    learner, total = MAML(network, inner_lr=0.1, inner_steps=2, loss=loss), torch.zeros(())
    criterion = loss or (lambda outputs, targets: ((outputs - targets) ** 2).mean())
    for i in range(len(episode)):
        own: Parameters = dict(network.named_parameters())
        for _ in range(2):
            of_support = criterion(
                functional_call(network, own, (episode.support_images[i],)), episode.support_labels[i]
            )
            gradients = torch.autograd.grad(of_support, list(own.values()), create_graph=True)
            own = {n: p - 0.1 * g for (n, p), g in zip(own.items(), gradients, strict=True)}
        outputs = functional_call(network, own, (episode.query_images[i],))
        assert close(learner(episode)[i], outputs)
        total = total + criterion(outputs, episode.query_labels[i]) / len(episode)
    assert close(learner.meta_loss(episode), total)
    assert close(gradient_of(learner, episode), flat(torch.autograd.grad(total, list(network.parameters()))))


# --- the same gradient in less memory, or less time --------------------------------------------------------------


OPTIONS: list[dict[str, Any]] = [
    {},
    {"inner_steps": 0},
    {"inner_steps": 2, "first_order": True},
    {"inner_steps": 2, "adapt": "head", "normalization": "support"},
    {"inner_steps": 2, "learned_lr": "parameter", "pooling": "max", "normalization": "group"},
    {"inner_steps": 2, "learned_lr": "layer", "multi_step_iterations": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_recomputed_is_plain(random_episode: Episodes, options: dict[str, Any]):
    learners = [small(recompute=recompute, **options) for recompute in (True, False)]
    gradients = [three_steps(random_episode, learner) for learner in learners]
    assert close(gradients[0], gradients[1])
    losses = [learner.meta_loss(random_episode()) for learner in learners]
    assert close(losses[0], losses[1])


@pytest.mark.parametrize("frozen", ["head.bias", "blocks.", "rates."])
def test_what_is_frozen_gets_no_recomputed_gradient(random_episode: Episodes, frozen: str):
    """And the others get what they got; a frozen layer does not move in the inner loop either."""
    found = []
    for recompute in (True, False):
        learner = small(inner_steps=2, learned_lr="layer", recompute=recompute)
        for name, parameter in learner.named_parameters():
            parameter.requires_grad_(not name.removeprefix("network.").startswith(frozen))
        gradient_of(learner, random_episode())
        gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
        found.append({name: gradient for name, gradient in gradients.items() if gradient.any()})
    assert found[0].keys() == found[1].keys()
    assert all(close(gradient, found[1][name]) for name, gradient in found[0].items())
    assert not any(name.removeprefix("network.").startswith(frozen) for name in found[0])


def test_a_loss_with_parameters_is_learned_too(random_episode: Episodes):
    """A temperature: also where steps are computed again."""
    gradients = []
    for recompute in (False, True):
        learner = small(inner_steps=2, recompute=recompute, loss=Temperature())
        assert list(learner.meta_parameters())[-1] == "loss.temperature"
        gradients.append(gradient_of(learner, random_episode()))
        assert gradients[-1][-1].abs() > 1e-3
    assert close(gradients[0], gradients[1])
    for slope, found in slopes(learner, random_episode(), n_directions=2):
        assert slope == pytest.approx(found, rel=1e-6, abs=1e-7)


class Temperature(nn.Module):
    """Cross-entropy of logits times a number that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.temperature * logits, labels)


def test_recomputed_keeps_the_graph_of_one_step(random_episode: Episodes):
    """What autograd saves for the backward of a step is gone when the next one is computed."""

    def most_saved(**options: Any) -> int:
        alive, most = 0, 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, most
                self.tensor, self.size = tensor, tensor.numel()
                alive += self.size
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            small(**options).meta_loss(random_episode()).backward()
        return most

    few, many = (most_saved(inner_steps=n, recompute=True) for n in (1, 8))
    assert many < 1.3 * few
    assert most_saved(inner_steps=8) > 4 * few


def test_recompute_has_fewer_tasks_side_by_side_the_more_steps_it_keeps(random_episode: Episodes):
    """32 tasks of a network of 900 KB, in chunks of at most 64 MiB of parameters."""
    episode = random_episode(n_tasks=32, n_way=5)

    def sizes(inner_steps: int, recompute: bool = True, training: bool = True) -> list[int]:
        learner = MAML(ConvNet(5, pooling="stride"), inner_steps=inner_steps, recompute=recompute).train(training)
        return [len(chunk) for chunk in learner.chunks(episode)]

    assert sizes(1) == sizes(2) == sizes(5, recompute=False) == sizes(5, training=False) == [32]
    assert sizes(3) == [16, 16]
    assert sizes(5) == [11, 11, 10]
    assert sizes(1000) == [1] * 32


def three_steps(random_episode: Episodes, learner: MAML) -> Tensor:
    """The meta-gradients of three steps of the outer loop, at other tasks and parameters each."""
    gradients = []
    for seed in range(3):
        gradients.append(gradient_of(learner, random_episode(n_tasks=2, seed=seed)))
        learner.after_step()
        for parameter in learner.parameters():
            parameter.data += 0.01
    return torch.stack(gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_traced_is_plain(random_episode: Episodes, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """What is compiled is the right thing; compiling it is left to the next test, since it takes long."""
    graphs: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda graph: graphs.append(graph) or graph)
    learner, plain = (small(compiled=on, n_blocks=1, **options) for on in (True, False))
    assert close(three_steps(random_episode, learner), three_steps(random_episode, plain))
    assert not any("scatter" in graph.code for graph in graphs)  # which some versions compile to an error, or worse
    # one graph for the loss after every step, and one for that after the last
    assert learner._compiled and len(learner._compiled.compiled) == (2 if "multi_step_iterations" in options else 1)
    with pytest.raises(ValueError, match="build ConvNet"):
        learner.meta_loss(random_episode(n_way=4))


def test_traced_and_recomputed_is_plain(random_episode: Episodes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda graph: graph)
    learners = [small(inner_steps=2, n_blocks=1, compiled=on, recompute=on) for on in (True, False)]
    compiled, plain = (three_steps(random_episode, learner) for learner in learners)
    assert close(compiled, plain)


def test_a_compiled_gradient_knows_what_the_outer_loop_leaves_alone(
    random_episode: Episodes, monkeypatch: pytest.MonkeyPatch
):
    """Frozen and fixed parameters are read at every call, not remembered from the first."""
    monkeypatch.setattr(torch, "compile", lambda graph: graph)
    gradients = []
    for compiled in (True, False):
        learner = small(compiled=compiled, n_blocks=1, fixed_head=True)
        learner.network.get_parameter("blocks.0.shift").requires_grad_(False)
        first = gradient_of(learner, random_episode())
        learner.load_state_dict({name: 0.9 * tensor for name, tensor in learner.state_dict().items()})
        gradients.append(torch.stack([first, gradient_of(learner, random_episode())]))
    assert close(gradients[0], gradients[1])
    assert not close(gradients[0][0], gradients[0][1], 1e-3)


def test_evaluation_mode_has_its_own_steps_also_if_compiled(random_episode: Episodes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda graph: graph)
    episode = random_episode(n_tasks=2)
    compiled, plain = (small(compiled=on, n_blocks=1, test_inner_steps=2) for on in (True, False))
    for training in (True, False):
        found, expected = (gradient_of(learner.train(training), episode) for learner in (compiled, plain))
        assert close(found, expected)


@pytest.mark.skipif(which("g++") is None and which("clang++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_is_plain():
    """The smallest of networks: a compiler takes long."""
    learners = [MAML(drawn(MLP(2, 1, hidden=(2,))), inner_lr=0.3, compiled=on) for on in (True, False)]
    gradients = [
        flat(gradient_of(learner, regression(n_inputs=2, n_tasks=2, seed=seed)) for seed in range(2))
        for learner in learners
    ]
    assert close(gradients[0], gradients[1])


@pytest.mark.parametrize("options", [{}, {"pooling": "max"}, {"normalization": "support"}, {"recompute": True}])
def test_half_precision_is_near_full(random_episode: Episodes, options: dict[str, Any]):
    episode, learner = random_episode(), small(**options).float()
    episode = replace(episode, support_images=episode.support_images.float(), query_images=episode.query_images.float())
    full = gradient_of(learner, episode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = gradient_of(learner, episode)
    assert not torch.equal(full, half)
    assert (full - half).norm() < 0.1 * full.norm()


# --- adaptation ------------------------------------------------------------------------------------------------


def test_only_the_head_or_all_but_it_moves_if_asked(random_episode: Episodes):
    episode = random_episode()
    for adapt, head, body in (("all", True, True), ("head", True, False), ("body", False, True)):
        learner = small(adapt=adapt, hidden=(5,))
        adapted = learner.adapt(episode)
        for name, parameter in learner.network.named_parameters():
            assert adapted[name].shape == (len(episode), *parameter.shape)
            moved = (adapted[name] != parameter).flatten(1).any(1)
            assert moved.tolist() == [head if name.startswith("head.") else body] * len(episode), name


def test_test_inner_lr_is_for_evaluation_mode(random_episode: Episodes):
    episode, learner = random_episode(), small(inner_lr=0.3, test_inner_lr=0.1)
    assert torch.equal(learner.train()(episode), small(inner_lr=0.3).train()(episode))
    assert torch.equal(learner.eval()(episode), small(inner_lr=0.1).eval()(episode))


def test_the_loss_falls_along_the_gradient_of_each_task(random_episode: Episodes):
    """The first step is `inner_lr` times the gradient of the mean cross-entropy of the task's own support."""
    episode, learner = random_episode(), small(inner_lr=0.25)
    adapted, parameters = learner.adapt(episode), dict(learner.network.named_parameters())
    for task in range(len(episode)):
        logits = learner.network(episode.support_images[task])
        loss = F.cross_entropy(logits, episode.support_labels[task])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            assert close(adapted[name][task], parameter - 0.25 * gradient)


# --- learning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"first_order": True}, {"adapt": "head"}, {"normalization": "support"}])
def test_overfits_one_episode(random_episode: Episodes, options: dict[str, Any]):
    episode, learner = random_episode(n_tasks=1), small(**options)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        learner.meta_loss(episode).backward()
        optimizer.step()
    assert learner.meta_loss(episode).item() < 0.2
    assert torch.equal(learner(episode).argmax(-1), episode.query_labels)


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": 0.0}, "inner_lr must be positive, got 0.0"),
        ({"inner_lr": float("nan")}, "inner_lr must be positive, got nan"),
        ({"inner_steps": -1}, "inner steps must not be negative, got -1 and None"),
        ({"test_inner_steps": -2}, "inner steps must not be negative, got 1 and -2"),
        ({"test_inner_lr": 0.0}, "test_inner_lr must be positive, got 0.0"),
        (
            {"test_inner_lr": 0.1, "learned_lr": "layer"},
            "where rates are learned, the test uses them too; leave test_inner_lr out",
        ),
        ({"adapt": "tail"}, "adapt must be 'all', 'head' or 'body', got 'tail'"),
        ({"learned_lr": "each"}, "learned_lr must be 'none', 'parameter' or 'layer', got 'each'"),
        ({"multi_step_iterations": -1}, "multi_step_iterations must not be negative, got -1"),
        (
            {"inner_steps": 0, "learned_lr": "layer"},
            "without inner steps there are no rates to learn and no steps to weight; see inner_steps",
        ),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MAML(ConvNet(3), **options)
