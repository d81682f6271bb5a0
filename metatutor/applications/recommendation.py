"""Personalisation: a user is a task, the ratings seen so far are its support set.

Baselines and the exact answers for two kinds of users, and a network whose last layer is the user. That layer is what
`MAML(..., adapt="head")` adapts to each of them.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from metatutor.episodes import Episode, EpisodeSpec, SeededSampler
from metatutor.files import decoding, expanded

Table = Float[Tensor, "user item"]  # ratings; NaN: unknown
Predictor = Callable[[Table], Table]  # maps what is known of users to ratings of all items


# --- ratings ---


@dataclass(frozen=True, eq=False)
class Ratings:
    """What users think of items.

    Args:
        values: `[user, item]`; NaN where unknown.
        scale: the lowest and the highest possible rating; None: any number.

    Raises:
        ValueError: if there is no rating, or one is outside the scale.

    Example:
        >>> Ratings(torch.tensor([[1.0, torch.nan], [3.0, 5.0]]), (1.0, 5.0)).counts.tolist()
        [1, 2]
    """

    values: Table
    scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        known = self.values[~self.values.isnan()]
        if self.values.dim() != 2 or not known.numel():
            raise ValueError(f"expected ratings [user, item], at least one known, got {list(self.values.shape)}")
        if not known.isfinite().all():
            raise ValueError("a rating is infinite; unknown ratings are NaN")
        if self.scale is not None and not self.scale[0] <= known.min() <= known.max() <= self.scale[1]:
            raise ValueError(
                f"ratings must lie from {self.scale[0]:g} to {self.scale[1]:g}, got {known.min():g} to {known.max():g}"
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def counts(self) -> Int64[Tensor, " user"]:
        """How many items each user has rated."""
        return (~self.values.isnan()).sum(1)

    def of(self, users: Int64[Tensor, " n"] | Sequence[int]) -> Ratings:
        """The ratings of some users."""
        return replace(self, values=self.values[torch.as_tensor(users)])

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> RatingSampler:
        """A sampler of users with some of their ratings: at most `spec.k_shot` known, `spec.n_query` to predict."""
        return RatingSampler(self, spec, seed=seed)

    def histories(self, n_seen: Sequence[int], *, seed: int = 0) -> tuple[list[Table], Table]:
        """What is known about every user after `n_seen` random ratings, and the ratings after the last of these.

        The ratings to predict are the same however much is known, so that predictions can be compared in pairs.

        Raises:
            ValueError: if a user has rated too few items to leave one to predict.
        """
        if int(self.counts.min()) <= max(n_seen):
            raise ValueError(
                f"every user must have rated more than {max(n_seen)} items; the fewest are {int(self.counts.min())}"
            )
        rank = _order(self.values, torch.Generator().manual_seed(seed)).argsort(1)
        known = [self.values.where(rank < n, torch.nan) for n in n_seen]
        return known, self.values.where(rank >= max(n_seen), torch.nan)


def _order(values: Table, generator: torch.Generator) -> Int64[Tensor, "user item"]:
    """The items of each user in random order, rated ones first."""
    drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
    return drawn.masked_fill(values.isnan(), 2.0).argsort(1)


class RatingSampler(SeededSampler):
    """Draws users; all users of a draw have the same number of known ratings, from one to `spec.k_shot`.

    Args:
        ratings: where they come from.
        spec: the most known ratings and how many to predict; a rating is one number, so `n_way` is 1.
        seed: selects the stream of users.

    Raises:
        ValueError: if `n_way` is not 1, or nobody has rated enough items.
    """

    def __init__(self, ratings: Ratings, spec: EpisodeSpec, *, seed: int = 0) -> None:
        if spec.n_way != 1:
            raise ValueError(f"a rating is one number, so n_way must be 1, got {spec.n_way}")
        enough = ratings.counts >= spec.k_shot + spec.n_query
        if not enough.any():
            raise ValueError(f"nobody has rated {spec.k_shot + spec.n_query} items; lower k_shot or n_query")
        self.values, self.spec = ratings.values[enough].float(), spec
        super().__init__(seed)

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next users: `images` are item numbers and `labels` ratings, `[user, item, 1]`."""
        if n_tasks < 1:
            raise ValueError(f"n_tasks must be positive, got {n_tasks}")
        users = torch.randint(len(self.values), (n_tasks,), generator=self.generator)
        n_known = int(torch.randint(1, self.spec.k_shot + 1, (), generator=self.generator))
        items = _order(self.values[users], self.generator)[:, : n_known + self.spec.n_query]
        told = self.values[users].gather(1, items)[..., None]
        numbers = items[..., None].float()
        return Episode(numbers[:, :n_known], told[:, :n_known], numbers[:, n_known:], told[:, n_known:], n_way=1)


