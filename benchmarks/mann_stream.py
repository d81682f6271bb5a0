"""One gradient of a MANN: 16 streams of 50 images, 5 classes with 10 images each, ours and the plain loop's.

    python benchmarks/mann_stream.py --json mann_stream.json
    python benchmarks/mann_stream.py --quick                    # few streams, few rounds: are the gradients the same?

A setting `5w-10i` has 5 classes with 10 images each. Ours is `MANN(Pixels(20)).meta_loss(episode).backward()`. The
plain loop is what its user would write: at every step `torch.nn.LSTMCell` is given the image, the label told and what
was read; every head is a module, and the heads write and read one after the other, comparing by
`torch.nn.functional.cosine_similarity`. Streams are side by side in both, and both have the same weights. Nothing is
timed before both have given the same gradient in float64. Turns, ratio and peak memory are those of `maml_step.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import harness
import torch
import torch.nn.functional as F
import tyro
from harness import TOLERANCE, Prepared, compare, difference, refuse_differences
from torch import Tensor, nn

from metatutor.backbones import Pixels
from metatutor.episodes import Episode
from metatutor.memory import MANN

SIZE = 20  # height and width of the images that the controller sees
SETTINGS = ("5w-10i",)


@dataclass(frozen=True)
class Config(harness.Config):
    """What to measure, and how.

    Args:
        settings: which settings, such as `5w-10i`; any numbers will do.
        peers: which peers to compare with: there is one, `plain loop`.
        variants: what else to time: `metatutor-plain-malloc` (glibc's own memory limits), `plain loop-keep-memory` (the
            plain loop with ours).
        tasks: streams in an episode.
    """

    settings: tuple[str, ...] = SETTINGS
    peers: tuple[str, ...] = ("plain loop",)
    variants: tuple[str, ...] = ()
    tasks: int = 16


@dataclass(frozen=True)
class Setting:
    """The shape of the work, and where it is done."""

    name: str
    tasks: int
    device: str

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[MANN, Episode]:
        """The learner and its streams; the same in every process."""
        found = re.fullmatch(r"(\d+)w-(\d+)i", self.name)
        if not found:
            raise SystemExit(f"no such setting: {self.name}; write it like 5w-10i")
        n_way, n_images = map(int, found.groups())
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            learner = MANN(Pixels(SIZE), n_way=n_way)
        order = torch.rand(self.tasks, n_way * n_images, generator=generator).argsort(1)
        labels = order % n_way
        looks = torch.rand(self.tasks, n_way, 1, 28, 28, generator=generator, dtype=dtype)  # of the classes
        images = looks[torch.arange(self.tasks)[:, None], labels]
        images = (images + torch.rand(images.shape, generator=generator, dtype=dtype)) / 2
        episode = Episode(images, labels, images[:, :1], labels[:, :1], n_way=n_way)
        return learner.to(self.device, dtype), episode.to(self.device)


# --- the plain loop ------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """What one head wants of the controller: a key, a gate, and how sharply to read."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.key = nn.Linear(hidden_size, width)
        self.gate = nn.Linear(hidden_size, 1)
        self.strength = nn.Linear(hidden_size, 1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tanh(self.key(h)), torch.sigmoid(self.gate(h)), 1 + F.softplus(self.strength(h))


class PlainMANN(nn.Module):
    """A MANN as its user would write it.

    Args:
        learner: whose sizes and weights it takes.
        detached: whether to leave out the gradients through the memory: a mistake, for a test.
    """

    def __init__(self, learner: MANN, detached: bool = False) -> None:
        super().__init__()
        self.n_way, self.hidden_size, self.usage_decay = learner.n_way, learner.hidden_size, learner.usage_decay
        self.n_heads, self.slots, self.width = learner.heads, learner.slots, learner.width
        self.detached = detached
        n_read = self.n_heads * self.width
        self.controller = nn.LSTMCell(SIZE * SIZE + self.n_way + n_read, self.hidden_size)
        self.heads = nn.ModuleList(Head(self.hidden_size, self.width) for _ in range(self.n_heads))
        self.out = nn.Linear(self.hidden_size + n_read, self.n_way)
        self.to(learner.out.weight)
        self.load(learner)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        n_tasks, n_images = labels.shape
        small = F.interpolate(images.flatten(0, 1), (SIZE, SIZE), mode="bilinear", antialias=True)
        pixels = small.view(n_tasks, n_images, -1)
        told = F.one_hot(labels, self.n_way).to(images.dtype)
        told = torch.cat([torch.zeros_like(told[:, :1]), told[:, :-1]], dim=1)
        h = cell = images.new_zeros(n_tasks, self.hidden_size)
        memory = images.new_zeros(n_tasks, self.slots, self.width)
        usage = images.new_zeros(n_tasks, self.slots)
        looks_at = torch.eye(self.slots, dtype=images.dtype, device=images.device)
        read_weights = [looks_at[i].expand(n_tasks, -1) for i in range(self.n_heads)]
        reads = [images.new_zeros(n_tasks, self.width) for _ in range(self.n_heads)]
        answers = []
        for t in range(n_images):
            h, cell = self.controller(torch.cat([pixels[:, t], told[:, t], *reads], dim=1), (h, cell))
            wanted = [head(h) for head in self.heads]
            unused = usage.sort(stable=True).indices[:, : self.n_heads]
            before, read_weights = read_weights, []
            for i, (key, _, strength) in enumerate(wanted):
                similarity = F.cosine_similarity(key.unsqueeze(1), memory, dim=2)
                read_weights.append(torch.softmax(strength * similarity, dim=1))
                reads[i] = (read_weights[i].unsqueeze(2) * memory).sum(1)
            write_weights = []
            for i, (_, gate, _) in enumerate(wanted):
                least_used = F.one_hot(unused[:, i], self.slots).to(images.dtype)
                write_weights.append(gate * before[i] + (1 - gate) * least_used)
                memory = memory * (1 - least_used).unsqueeze(2)
            for weights, (key, _, _) in zip(write_weights, wanted, strict=True):
                memory = memory + weights.unsqueeze(2) * key.unsqueeze(1)
            usage = self.usage_decay * usage + sum(read_weights) + sum(write_weights)
            answers.append(self.out(torch.cat([h, *reads], dim=1)))
            if self.detached:
                memory = memory.detach()
        return torch.stack(answers, dim=1)

    def load(self, learner: MANN) -> None:
        """Take the weights of a MANN."""
        n_heads, width, hidden_size = self.n_heads, self.width, self.hidden_size
        of_state, of_read = learner.recur.weight.split([hidden_size, n_heads * width], dim=1)
        given = [(self.controller.weight_ih, torch.cat([learner.enter.weight, of_read], dim=1))]
        given += [(self.controller.weight_hh, of_state), (self.controller.bias_ih, learner.enter.bias)]
        given += [(self.controller.bias_hh, torch.zeros_like(learner.enter.bias))]
        for name in ("weight", "bias"):
            keys, gates, strengths = learner.control.get_parameter(name).split([n_heads * width, n_heads, n_heads])
            given += [(self.out.get_parameter(name), learner.out.get_parameter(name))]
            for i, head in enumerate(self.heads):
                given += [(head.get_parameter(f"key.{name}"), keys.unflatten(0, (n_heads, width))[i])]
                given += [(head.get_parameter(f"gate.{name}"), gates[i : i + 1])]
                given += [(head.get_parameter(f"strength.{name}"), strengths[i : i + 1])]
        with torch.no_grad():
            for parameter, value in given:
                parameter.copy_(value)

    def gradients(self) -> list[Tensor]:
        """The gradients, put together as those of a MANN, in the order of its parameters."""
        of = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.named_parameters()}
        enter, of_read = of["controller.weight_ih"].tensor_split([-self.n_heads * self.width], dim=1)
        recur = torch.cat([of["controller.weight_hh"], of_read], dim=1)
        parts = [f"heads.{i}.{part}" for part in ("key", "gate", "strength") for i in range(self.n_heads)]
        control = [torch.cat([of[f"{part}.{name}"] for part in parts]) for name in ("weight", "bias")]
        return [enter, of["controller.bias_ih"], recur, *control, of["out.weight"], of["out.bias"]]


