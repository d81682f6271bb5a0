"""The LSTM optimizer, by hand, against the paper's equations one number at a time, and with gradients held fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.backbones import MLP, ConvNet
from metatutor.episodes import Episode
from metatutor.functional import Parameters, preprocess
from metatutor.optimization import MetaLSTM
from tests.gradients import close, flat, gradient_of, regression

Episodes = Callable[..., Episode]


def small(hidden: tuple[int, ...] = (2,), seed: int = 0, **options: Any) -> MetaLSTM:
    """A learner of regression tasks in float64, every parameter random, also those of the LSTM."""
    defaults: dict[str, Any] = {"inner_steps": 3, "hidden_size": 2}
    learner = MetaLSTM(MLP(1, 1, hidden=hidden), **defaults | options).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return learner


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- by hand ---------------------------------------------------------------------------------------------------


def of_a_line(**options: Any) -> tuple[MetaLSTM, Episode]:
    """`w x + b` with w = 1/2 and b = -1, one point (2, 3): the squared error 9 has the gradient (-12, -6)."""
    learner = small(hidden=(), **options)
    for parameter, value in zip(learner.network.parameters(), (0.5, -1.0), strict=True):
        nn.init.constant_(parameter, value)
    for gate in (learner.forget, learner.enter):
        nn.init.zeros_(gate.weight)
    x, y = torch.full((1, 1, 1), 2.0).double(), torch.full((1, 1, 1), 3.0).double()
    return learner, Episode(x, y, x, y, n_way=1)


def adapted(learner: MetaLSTM, episode: Episode, inner_steps: int) -> list[float]:
    return [p.item() for p in learner.adapt(episode, inner_steps).values()]


def test_one_step_of_constant_gates_by_hand():
    """Without weights the gates are what their biases say: all decays alike, and the gradient enters at one rate."""
    learner, episode = of_a_line()
    nn.init.constant_(learner.forget.bias, 1.5)
    nn.init.constant_(learner.enter.bias, -2.5)
    keep, rate = sigmoid(1.5), sigmoid(-2.5)
    assert adapted(learner, episode, 1) == pytest.approx([keep * 0.5 + rate * 12, -keep + rate * 6], rel=1e-12)


def test_open_and_closed_gates_are_gradient_descent():
    learner, episode = of_a_line()
    nn.init.constant_(learner.forget.bias, 50)  # sigmoid: 1
    nn.init.constant_(learner.enter.bias, math.log(0.01 / 0.99))  # sigmoid: 0.01
    w, b = 0.5, -1.0
    for _ in range(3):
        error = 2 * w + b - 3
        w, b = w - 0.01 * 4 * error, b - 0.01 * 2 * error
    assert adapted(learner, episode, 3) == pytest.approx([w, b], rel=1e-12)


def test_each_gate_sees_its_parameter_and_its_own_past_by_hand():
    """The last two weights of a gate: of the parameter before the step, and of the gate's own value, at first 0."""
    learner, episode = of_a_line()
    learner.forget.weight.data[0, -2:] = torch.tensor([0.7, 1.1], dtype=torch.float64)
    learner.enter.weight.data[0, -2:] = torch.tensor([-0.3, 2.0], dtype=torch.float64)
    nn.init.constant_(learner.forget.bias, 0.2)
    nn.init.constant_(learner.enter.bias, -3)
    w, b, forget, enter = 0.5, -1.0, [0.0, 0.0], [0.0, 0.0]
    for steps in (1, 2, 3):
        error = 2 * w + b - 3
        forget = [sigmoid(0.7 * p + 1.1 * f + 0.2) for p, f in zip((w, b), forget, strict=True)]
        enter = [sigmoid(-0.3 * p + 2.0 * i - 3) for p, i in zip((w, b), enter, strict=True)]
        w, b = forget[0] * w - enter[0] * 4 * error, forget[1] * b - enter[1] * 2 * error
        assert adapted(learner, episode, steps) == pytest.approx([w, b], rel=1e-9)