def load_jester(path: Path | str) -> Ratings:
    """Jester's ratings of 100 jokes, from -10 to 10, as lines of user, joke and rating in a CSV file, zipped or not.

    Reference:
        Goldberg, Roeder, Gupta & Perkins (2001), Eigentaste.
    """
    return _of_lines(_text(path).splitlines()[1:], ",", path, (-10.0, 10.0))


def load_movielens(path: Path | str) -> Ratings:
    """MovieLens' ratings, from 0.5 to 5: `ratings.csv` (with a header), `ratings.dat` (`::`) or `u.data` (tabs).

    Items and users are numbered in the order of their ids.

    Reference:
        Harper & Konstan (2015), The MovieLens datasets.
    """
    lines = _text(path).splitlines()
    between = next((mark for mark in ("::", "\t", ",") if lines and mark in lines[0]), ",")
    return _of_lines(lines[not lines[0][:1].isdigit() :] if lines else [], between, path, (0.5, 5.0))


def _text(path: Path | str) -> str:
    path = expanded(path, "the path of the ratings")
    with decoding(f"{path} holds no ratings that can be read"):
        if not zipfile.is_zipfile(path):
            return path.read_text(encoding="utf-8")
        with zipfile.ZipFile(path) as archive:
            [name] = [n for n in archive.namelist() if n.endswith((".csv", ".dat", ".data"))]
            return archive.read(name).decode()


def _of_lines(lines: Sequence[str], between: str, path: Any, scale: tuple[float, float]) -> Ratings:
    with decoding(f"{path} holds no lines of user{between}item{between}rating"):
        rows = list(csv.reader(io.StringIO("\n".join(line.replace(between, ",") for line in lines))))
        triples = [(int(user), int(item), float(rating)) for user, item, rating, *_ in rows]
        users, items = ({id_: i for i, id_ in enumerate(sorted({t[at] for t in triples}))} for at in (0, 1))
        values = torch.full((len(users), len(items)), torch.nan, dtype=torch.float64)
        places = torch.tensor([(users[user], items[item]) for user, item, _ in triples])
        values[places[:, 0], places[:, 1]] = torch.tensor([rating for *_, rating in triples], dtype=torch.float64)
    return Ratings(values, scale)


# --- who predicts without a network ---


def item_means(ratings: Ratings) -> Predictor:
    """What is known about a user is ignored: the mean rating of each item."""
    means = _means(ratings)
    return lambda known: means.expand(len(known), -1)


def own_mean(ratings: Ratings) -> Predictor:
    """The mean of a user's own ratings for every item; without ratings, the mean of everybody's."""
    overall = ratings.values.nanmean()
    return lambda known: known.nanmean(1, keepdim=True).nan_to_num(overall.item()).expand_as(known)


def shrunken_mean(ratings: Ratings) -> Predictor:
    """Item means, plus how much kinder a user is than they are, shrunk towards zero while little is known.

    For `n` ratings whose mean is `d` above that of those items, the shift is `d n / (n + s)`, where `s` is the variance
    within users divided by that between them.

    Reference:
        Efron & Morris (1975), Data analysis using Stein's estimator.
    """
    means = _means(ratings)
    rest = ratings.values - means
    counts = ratings.counts
    shifts = rest.nanmean(1)
    within = (rest - shifts[:, None]).pow(2).nansum() / (counts - 1).clamp(min=0).sum()
    between = (shifts.pow(2) - within / counts).mean().clamp(min=1e-9)

    def predict(known: Table) -> Table:
        n = (~known.isnan()).sum(1, keepdim=True)
        return means + (known - means).nansum(1, keepdim=True) / (n + within / between)

    return predict


