"""What moved: how far each layer's parameters travel when a network adapts, and how much its answers change.

Two measures, because they can disagree. *Relative change* compares the parameters before and after adaptation; *linear
CKA* compares a layer's outputs for the same images. A layer may move far and mean the same, or hardly move and mean
something else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.backbones import ConvBlock, Network
from metatutor.episodes import Episode
from metatutor.functional import Parameters


@runtime_checkable
class Adapting(Protocol):
    """A learner that adapts its network to each task by steps."""

    if TYPE_CHECKING:  # from Python 3.12 on, a check at run time does not see the submodules of a module
        network: Network

    def adaptation_path(self, episode: Episode, inner_steps: int | None = None) -> list[Parameters]:
        """The parameters of every task, `[task, ...]` by name, before the first step and after each."""
        ...


@dataclass(frozen=True)
class Movement:
    """What adaptation did to each layer: relative change, 0 if it stayed; linear CKA, 1 if it means the same."""

    change: dict[str, Float[Tensor, " task"]]
    similarity: dict[str, Float[Tensor, " task"]]


def what_moved(learner: Adapting, episode: Episode, inner_steps: int | None = None) -> Movement:
    """Adapt to every task, then compare each layer before and after: its parameters, its outputs for the query images.

    This follows Raghu et al. (2020), section 3.2, with linear CKA in place of CCA; `inner_steps` defaults to that of
    the learner's mode.
    """
    with torch.no_grad():
        path = learner.adaptation_path(episode, inner_steps)
        shared = {n: p.expand(len(episode), *p.shape) for n, p in learner.network.named_parameters()}
        before, after = shared | path[0], shared | path[-1]  # frozen parameters are not in the path
        similarity: dict[str, list[Tensor]] = {name: [] for name in layers(learner.network).values()}
        for i in range(len(episode)):
            task = episode.task(i)
            of_task = ({name: p[i] for name, p in parameters.items()} for parameters in (before, after))
            outputs = [query_outputs(learner.network, parameters, task) for parameters in of_task]
            for name, values in similarity.items():
                values.append(linear_cka(outputs[0][name], outputs[1][name]))
        change = {name: relative_change(before, after, prefix) for prefix, name in layers(learner.network).items()}
        return Movement(change, {name: torch.stack(values) for name, values in similarity.items()})


def layers(network: Network) -> dict[str, str]:
    """The layers of a network: the prefix of their parameters' names to a name for readers, such as `conv 2`."""
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name, _ in network.named_parameters()):
        layer = network.get_submodule(prefix)
        kind = "linear" if isinstance(layer, nn.Linear) else type(layer).__name__
        kind = "conv" if isinstance(layer, ConvBlock | nn.modules.conv._ConvNd) else kind
        counts[kind] += 1
        names[prefix] = f"{kind} {counts[kind]}"
    return names


def relative_change(before: Parameters, after: Parameters, prefix: str) -> Float[Tensor, " task"]:
    """How far the parameters under a prefix moved, relative to their length: `‖after - before‖ / ‖before‖`.

    Example:
        >>> before = {"head.weight": torch.tensor([[3.0, 0.0]]), "head.bias": torch.tensor([[4.0]])}
        >>> relative_change(before, {name: 2 * p for name, p in before.items()}, "head")
        tensor([1.])
    """
    names = [name for name in before if name.startswith(f"{prefix}.")]
    if not names:
        raise ValueError(f"no parameter of '{prefix}' among {', '.join(before)}")
    initial, adapted = (torch.cat([of[name].flatten(1) for name in names], dim=1) for of in (before, after))
    return (adapted - initial).norm(dim=1) / initial.norm(dim=1)


def linear_cka(first: Float[Tensor, "n p"], second: Float[Tensor, "n q"]) -> Float[Tensor, ""]:
    """Linear centred kernel alignment: how alike two sets of features of the same `n` images are, from 0 to 1.

    `‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)`, with the columns of `X` and `Y` centred: Kornblith et al. (2019), equation 3. Rotating,
    reflecting or scaling the features as a whole changes nothing. Computed from the `n × n` products `X Xᵀ` and `Y Yᵀ`,
    since images are fewer than features.

    Example:
        >>> features = torch.eye(3)
        >>> linear_cka(features, -2 * features).item()
        1.0
    """
    x, y = ((features - features.mean(0)).double() for features in (first, second))
    xx, yy = x @ x.T, y @ y.T
    lengths = xx.norm() * yy.norm()
    if lengths == 0:
        raise ValueError("the features do not differ between images, so there is nothing to compare")
    return ((xx * yy).sum() / lengths).to(first.dtype)


def query_outputs(
    network: Network, parameters: Parameters, episode: Episode
) -> dict[str, Float[Tensor, "query feature"]]:
    """The outputs of each layer (see `layers`) for one task's query images, under that task's parameters, flattened."""
    support, query = episode.support_images[0], episode.query_images[0]
    by_support = network.normalization == "support"
    arguments = (torch.cat([support, query]), len(support)) if by_support else (query,)
    kept: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        kept[name] = output[-len(query) :].flatten(1)

    hooks = [
        network.get_submodule(prefix).register_forward_hook(partial(keep, name))
        for prefix, name in layers(network).items()
    ]
    try:
        functional_call(network, parameters, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
