"""Anybody's network under the gradient methods: each works as its owner means it, or one sentence says why not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import resnet18

from metatutor.backbones import MLP, Embedding, backbone
from metatutor.episodes import ClassImages, Episode, EpisodeSpec
from metatutor.functional import Parameters
from metatutor.optimization import MAML, ImplicitMAML, MetaLSTM, Reptile
from metatutor.optimization.base import AdaptingLearner
from metatutor.training import TrainConfig, accumulate, train
from tests.gradients import close, drawn, flat, gradient_of, slopes

Episodes = Callable[..., Episode]
METHODS: dict[str, Callable[..., AdaptingLearner]] = {
    "maml": lambda network, **options: MAML(network, **{"inner_lr": 0.1, "inner_steps": 2} | options),
    "reptile": lambda network, **options: Reptile(network, **{"inner_steps": 2, "test_inner_steps": None} | options),
    "imaml": lambda network, **options: ImplicitMAML(network, **{"inner_steps": 2} | options),
    "meta_lstm": lambda network, **options: MetaLSTM(network, **{"inner_steps": 2, "hidden_size": 3} | options),
}
of_every_method = pytest.mark.parametrize("method", METHODS)
ONE_BY_ONE = "^tasks are computed one by one, since vmap fails: "


def learner_of(method: str, network: nn.Module, **options: Any) -> AdaptingLearner:
    """In float64, every parameter random."""
    return drawn(METHODS[method](network, **options))


def outer_step(learner: AdaptingLearner, episode: Episode) -> dict[str, Tensor]:
    """The gradients of one step of the outer loop, by name."""
    learner.zero_grad()
    accumulate(learner, episode)
    learner.after_step()
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- networks of other people -------------------------------------------------------------------------------------


def sequential(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3))


def with_running_statistics() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))


def with_dropout() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 3))


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.lstm(images.flatten(1, 2))[0][:, -1])


class HeadInTheMiddle(nn.Module):
    """Its last layer is not the one that was defined last."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.classifier, self.body = nn.Linear(width, 3), nn.Linear(64, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images.flatten(1)).tanh())


