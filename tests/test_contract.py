"""Every method keeps the contract, and `check_learner` names what breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metatutor
from metatutor import (
    MAML,
    MANN,
    R2D2,
    SNAIL,
    ConvNet,
    FeedForward,
    ImplicitMAML,
    Learner,
    Matching,
    MetaLSTM,
    MetaNet,
    NearestPixels,
    Pixels,
    PlainLSTM,
    PretrainedCosine,
    PretrainedFinetuned,
    ProtoMAML,
    Prototypical,
    Relation,
    Reptile,
    Scratch,
    Siamese,
)
from metatutor.episodes import Episode
from metatutor.functional import Parameters
from metatutor.testing import ContractError, check_learner

SIZE = 12


def network(n_outputs: int | None = None, **options: Any) -> ConvNet:
    return ConvNet(n_outputs, **{"filters": 4, "n_blocks": 2, "image_size": SIZE} | options)


def any_network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))


def with_running_statistics() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))


LEARNERS: dict[str, Callable[[], Learner]] = {
    "MAML": lambda: MAML(network(3), inner_steps=2),
    "MAML, inductive": lambda: MAML(network(3, normalization="support"), inner_steps=2, test_inner_steps=3),
    "MAML, group": lambda: MAML(network(3, normalization="group", pooling="max", hidden=(6,))),
    "MAML, recompute": lambda: MAML(network(3), inner_steps=2, recompute=True),
    "MAML, first order": lambda: MAML(network(3), first_order=True),
    "MAML, fixed head": lambda: MAML(network(3, zero_head=True), inner_steps=2, fixed_head=True),
    "MAML, any network": lambda: MAML(any_network(), inner_lr=0.1),
    "MAML, running statistics": lambda: MAML(with_running_statistics(), inner_lr=0.1),
    "ANIL": lambda: MAML(network(3), adapt="head"),
    "BOIL": lambda: MAML(network(3), adapt="body"),
    "ProtoMAML": lambda: ProtoMAML(network(normalization="group"), inner_steps=2),
    "ProtoMAML, inductive": lambda: ProtoMAML(network(normalization="support"), test_inner_steps=3),
    "ProtoMAML, first order": lambda: ProtoMAML(network(), first_order=True),
    "ProtoMAML, any network": lambda: ProtoMAML(any_network()),
    "R2-D2": lambda: R2D2(network(normalization="support")),
    "R2-D2, any network": lambda: R2D2(any_network(), penalty=0.1),
    "Meta-SGD": lambda: MAML(network(3), learned_lr="parameter"),
    "MAML++": lambda: MAML(network(3), inner_steps=2, learned_lr="layer", multi_step_iterations=5),
    "Reptile": lambda: Reptile(network(3), test_inner_steps=3),
    "ImplicitMAML": lambda: ImplicitMAML(network(3), inner_steps=3),
    "MetaLSTM": lambda: MetaLSTM(network(3), inner_steps=2),
    "Prototypical": lambda: Prototypical(network(normalization="support")),
    "Prototypical, batch": lambda: Prototypical(network()),
    "Prototypical, fine-tuned": lambda: Prototypical(network(normalization="group"), finetune_steps=2),
    "Prototypical, any network": lambda: Prototypical(any_network()),
    "Matching": lambda: Matching(network(normalization="support")),
    "Matching, full context": lambda: Matching(network(normalization="support"), full_context=True),
    "Relation": lambda: Relation(network(n_halving=1, normalization="support")),
    "Siamese": lambda: Siamese(network(normalization="support")),
    "MANN": lambda: MANN(Pixels(5), n_way=3, slots=8, width=6, hidden_size=16),
    "PlainLSTM": lambda: PlainLSTM(Pixels(5), n_way=3, hidden_size=16),
    "PlainLSTM, letters": lambda: PlainLSTM(Pixels(5), n_way=3, hidden_size=16, labels="letters"),
    "FeedForward": lambda: FeedForward(Pixels(5), n_way=3, hidden_size=16),
    "MetaNet": lambda: MetaNet(network(normalization="support"), n_way=3, hidden_size=8),
    "SNAIL": lambda: SNAIL(network(normalization="support"), n_way=3, embedding=8, filters=4, attention=(4, 4)),
    "PretrainedCosine": lambda: PretrainedCosine(network(7, normalization="support")),
    "PretrainedFinetuned": lambda: PretrainedFinetuned(network(7)),
    "PretrainedFinetuned, head": lambda: PretrainedFinetuned(network(7), adapt="head"),
    "Scratch": lambda: Scratch(network(3), steps=2),
    "NearestPixels": NearestPixels,
}


@pytest.mark.filterwarnings("ignore:tasks are computed one by one")
@pytest.mark.parametrize("name", LEARNERS)
def test_the_contract_is_kept(name: str):
    torch.manual_seed(0)
    check_learner(LEARNERS[name](), image_shape=(1, SIZE, SIZE))


def test_every_exported_method_is_checked():
    exported = {getattr(metatutor, name) for name in metatutor.__all__}
    methods = {value for value in exported if isinstance(value, type) and issubclass(value, Learner)} - {Learner}
    torch.manual_seed(0)
    assert methods == {type(make()) for make in LEARNERS.values()}


# --- planted faults are named ---


class Leaky(Prototypical):
    def answer(self, episode: Episode) -> Tensor:
        logits = super().answer(episode)
        return logits if episode.query_labels is None else logits + nn.functional.one_hot(episode.query_labels, 3)


class Stateful(Prototypical):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("calls", torch.zeros(()))

    def meta_loss(self, episode: Episode) -> Tensor:
        self.calls += 1
        return super().meta_loss(episode) * (1 + 0.1 * self.calls)


class Remembering(Prototypical):
    last: Tensor | None = None

    def answer(self, episode: Episode) -> Tensor:
        logits = super().answer(episode)
        mixed = logits if self.last is None else logits + 0.1 * self.last
        self.last = logits.detach()
        return mixed


class HeadStays(MAML):
    def inner_step(self, parameters: Parameters, state: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        moved, state = super().inner_step(parameters, state, episode, step)
        return moved | {name: p for name, p in parameters.items() if name.startswith("head.")}, state


class BodyMoves(MAML):
    def inner_step(self, parameters: Parameters, state: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        return {name: p + 0.1 for name, p in super().inner_step(parameters, state, episode, step)[0].items()}, state


class SilentlyFirstOrder(MAML):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.first_order = True


class Inductive(MAML):
    transductive = False  # pyright: ignore


class Mixing(Prototypical):
    def answer(self, episode: Episode) -> Tensor:
        return super().answer(episode) - super().answer(episode).mean(0)


class NoSupport(Prototypical):
    def answer(self, episode: Episode) -> Tensor:
        labels = torch.arange(episode.support_labels.shape[1]) % episode.n_way
        return super().answer(Episode(episode.support_images, labels.expand_as(episode.support_labels),
                                      episode.query_images, n_way=episode.n_way))  # fmt: skip


class OrderMatters(Prototypical):
    def answer(self, episode: Episode) -> Tensor:
        return super().answer(episode) + torch.arange(episode.query_images.shape[1])[:, None]


class AnyWays(MAML):
    ways = None  # pyright: ignore


class Forgetful(Prototypical):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.bias = torch.randn(())

    def answer(self, episode: Episode) -> Tensor:
        return super().answer(episode) * self.bias

    def __deepcopy__(self, memo: Any) -> Forgetful:
        made = Forgetful(network(normalization="support")).double()
        made.load_state_dict(self.state_dict())
        return made


FAULTS = {
    "query_labels_are_not_read": lambda: Leaky(network()),
    "meta_loss_is_pure": lambda: Stateful(network()),
    "nothing_is_left_behind": lambda: Remembering(network()),
    "what_adapts_moves": lambda: HeadStays(network(3)),
    "transductive_as_declared": lambda: Inductive(network(3)),
    "gradients_as_declared": lambda: SilentlyFirstOrder(network(3)),
    "tasks_do_not_meet": lambda: Mixing(network(normalization="support")),
    "support_labels_are_read": lambda: NoSupport(network(normalization="support")),
    "permuted_queries_permute_the_answers": lambda: OrderMatters(network(normalization="support")),
    "copies_are_alike": lambda: Forgetful(network(normalization="support")),
}


@pytest.mark.parametrize("check", FAULTS)
def test_a_planted_fault_is_named(check: str):
    torch.manual_seed(0)
    with pytest.raises(ContractError, match=f"^{check}: "):
        check_learner(FAULTS[check](), image_shape=(1, SIZE, SIZE))


def test_what_should_stay_must_not_move():
    torch.manual_seed(0)
    with pytest.raises(ContractError, match="^what_adapts_moves: .*but it moved"):
        check_learner(BodyMoves(network(3), adapt="head"), image_shape=(1, SIZE, SIZE))


@pytest.mark.parametrize("seed", [4, 6])
def test_a_kink_between_two_points_is_no_wrong_gradient(seed: int):
    torch.manual_seed(seed)  # with these weights, a step of 1e-6 takes some ReLU from one side to the other
    check_learner(Prototypical(metatutor.ConvNet(filters=4)))
