"""Last layers for embeddings of a few pictures, in closed form; each also gives its answer for a left-out picture.

Every head is linear in the direction of an embedding from the middle of the classes:
`logits = direction(embedding) W + b`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from metatutor.checks import check_choice
from metatutor.functional import class_means

HeadName = Literal["auto", "ridge", "gaussians", "prototypes"]
Rows = Float[Tensor, "n embedding"]
Labels = Int64[Tensor, " n"]
Counts = Int64[Tensor, " way"]
Scores = Float[Tensor, "n way"]
_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_SCALES = tuple(10 ** (i / 4) for i in range(-4, 13))  # 0.1 to 1,000


@dataclass(frozen=True)
class LinearHead:
    """A fitted head.

    Attributes:
        center: the middle of the classes, `[embedding]`.
        weights: `[embedding, way]`.
        bias: `[way]`.
        left_out: logits of every support picture from the same head without it, `[n, way]`; NaN for the only picture of
            a class, about which they say nothing.
    """

    center: Float[Tensor, " embedding"]
    weights: Float[Tensor, "embedding way"]
    bias: Float[Tensor, " way"]
    left_out: Scores

    def __call__(self, embeddings: Rows) -> Scores:
        """Logits of embeddings."""
        return directions(embeddings, self.center) @ self.weights + self.bias


def fit_head(embeddings: Rows, labels: Labels, n_way: int, head: HeadName = "auto") -> LinearHead:
    """Fit a last layer to embeddings `[n, embedding]` of pictures of `n_way` classes, not necessarily equally many.

    - `"ridge"`: least squares on the classes, with a penalty on large weights.
    - `"gaussians"`: Gaussian classes with one covariance, shrunk towards a spherical one (linear discriminants).
    - `"prototypes"`: the direction in which the mean of each class lies.
    - `"auto"`: ridge or Gaussians, whichever answers better for left-out pictures.

    The penalty, the shrinkage and the scale of the logits are those with the lowest cross-entropy on left-out pictures.
    Leaving a picture out needs no other fit; the middle of the classes stays where it is.

    Raises:
        ValueError: if there is no such head, or a class has no picture.

    Example:
        >>> embeddings = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.2]])
        >>> head = fit_head(embeddings, torch.tensor([0, 0, 1, 1]), 2)
        >>> head(torch.tensor([[0.0, 2.0], [3.0, 0.3]])).argmax(1)
        tensor([0, 1])

    Reference:
        Prototypes: Snell et al. (2017); centring: Wang et al. (2019), SimpleShot; ridge: Bertinetto et al. (2019);
        leaving pictures out of it: Hastie, Tibshirani & Friedman (2009), equation 7.64; shrunk covariances: section
        4.3.1.
    """
    check_choice("head", head, get_args(HeadName))
    counts = labels.bincount(minlength=n_way)
    if not bool((counts > 0).all()):
        raise ValueError(f"class {int(counts.argmin())} has no picture; give at least one of each class")
    center = class_means(embeddings[None], labels[None], n_way)[0].mean(0)
    rows = directions(embeddings, center)
    basis = torch.linalg.qr(rows.mT)[0]  # what the support set does not span changes no answer
    fits = [fit(rows @ basis, labels, counts) for fit in _FITS[head]]
    for _, _, left_out in fits:
        left_out[counts[labels] == 1] = torch.nan
    weights, bias, left_out = min(fits, key=lambda fit: _scaled(fit[2], labels)[0])
    scale = _scaled(left_out, labels)[1]
    return LinearHead(center, scale * basis @ weights, scale * bias, scale * left_out)


def directions(embeddings: Rows, center: Float[Tensor, " embedding"]) -> Rows:
    """The directions of embeddings from a centre, all at distance one."""
    return F.normalize(embeddings - center, dim=1)


def _scaled(left_out: Scores, labels: Labels) -> tuple[float, float]:
    """The lowest cross-entropy that a factor can give the logits of left-out pictures, and the factor.

    If `n` answers are all right, no more can be said than that `n + 1` of `n + 2` would be (Laplace).
    """
    known = ~left_out.isnan().any(1)
    if not bool(known.any()):
        return 0.0, 10.0
    logits, truth, doubt = left_out[known], labels[known], 1 / (int(known.sum()) + 2)
    losses = [F.cross_entropy(factor * logits, truth, label_smoothing=doubt).item() for factor in _SCALES]
    return min(zip(losses, _SCALES, strict=True))


Fit = tuple[Float[Tensor, "embedding way"], Float[Tensor, " way"], Scores]


def fit_prototypes(rows: Rows, labels: Labels, counts: Counts) -> Fit:
    """`(x - m) p`, `p` the direction of a class mean from `m`, the mean of them; all are refitted without `x`."""
    means = class_means(rows[None], labels[None], len(counts))[0]
    left_out = []
    for row, label in zip(rows, labels.tolist(), strict=True):
        without = means.clone()
        without[label] -= (row - means[label]) / (counts[label] - 1)
        weights, bias = _from_middle(without)
        left_out.append(row @ weights + bias)
    return *_from_middle(means), torch.stack(left_out)


def _from_middle(
    means: Float[Tensor, "way embedding"],
) -> tuple[Float[Tensor, "embedding way"], Float[Tensor, " way"]]:
    middle = means.mean(0)
    weights = F.normalize(means - middle, dim=1).mT
    return weights, -middle @ weights


def fit_ridge(rows: Rows, labels: Labels, counts: Counts, penalty: float) -> Fit:
    """`W, b = argmin Σ v |x W + b - y|² + penalty |W|²`, `y` one-hot; `v` gives classes equal weight.

    Without picture `i`, the regression's error on it is `(y - x W - b) / (1 - h)`, where
    `h = v (1 / Σ v + x (Xᵀ V X + penalty I)⁻¹ xᵀ)`, `x` from the mean, is what the answer for it owes to itself. The
    bias has no penalty: in rows with mean zero, each is determined by the others, and left-out pictures would seem
    easier than they are.
    """
    n_way = len(counts)
    targets = F.one_hot(labels, n_way).to(rows.dtype)
    weigh = (len(rows) / (n_way * counts[labels].to(rows.dtype)))[:, None]
    middle = (weigh * rows).mean(0)
    inside = rows - middle
    gram = inside.mT @ (weigh * inside) + penalty * torch.eye(rows.shape[1], dtype=rows.dtype)
    inverse = torch.linalg.inv(gram)
    weights = inverse @ inside.mT @ (weigh * targets)
    bias = 1 / n_way - middle @ weights
    own = weigh * (1 / len(rows) + (inside @ inverse * inside).sum(1, keepdim=True))
    return weights, bias, targets - (targets - rows @ weights - bias) / (1 - own)


def fit_gaussians(rows: Rows, labels: Labels, counts: Counts, shrinkage: float) -> Fit:
    """Half the squared distance to each class mean, `-(x - μ)ᵀ A⁻¹ (x - μ) / 2`, with `A` the spread within classes.

    `A = Σ r rᵀ + t I` with `r = x - μ(x)` and `t` a share of the trace. Without picture `i`, of a class of `n`, the
    mean of its class is `μ - r / (n - 1)` and `A` is `A - β r rᵀ`, `β = n / (n - 1)`, whose inverse is given by Sherman
    and Morrison.
    """
    means = class_means(rows[None], labels[None], len(counts))[0]
    rest = rows - means[labels]
    floor = torch.clamp(shrinkage * rest.pow(2).sum() / 50, min=1e-6)
    inverse = torch.linalg.inv(rest.mT @ rest + floor * torch.eye(rows.shape[1], dtype=rows.dtype))
    weights, own = inverse @ means.mT, (means @ inverse * means).sum(1)  # [embedding, way], [way]
    turned = rest @ inverse
    beta, length = (counts / (counts - 1))[labels].to(rows.dtype), (turned * rest).sum(1)
    more = beta / (1 - beta * length)
    squared = (rows @ inverse * rows).sum(1, keepdim=True) - 2 * rows @ weights + own
    squared += more[:, None] * ((turned * rows).sum(1, keepdim=True) - turned @ means.mT).pow(2)
    squared[torch.arange(len(rows)), labels] = beta * more * length
    return floor * weights, -floor * own / 2, -floor * squared / 2


def _with(fit: Callable[..., Fit], penalty: float) -> Callable[..., Fit]:
    return lambda rows, labels, counts: fit(rows, labels, counts, penalty)


_FITS: dict[str, list[Callable[..., Fit]]] = {
    "ridge": [_with(fit_ridge, penalty) for penalty in _PENALTIES],
    "gaussians": [_with(fit_gaussians, penalty) for penalty in _PENALTIES],
    "prototypes": [fit_prototypes],
}
_FITS["auto"] = [*_FITS["ridge"], *_FITS["gaussians"]]