def _means(ratings: Ratings) -> Float[Tensor, " item"]:
    means = ratings.values.nanmean(0)
    if means.isnan().any():
        raise ValueError(f"nobody has rated item {int(means.isnan().nonzero()[0])}; leave it out")
    return means


@dataclass(frozen=True, eq=False)
class GaussianUsers:
    """Users whose ratings are `mean + factors z + noise`, `z` and the noise Gaussian: predictions are exact Bayes.

    Attributes:
        mean: mean rating of each item, `[item]`.
        factors: `[item, factor]`.
        noise: standard deviation of a rating.

    Reference:
        Tipping & Bishop (1999), Probabilistic principal component analysis, equations 3, 8 and 27.
    """

    mean: Float[Tensor, " item"]
    factors: Float[Tensor, "item factor"]
    noise: float

    def __call__(self, known: Table) -> Table:
        """The expected ratings of all items, given some."""
        return self.mean + self.tastes(known)[0] @ self.factors.mT

    def tastes(self, known: Table) -> tuple[Float[Tensor, "user factor"], Float[Tensor, "user factor factor"]]:
        """Mean and covariance of each user's `z`, given some ratings: all that has to be kept of a user."""
        mask = (~known.isnan()).to(known.dtype)
        rest = (known - self.mean).nan_to_num(0.0)
        precision = torch.einsum("ui,ik,il->ukl", mask, self.factors, self.factors) / self.noise**2
        covariance = torch.linalg.inv(precision + torch.eye(self.factors.shape[1], dtype=known.dtype))
        return torch.einsum("ukl,ul->uk", covariance, rest @ self.factors / self.noise**2), covariance

    def sample(self, n_users: int, *, seed: int = 0) -> Ratings:
        """New users who rate everything."""
        generator = torch.Generator().manual_seed(seed)
        tastes, noise = (
            torch.randn(n_users, size, generator=generator, dtype=self.mean.dtype)
            for size in (self.factors.shape[1], len(self.mean))
        )
        return Ratings(self.mean + tastes @ self.factors.mT + self.noise * noise)

    @classmethod
    def fit(cls, ratings: Ratings, n_factors: int, *, iterations: int = 60, seed: int = 0) -> GaussianUsers:
        """The likeliest model of some users, by expectation maximisation; what they have not rated is left out."""
        values, mask = ratings.values.nan_to_num(0.0), (~ratings.values.isnan()).to(ratings.values.dtype)
        draw = torch.randn(
            values.shape[1], n_factors, generator=torch.Generator().manual_seed(seed), dtype=values.dtype
        )
        model = cls(_means(ratings), draw, ratings.values[mask > 0].std().item())
        for _ in range(iterations):
            z, covariance = model.tastes(ratings.values)
            one = torch.ones_like(z[:, :1])
            z = torch.cat([z, one], 1)
            squares = F.pad(covariance, (0, 1, 0, 1)) + z[:, :, None] * z[:, None]
            of_items = torch.einsum("ui,ukl->ikl", mask, squares)
            weights = torch.linalg.solve(of_items, (values.mT @ z)[..., None])[..., 0]  # the last factor is the mean
            spread = torch.einsum("ik,il,ikl->", weights, weights, of_items) - 2 * (values * (z @ weights.mT)).sum()
            noise = math.sqrt(((values.pow(2).sum() + spread) / mask.sum()).item())
            model = cls(weights[:, -1], weights[:, :-1], noise)
        return model