class Tied(nn.Module):
    """One weight, used twice and found under two names: that of the body is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.body, self.head = nn.Linear(64, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.head.weight = self.body.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.enter(images.flatten(1)).tanh()).tanh())


def without_linear() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# --- one like ours ------------------------------------------------------------------------------------------------


@of_every_method
@pytest.mark.parametrize("options", [{}, {"fixed_head": True}])
@pytest.mark.usefixtures("no_warnings")
def test_a_sequential_network_does_what_ours_does(random_episode: Episodes, method: str, options: dict[str, Any]):
    """The same layers, one of ours and an `nn.Sequential`: the same answers, losses and gradients, to the last bit."""
    episode, found = random_episode(), []
    for network in (MLP(64, 3, hidden=(5,)), sequential()):
        learner = learner_of(method, network, **options)
        gradients = outer_step(learner, episode)
        found.append(flat([learner.meta_loss(episode), learner(episode), *gradients.values()]))
        assert (learner.ways, learner.normalization, learner.transductive) == (3, "none", False)
        assert len(gradients) == len(list(learner.meta_parameters()))
    assert torch.equal(*found)
    assert found[0].isfinite().all() and found[0].any()


@pytest.mark.parametrize(
    ("network", "head", "moving"),
    [
        (sequential, None, ["module.3.weight", "module.3.bias"]),
        (with_running_statistics, None, ["module.4.weight", "module.4.bias"]),
        (lambda: sequential(3), "1", ["module.1.weight", "module.1.bias"]),
        (HeadInTheMiddle, None, ["module.body.weight", "module.body.bias"]),
        (HeadInTheMiddle, "classifier", ["module.classifier.weight", "module.classifier.bias"]),
        (lambda: nn.Linear(64, 3), None, ["module.weight", "module.bias"]),
        (without_linear, "0", ["module.0.weight", "module.0.bias"]),
        (Tied, None, ["module.body.weight", "module.head.bias"]),  # its weight is that of another layer too
    ],
)
@pytest.mark.filterwarnings("ignore:tasks are computed one by one")
def test_the_head_is_the_last_linear_layer_or_what_is_named(
    random_episode: Episodes, network: Callable[[], nn.Module], head: str | None, moving: list[str]
):
    """With `adapt="head"` it moves and nothing else does."""
    built, episode = network(), random_episode()
    if isinstance(built, nn.Linear):
        episode = Episode(episode.support_images.flatten(2), episode.support_labels, episode.query_images.flatten(2))
    learner = learner_of("maml", built if head is None else backbone(built, head=head), adapt="head")
    assert learner.moving == moving
    adapted = learner.adapt(episode)
    moved = [n for n, p in learner.network.named_parameters() if not torch.equal(adapted[n], p.expand_as(adapted[n]))]
    assert sorted(moved) == sorted(moving)


@pytest.mark.parametrize("options", [{"adapt": "head"}, {"fixed_head": True}])
def test_without_a_last_layer_one_sentence(options: dict[str, Any]):
    message = (
        "Sequential has no last layer that could adapt; say which it is with "
        "backbone(network, head=the name of a layer)"
    )
    frozen = sequential()
    frozen[-1].requires_grad_(False)
    for network in (without_linear(), backbone(sequential(), head=""), frozen):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            MAML(network, **options)
    with pytest.raises(ValueError, match="^Sequential has no layer 'fc'; see its named_modules()"):
        backbone(sequential(), head="fc")


def test_a_wrong_guess_of_the_last_layer_can_be_put_right(random_episode: Episodes):
    message = (
        "the network has 5 outputs but the episode is 3-way; give one with that many, or "
        "name its last layer with backbone(network, head=its name)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        learner_of("maml", HeadInTheMiddle(5))(random_episode())
    learner_of("maml", backbone(HeadInTheMiddle(5), head="classifier"))(random_episode())


@pytest.mark.usefixtures("no_warnings")
def test_without_a_linear_layer_all_can_adapt(random_episode: Episodes):
    learner = learner_of("maml", without_linear())
    assert learner.ways is None
    assert outer_step(learner, random_episode())["network.module.0.weight"].any()


# --- a residual network ------------------------------------------------------------------------------------------


def test_a_residual_network_on_colour_photos():
    """Its batch normalisation keeps running statistics, and an integer buffer: tasks go one by one, told once."""
    torch.manual_seed(0)
    images, labels = torch.rand(2, 2, 3, 84, 84), torch.tensor([[0, 1], [1, 0]])
    episode = Episode(images, labels, 0.9 * images, labels)
    learner = MAML(resnet18(num_classes=2), inner_lr=0.01)
    before = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    with pytest.warns(UserWarning, match=ONE_BY_ONE) as told:
        loss = learner.meta_loss(episode)
        loss.backward()
        logits = learner.eval()(episode)
    assert len(told) == 1
    assert learner.normalization == "running" and not learner.transductive
    assert logits.shape == (2, 2, 2) and logits.isfinite().all() and loss.isfinite()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert learner.get_parameter("network.module.conv1.weight").grad.any()  # pyright: ignore
    assert learner.get_parameter("network.module.fc.weight").grad.any()  # pyright: ignore
    assert all(not torch.equal(buffer, before[name]) for name, buffer in learner.named_buffers())


# --- one by one ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:tasks are computed one by one")
@pytest.mark.parametrize("network", [with_running_statistics, Recurrent])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"learned_lr": "layer", "adapt": "head"}])
def test_second_order_gradients_one_by_one_against_finite_differences(
    random_episode: Episodes, network: Callable[[], nn.Module], options: dict[str, Any]
):
    learner = learner_of("maml", network(), **options)
    for slope, found in slopes(learner, random_episode(n_tasks=2, k_shot=1, n_query=1), n_directions=2):
        assert slope == pytest.approx(found, rel=1e-6, abs=1e-7)
    first_order = learner_of("maml", network(), **options, first_order=True)
    assert not close(gradient_of(first_order, random_episode()), gradient_of(learner, random_episode()), 1e-3)


@of_every_method
@pytest.mark.parametrize("network", [with_running_statistics, Recurrent])
def test_what_vmap_cannot_goes_one_by_one_and_is_told_once(
    random_episode: Episodes, method: str, network: Callable[[], nn.Module]
):
    """Over all steps of all tasks in both modes; from then on the outer loop takes one task at a time."""
    episode, learner = random_episode(n_tasks=2), learner_of(method, network())
    alone = [deepcopy(learner) for _ in episode]
    assert learner.tasks_at_once(episode) == 2
    with pytest.warns(UserWarning, match=ONE_BY_ONE) as told:
        loss = learner.meta_loss(episode)
        gradients = outer_step(learner, episode)
        assert learner.eval()(episode).isfinite().all()
        assert not learner.train().map_tasks.side_by_side
    assert len(told) == 1
    assert learner.tasks_at_once(episode) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = [outer_step(one, task) for one, task in zip(alone, episode, strict=True)]
        losses = [one.meta_loss(task) for one, task in zip(alone, episode, strict=True)]
    if method != "reptile":  # whose Adam has gone on
        assert close(torch.stack(losses).mean(), loss)
    assert all(close(torch.stack([s[name] for s in steps]).mean(0), gradient) for name, gradient in gradients.items())


@pytest.mark.filterwarnings("ignore:tasks are computed one by one")
def test_the_outer_loop_trains_a_network_with_integer_buffers(class_images: Callable[..., ClassImages]):
    torch.manual_seed(0)
    learner = MAML(with_running_statistics(), inner_lr=0.1)
    start, batch_norm = flat(learner.parameters()).detach().clone(), learner.network.get_submodule("module.1")
    config = TrainConfig(iterations=2, tasks_per_step=2, warmup=0)
    train(learner, class_images(), EpisodeSpec(3, 1, 1), config, progress_bar=False, device="cpu")
    assert not close(flat(learner.parameters()), start, 1e-4)
    assert batch_norm.num_batches_tracked.dtype == torch.int64 and batch_norm.num_batches_tracked > 4
    assert batch_norm.running_mean.any()
    again = MAML(with_running_statistics(), inner_lr=0.1).eval()
    again.load_state_dict(learner.state_dict())
    episode = class_images(seed=1).sampler(EpisodeSpec(3, 1, 1)).sample(2)
    assert close(again(episode), learner(episode), 1e-6)


@pytest.mark.filterwarnings("ignore:tasks are computed one by one")
def test_running_statistics_are_for_evaluation(random_episode: Episodes):
    """In training a task's own, all its images at once; in evaluation what training has kept: then no query counts."""
    episode, learner = random_episode(), learner_of("maml", with_running_statistics())
    half = Episode(episode.support_images, episode.support_labels, episode.query_images[:, :3])
    assert not close(learner(half), learner(episode)[:, :3], 1e-3)
    assert torch.equal(learner.eval()(half), learner(episode)[:, :3])


