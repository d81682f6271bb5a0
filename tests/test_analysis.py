"""What moved: measures with known answers on cases small enough to work out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metatutor.analysis import layers, linear_cka, query_outputs, relative_change, what_moved
from metatutor.backbones import ConvNet, Normalization, backbone
from metatutor.episodes import Episode
from metatutor.optimization import MAML


def episode(n_tasks: int = 3, n_query: int = 3) -> Episode:
    images = torch.rand(n_tasks, 5 * (1 + n_query), 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5).repeat(n_tasks, 1)
    return Episode(images[:, :5], labels, images[:, 5:], labels.repeat_interleave(n_query, 1), n_way=5)


def network(normalization: Normalization = "batch") -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(n_outputs=5, filters=4, hidden=(6,), normalization=normalization)


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_cka_is_one_for_features_turned_scaled_and_shifted() -> None:
    x = features(10, 4)
    turn = torch.linalg.qr(features(4, 4)).Q
    assert linear_cka(x, 3 * x @ turn + 7).item() == pytest.approx(1)


def test_cka_as_the_papers_formula_says_in_feature_space() -> None:
    x, y = features(10, 4), features(10, 6).square()
    x0, y0 = x - x.mean(0), y - y.mean(0)
    by_features = (y0.T @ x0).norm() ** 2 / ((x0.T @ x0).norm() * (y0.T @ y0).norm())
    assert linear_cka(x, y).item() == pytest.approx(by_features.item())
    assert linear_cka(x, y) == linear_cka(y, x)


def test_cka_of_features_without_anything_in_common_is_zero() -> None:
    x = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    assert linear_cka(x, x.roll(2, 0)).item() == 0


def test_cka_of_constant_features_is_refused() -> None:
    with pytest.raises(ValueError, match="do not differ"):
        linear_cka(torch.ones(4, 3), torch.rand(4, 3))


def test_relative_change_by_hand() -> None:
    before = {"head.weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "head.bias": torch.tensor([[4.0], [0.0]])}
    after = before | {"head.bias": torch.tensor([[3.0], [2.0]])}
    assert relative_change(before, after, "head").tolist() == pytest.approx([1 / 5, 2.0])
    with pytest.raises(ValueError, match=r"no parameter of 'hidden\.0'"):
        relative_change(before, after, "hidden.0")


def test_every_parameter_belongs_to_a_layer() -> None:
    of_network = network()
    prefixes = tuple(f"{prefix}." for prefix in layers(of_network))
    assert all(name.startswith(prefixes) for name, _ in of_network.named_parameters())


def test_nothing_moves_without_a_step() -> None:
    moved = what_moved(MAML(network()), episode(), inner_steps=0)
    assert all(change.tolist() == [0, 0, 0] for change in moved.change.values())
    assert all(torch.allclose(alike, torch.ones(3)) for alike in moved.similarity.values())


def test_with_anil_only_the_head_moves() -> None:
    moved = what_moved(MAML(network(), adapt="head"), episode())
    still = {name: (change == 0).all().item() for name, change in moved.change.items()}
    assert still == {
        "conv 1": True,
        "conv 2": True,
        "conv 3": True,
        "conv 4": True,
        "linear 1": True,
        "linear 2": False,
    }
    assert (moved.similarity["linear 2"] < 1).all()


@pytest.mark.parametrize("normalization", ["batch", "support", "group"])
def test_the_last_outputs_are_the_learners_logits(normalization: Normalization) -> None:
    learner, of_tasks = MAML(network(normalization)).eval(), episode()
    with torch.no_grad():
        logits, adapted = learner(of_tasks), learner.adapt(of_tasks)
    for i in range(len(of_tasks)):
        parameters = {name: p[i] for name, p in adapted.items()}
        outputs = query_outputs(learner.network, parameters, of_tasks.task(i))
        assert torch.allclose(outputs["linear 2"], logits[i], atol=1e-4)
        assert outputs["conv 1"].shape == (15, 4 * 14 * 14)


def of_someone_else() -> nn.Sequential:
    layers = (
        nn.Conv2d(1, 3, 3, stride=4),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(147, 6),
        nn.Linear(6, 5),
    )
    return nn.Sequential(*layers)


def test_layers_of_anybodys_network_are_named_by_what_they_are() -> None:
    assert list(layers(backbone(of_someone_else())).items()) == [
        ("module.0", "conv 1"),
        ("module.1", "BatchNorm2d 1"),
        ("module.4", "linear 1"),
        ("module.5", "linear 2"),
    ]


def test_frozen_layers_do_not_move() -> None:
    """They are no part of what adapts, and are compared all the same."""
    someones = of_someone_else()
    someones[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="one by one"):
        moved = what_moved(MAML(someones), episode())
    assert list(moved.change) == ["conv 1", "BatchNorm2d 1", "linear 1", "linear 2"]
    assert moved.change["conv 1"].tolist() == [0, 0, 0]
    assert torch.allclose(moved.similarity["conv 1"], torch.ones(3))
    assert all((moved.change[name] > 0).all() for name in list(moved.change)[1:])


def test_hooks_do_not_stay() -> None:
    of_network = network()
    what_moved(MAML(of_network), episode(1))
    assert not any(module._forward_hooks for module in of_network.modules())
