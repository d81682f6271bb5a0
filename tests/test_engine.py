"""What every meta-gradient needs: chunks in order, sums of gradients that are known, one trace for every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from metatutor.optimization.engine import Compiled, chunks, with_known_gradient
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metatutor.backbones import MLP, ConvNet
from metatutor.episodes import Episode

Episodes = Callable[..., Episode]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks_per_chunk", "sizes"),
    [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (6, [6, 1]), (7, [7]), (100, [7]), (None, [7])],
)
def test_chunks_are_the_tasks_in_their_order(random_episode: Episodes, tasks_per_chunk: int | None, sizes: list[int]):
    episode = random_episode(n_tasks=7)
    parts = list(chunks(episode, ConvNet(3), tasks_per_chunk))
    assert [len(part) for part in parts] == sizes
    for name in ("support_images", "support_labels", "query_images", "query_labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(episode, name))
    assert {part.n_way for part in parts} == {3}


@pytest.mark.parametrize(
    ("megabytes_a_task", "sizes"), [(4, [12]), (11, [6, 6]), (30, [4, 4, 4]), (40, [3, 3, 3, 3]), (200, [1] * 12)]
)
def test_by_default_the_largest_activation_of_a_chunk_is_at_most_128_mib(megabytes_a_task: int, sizes: list[int]):
    """Chunks are as few and as equal as that allows; one task is never split. Twelve tasks of 4 images in float32."""
    images, labels = torch.zeros(12, 2, 1, 8, 8), torch.zeros(12, 2, dtype=torch.long)
    network = MLP()
    network.largest_activation = megabytes_a_task * 2**20 // 16
    episode = Episode(images, labels, images, labels, n_way=2)
    assert [len(chunk) for chunk in chunks(episode, network)] == sizes


@pytest.mark.parametrize(("copies", "sizes"), [(0, [12]), (4, [12]), (6, [6, 6]), (16, [4, 4, 4]), (1000, [1] * 12)])
def test_by_default_the_parameters_kept_for_a_chunk_are_at_most_64_mib(copies: int, sizes: list[int]):
    """Twelve tasks of a network of one MiB."""
    x = torch.zeros(12, 3, 1)
    network = MLP(n_inputs=1, hidden=[], n_outputs=2**17)
    assert sum(p.numel() for p in network.parameters()) == 2**18
    assert [len(chunk) for chunk in chunks(Episode(x, x, x, x, 1), network, copies_kept=copies)] == sizes
    assert [len(chunk) for chunk in chunks(Episode(x, x, x, x, 1), network, 12, copies_kept=copies)] == [12]


def test_numbers_of_twice_the_size_take_twice_the_room():
    images, labels = torch.zeros(12, 2, 1, 8, 8), torch.zeros(12, 2, dtype=torch.long)
    network = MLP()
    network.largest_activation = 10 * 2**20 // 16
    for pixels, n_chunks in ((images, 1), (images.double(), 2)):
        episode = Episode(pixels, labels, pixels, labels, n_way=2)
        assert len(list(chunks(episode, network))) == n_chunks


def test_a_network_that_does_not_say_gets_all_tasks_at_once():
    x = torch.zeros(1000, 10, 1)
    assert [len(chunk) for chunk in chunks(Episode(x, x, x, x, n_way=1), MLP())] == [1000]


# --- gradients known beforehand --------------------------------------------------------------------------------


def test_values_and_gradients_are_weighted_sums():
    one, other = nn.Parameter(numbers(1, 2)), nn.Parameter(numbers(3))
    parts = [
        (0.25, numbers(8).squeeze(), [numbers(4, -8), numbers(12)]),
        (0.75, numbers(-4).squeeze(), [numbers(0, 4), numbers(-8)]),
    ]
    loss = with_known_gradient(parts, [one, other])
    assert loss.shape == ()
    assert loss.item() == 0.25 * 8 - 0.75 * 4
    loss.backward()
    assert one.grad is not None and other.grad is not None
    assert one.grad.tolist() == [1, 1]
    assert other.grad.tolist() == [-3]


def test_the_gradient_is_scaled_and_added_as_any_loss_is():
    weight = nn.Parameter(numbers(1, 2))
    known = with_known_gradient([(1.0, torch.tensor(5.0).double(), [numbers(10, 20)])], [weight])
    (-3 * known + weight.pow(2).sum()).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [-30 + 2, -60 + 4]


def test_no_parameter_is_changed_nor_any_gradient_that_was_handed_over():
    weight, gradient = nn.Parameter(numbers(1, 2)), numbers(10, 20)
    loss = with_known_gradient([(0.5, torch.tensor(5.0).double(), [gradient])], [weight])
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert weight.grad is not None
    assert weight.grad.tolist() == [10, 20]  # twice a half
    assert gradient.tolist() == [10, 20]
    assert weight.tolist() == [1, 2]


def test_a_frozen_parameter_is_passed_over():
    weight, frozen = nn.Parameter(numbers(1)), nn.Parameter(numbers(2), requires_grad=False)
    parts = [(1.0, torch.tensor(5.0).double(), [numbers(10), numbers(20)])]
    with_known_gradient(parts, [weight, frozen]).backward()
    assert weight.grad is not None
    assert (weight.grad.tolist(), frozen.grad) == ([10], None)
    assert not with_known_gradient([(1.0, torch.tensor(5.0), [numbers(20)])], [frozen]).requires_grad


def test_what_the_parts_came_from_is_not_differentiated():
    weight = nn.Parameter(numbers(3))
    value = (weight**2).sum()
    with_known_gradient([(1.0, value, [numbers(10)])], [weight]).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [10]


def test_without_gradients_it_is_a_number():
    weight = nn.Parameter(numbers(1))
    with torch.no_grad():
        loss = with_known_gradient([(0.5, torch.tensor(6.0), [numbers(10)])], [weight])
    assert loss.item() == 3
    assert not loss.requires_grad


def test_it_has_no_second_derivative_and_says_so():
    weight = nn.Parameter(numbers(1))
    loss = with_known_gradient([(1.0, torch.tensor(6.0).double(), [numbers(10)])], [weight])
    message = "^a meta-gradient known beforehand cannot be differentiated again; see tasks_per_chunk$"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("gradients", [[], [numbers(1), numbers(2), numbers(3)]])
def test_every_parameter_has_its_gradient(gradients: list[Tensor]):
    """One too few or too many is an error when the gradient is due, not a silent mistake."""
    weights = [nn.Parameter(numbers(1)), nn.Parameter(numbers(1))]
    loss = with_known_gradient([(1.0, torch.tensor(6.0).double(), gradients)], weights)
    with pytest.raises(RuntimeError, match="incorrect number of gradients"):
        loss.backward()


def test_parts_must_have_as_many_gradients_as_each_other():
    weight, value = nn.Parameter(numbers(1)), torch.tensor(6.0).double()
    with pytest.raises(ValueError, match="zip"):
        with_known_gradient([(0.5, value, [numbers(1)]), (0.5, value, [])], [weight])


# --- traced and compiled ---------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches `torch.compile`, which takes long and is left out here."""
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda graph: seen.append(graph) or graph)
    return seen