def test_compiled_is_plain_one_by_one(random_episode: Episodes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda graph: graph)
    found = []
    for compiled in (True, False):
        learner = learner_of("maml", with_running_statistics(), compiled=compiled, inner_steps=1)
        with pytest.warns(UserWarning, match=ONE_BY_ONE):
            found.append(torch.stack([gradient_of(learner, random_episode(n_tasks=2, seed=seed)) for seed in (0, 1)]))
    assert close(*found)


def test_what_cannot_be_compiled_is_told_in_one_sentence(random_episode: Episodes, monkeypatch: pytest.MonkeyPatch):
    """An LSTM in single precision is one operation that tracing does not see through."""
    monkeypatch.setattr(torch, "compile", lambda graph: graph)
    episode = random_episode(n_tasks=2, k_shot=1, n_query=1).to(torch.float32)
    two_rows = episode.support_images[..., :2, :], episode.support_labels
    learner, episode = MAML(Recurrent(), compiled=True), Episode(*two_rows, *two_rows)
    with (
        pytest.warns(UserWarning, match=ONE_BY_ONE),
        pytest.raises(ValueError, match=r"^this network cannot be compiled \(.*\); leave compiled out$"),
    ):
        learner.meta_loss(episode)


# --- chance -------------------------------------------------------------------------------------------------------


@of_every_method
@pytest.mark.usefixtures("no_warnings")
def test_dropout_is_chance_in_training_only(random_episode: Episodes, method: str):
    """Every task, image and step has its own."""
    episode, learner = random_episode(), learner_of(method, with_dropout())
    gradients = [outer_step(learner, episode)["network.module.1.weight"] for _ in range(2)]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert not close(gradients[0], gradients[1], 1e-3)
    assert not close(learner(episode), learner(episode), 1e-3)
    assert torch.equal(learner.eval()(episode), learner(episode))
    images, labels = (t[:1].expand_as(t) for t in (episode.support_images, episode.support_labels))
    adapted = learner.train().adapt(Episode(images, labels, images), inner_steps=1)["module.3.weight"]
    assert not close(adapted[0], adapted[1], 1e-6)  # the same support set, another mask