# --- one number at a time --------------------------------------------------------------------------------------


class PaperLSTM:
    """The optimizer of one parameter of one task, in Python's own numbers.

    Written from Ravi & Larochelle (2017), equations 2 to 4, Andrychowicz et al. (2016), appendix A, and the usual
    equations of an LSTM.
    """

    def __init__(self, learner: MetaLSTM) -> None:
        self.weights = {name: p.tolist() for name, p in learner.named_parameters() if not name.startswith("network")}
        size = learner.arguments["hidden_size"]
        self.h, self.c, self.f, self.i = [0.0] * size, [0.0] * size, 0.0, 0.0

    def step(self, parameter: float, gradient: float, loss: float) -> float:
        self.h, self.c = self.watch([*of_any_size(gradient), *of_any_size(loss)])
        self.f = self.gate("forget", [*self.h, parameter, self.f])
        self.i = self.gate("enter", [*self.h, parameter, self.i])
        return self.f * parameter + self.i * -gradient

    def watch(self, x: list[float]) -> tuple[list[float], list[float]]:
        weights, size, h, c = self.weights, len(self.h), [], []
        rows = [
            dot(of_x, x) + b_x + dot(of_h, self.h) + b_h
            for of_x, b_x, of_h, b_h in zip(
                *(weights[f"watch.{name}"] for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")), strict=True
            )
        ]
        for unit in range(size):
            enter, forget, candidate, out = rows[unit::size]
            c.append(sigmoid(forget) * self.c[unit] + sigmoid(enter) * math.tanh(candidate))
            h.append(sigmoid(out) * math.tanh(c[-1]))
        return h, c

    def gate(self, name: str, seen: list[float]) -> float:
        return sigmoid(dot(self.weights[f"{name}.weight"][0], seen) + self.weights[f"{name}.bias"][0])


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def of_any_size(x: float) -> tuple[float, float]:
    if abs(x) >= math.exp(-10):
        return math.log(abs(x)) / 10, math.copysign(1, x)
    return -1.0, math.exp(10) * x


@pytest.mark.parametrize("hidden_size", [1, 3])
def test_every_step_against_the_papers_equations(hidden_size: int):
    """Task by task and parameter by parameter; the gradients are PyTorch's, at the parameters of this loop."""
    learner, episode = small(hidden_size=hidden_size, inner_steps=4), regression(n_tasks=2)
    path = learner.adaptation_path(episode)
    for task in range(len(episode)):
        values = flat(learner.network.parameters()).tolist()
        cells = [PaperLSTM(learner) for _ in values]
        for step in range(1, 5):
            loss, gradients = support_gradients(learner, episode, task, values)
            triples = zip(cells, values, gradients, strict=True)
            values = [cell.step(value, gradient, loss) for cell, value, gradient in triples]
            assert flat([p[task] for p in path[step].values()]).tolist() == pytest.approx(values, rel=1e-9)


def support_gradients(learner: MetaLSTM, episode: Episode, task: int, values: list[float]) -> tuple[float, list[float]]:
    """The support loss of one task, and its gradient, at parameters that are a list of numbers."""
    leaves = torch.tensor(values, dtype=torch.float64).requires_grad_()
    outputs = functional_call(learner.network, named(learner, leaves), (episode.support_images[task],))
    loss = ((outputs - episode.support_labels[task]) ** 2).mean()
    return loss.item(), torch.autograd.grad(loss, leaves)[0].tolist()


def named(learner: MetaLSTM, values: Tensor) -> Parameters:
    parameters = dict(learner.network.named_parameters())
    parts = values.split([p.numel() for p in parameters.values()])
    return {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}


# --- the outer gradient ----------------------------------------------------------------------------------------


def loop_gradient(learner: MetaLSTM, episode: Episode, *, held_fixed: bool) -> Tensor:
    """The gradient in all parameters by autograd through a loop over tasks, steps and parameters."""
    losses = []
    for task in range(len(episode)):
        values = flat(learner.network.parameters())
        states: list[Any] = [None] * len(values)
        gates = [torch.zeros(2, dtype=torch.float64)] * len(values)
        for _ in range(learner.inner_steps):
            outputs = functional_call(learner.network, named(learner, values), (episode.support_images[task],))
            loss = ((outputs - episode.support_labels[task]) ** 2).mean()
            (gradients,) = torch.autograd.grad(loss, values, create_graph=True)
            if held_fixed:
                loss, gradients = loss.detach(), gradients.detach()
            after = []
            for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
                seen = torch.cat([preprocess(gradient.view(1)), preprocess(loss.view(1))], dim=1)
                states[i] = learner.watch(seen, states[i])
                inputs = [torch.cat([states[i][0][0], torch.stack([value, gate])]) for gate in gates[i]]
                gates[i] = torch.cat([learner.forget(inputs[0]), learner.enter(inputs[1])]).sigmoid()
                after.append(gates[i][0] * value - gates[i][1] * gradient)
            values = torch.stack(after)
        outputs = functional_call(learner.network, named(learner, values), (episode.query_images[task],))
        losses.append(((outputs - episode.query_labels[task]) ** 2).mean())
    return flat(torch.autograd.grad(torch.stack(losses).mean(), list(learner.parameters())))


def test_the_outer_gradient_holds_inner_gradients_fixed():
    learner, episode = small(), regression(n_tasks=2)
    found = gradient_of(learner, episode)
    assert close(found, loop_gradient(learner, episode, held_fixed=True))
    through = loop_gradient(learner, episode, held_fixed=False)
    assert (found - through).norm() > 0.1 * through.norm()


class Replayed(MetaLSTM):
    """Takes the losses and gradients of its first run for those of every later one."""

    def support_gradients(self, parameters: Parameters, episode: Episode, **options: Any) -> Any:
        if not hasattr(self, "recorded"):
            self.recorded: list[Any] = []
        if len(self.recorded) < self.inner_steps:
            self.recorded.append(super().support_gradients(parameters, episode, **options))
            self.turn = -1
            return self.recorded[-1]
        self.turn = (self.turn + 1) % self.inner_steps
        return self.recorded[self.turn]


def test_the_outer_gradient_against_finite_differences():
    """Central differences along random directions, with the support gradients of the point where they are taken."""
    learner, episode, step = small(), regression(), 1e-6
    gradient, parameters = gradient_of(learner, episode), list(learner.parameters())
    replayed = Replayed(learner.network, inner_steps=3, hidden_size=2)
    replayed.watch, replayed.forget, replayed.enter = learner.watch, learner.forget, learner.enter
    start, generator = flat(parameters).detach(), torch.Generator().manual_seed(1)

    def loss_at(position: Tensor) -> float:
        nn.utils.vector_to_parameters(position, parameters)
        with torch.no_grad():
            return replayed.meta_loss(episode).item()

    assert loss_at(start) == learner.meta_loss(episode).item()  # and so it is recorded
    for _ in range(8):
        direction = torch.randn(len(start), dtype=torch.float64, generator=generator)
        slope = (loss_at(start + step * direction) - loss_at(start - step * direction)) / (2 * step)
        assert (gradient @ direction).item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_everything_is_learned(random_episode: Episodes):
    """The initial parameters and every weight of the LSTM have a gradient, of images too."""
    learner = MetaLSTM(ConvNet(3, filters=4, n_blocks=2, image_size=8), inner_steps=3).double()
    learner.meta_loss(random_episode()).backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_no_inner_step_is_plain_training():
    learner, episode = small(inner_steps=0), regression()
    learner.meta_loss(episode).backward()
    loss = (learner.network(episode.query_images.flatten(0, 1)) - episode.query_labels.flatten(0, 1)).pow(2).mean()
    expected = torch.autograd.grad(loss, list(learner.network.parameters()))
    for parameter, gradient in zip(learner.network.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert close(parameter.grad, gradient)


# --- what the LSTM is -------------------------------------------------------------------------------------------


def test_all_parameters_share_one_lstm():
    """Its size does not depend on the network's: four gates of the LSTM, and two of the cell."""
    for network in (MLP(1, 1, hidden=()), MLP(1, 1, hidden=(40, 40))):
        of_lstm = [p for n, p in MetaLSTM(network, hidden_size=7).named_parameters() if not n.startswith("network.")]
        assert sum(p.numel() for p in of_lstm) == 4 * (7 * 4 + 7 * 7 + 2 * 7) + 2 * (7 + 2 + 1)


def test_a_parameter_is_moved_by_what_concerns_it():
    """Permuted units of the network are permuted, and nothing else, after any number of steps."""
    learner, episode = small(hidden=(3,)), regression()
    adapted, order = learner.adapt(episode), torch.tensor([2, 0, 1])
    parameters = dict(learner.network.named_parameters())
    for name in ("hidden.0.weight", "hidden.0.bias"):
        parameters[name].data = parameters[name].data[order]
    parameters["head.weight"].data = parameters["head.weight"].data[:, order]
    permuted = learner.adapt(episode)
    assert close(permuted["hidden.0.weight"], adapted["hidden.0.weight"][:, order])
    assert close(permuted["hidden.0.bias"], adapted["hidden.0.bias"][:, order])
    assert close(permuted["head.weight"], adapted["head.weight"][:, :, order])
    assert close(permuted["head.bias"], adapted["head.bias"])


def test_at_first_it_nearly_descends(random_episode: Episodes):
    """With its initial weights, a step forgets at most 2.4 % of a parameter; a hundredth of the gradient enters."""
    network = ConvNet(3, filters=4, n_blocks=2, image_size=8)
    learner, episode = MetaLSTM(network).double(), random_episode()
    before = learner.adapt(episode, 0)
    after = learner.adapt(episode, 1)
    _, gradients = learner.support_gradients(before, episode)
    for name, p in before.items():
        move, forgotten = after[name] - p, 0.024 * p.abs()
        least, most = -0.005 * gradients[name], -0.024 * gradients[name]
        assert (move >= torch.minimum(least, most) - forgotten).all(), name
        assert (move <= torch.maximum(least, most) + forgotten).all(), name
    assert 4 <= learner.forget.bias.item() <= 6
    assert -5 <= learner.enter.bias.item() <= -4


# --- preprocessing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [10.0, 2.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_preprocess_against_the_formula(p: float, sign: int):
    """Andrychowicz et al.: (log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x)."""
    sizes = [0.0, 1e-300, 1e-9, math.exp(-p) * 0.999, math.exp(-p) * 1.001, 1e-1, 1.0, 5.0, 1e9]
    found = preprocess(sign * torch.tensor(sizes, dtype=torch.float64), p)
    for (size, direction), x in zip(found.tolist(), [sign * s for s in sizes], strict=True):
        if abs(x) >= math.exp(-p):
            assert (size, direction) == (pytest.approx(math.log(abs(x)) / p), math.copysign(1, x))
        else:
            assert (size, direction) == (-1, pytest.approx(math.exp(p) * x))


def test_preprocess_is_continuous_where_its_cases_meet():
    below, above = preprocess(math.exp(-10) * torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=torch.float64))
    assert close(below, above, 1e-8)
    assert close(below, torch.tensor([-1.0, 1.0]).double(), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preprocess_keeps_the_dtype_and_is_finite(dtype: torch.dtype):
    found = preprocess(torch.tensor([0.0, -0.0, 1e-40, -1e38], dtype=dtype))
    assert found.dtype == dtype
    assert found.isfinite().all()
