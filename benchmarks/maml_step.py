"""One meta-gradient of second-order MAML: 32 tasks, 5-way 1-shot, Conv-4 with 64 filters, ours and the peers'.

    python benchmarks/maml_step.py --json maml_step.json
    python benchmarks/maml_step.py --quick                      # few tasks, few rounds: are the gradients the same?

A setting `pooled-15q-5s` is a max-pooled network, 15 queries a class and 5 inner steps; `strided` halves its images by
strided convolutions. Ours is what `train` does in a step, `accumulate(MAML(...), episode)`, with `ConvNet`; every peer
adapts task by task the network its user would write, `torch.nn.Conv2d`, `BatchNorm2d`, `ReLU`, with the same weights;
parallel-metalearn all tasks at once. Nothing is timed before all have given the same gradient in float64. Then each
lives in a process of its own and they take turns, one step at a time, so that whatever else the machine does meets all
alike. Peak memory is what the steps add to the process, for JAX including what compiling takes; the ratio is to
metatutor's median in the same setting. Peers that are not installed are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import harness
import torch
import torch.nn.functional as F
import tyro
from harness import Prepared, compare, difference, refuse_differences
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.allocator import keep_freed_memory_once
from metatutor.backbones import ConvBlock, ConvNet
from metatutor.episodes import Episode
from metatutor.optimization.maml import MAML
from metatutor.training import accumulate

INNER_LR = 0.4

AT_ONCE = (16, 8, 4, 2, 1)
STEPS = (1, 2, 5, 10)
SETTINGS = (
    *(f"strided-{queries}q-{steps}s" for queries in (1, 15) for steps in STEPS),
    *(f"pooled-{queries}q-{steps}s" for queries in (1, 15) for steps in (1, 5)),
)


@dataclass(frozen=True)
class Config(harness.Config):
    """What to measure, and how.

    Args:
        settings: which settings, such as `pooled-15q-5s`; any numbers will do.
        peers: which peers to compare with, if installed.
        variants: what else to time: `metatutor-recompute`, `metatutor-compiled`, `metatutor-8-at-once` (or 16, 4, 2, 1
            tasks side by side, `tasks_at_once` of `train`), `metatutor-plain-malloc` (glibc's own memory limits),
            `plain loop-keep-memory` (the plain loop with ours), `JAX-vmap` (all tasks at once).
        tasks: tasks in an episode.
        filters: channels of every convolution.
    """

    settings: tuple[str, ...] = SETTINGS
    peers: tuple[str, ...] = ("plain loop", "higher", "TorchOpt", "learn2learn", "parallel-metalearn", "JAX")
    variants: tuple[str, ...] = ()
    tasks: int = 32
    filters: int = 64


@dataclass(frozen=True)
class Setting:
    """The shape of the work, and where it is done."""

    name: str
    tasks: int
    filters: int
    device: str

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[ConvNet, Episode, int]:
        """The network, the episode and the number of inner steps; the same in every process."""
        found = re.fullmatch(r"(strided|pooled)-(\d+)q-(\d+)s", self.name)
        if not found:
            raise SystemExit(f"no such setting: {self.name}; write it like pooled-15q-5s")
        pooling, queries, steps = found.groups()
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = ConvNet(5, filters=self.filters, pooling="max" if pooling == "pooled" else "stride")
        labels = [torch.arange(5).repeat_interleave(n).repeat(self.tasks, 1) for n in (1, int(queries))]
        images = [torch.rand(*of_images.shape, 1, 28, 28, generator=generator, dtype=dtype) for of_images in labels]
        episode = Episode(images[0], labels[0], images[1], labels[1], n_way=5)
        return network.to(self.device, dtype), episode.to(self.device), int(steps)


# --- implementations: each gives a module, and a function that adds one meta-gradient to its parameters' -----------

Implementation = Callable[[ConvNet, Episode, int], Prepared]


def metatutor(
    network: ConvNet, episode: Episode, inner_steps: int, at_once: int | None = None, **options: Any
) -> Prepared:
    keep_freed_memory_once()  # as `train` does, unless the environment forbids it
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=inner_steps, **options)

    def backward() -> None:
        accumulate(learner, episode, at_once)

    return network, backward


def plain_loop(network: ConvNet, episode: Episode, inner_steps: int, second_order: bool = True) -> Prepared:
    net = ordinary(network)

    def loss(parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (images,)), labels)

    def backward() -> None:
        for support_images, support_labels, query_images, query_labels in tasks(episode):
            adapted: dict[str, Tensor] = dict(net.named_parameters())
            for _ in range(inner_steps):
                support_loss = loss(adapted, support_images, support_labels)
                gradients = torch.autograd.grad(support_loss, list(adapted.values()), create_graph=second_order)
                adapted = {n: p - INNER_LR * g for (n, p), g in zip(adapted.items(), gradients, strict=True)}
            (loss(adapted, query_images, query_labels) / len(episode)).backward()

    return net, backward


def higher_(network: ConvNet, episode: Episode, inner_steps: int) -> Prepared:
    import higher

    net = ordinary(network)
    optimizer = torch.optim.SGD(net.parameters(), lr=INNER_LR)

    def backward() -> None:
        for support_images, support_labels, query_images, query_labels in tasks(episode):
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (adapted, inner):
                for _ in range(inner_steps):
                    inner.step(F.cross_entropy(adapted(support_images), support_labels))
                (F.cross_entropy(adapted(query_images), query_labels) / len(episode)).backward()

    return net, backward


def torchopt_(network: ConvNet, episode: Episode, inner_steps: int) -> Prepared:
    import torchopt

    net = ordinary(network)
    inner = torchopt.MetaSGD(net, lr=INNER_LR)

    def backward() -> None:
        states = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
        for support_images, support_labels, query_images, query_labels in tasks(episode):
            for _ in range(inner_steps):
                inner.step(F.cross_entropy(net(support_images), support_labels))
            (F.cross_entropy(net(query_images), query_labels) / len(episode)).backward()
            for target, state in zip((net, inner), states, strict=True):
                torchopt.recover_state_dict(target, state)

    return net, backward


def learn2learn_(network: ConvNet, episode: Episode, inner_steps: int) -> Prepared:
    from learn2learn.algorithms import MAML as TheirMAML

    maml = TheirMAML(ordinary(network), lr=INNER_LR)

    def backward() -> None:
        for support_images, support_labels, query_images, query_labels in tasks(episode):
            learner = maml.clone()
            for _ in range(inner_steps):
                learner.adapt(F.cross_entropy(learner(support_images), support_labels))
            (F.cross_entropy(learner(query_images), query_labels) / len(episode)).backward()

    return maml, backward


class Layers(nn.Sequential):
    """Layers that need nothing of what parallel-metalearn tells every module, such as the inner step."""

    def forward(self, input: Tensor, **told: Any) -> Tensor:
        return super().forward(input)


def parallel_metalearn(network: ConvNet, episode: Episode, inner_steps: int) -> Prepared:
    from metalearn.algorithms import MAML as TheirMAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss import CategoricalAccuracy, CrossEntropy
    from metalearn.model_wrappers import MAML_Model
    from metalearn.nn_models.basic_layers.BatchNormalization import BatchNorm

    images = episode.support_images
    net = ordinary(network, BatchNorm)  # vmap over a BatchNorm2d with weights of each task: wrong second derivatives
    model = MAML_Model(Layers(*net[:-1]), Layers(net[-1]))
    inner = InnerSGD(model.get_fast_weights(), learn_lr=False).to(images)
    nn.init.constant_(inner.lrs["lr_global"], INNER_LR)  # which the constructor rounds to float32
    maml = TheirMAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=inner,
        support_loss_fn=CrossEntropy(CategoricalAccuracy()),
        inner_steps=inner_steps,
        chunk_size=len(episode),
        device=images.device,
    )
    batch = images, {"labels": episode.support_labels}, episode.query_images, {"labels": episode.query_labels}

    def backward() -> None:
        maml.step(iter([batch]))

    return model, backward


def jax_(network: ConvNet, episode: Episode, inner_steps: int, side_by_side: bool = False) -> Prepared:
    os.environ["PJRT_NPROC"] = str(torch.get_num_threads())  # XLA's threads; read once, before the first array
    import jax
    from jax import lax
    from jax import numpy as jnp

    jax.config.update("jax_platforms", episode.support_images.device.type)
    jax.config.update("jax_enable_x64", episode.support_images.dtype == torch.float64)
    strides = [block.stride for block in network.blocks if isinstance(block, ConvBlock)]
    layout = "NHWC", "OIHW", "NHWC"

    def array(tensor: Tensor) -> jax.Array:
        return jnp.asarray(tensor.detach().cpu().numpy())

    def logits(parameters: list[jax.Array], images: jax.Array) -> jax.Array:
        *blocks, head_weight, head_bias = parameters
        for stride, weight, scale, shift in zip(strides, blocks[::3], blocks[1::3], blocks[2::3], strict=True):
            images = lax.conv_general_dilated(images, weight, (stride, stride), 2 * [(1, 1)], dimension_numbers=layout)
            images = jax.nn.relu(jax.nn.standardize(images, (0, 1, 2), epsilon=1e-5) * scale + shift)
            if stride == 1:
                images = lax.reduce_window(images, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return images.transpose(0, 3, 1, 2).reshape(len(images), -1) @ head_weight.T + head_bias

    def loss(parameters: list[jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits(parameters, images)), labels[:, None], 1).mean()

    def query_loss(parameters: list[jax.Array], task: tuple[jax.Array, ...]) -> jax.Array:
        support_images, support_labels, query_images, query_labels = task
        adapted = parameters
        for _ in range(inner_steps):
            gradients = jax.grad(loss)(adapted, support_images, support_labels)
            adapted = [p - INNER_LR * g for p, g in zip(adapted, gradients, strict=True)]
        return loss(adapted, query_images, query_labels)

    @jax.jit
    @jax.grad
    def mean_gradient(parameters: list[jax.Array], tasks: tuple[jax.Array, ...]) -> jax.Array:
        return jax.vmap(query_loss, (None, 0))(parameters, tasks).mean()

    task_gradient = jax.jit(jax.grad(query_loss))
    mean = jax.jit(lambda gradients: jax.tree.map(lambda *of_tasks: sum(of_tasks) / len(of_tasks), *gradients))
    parameters = [array(p) for p in network.parameters()]
    images = [array(of_images.movedim(2, 4)) for of_images in (episode.support_images, episode.query_images)]
    labels = [array(of_labels) for of_labels in (episode.support_labels, episode.query_labels)]
    together = images[0], labels[0], images[1], labels[1]
    each = list(zip(*together, strict=True))

    def backward() -> None:
        if side_by_side:
            gradients = mean_gradient(parameters, together)
        else:
            gradients = mean([task_gradient(parameters, task) for task in each])
        for parameter, gradient in zip(network.parameters(), jax.block_until_ready(gradients), strict=True):
            parameter.grad = torch.from_dlpack(gradient)

    return network, backward


IMPLEMENTATIONS: dict[str, Implementation] = {
    "metatutor": metatutor,
    "metatutor-recompute": partial(metatutor, recompute=True),
    "metatutor-compiled": partial(metatutor, compiled=True),
    "metatutor-plain-malloc": metatutor,
    **{f"metatutor-{n}-at-once": partial(metatutor, at_once=n) for n in AT_ONCE},
    "plain loop": plain_loop,
    "plain loop-keep-memory": plain_loop,
    "higher": higher_,
    "TorchOpt": torchopt_,
    "learn2learn": learn2learn_,
    "parallel-metalearn": parallel_metalearn,
    "JAX": jax_,
    "JAX-vmap": partial(jax_, side_by_side=True),
}
PACKAGES = {
    "higher": "higher",
    "TorchOpt": "torchopt",
    "learn2learn": "learn2learn",
    "parallel-metalearn": "metalearn",
    "JAX": "jax",
}


def ordinary(network: ConvNet, batch_norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """The network a user of the peers would write, with the same weights; its parameters come in the same order."""
    layers: list[nn.Module] = []
    for block in network.blocks:
        assert isinstance(block, ConvBlock)
        c_out, c_in = block.weight.shape[:2]
        layers += [nn.Conv2d(c_in, c_out, 3, stride=block.stride, padding=1, bias=False)]
        layers += [batch_norm(c_out, track_running_stats=False), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if block.stride == 1 else []
    weight = network.get_parameter("head.weight")
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(weight.shape[1], len(weight))).to(weight)
    with torch.no_grad():
        for theirs, given in zip(net.parameters(), network.parameters(), strict=True):
            theirs.copy_(given)
    return net


def tasks(episode: Episode) -> Iterator[tuple[Tensor, ...]]:
    images = episode.support_images, episode.support_labels, episode.query_images, episode.query_labels
    return zip(*images, strict=True)


# --- the same gradient ---------------------------------------------------------------------------------------------


def meta_gradient(implementation: Implementation, setting: Setting) -> list[Tensor]:
    """The meta-gradient in float64, one tensor a parameter."""
    module, backward = implementation(*setting.build(torch.float64))
    backward()
    return harness.gradients(module)


def check(setting: Setting, names: Sequence[str]) -> dict[str, float]:
    """How far each gradient is from the plain loop's.

    Raises:
        SystemExit: if one differs, or if leaving the second derivatives out would have made no difference.
    """
    expected = meta_gradient(plain_loop, setting)
    first_order = difference(meta_gradient(lambda *given: plain_loop(*given, second_order=False), setting), expected)
    if first_order < 1e-3:
        raise SystemExit(f"{setting.name}: first order differs by {first_order:.0e} only; this checks nothing")
    differences = {n: difference(meta_gradient(IMPLEMENTATIONS[n], setting), expected) for n in names}
    refuse_differences(setting.name, differences)
    return differences


def prepare(setting: Setting, name: str) -> Prepared:
    return IMPLEMENTATIONS[name](*setting.build())


def main(config: Annotated[Config, tyro.conf.arg(name="")]) -> None:
    """Compare the gradients, then time them, print one table, and write it as JSON if asked to."""
    n_tasks, rounds = (4, 2) if config.quick else (config.tasks, config.rounds)
    compare(
        config,
        f"{n_tasks} tasks, 5-way 1-shot, {config.filters} filters, second order",
        [Setting(name, n_tasks, config.filters, config.device) for name in config.settings],
        rounds=rounds,
        implementations=IMPLEMENTATIONS,
        packages=PACKAGES,
        check=check,
        prepare=prepare,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