@pytest.mark.usefixtures("no_warnings")
def test_the_meta_gradient_goes_through_the_same_dropout_as_the_loss(random_episode: Episodes):
    """With a seed of its own before each loss, chance is a function, and has a slope."""

    class Seeded(MAML):
        def meta_loss(self, episode: Episode) -> Tensor:
            torch.manual_seed(0)
            return super().meta_loss(episode)

    learner = drawn(Seeded(with_dropout(), inner_lr=0.1, inner_steps=2))
    for slope, found in slopes(learner, random_episode(), n_directions=2):
        assert slope == pytest.approx(found, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("network", [with_dropout, lambda: nn.LSTM(8, 4, 2, dropout=0.1)])
def test_dropout_is_not_recomputed(network: Callable[[], nn.Module]):
    message = "a recomputed step would have different dropout; leave out recompute or the dropout"
    with pytest.raises(ValueError, match=f"^{message}$"):
        MAML(network(), recompute=True)
    MAML(sequential().append(nn.Dropout(0.0)), recompute=True)


def test_dropout_by_a_function_is_not_recomputed_either(random_episode: Episodes):
    class Drops(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.dropout(images, 0.1, self.training)

    episode, learner = random_episode(), drawn(MAML(sequential().insert(0, Drops()), recompute=True))
    with pytest.raises(ValueError, match="^a recomputed step would have different dropout; leave out recompute"):
        learner.meta_loss(episode)
    learner.network.eval()
    learner.meta_loss(episode).backward()


@pytest.mark.parametrize(("build", "fused"), [(Recurrent, False), (with_dropout, True)])
def test_recurrent_layers_are_computed_without_cudnn(build: Callable[[], nn.Module], fused: bool):
    """Which differentiates them once only, and not at all in evaluation mode; other layers keep it."""
    module, seen = build(), []
    module.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    network = backbone(module)
    assert isinstance(network, Embedding)
    for method in (network, network.embed):
        method(torch.rand(2, 1, 8, 8))
    assert seen == [fused, fused] and torch.backends.cudnn.enabled


# --- frozen and tied parameters -----------------------------------------------------------------------------------


@of_every_method
@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_parameters_stay_in_both_loops(random_episode: Episodes, method: str, when: str):
    """Frozen before the learner is made or later: as if the network had only the others, and a fixed function below."""
    torch.manual_seed(0)
    below, above = nn.Linear(64, 5).double(), nn.Linear(5, 3).double()
    episode, network = random_episode(), nn.Sequential(nn.Flatten(), below, nn.Tanh(), above)
    if when == "before":
        below.requires_grad_(False)
    learner = METHODS[method](network).double()
    below.requires_grad_(False)
    gradients = outer_step(learner, episode)
    assert learner.adapt(episode).keys() == {"module.3.weight", "module.3.bias"}
    assert all("module.1." not in name for name in gradients)

    def lower(images: Tensor) -> Tensor:
        with torch.no_grad():
            return below(images.flatten(2)).tanh()

    features = Episode(
        lower(episode.support_images), episode.support_labels, lower(episode.query_images), episode.query_labels
    )
    expected = METHODS[method](deepcopy(above)).double()
    lstm = {name: p for name, p in learner.state_dict().items() if name.startswith(("watch.", "forget.", "enter."))}
    expected.load_state_dict(lstm, strict=False)
    of_features = outer_step(expected, features)
    assert close(learner(episode), expected(features))
    for name, gradient in of_features.items():
        assert close(gradients[name.replace("network.module.", "network.module.3.")], gradient), name


@of_every_method
def test_where_everything_is_frozen_there_is_nothing_to_adapt(method: str):
    with pytest.raises(ValueError, match="^Sequential has no parameter that could adapt; unfreeze some$"):
        METHODS[method](sequential().requires_grad_(False))


@pytest.mark.usefixtures("no_warnings")
def test_tied_parameters_stay_tied(random_episode: Episodes):
    """Against a plain loop over tasks and steps, where the one weight collects the gradients of its two uses."""
    episode, learner = random_episode(), learner_of("maml", Tied())
    network, losses = learner.network, []
    for images, labels, queries, wanted in zip(
        episode.support_images, episode.support_labels, episode.query_images, episode.query_labels, strict=True
    ):
        own: Parameters = dict(network.named_parameters())
        assert len(own) == 5
        for _ in range(2):
            loss = F.cross_entropy(functional_call(network, own, (images,)), labels)
            gradients = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            own = {name: p - 0.1 * g for (name, p), g in zip(own.items(), gradients, strict=True)}
        losses.append(F.cross_entropy(functional_call(network, own, (queries,)), wanted))
    expected = flat(torch.autograd.grad(torch.stack(losses).mean(), list(network.parameters())))
    assert close(gradient_of(learner, episode), expected)


@of_every_method
@pytest.mark.usefixtures("no_warnings")
def test_every_method_takes_tied_parameters(random_episode: Episodes, method: str):
    learner, episode = learner_of(method, Tied()), random_episode()
    optimizer = torch.optim.SGD(learner.meta_parameters().values(), lr=0.1)
    assert outer_step(learner, episode)["network.module.body.weight"].any()
    optimizer.step()
    module: Any = learner.network.module
    assert module.head.weight is module.body.weight
    again = learner_of(method, Tied()).eval()
    again.load_state_dict(learner.state_dict())
    assert torch.equal(again(episode), learner.eval()(episode))


def test_attention_adapts_in_evaluation_mode(random_episode: Episodes):
    """PyTorch's short cut for it has no derivatives."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(64, 3))
    episode = random_episode(size=8).to(torch.float32)
    assert MAML(network).eval()(episode).shape == (*episode.query_labels.shape, 3)
    assert torch.backends.mha.get_fastpath_enabled()
