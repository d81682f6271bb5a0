"""The contract of a `Learner` as a test, for our methods and anybody's, in the spirit of scikit-learn's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metatutor.episodes import Episode
from metatutor.evaluation import is_transductive
from metatutor.learner import Learner

Check = Callable[[Learner, Episode], None]
_ROUNDING = 1e-6  # of float64 logits, relative
_STEPS = (1e-6, 1e-7, 1e-8)  # of central differences: a shorter one misses the kink of a ReLU


class ContractError(AssertionError):
    """A learner breaks its contract; the message begins with the name of the check."""


def check_learner(learner: Learner, *, image_shape: tuple[int, ...] | None = None) -> None:
    """Check that a learner keeps the contract that training and evaluation rely on.

    Each check uses a copy of it, in float64, on random tasks:

    - it answers in `[task, query, way]`, the same with and without gradients, and reads no query labels;
    - its answers depend on the support labels; permuted queries permute them; tasks in a batch are answered as alone;
    - it is transductive or not, as it declares, and takes the number of ways that it declares, and any number of shots;
    - answering and `meta_loss` leave nothing behind; `meta_loss` called twice returns the same value twice;
    - the gradient of `meta_loss` is that of its value, unless `exact_gradient` says otherwise;
    - in a network that adapts, what is declared to move moves, and the rest stays;
    - copies, pickles, `state_dict` and moves to another device keep it as it is.

    Args:
        learner: any; it is not changed.
        image_shape: shape of the images; default: that of its network, or 1×28×28.

    Example:
        >>> from metatutor import ConvNet, Prototypical
        >>> check_learner(Prototypical(ConvNet(filters=4)))
    """
    shape = image_shape or getattr(getattr(learner, "network", None), "image_shape", (1, 28, 28))
    for check in CHECKS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            asked = copy.deepcopy(learner).double().eval()
            try:
                check(asked, random_episode(shape, n_way=learner.ways or 3))
            except ContractError as error:
                raise ContractError(f"{check.__name__}: {error}") from None


def random_episode(
    image_shape: tuple[int, ...], *, n_tasks: int = 2, n_way: int = 3, k_shot: int = 2, n_query: int = 2
) -> Episode:
    """Tasks of random images in float64, in random order: those of a class are noisy copies of one image."""
    classes = torch.rand(n_tasks, n_way, *image_shape, dtype=torch.float64)

    def drawn(shots: int) -> tuple[Tensor, Tensor]:
        labels = torch.stack([torch.randperm(n_way * shots) % n_way for _ in range(n_tasks)])
        images = classes[torch.arange(n_tasks)[:, None], labels]
        return 0.7 * images + 0.3 * torch.rand_like(images), labels

    return Episode(*drawn(k_shot), *drawn(n_query), n_way=n_way)


# --- answers ---


def answers_in_shape(learner: Learner, episode: Episode) -> None:
    """Logits are `[task, query, way]`, and finite."""
    logits = learner(episode)
    expected = (*episode.query_images.shape[:2], episode.n_way)
    _demand(tuple(logits.shape) == expected, f"logits must be {expected}, got {tuple(logits.shape)}")
    _demand(bool(logits.isfinite().all()), "logits must be finite")


def the_same_without_gradients(learner: Learner, episode: Episode) -> None:
    """Answers do not depend on whether gradients are recorded."""
    with torch.no_grad():
        without = learner(episode)
    _same(without, learner(episode), "answers under torch.no_grad() differ from those with gradients")


def query_labels_are_not_read(learner: Learner, episode: Episode) -> None:
    """Answers do not depend on query labels, nor on whether there are any."""
    logits = learner(episode)
    others = replace(episode, query_labels=(episode.query_labels + 1) % episode.n_way)
    _same(learner(others), logits, "other query labels changed the answers: they leak")
    _same(learner(replace(episode, query_labels=None)), logits, "without query labels the answers differ")


def support_labels_are_read(learner: Learner, episode: Episode) -> None:
    """Answers depend on the support labels."""
    others = replace(episode, support_labels=(episode.support_labels + 1) % episode.n_way)
    changed = (learner(others) - learner(episode)).abs().max()
    _demand(bool(changed > 0), "other support labels change no answer: nothing is learned from them")


def permuted_queries_permute_the_answers(learner: Learner, episode: Episode) -> None:
    """The order of the query images does not matter."""
    order = torch.randperm(episode.query_images.shape[1])
    permuted = replace(episode, query_images=episode.query_images[:, order], query_labels=None)
    _same(learner(permuted), learner(episode)[:, order], "the order of the queries matters")


def tasks_do_not_meet(learner: Learner, episode: Episode) -> None:
    """A task gets the same answer whatever batch it is in."""
    one_by_one = torch.cat([learner(task) for task in episode])
    _same(learner(episode), one_by_one, "tasks side by side are answered differently from one by one")


def transductive_as_declared(learner: Learner, episode: Episode) -> None:
    """Whether one query image changes the answer for another agrees with `transductive`."""
    measured = is_transductive(learner, episode)
    _demand(
        measured == learner.transductive,
        f"declares transductive = {learner.transductive}, but another query image "
        f"{'changes' if measured else 'does not change'} the answer for the first one",
    )


def ways_as_declared(learner: Learner, episode: Episode) -> None:
    """Any number of shots is answered, and as many ways as `ways` declares; others are a `ValueError`."""
    shape = tuple(episode.query_images.shape[2:])
    for k_shot in (1, 3):
        answers_in_shape(learner, random_episode(shape, n_way=episode.n_way, k_shot=k_shot))
    other = random_episode(shape, n_way=episode.n_way + 1)
    if learner.ways is None:
        answers_in_shape(learner, other)
        return
    with suppress(ValueError):
        learner(other)
        raise ContractError(f"made for {learner.ways} ways, it must refuse {other.n_way} with a ValueError")


# --- learning ---


def meta_loss_is_pure(learner: Learner, episode: Episode) -> None:
    """`meta_loss` is a finite scalar, the same when called again, and changes nothing."""
    if not learner.learns:
        with suppress(ValueError):
            learner.meta_loss(episode)
            raise ContractError("it declares that it learns nothing, so meta_loss must raise a ValueError")
        return
    episode = _training_episode(learner, episode)
    before = _state(learner)
    first, second = (_loss(learner, episode) for _ in range(2))
    _demand(first.dim() == 0 and bool(first.isfinite()), "meta_loss must be a finite scalar")
    first.backward()
    third = _loss(learner, episode)
    _demand(first.item() == second.item() == third.item(), "called twice, meta_loss returns two different values")
    _unchanged(before, learner, "meta_loss")


def gradients_as_declared(learner: Learner, episode: Episode) -> None:
    """The gradient of `meta_loss` agrees with a central difference along a random direction."""
    if not learner.learns:
        return
    episode = _training_episode(learner, episode)
    parameters = list(learner.meta_parameters().values())
    gradients = torch.autograd.grad(_loss(learner, episode), parameters, allow_unused=True)
    _demand(any(g is not None and bool(g.any()) for g in gradients), "meta_loss has no gradient in any meta-parameter")
    if not learner.exact_gradient:
        return
    starts = [p.detach().clone() for p in parameters]
    directions = [torch.randn_like(p) for p in parameters]
    pairs = zip(gradients, directions, strict=True)
    expected = sum((g * d).sum().item() for g, d in pairs if g is not None)

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for parameter, start, direction in zip(parameters, starts, directions, strict=True):
                parameter.copy_(start + distance * direction)
        return _loss(learner, episode).item()

    differences = ((loss_at(step) - loss_at(-step)) / (2 * step) for step in _STEPS)
    found = min(differences, key=lambda difference: abs(difference - expected))
    _demand(
        abs(found - expected) <= 1e-3 * (abs(expected) + 1e-2),
        f"the gradient of meta_loss says {expected:.6g} along a direction, finite differences say {found:.6g}; if that "
        "is intended, set exact_gradient = False",
    )


def what_adapts_moves(learner: Learner, episode: Episode) -> None:
    """What is declared to move moves, above all the last layer; and the rest stays."""
    adapt, moving = getattr(learner, "adapt", None), getattr(learner, "moving", None)
    if adapt is None or moving is None or (not getattr(learner, "test_inner_steps", None) and not learner.inner_steps):
        return
    network: Any = learner.network
    initial, prefix = adapt(episode, 0), network.head_prefix
    for name, adapted in adapt(episode).items():
        change = (adapted - initial[name]).abs().amax(dim=tuple(range(1, adapted.dim())))
        if name not in moving:
            _demand(not bool(change.any()), f"{name} is not declared to adapt, but it moved")
        elif prefix and name.startswith(prefix):
            _demand(bool(change.all()), f"{name} is declared to adapt, but it did not move")


# --- what stays ---


def nothing_is_left_behind(learner: Learner, episode: Episode) -> None:
    """An answer does not depend on earlier questions."""
    other = random_episode(tuple(episode.query_images.shape[2:]), n_way=episode.n_way)
    before, first = _state(learner), learner(episode)
    learner(other)
    _same(learner(episode), first, "another episode in between changed the answers")
    _unchanged(before, learner, "forward")


def copies_are_alike(learner: Learner, episode: Episode) -> None:
    """Copies, pickles and what `state_dict` holds answer like the learner itself."""
    logits = learner(episode)
    _same(copy.deepcopy(learner)(episode), logits, "a deep copy answers differently")
    _same(pickle.loads(pickle.dumps(learner))(episode), logits, "a pickled copy answers differently")
    another = copy.deepcopy(learner)
    with torch.no_grad():
        for parameter in another.parameters():
            parameter.add_(1)
    another.load_state_dict(learner.state_dict())
    _same(another(episode), logits, "state_dict does not hold all that was learned")


def devices_are_alike(learner: Learner, episode: Episode) -> None:
    """It answers in float32, and on a GPU if there is one."""
    logits = learner.float()(episode.to(torch.float32))
    if torch.cuda.is_available():
        moved = learner.cuda()(episode.to("cuda", torch.float32)).cpu()
        _demand(torch.allclose(moved, logits, rtol=1e-2, atol=1e-2), "on cuda it answers differently")
    answers_in_shape(learner.cpu(), episode.to(torch.float32))


CHECKS: tuple[Check, ...] = (
    answers_in_shape,
    nothing_is_left_behind,
    the_same_without_gradients,
    query_labels_are_not_read,
    support_labels_are_read,
    permuted_queries_permute_the_answers,
    tasks_do_not_meet,
    transductive_as_declared,
    ways_as_declared,
    meta_loss_is_pure,
    gradients_as_declared,
    what_adapts_moves,
    copies_are_alike,
    devices_are_alike,
)


# --- help ---


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def _same(found: Tensor, expected: Tensor, message: str) -> None:
    scale = 1 + expected.abs().max()
    _demand(bool((found - expected).abs().max() <= _ROUNDING * scale), message)


def _loss(learner: Learner, episode: Episode) -> Tensor:
    """The meta-loss in training mode, with the same dropout every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return learner.train().meta_loss(episode)


def _training_episode(learner: Learner, episode: Episode) -> Episode:
    """The episode as it is, or a mini-batch of all classes for a learner that is pretrained like a classifier."""
    if learner.trains_on == "episodes":
        return episode
    network: Any = learner.network
    labels = torch.randint(network.n_outputs, episode.query_images.shape[:2])
    return Episode(episode.support_images[:, :0], labels[:, :0], episode.query_images, labels, n_way=network.n_outputs)


def _state(learner: Learner) -> dict[str, Tensor]:
    """Parameters and buffers, without the running statistics that a network keeps in training."""
    running = {
        f"{path}.{name}"
        for path, layer in learner.named_modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    return {name: tensor.clone() for name, tensor in learner.state_dict().items() if name not in running}


def _unchanged(before: dict[str, Tensor], learner: Learner, by: str) -> None:
    after = _state(learner)
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    _demand(not changed, f"{by} changed {', '.join(changed)}")
