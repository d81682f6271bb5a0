"""How many tasks go side by side, and one trace of a function for every set of shapes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from metatutor.backbones import MLP, ConvNet
from metatutor.episodes import Episode
from metatutor.functional import leaves
from metatutor.optimization import MAML
from metatutor.optimization.chunks import Compiled, tasks_that_fit

Episodes = Callable[..., Episode]


def of_images(n_images: int = 4, n_tasks: int = 12, size: int = 8, dtype: torch.dtype = torch.float32) -> Episode:
    """Tasks of black images that take no room, half of them support."""
    images = torch.zeros((), dtype=dtype).expand(n_tasks, n_images // 2, 1, size, size)
    labels = torch.arange(2).repeat_interleave(n_images // 4).repeat(n_tasks, 1)
    return Episode(images, labels, images, labels)


# --- chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at_once", "sizes"),
    [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (6, [6, 1]), (7, [7]), (100, [7]), (None, [7])],
)
def test_chunks_are_the_tasks_in_their_order(random_episode: Episodes, at_once: int | None, sizes: list[int]):
    episode = random_episode(n_tasks=7)
    parts = list(MAML(ConvNet(3)).chunks(episode, at_once))
    assert [len(part) for part in parts] == sizes
    for name in ("support_images", "support_labels", "query_images", "query_labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(episode, name))
    assert {part.n_way for part in parts} == {3}


@pytest.mark.parametrize(("megabytes_a_task", "size"), [(4, 12), (11, 6), (30, 4), (40, 3), (50, 3), (60, 2), (200, 1)])
def test_the_largest_activation_of_a_chunk_is_at_most_128_mib(megabytes_a_task: int, size: int):
    """Chunks are as few and as equal as that allows; one task is never split. Twelve tasks of 4 images in float32."""
    network = MLP()
    network.largest_activation = megabytes_a_task * 2**20 // 16
    assert tasks_that_fit(of_images(), network) == size


@pytest.mark.parametrize(("copies", "size"), [(0, 12), (4, 12), (6, 6), (16, 4), (1000, 1)])
def test_the_parameters_kept_for_a_chunk_are_at_most_64_mib(copies: int, size: int):
    """Twelve tasks of a network of one MiB."""
    network = MLP(n_inputs=1, hidden=[], n_outputs=2**17)
    assert sum(p.numel() for p in network.parameters()) == 2**18
    assert tasks_that_fit(of_images(), network, copies_kept=copies) == size


def test_numbers_of_twice_the_size_take_twice_the_room():
    network = MLP()
    network.largest_activation = 10 * 2**20 // 16
    assert tasks_that_fit(of_images(), network) == 12
    assert tasks_that_fit(of_images(dtype=torch.float64), network) == 6


@pytest.mark.parametrize(("queries", "fit"), [(1, [32]), (15, [8, 8, 8, 8]), (15 * 200, [1] * 32)])
def test_chunks_of_the_usual_network_and_tasks(queries: int, fit: list[int]):
    images, labels = torch.zeros(()).expand(32, 5 * queries, 1, 28, 28), torch.arange(5).repeat(32, 1)
    episode = Episode(images[:, :5], labels, images, labels.repeat(1, queries))
    assert [len(chunk) for chunk in MAML(ConvNet(5, pooling="max")).chunks(episode)] == fit


def test_a_network_that_does_not_say_gets_all_tasks_at_once():
    assert tasks_that_fit(of_images(n_tasks=1000), MLP()) == 1000


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
        own = leaves(dict(zip(names, parameters, strict=True)))
        with torch.enable_grad():
            outputs = vmap(lambda point: functional_call(network, own, (point[None],)))(x)
            first = torch.autograd.grad(outputs.pow(3).sum(), list(own.values()), create_graph=True)
            return list(torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), list(own.values())))

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


def test_what_cannot_be_traced_is_told_in_one_sentence():
    message = "this network cannot be compiled (no such luck); leave compiled out"

    def fails(x: Tensor) -> list[Tensor]:
        raise RuntimeError("no such luck\nand a long story")

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Compiled(fails)(torch.ones(1))