@dataclass(frozen=True, eq=False)
class MixedUsers:
    """Users of a few kinds, each with a taste of its own; a rating is that taste plus noise. Exact Bayes again.

    Attributes:
        tastes: what each kind thinks of each item, `[kind, item]`; all kinds are equally frequent.
        noise: standard deviation of a rating.
    """

    tastes: Float[Tensor, "kind item"]
    noise: float

    def __call__(self, known: Table) -> Table:
        """The expected ratings of all items, given some."""
        return self.kinds(known) @ self.tastes

    def kinds(self, known: Table) -> Float[Tensor, "user kind"]:
        """The probability that a user is of each kind, given some ratings."""
        return (-0.5 * ((known[:, None] - self.tastes) / self.noise).pow(2)).nansum(2).softmax(1)

    def sample(self, n_users: int, *, seed: int = 0) -> Ratings:
        """New users who rate everything."""
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.randint(len(self.tastes), (n_users,), generator=generator)
        noise = torch.randn(n_users, self.tastes.shape[1], generator=generator, dtype=self.tastes.dtype)
        return Ratings(self.tastes[kinds] + self.noise * noise)

    def gaussian(self) -> GaussianUsers:
        """The Gaussian users with the same mean and covariance: as good as any linear prediction can be."""
        mean = self.tastes.mean(0)
        _, s, v = torch.linalg.svd((self.tastes - mean) / math.sqrt(len(self.tastes)), full_matrices=False)
        return GaussianUsers(mean, v.mT * s, self.noise)


# --- a network, whose last layer is the user ---


class ItemNetwork(nn.Module):
    """Maps item numbers to ratings: `base + user(embedding)`; the last layer, `user`, is what adapts to a user.

    With `kinds`, the layer's weights go through a softmax, as shares of that many kinds of users; an embedding is then
    what each kind thinks of the item.

    Args:
        means: means of the items, from which `base` starts.
        size: numbers in an embedding.
        kinds: whether these numbers stand for kinds of users.

    Example:
        >>> network = ItemNetwork(torch.zeros(100), size=8)
        >>> network(torch.tensor([[3.0], [99.0]])).shape
        torch.Size([2, 1])
    """

    def __init__(self, means: Float[Tensor, " item"], size: int = 8, *, kinds: bool = False) -> None:
        super().__init__()
        self.base = nn.Embedding.from_pretrained(means.float()[:, None].clone(), freeze=False)
        self.embedding = nn.Embedding(len(means), size)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.user = _Shares(size, 1) if kinds else nn.Linear(size, 1)
        nn.init.zeros_(self.user.weight)
        nn.init.zeros_(self.user.bias)

    def forward(self, items: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
        """Ratings of items by their numbers."""
        numbers = items[:, 0].long()
        return self.base(numbers) + self.user(self.embedding(numbers))


class _Shares(nn.Linear):
    """A linear layer of weights that are positive and add up to one."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.softmax(-1), self.bias)


def half_squares(outputs: Float[Tensor, "n 1"], ratings: Float[Tensor, "n 1"]) -> Float[Tensor, ""]:
    """Half the sum of squared errors, as the inner loss of users: each additional rating moves the user further."""
    return 0.5 * (outputs - ratings).pow(2).sum()


def predictor(learner: Any) -> Predictor:
    """The predictions of a learner, such as `MAML(ItemNetwork(...), adapt="head")`, for users with some history.

    Users with equally many ratings are answered side by side; those without any by the initial parameters.
    """

    @torch.no_grad()
    def predict(known: Table) -> Table:
        n_items, found = known.shape[1], torch.empty_like(known)
        every = torch.arange(n_items, dtype=torch.float32, device=learner.device).view(1, -1, 1)
        counts = (~known.isnan()).sum(1)
        for n in counts.unique().tolist():
            users = (counts == n).nonzero()[:, 0]
            if not n:
                found[users] = learner.network(every[0])[:, 0].to(known)
                continue
            rows = known[users]
            items = rows.isnan().long().argsort(dim=1, stable=True)[:, :n]
            told = rows.gather(1, items)[..., None].to(every)
            asked = every.expand(len(users), -1, -1)
            episode = Episode(items[..., None].to(every), told, asked, torch.zeros_like(asked), n_way=1)
            found[users] = learner(episode)[..., 0].to(known)
        return found

    return predict


def squared_errors(predicted: Table, asked: Table) -> Float[Tensor, " user"]:
    """The mean squared error of each user over the ratings to predict."""
    return (predicted - asked).pow(2).nanmean(1)