# --- implementations: each gives a module, and a function that adds one gradient to its parameters' ----------------

Implementation = Callable[[MANN, Episode], Prepared]


def metatutor(learner: MANN, episode: Episode) -> Prepared:
    return learner, lambda: learner.meta_loss(episode).backward()


def plain_loop(learner: MANN, episode: Episode, detached: bool = False) -> Prepared:
    net = PlainMANN(learner, detached)
    images, labels = episode.support_images, episode.support_labels
    return net, lambda: F.cross_entropy(net(images, labels).flatten(0, 1), labels.flatten()).backward()


IMPLEMENTATIONS: dict[str, Implementation] = {
    "metatutor": metatutor,
    "metatutor-plain-malloc": metatutor,
    "plain loop": plain_loop,
    "plain loop-keep-memory": plain_loop,
}


# --- the same gradient ---------------------------------------------------------------------------------------------


def gradient(implementation: Implementation, setting: Setting) -> list[Tensor]:
    """The gradient in float64, one tensor a parameter of the MANN."""
    module, backward = implementation(*setting.build(torch.float64))
    backward()
    return module.gradients() if isinstance(module, PlainMANN) else harness.gradients(module)


def check(setting: Setting, names: Sequence[str]) -> dict[str, float]:
    """How far each gradient is from the plain loop's.

    Raises:
        SystemExit: if one differs, or if leaving out the gradients through the memory would have made no difference.
    """
    expected = gradient(plain_loop, setting)
    detached = difference(gradient(lambda *given: plain_loop(*given, detached=True), setting), expected)
    if detached < 1e-3:
        raise SystemExit(f"{setting.name}: a detached memory differs by {detached:.0e} only; this checks nothing")
    differences = {n: difference(gradient(IMPLEMENTATIONS[n], setting), expected) for n in names}
    refuse_differences(setting.name, differences, TOLERANCE)
    return differences


def prepare(setting: Setting, name: str) -> Prepared:
    return IMPLEMENTATIONS[name](*setting.build())


def main(config: Annotated[Config, tyro.conf.arg(name="")]) -> None:
    """Compare the gradients, then time them, print one table, and write it as JSON if asked to."""
    n_tasks, rounds = (4, 2) if config.quick else (config.tasks, config.rounds)
    compare(
        config,
        f"{n_tasks} streams, MANN on {SIZE}×{SIZE} pixels",
        [Setting(name, n_tasks, config.device) for name in config.settings],
        rounds=rounds,
        implementations=IMPLEMENTATIONS,
        packages={},
        check=check,
        prepare=prepare,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
