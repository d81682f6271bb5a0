"""Strokes: alphabets that nobody has ever written, drawn as a hand would; the stand-in for Omniglot when offline.

In reading order: the gestures of a pen, the alphabet invented from them, the hand that writes it, the ink, the data
set. An alphabet is a habit: six gestures, and the guide lines it is written between. A character is one to four of
the gestures, each in a box from guide line to guide line, so that strokes meet as they do in real letters. A drawing
is a character written by an unsteady hand. Lengths are in pixels, x to the right, y down, the image's middle at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor
from torch.nn.functional import normalize, pad

from metatutor.data.omniglot import Alphabets, Splits

_PIXELS = 28
_STROKES = 4  # at most, in a character
_EDGES = 12  # of a gesture's polyline
_DOTS = 104  # of ink, spread evenly along a drawing
_PEN, _BLUR = 1.5, 0.48  # width of a line; standard deviation of the blur that shrinking a scan to 28 pixels leaves
_CANDIDATES = 8  # for each character; the clearest is taken
_GRID = 2**13  # steps of a score per unit: far coarser than rounding errors, far finer than an eye can tell
_double = partial(torch.tensor, dtype=torch.float64)

# --- the gestures of a pen: corners (column, row) on a 5 × 5 grid, and how common each is ---

_GESTURES = {
    "00 04": 2.2,  # stem
    "20 24": 1.4,  # post
    "40 04": 1.2,  # slash
    "00 24 40": 0.8,  # vee
    "00 04 44": 1.1,  # corner
    "40 44 04 03": 1.0,  # hook
    "00 04 44 40": 0.9,  # cup
    "00 40 44 04": 1.3,  # bowl
    "30 00 04 24 44 40 10": 2.2,  # ring
    "20 04 44 20": 0.6,  # triangle
    "00 40 04 44": 0.6,  # zed
    "41 40 00 02 42 44 04": 0.6,  # ess
    "00 40 42 22 42 44 04": 0.4,  # three
    "04 00 24 40 44": 0.4,  # em
    "40 04 00 44": 1.0,  # fish
    "42 22 20 40 44 04 00": 0.4,  # curl
    "00 02 42 40 44 04 03": 0.4,  # tail
    "04 01 00 30 41 42 44": 0.5,  # arch
    "02 42 40 00 02 04 44": 0.9,  # eye
    "00 04 44 42 02": 1.1,  # belly
    "20 40 04 24 44 00 20": 0.5,  # eight
    "00 44 40 02 04": 0.3,  # knot
}


def _nodes(gesture: str) -> Float64[Tensor, "node 2"]:
    """The gesture as a polyline of equally many edges, whatever its corners, in a box of side 1."""
    corners = _double([[int(column), int(row)] for column, row in gesture.split()]) / 4 - 0.5
    along = torch.linspace(0, 1, _EDGES // (len(corners) - 1) + 1, dtype=torch.float64)[1:, None]
    edges = [start.lerp(end, along) for start, end in pairwise(corners)]
    return torch.cat([corners[:1], *edges])


_SHAPES = torch.stack([_nodes(gesture) for gesture in _GESTURES])  # [gesture, node, 2]
_COMMON = _double([*_GESTURES.values()])
# A hand misplaces, stretches and bends a stroke more than it trembles: smooth errors, the faster ones the smaller.
_WAVES = torch.arange(6).double()
_ERRORS = torch.cos(math.pi * torch.arange(_EDGES + 1)[:, None] / _EDGES * _WAVES) / _WAVES.clamp(min=1) ** 1.5
# Guide lines: three vertical ones, four horizontal ones. A box lies between two of each.
_GUIDES = _double([-1 / 2, 0, 1 / 2, -1 / 2, -1 / 6, 1 / 6, 1 / 2])
_COLUMNS = torch.tensor([[0, 2], [0, 2], [0, 1], [1, 2]])
_ROWS = torch.tensor([[3, 6], [3, 6], [3, 5], [4, 6], [3, 5], [4, 6], [3, 4], [5, 6]])


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def _bell(generator: torch.Generator, *shape: int) -> Tensor:
    """Bell-shaped noise of mean 0 and variance 1 that is never beyond ±3, and the same on every platform."""
    return 2 * _uniform(generator, *shape, 3).sum(-1) - 3


# --- an alphabet ---


class _Habit(NamedTuple):
    """What the characters of an alphabet have in common."""

    gestures: Float64[Tensor, "gesture node 2"]
    columns: Int64[Tensor, "column 2"]
    rows: Int64[Tensor, "row 2"]
    guides: Float64[Tensor, " guide"]
    size: Float64[Tensor, " 2"]
    slant: float
    roundness: float  # edges over which a corner is smoothed
    strokes: float  # after the first, on average
    mirrored: float  # how often a gesture is mirrored; from here on frequencies
    whole: float  # the first stroke is as wide, or as tall, as the alphabet is
    dotted: float  # the last stroke is a dot
    headed: float  # the first stroke is the first gesture, as in letters that hang from a headline


class _Characters(NamedTuple):
    """Plans of characters, stroke by stroke."""

    shapes: Float64[Tensor, "character stroke node 2"]  # in a box of side 1
    boxes: Int64[Tensor, "character stroke 2 2"]  # guide lines around it: x or y, low or high
    drawn: Bool[Tensor, "character stroke"]  # the rest of the strokes do not exist


def _habit(generator: torch.Generator) -> _Habit:
    """Angular or round, dense or sparse, upright or slanted: what one alphabet is like."""
    lying, roundness, strokes, mirrored, whole, dotted, headed = _uniform(generator, 7).tolist()
    rarity = -_uniform(generator, len(_SHAPES)).log() / _COMMON
    gestures = _SHAPES[rarity.topk(6, largest=False).indices]
    gestures = gestures.where(_uniform(generator, 6, 1, 1) > 0.35 * lying, gestures.flip(-1))
    gestures = gestures * torch.where(_uniform(generator, 6, 1, 2) < 0.3, -1.0, 1.0)
    return _Habit(
        gestures=gestures + 0.05 * _ERRORS[:, 1:] @ _bell(generator, 6, len(_WAVES) - 1, 2),
        columns=_COLUMNS[(4 * _uniform(generator, 3)).long()],
        rows=_ROWS[(8 * _uniform(generator, 4)).long()],
        guides=_GUIDES + _double([0, 0.1, 0, 0, 0.1, 0.1, 0]) * _bell(generator, 7),
        size=_double([13.6, 15.0]) * (0.19 * _bell(generator, 2)).exp(),
        slant=0.1 * _bell(generator, 1).item(),
        roundness=min(2.6, max(0.2, 4.2 * roundness - 0.3)),
        strokes=0.6 + 2 * strokes,
        mirrored=0.5 * mirrored,
        whole=0.6 + 0.4 * whole,
        dotted=max(0, 0.7 * dotted - 0.35),
        headed=max(0, 1.4 * headed - 0.9),
    )


def _invent(generator: torch.Generator, habit: _Habit, n: int) -> _Characters:
    """Characters as chance has them; some are illegible."""
    number = torch.arange(_STROKES)
    first = number == 0
    dice = _uniform(generator, n, _STROKES, 9)
    which, column, row, dot, once = dice[..., :5].unbind(-1)  # [character, stroke]
    last = (habit.strokes + 1.6 * (once[:, 1:2] + once[:, 2:3] - 1)).round().clamp(0, _STROKES - 1)
    head = first & (once[:, :1] < habit.headed)
    shapes = habit.gestures[(6 * which ** (1 + 0.7 * number)).long().where(~head, 0)]
    flipped = (dice[..., 5:7] < habit.mirrored) & ~head[..., None]
    shapes = shapes * torch.where(flipped, -1.0, 1.0)[..., None, :]
    dotted = (dot < habit.dotted) & (number == last) & ~first
    shapes = shapes * torch.where(dotted, 0.12, 1.0)[..., None, None]
    boxes = torch.stack([habit.columns[(3 * column).long()], habit.rows[(4 * row).long()]], -2)
    whole = first[:, None] & ((dice[..., 7:9] < habit.whole) | head[..., None])
    boxes = torch.tensor([[0, 2], [3, 6]]).where(whole[..., None], boxes)
    return _Characters(shapes, boxes, number <= last)


def _clearest(habit: _Habit, characters: _Characters) -> Int64[Tensor, " n"]:
    """From every `_CANDIDATES` in turn, the one that is least cluttered and least like those taken before."""
    path = habit.size * _path(characters, habit.guides, _double([habit.roundness]))
    dots, length = _spread(path, characters.drawn)
    seen = _expose((dots - dots.mean(1, keepdim=True)) / 2, _PEN * length / 4, 0.6, _PIXELS // 2)  # from afar
    clutter = (seen - 0.7).clamp(min=0).sum((1, 2)) / seen.sum((1, 2))
    tiny = (dots.amax(1) - dots.amin(1)).amax(1) < 9
    fault = (9 * clutter + 0.015 * (length - 50).clamp(min=0) + tiny).view(-1, _CANDIDATES)
    looks = normalize(seen.flatten(1)).unflatten(0, fault.shape)  # [character, candidate, pixel]
    alike = torch.zeros_like(fault)  # the greatest likeness to a character taken before
    taken = []
    for i in range(len(fault)):
        taken.append(best := _first_of_least(fault[i] + alike[i]))
        alike = torch.maximum(alike, looks @ looks[i, best])
    return torch.tensor(taken) + torch.arange(len(taken)) * _CANDIDATES


def _first_of_least(scores: Float64[Tensor, " n"]) -> int:
    """The index of the lowest score, the first if several differ only by rounding errors.

    Two simple strokes, or two copies of earlier characters, are equally good; which sum comes out smaller in the last
    digit depends on the processor.
    """
    rounded = (_GRID * scores).round().tolist()
    return rounded.index(min(rounded))


# --- the hand ---


def _path(
    characters: _Characters, guides: Float64[Tensor, "*n guide"], roundness: Float64[Tensor, " m"]
) -> Float64[Tensor, "character stroke point 2"]:
    """The path of the pen: shapes stretched to fill their boxes, corners smoothed by a moving average."""
    guides = guides.expand(len(characters.boxes), -1)
    low, high = guides.gather(1, characters.boxes.flatten(1)).unflatten(1, (_STROKES, 1, 2, 2)).unbind(-1)
    nodes = (low + high) / 2 + characters.shapes * (high - low)
    time = torch.arange(0, _EDGES + 0.5, 0.5).double()  # in edges
    reach = torch.minimum(time, _EDGES - time).clamp(max=roundness[:, None])  # none at the ends, which stay in place
    window = time + reach * torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None, None]  # [7, m, point]
    weights = (1 - (window[..., None] - torch.arange(_EDGES + 1)).abs()).clamp(min=0).mean(0)  # [m, point, node]
    return weights[:, None] @ nodes


def _draw(
    generator: torch.Generator, habit: _Habit, characters: _Characters, hands: Float64[Tensor, "character 7"]
) -> UInt8[Tensor, "character height width"]:
    """One drawing of each character, each by its own hand: gestures, guide lines and the whole vary a little."""
    n = len(hands)
    shapes = characters.shapes * (1 + 0.06 * _bell(generator, n, _STROKES, 1, 2))
    shapes = shapes + 0.06 * _ERRORS @ _bell(generator, n, _STROKES, len(_WAVES), 2)
    guides = habit.guides + 0.048 * _bell(generator, n, len(_GUIDES))
    roundness = (habit.roundness * (0.25 * _bell(generator, n)).exp()).clamp(max=3)
    turn, shear, wide, tall, right, down, pen = (0.8 * hands + 0.6 * _bell(generator, n, 7)).unbind(1)
    turn, shear, wide, tall = 0.05 * turn, habit.slant + 0.08 * shear, (0.095 * wide).exp(), (0.095 * tall).exp()
    frame = torch.stack([wide, (turn - shear) * tall, -turn * wide, tall], -1).view(n, 1, 2, 2)
    path = habit.size * _path(characters._replace(shapes=shapes), guides, roundness)
    dots, length = _spread(path @ frame.mT, characters.drawn)
    low, high = dots.amin(1), dots.amax(1)
    middle = (dots.mean(1) + (low + high) / 2) / 2  # halfway from that of the ink to that of the outline
    shift = 1.4 * torch.stack([right, down], -1) + _double([-0.35, -0.7]) - middle
    edge = _PIXELS / 2 - 1.3
    shift = torch.minimum(torch.maximum(shift, -edge - low), edge - high)  # so that it stays on the paper
    exposure = _expose(dots + shift[:, None], _PEN * length * (0.06 * pen).exp(), _BLUR, _PIXELS)
    return (255 * exposure.clamp(max=1)).round().to(torch.uint8)


# --- the ink ---


def _spread(
    path: Float64[Tensor, "drawing stroke point 2"], drawn: Bool[Tensor, "drawing stroke"]
) -> tuple[Float64[Tensor, "drawing dot 2"], Float64[Tensor, " drawing"]]:
    """Dots at equal distances along the strokes that are drawn, and the total length of these."""
    starts, edges = path[:, :, :-1].flatten(1, 2), path.diff(dim=2)
    until = (edges.norm(dim=-1) * drawn[..., None]).flatten(1).cumsum(1)  # [drawing, edge]
    at = until[:, -1:] * (torch.arange(_DOTS) + 0.5) / _DOTS
    edge = torch.searchsorted(until, at)  # [drawing, dot]
    before, after = pad(until, (1, 0)).gather(1, edge), until.gather(1, edge)
    share = ((at - before) / (after - before))[..., None]
    edge = edge[..., None].expand(-1, -1, 2)
    return starts.gather(1, edge) + share * edges.flatten(1, 2).gather(1, edge), until[:, -1]


def _expose(
    dots: Float64[Tensor, "drawing dot 2"], ink: Float64[Tensor, " drawing"], blur: float, pixels: int
) -> Float64[Tensor, "drawing {pixels} {pixels}"]:
    """Ink per pixel; a dot is a Gaussian in x times one in y, so that the sum over dots is a matrix product."""
    centres = torch.arange(pixels) + 0.5 - pixels / 2
    bells = (dots[..., None] - centres).square_().mul_(-0.5 / blur**2).exp_()  # [drawing, dot, 2, pixel]
    x, y = bells.unbind(2)
    return (y.mT @ x) * (ink / (2 * math.pi * blur**2 * _DOTS))[:, None, None]


# --- the data set ---


def _generator(*numbers: int) -> torch.Generator:
    """A random stream for each tuple of numbers."""
    seed = reduce(lambda state, number: 1_000_003 * state + number, numbers)
    return torch.Generator().manual_seed(seed % (2**32 - 5))  # a prime; a CPU generator takes 32 bits


def _alphabet(seed: int, index: int, n: int, drawings: int) -> UInt8[Tensor, "character drawing 1 height width"]:
    generator = _generator(seed, index, 0)
    habit = _habit(generator)
    candidates = _invent(generator, habit, n * _CANDIDATES)
    generator = _generator(seed, index, 1)  # its own, so that drawings do not depend on how many characters there are
    hands = _bell(generator, drawings, 7)  # drawing `d` of every character is by hand `d`, as in Omniglot
    taken = _clearest(habit, candidates)[:, None].expand(-1, drawings)
    characters = [_Characters(*(field[same] for field in candidates)) for same in taken]
    return torch.stack([_draw(generator, habit, character, hands) for character in characters]).unsqueeze(2)


@dataclass(frozen=True, eq=False)
class Strokes(Alphabets):
    """Characters of invented alphabets as one tensor, pixels 0 (paper) to 255 (ink), much like `Omniglot`.

    Simple shapes, a bar or a cup, turn up in several alphabets, as they do in real ones.

    Args:
        images: `[character, drawing, channel, height, width]`, uint8.
        names: one per character, such as `Alphabet07/character12`; an alphabet's characters are consecutive.
        seed: the seed they were drawn with.

    Example:
        >>> strokes = Strokes.load(n_alphabets=4, characters_per_alphabet=5, drawings=2)
        >>> strokes.images.shape, strokes.names[-1]
        (torch.Size([20, 2, 1, 28, 28]), 'Alphabet04/character05')

    Reference:
        Characters as compositions of an alphabet's shared strokes: Lake, Salakhutdinov and Tenenbaum (2015),
        Human-level concept learning through probabilistic program induction, Science 350, figure 3.
    """

    images: UInt8[Tensor, "character drawing 1 28 28"]
    seed: int = 0

    @classmethod
    def load(
        cls, n_alphabets: int = 50, characters_per_alphabet: int = 30, drawings: int = 20, seed: int = 0
    ) -> Strokes:
        """Draw the first `n_alphabets` of the endless alphabets of `seed`; every pixel is the same on every platform.

        An alphabet does not depend on how many are drawn, nor a character on how many follow it.

        Args:
            n_alphabets: how many alphabets.
            characters_per_alphabet: how many characters in each; the more, the more alike some of them are.
            drawings: how many of each character, each by a different hand.
            seed: another seed gives other alphabets.

        Raises:
            ValueError: if a size is not a positive integer.
        """
        sizes = {"n_alphabets": n_alphabets, "characters_per_alphabet": characters_per_alphabet, "drawings": drawings}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}; ask for at least 1")
        images = [_alphabet(seed, index, characters_per_alphabet, drawings) for index in range(n_alphabets)]
        numbers = ((a, c) for a in range(1, n_alphabets + 1) for c in range(1, characters_per_alphabet + 1))
        return cls(torch.cat(images), tuple(f"Alphabet{a:02}/character{c:02}" for a, c in numbers), seed)

    def split(self, *, seed: int = 0, rotations: bool = True) -> Splits:
        """Divide whole alphabets into meta-training (about two thirds), meta-validation and meta-test classes.

        The split's id is `strokes-0-50x30-0` for example (seed of the alphabets, alphabets × characters, seed of the
        split); `strokes-0-50x30-0-upright` without rotations.

        Args:
            seed: another seed gives another split.
            rotations: whether each character rotated by 90, 180 and 270 degrees counts as three more classes of its
                split.

        Raises:
            ValueError: if there are fewer than three alphabets.
        """
        n = len(self.alphabets)
        if n < 3:
            raise ValueError(f"a split needs at least 3 alphabets, one for each part, got {n}; raise n_alphabets")
        n_validation, n_test = max(1, n // 10), max(1, n // 4)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        test, validation, train = order.tensor_split([n_test, n_test + n_validation])
        alphabet = self._numbers()
        parts = (torch.isin(alphabet, part).nonzero().squeeze(1) for part in (train, validation, test))
        return self._splits(parts, f"strokes-{self.seed}-{n}x{len(self.names) // n}-{seed}", rotations)