def test_traces_once_for_every_set_of_shapes(graphs: list[Any]):
    calls: list[tuple[int, ...]] = []

    def product(one: Tensor, other: Tensor) -> list[Tensor]:
        calls.append((*one.shape, *other.shape))
        return [one @ other]

    compiled = Compiled(product)
    for shift in range(3):
        for rows, columns in ((2, 3), (4, 3), (2, 5)):
            one, other = torch.rand(rows, 7) + shift, torch.rand(7, columns)
            (found,) = compiled(one, other)
            assert torch.equal(found, one @ other)  # of these numbers, not of those that were traced
    assert calls == [(2, 7, 7, 3), (4, 7, 7, 3), (2, 7, 7, 5)]
    assert len(graphs) == len(compiled.compiled) == 3


def test_another_dtype_is_traced_anew(graphs: list[Any]):
    compiled = Compiled(lambda x: [x + torch.ones(len(x), dtype=x.dtype)])
    for dtype in (torch.float32, torch.float64, torch.float32):
        (found,) = compiled(torch.zeros(2, dtype=dtype))
        assert found.dtype == dtype
    assert len(graphs) == 2


def test_two_functions_do_not_share_their_traces(graphs: list[Any]):
    twice, thrice = Compiled(lambda x: [2 * x]), Compiled(lambda x: [3 * x])
    assert [f(torch.ones(1))[0].item() for f in (twice, thrice, twice)] == [2, 3, 2]


def test_sees_through_gradients_of_gradients_side_by_side(graphs: list[Any]):
    """Of `vmap` and two derivatives nothing remains in the graph but tensors."""
    network = MLP(2, 1, hidden=(3,)).double()
    names = [name for name, _ in network.named_parameters()]

    def second_order(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        leaves = {n: p.detach().requires_grad_() for n, p in zip(names, parameters, strict=True)}
        with torch.enable_grad():
            outputs = vmap(lambda point: functional_call(network, leaves, (point[None],)))(x)
            first = torch.autograd.grad(outputs.pow(3).sum(), list(leaves.values()), create_graph=True)
            return list(torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), list(leaves.values())))

    compiled = Compiled(second_order)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 2, dtype=torch.float64, generator=generator)
        parameters = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in network.parameters()]
        found, expected = compiled(x, *parameters), second_order(x, *parameters)
        assert all(torch.allclose(a, b, rtol=1e-12) and b.any() for a, b in zip(found, expected, strict=True))
        assert not any(tensor.requires_grad for tensor in found)
    assert len(graphs) == 1
    assert {node.op for node in graphs[0].graph.nodes} <= {"placeholder", "call_function", "get_attr", "output"}


def test_what_is_not_a_tensor_argument_is_fixed_at_the_first_call(graphs: list[Any]):
    factor = [2.0]
    scaled = Compiled(lambda x: [factor[0] * x])
    assert scaled(torch.ones(1))[0].item() == 2
    factor[0] = 5.0
    assert scaled(torch.ones(1))[0].item() == 2
    assert scaled(torch.ones(2))[0].tolist() == [5, 5]
