"""Functions of many tasks at once: side by side or one by one, gradients that are known, vectors and parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metatutor.backbones import MLP
from metatutor.functional import (
    TaskMap,
    call_method,
    class_means,
    flatten_tasks,
    gradients_of,
    leaves,
    one_by_one,
    unflatten_tasks,
    with_gradient,
)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- a function for every task ---------------------------------------------------------------------------------


def with_data_dependent_flow(row: Tensor) -> Tensor:
    return row if row.sum() > 1 else -row


def with_running_statistics(row: Tensor) -> Tensor:
    return nn.BatchNorm1d(1)(row[:, None])[:, 0]


def recurrent(row: Tensor) -> Tensor:
    return nn.GRU(1, 2)(row[:, None])[0]


@pytest.mark.parametrize("function", [with_data_dependent_flow, with_running_statistics, recurrent])
def test_what_vmap_cannot_is_done_one_by_one_and_told_once(function: Callable[[Tensor], Tensor]):
    rows, map_tasks = torch.tensor([[0.5, 0.25], [1.0, 0.75], [3.0, 1.0]]), TaskMap()

    def seeded(row: Tensor) -> Tensor:
        torch.manual_seed(0)
        return function(row)

    expected = torch.stack([seeded(row) for row in rows])
    with pytest.warns(UserWarning, match="^tasks are computed one by one, since vmap fails: ") as told:
        assert torch.equal(map_tasks(seeded, rows), expected)
    assert len(told) == 1 and len(str(told[0].message)) < 240
    assert not map_tasks.side_by_side
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(map_tasks(seeded, rows), expected)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("no"), KeyError("vmap")])
def test_other_errors_are_not_swallowed(error: Exception):
    def fails(row: Tensor) -> Tensor:
        raise error

    map_tasks = TaskMap()
    with pytest.raises(type(error)) as raised:
        map_tasks(fails, torch.ones(2, 3))
    assert raised.value is error
    assert map_tasks.side_by_side


def test_an_error_of_the_function_itself_reaches_its_caller_though_it_speaks_of_vmap():
    """The second attempt, one by one, is not caught."""

    def fails(row: Tensor) -> Tensor:
        raise RuntimeError("vmap or not, this is wrong")

    with pytest.warns(UserWarning, match="one by one"), pytest.raises(RuntimeError, match="^vmap or not, this"):
        TaskMap()(fails, torch.ones(2, 3))


@pytest.mark.parametrize("map_tasks", [TaskMap(), one_by_one])
def test_arguments_may_be_dictionaries(map_tasks: Callable[..., Tensor]):
    weights, x = {"w": torch.rand(3, 2), "b": torch.rand(3)}, torch.rand(3, 5, 2)
    found = map_tasks(lambda p, x: x @ p["w"] + p["b"], weights, x)
    assert torch.allclose(found, torch.einsum("tni,ti->tn", x, weights["w"]) + weights["b"][:, None])


def test_every_task_drops_out_for_itself():
    """Side by side as one by one: chance is another for every task."""
    torch.manual_seed(0)
    found = TaskMap()(nn.Dropout(0.5), torch.ones(4, 50))
    assert len(set(map(tuple, found.tolist()))) == 4
    assert set(found.unique().tolist()) == {0.0, 2.0}


def test_class_means_by_hand():
    embeddings, labels = numbers(1, 10, 3, 5).view(1, 4, 1), torch.tensor([[0, 1, 0, 0]])
    assert class_means(embeddings, labels, 2).flatten().tolist() == [3, 10]


# --- gradients known beforehand --------------------------------------------------------------------------------


def test_value_and_gradients_are_those_that_are_given():
    one, other = nn.Parameter(numbers(1, 2)), nn.Parameter(numbers(3))
    loss = with_gradient(torch.tensor(8.0).double(), [one, other], [numbers(4, -8), numbers(12)])
    assert loss.shape == ()
    assert loss.item() == 8
    loss.backward()
    assert one.grad is not None and other.grad is not None
    assert (one.grad.tolist(), other.grad.tolist()) == ([4, -8], [12])


def test_the_gradient_is_scaled_and_added_as_any_loss_is():
    weight = nn.Parameter(numbers(1, 2))
    known = with_gradient(torch.tensor(5.0).double(), [weight], [numbers(10, 20)])
    (-3 * known + weight.pow(2).sum()).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [-30 + 2, -60 + 4]


def test_no_parameter_is_changed_nor_any_gradient_that_was_handed_over():
    weight, gradient = nn.Parameter(numbers(1, 2)), numbers(10, 20)
    loss = 0.5 * with_gradient(torch.tensor(5.0).double(), [weight], [gradient])
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert weight.grad is not None
    assert weight.grad.tolist() == [10, 20]  # twice a half
    assert gradient.tolist() == [10, 20]
    assert weight.tolist() == [1, 2]


def test_a_frozen_parameter_is_passed_over():
    weight, frozen = nn.Parameter(numbers(1)), nn.Parameter(numbers(2), requires_grad=False)
    with_gradient(torch.tensor(5.0).double(), [weight, frozen], [numbers(10), numbers(20)]).backward()
    assert weight.grad is not None
    assert (weight.grad.tolist(), frozen.grad) == ([10], None)
    assert not with_gradient(torch.tensor(5.0), [frozen], [numbers(20)]).requires_grad


def test_what_value_and_gradient_came_from_is_not_differentiated():
    weight = nn.Parameter(numbers(3))
    with_gradient((weight**2).sum(), [weight], [10 * weight]).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [30]


def test_without_gradients_it_is_a_number():
    weight = nn.Parameter(numbers(1))
    with torch.no_grad():
        loss = with_gradient(torch.tensor(6.0), [weight], [numbers(10)])
    assert loss.item() == 6
    assert not loss.requires_grad


def test_its_gradient_is_a_constant():
    """Alone it cannot be differentiated again, and autograd says so."""
    weight = nn.Parameter(numbers(1))
    loss = with_gradient(torch.tensor(6.0).double(), [weight], [numbers(10)])
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert gradient.tolist() == [10]
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(gradient, weight)


@pytest.mark.parametrize("gradients", [[], [numbers(1), numbers(2), numbers(3)]])
def test_every_input_has_its_gradient(gradients: list[Tensor]):
    """One too few or too many is an error, not a silent mistake."""
    with pytest.raises(ValueError, match="zip"):
        with_gradient(torch.tensor(6.0), [nn.Parameter(numbers(1)), nn.Parameter(numbers(1))], gradients)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_value(bad: float):
    """So that training stops, whichever of the two it looks at."""
    loss = with_gradient(torch.tensor(6.0).double(), [weight := nn.Parameter(numbers(1))], [numbers(bad)])
    assert not loss.isfinite()
    loss.backward()
    assert weight.grad is not None and not weight.grad.isfinite().any()


def test_gradients_of_what_does_not_matter_are_zero():
    used, unused = nn.Parameter(numbers(3)), nn.Parameter(numbers(1, 2))
    first, second = gradients_of(used.pow(2).sum(), [used, unused], create_graph=True)
    assert (first.tolist(), second.tolist()) == ([6], [0, 0])
    assert gradients_of(first.sum(), [used])[0].tolist() == [2]


# --- vectors and parameters ------------------------------------------------------------------------------------


def test_vectors_and_parameters():
    parameters = {"w": torch.rand(3, 4, 2), "b": torch.rand(3), "c": torch.rand(1, 5).expand(3, 5)}
    vectors = flatten_tasks(parameters.values())
    assert vectors.shape == (3, 4 * 2 + 1 + 5)
    assert torch.equal(vectors[1], torch.cat([p[1].flatten() for p in parameters.values()]))
    again = unflatten_tasks(vectors, parameters)
    assert list(again) == list(parameters)
    assert all(torch.equal(again[name], p) for name, p in parameters.items())


def test_leaves_have_no_past():
    weight = nn.Parameter(numbers(2))
    leaf = leaves({"w": 3 * weight})["w"]
    assert leaf.is_leaf and leaf.requires_grad and leaf.tolist() == [6]


def test_a_method_under_other_parameters():
    network, x = MLP(1, 1, hidden=(2,)), torch.rand(3, 1)
    before = network(x)
    others = {name: torch.zeros_like(p) for name, p in network.named_parameters() if name != "head.bias"}
    assert torch.equal(call_method(network, others, network.forward, x), network.head.bias.expand(3, 1))
    assert torch.equal(call_method(network, others, network.embed, x), torch.zeros(3, 2))
    assert torch.equal(network(x), before)  # and it is itself again
