"""Few-shot generation: new drawings of a character seen once, by a variational autoencoder that looks at a support set.

The context `c`, the mean of a network's outputs for the support images, says which character is drawn. The latent
numbers `z` say what is special about one drawing `x` of it. So `p(x | c) = ∫ p(x | z, c) p(z | c) dz`, and any
`q(z | x, c)` gives a bound,

    log p(x | c)  >=  E_q[log p(x | z, c)] - KL(q(z | x, c) || p(z | c)),

in nats per image, for any number of support images, including none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import Network
from metatutor.checks import check_not_negative, check_positive, check_sizes
from metatutor.episodes import Episode
from metatutor.learner import Learner

Drawings = Float[Tensor, "n 1 28 28"]
Maps = Float[Tensor, "n channel 7 7"]
Context = Float[Tensor, "#n channel 7 7"]  # of each image, or of all of them
_SIDE, _QUARTER = 28, 7
_PAPER = -8.0  # logit of a pixel beyond the margin


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians: means and logarithms of standard deviations, `[n, latent]`."""

    mean: Float[Tensor, "n latent"]
    log_scale: Float[Tensor, "n latent"]

    def at(self, noise: Float[Tensor, "*more #n latent"]) -> Float[Tensor, "*more n latent"]:
        """What standard normal noise turns into."""
        return self.mean + self.log_scale.exp() * noise

    def log_density(self, values: Float[Tensor, "*more n latent"]) -> Float[Tensor, "*more n"]:
        """The log-density of each row."""
        rest = (values - self.mean) * (-self.log_scale).exp()
        return -(0.5 * rest**2 + self.log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)

    def divergence(self, other: Gaussian) -> Float[Tensor, " n"]:
        """The Kullback-Leibler divergence `KL(self || other)` of each row, in nats."""
        squares = (2 * (self.log_scale - other.log_scale)).exp()
        moved = ((self.mean - other.mean) * (-other.log_scale).exp()) ** 2
        return (other.log_scale - self.log_scale + 0.5 * (squares + moved - 1)).sum(-1)


def ink(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 where more than half of a pixel is ink, else 0: what the model gives probabilities of."""
    return (images > 0.5).to(images.dtype)


def log_pixels(logits: Float[Tensor, "n 1 28 28"], drawings: Drawings) -> Float[Tensor, " n"]:
    """The log-probability of each drawing, whose pixels are independent given the logits."""
    return -F.binary_cross_entropy_with_logits(logits, drawings, reduction="none").flatten(1).sum(1)


class ConditionalVAE(Learner):
    """Makes more drawings of a character from some drawings of it, and says how probable a drawing is.

    As a classifier it answers by Bayes' rule: the logit of a class is the bound on the log-probability of the query
    image, given the support images of that class.

    Args:
        latent: numbers in `z`.
        width: channels of the feature maps.
        max_shots: in training, a task shows a random number of its support images of each class, from 1 to this; 0:
            none, for a model without support.

    Attributes:
        places: how much drawings of one character differ in place, `[6]`, see `spread_of_places`; zeros until measured.

    Raises:
        ValueError: if images are not 1×28×28.

    Example:
        >>> model = ConditionalVAE(width=8)
        >>> model.draw(torch.rand(3, 1, 28, 28), 5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 1, 28, 28])

    Reference:
        The bound: Kingma & Welling (2014), equation 3; with a condition: Sohn, Lee & Yan (2015), equation 4. The
        context of a set: Edwards & Storkey (2017); Garnelo et al. (2018), section 2.
    """

    places: Float[Tensor, " 6"]

    def __init__(self, *, latent: int = 32, width: int = 64, max_shots: int = 10) -> None:
        check_sizes(latent=latent, width=width)
        check_not_negative(max_shots=max_shots)
        super().__init__()
        self.latent, self.max_shots = latent, max_shots
        self.look = Looking(width)
        self.prior = Belief(width + 1, latent)
        self.posterior = Belief(2 * width + 1, latent)
        self.decoder = Decoder(latent, width + 1, width)
        self.register_buffer("places", torch.zeros(6))

    # --- as a learner ---

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Minus the mean bound of the query images, each given support images of its class."""
        chance = episode.chance()
        shots = int(torch.randint(1, self.max_shots + 1, (), generator=chance)) if self.max_shots else 0
        contexts = self.contexts(episode, shots)
        rows = torch.arange(len(episode), device=contexts.device)[:, None]
        of_queries = contexts[rows, episode.query_labels].flatten(0, 1)
        return -self.bound(episode.query_images.flatten(0, 1), of_queries, chance).mean()

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """The bound of every query image given the support images of every class, all with the same random numbers."""
        contexts, noise = self.contexts(episode), _noise((1, self.latent), torch.Generator().manual_seed(0), self)
        n_query, n_way = episode.query_images.shape[1], episode.n_way
        drawings = episode.query_images[:, :, None].expand(-1, -1, n_way, -1, -1, -1)
        of_each = contexts[:, None].expand(-1, n_query, -1, -1, -1, -1)
        bounds = self._bound(ink(drawings.flatten(0, 2)), of_each.flatten(0, 2), noise)
        return bounds.view(len(episode), n_query, n_way)

    # --- as a model ---

    def contexts(self, episode: Episode, shots: int | None = None) -> Float[Tensor, "task way channel 7 7"]:
        """What the first `shots` support images of every class say about it; default: all of them."""
        looks = self.look(episode.support_images.flatten(0, 1)).unflatten(0, (len(episode), -1))
        members = F.one_hot(episode.support_labels, episode.n_way)  # [task, support, way]
        if shots is not None:
            members = members * (members.cumsum(1) <= shots)
        members = members.to(looks.dtype)
        return _context(torch.einsum("tsw,tschv->twchv", members, looks), members.sum(1))

    def context(self, support_images: Float[Tensor, "shot 1 28 28"]) -> Maps:
        """What drawings of one character say about it, `[1, channel, 7, 7]`; without drawings, that nothing is known.

        Raises:
            ValueError: if images are not 1×28×28.
        """
        looks = self.look(support_images)
        return _context(looks.sum(0)[None], looks.new_full((1,), len(looks)))

    def bound(self, images: Drawings, context: Context, generator: torch.Generator) -> Float[Tensor, " n"]:
        """The bound on the log-probability of each image: an unbiased estimate from one sample, in nats."""
        return self._bound(ink(images), context, _noise((len(images), self.latent), generator, self))

    def _bound(self, drawings: Drawings, context: Tensor, noise: Tensor) -> Float[Tensor, " n"]:
        context = context.expand(len(drawings), -1, -1, -1)
        posterior, prior = self.beliefs(drawings, context)
        return log_pixels(self.decoder(posterior.at(noise), context), drawings) - posterior.divergence(prior)

    @torch.no_grad()
    def log_likelihood(
        self,
        images: Drawings,
        context: Context,
        generator: torch.Generator,
        *,
        samples: int = 50,
    ) -> Float[Tensor, " n"]:
        """A bound that approaches the log-probability with more samples: the log of their mean weight.

        Reference:
            Burda, Grosse & Salakhutdinov (2016), equation 8.
        """
        check_positive(samples=samples)
        drawings, context, found = ink(images), context.expand(len(images), -1, -1, -1), []
        posterior, prior = self.beliefs(drawings, context)
        for _ in range(samples):
            values = posterior.at(_noise(posterior.mean.shape, generator, self))
            weights = prior.log_density(values) - posterior.log_density(values)
            found.append(log_pixels(self.decoder(values, context), drawings) + weights)
        return torch.stack(found).logsumexp(0) - math.log(samples)

    def beliefs(self, drawings: Drawings, context: Maps) -> tuple[Gaussian, Gaussian]:
        """`q(z | x, c)` and `p(z | c)`."""
        seen = torch.cat([self.look(drawings), context], dim=1)
        return self.posterior(seen), self.prior(context)

    @torch.no_grad()
    def draw(
        self,
        support_images: Float[Tensor, "shot 1 28 28"],
        n: int,
        generator: torch.Generator,
        *,
        temperature: float = 1.0,
    ) -> Drawings:
        """New drawings of the character that the support images show: how probable ink is, pixel by pixel.

        A low temperature makes clear shapes, but also puts them all in the same place, which people do not do. The
        variance of place that it removes is put back: each drawing is stretched, sheared and moved at random, by
        `sqrt(1 - temperature²)` times `places`.

        Args:
            support_images: drawings of one character; if there are none: any character.
            n: how many to draw.
            generator: the source of randomness.
            temperature: factor of the prior's standard deviations; below 1: more alike, and clearer.

        Raises:
            ValueError: if images are not 1×28×28, `n` is not positive or the temperature is negative.
        """
        check_positive(n=n)
        check_not_negative(temperature=temperature)
        context = self.context(support_images)
        values = self.prior(context).at(temperature * _noise((n, self.latent), generator, self))
        logits = self.decoder(values, context.expand(n, -1, -1, -1))
        given_back = math.sqrt(max(0.0, 1 - temperature**2)) * self.places
        return placed(logits, given_back * _noise((n, 6), generator, self)).sigmoid()


# --- adapted by gradients ---


class Adaptable(Network):
    """A model without support as a network whose decoder `Reptile` or `MAML` can adapt, with the bound as their loss.

    It returns the logits of all pixels and the divergence, for latent numbers drawn from `q(z | x)` by PyTorch's own
    random numbers. `drawing_task` makes the labels of its tasks.

    Args:
        model: the one whose decoder adapts; everything else stays as it is.

    Raises:
        ValueError: if the model was made for use with a support set.

    Example:
        >>> from metatutor import Reptile
        >>> learner = Reptile(Adaptable(ConditionalVAE(width=8, max_shots=0)), loss=minus_bound)
        >>> task = drawing_task(torch.rand(2, 5, 1, 28, 28), torch.rand(2, 3, 1, 28, 28))
        >>> learner(task).shape
        torch.Size([2, 3, 785])
    """

    n_outputs = _SIDE**2 + 1

    def __init__(self, model: ConditionalVAE) -> None:
        super().__init__()
        if model.max_shots:
            raise ValueError(f"expected a model without support, max_shots=0; this one has {model.max_shots}")
        self.model, self.image_shape = model, (1, _SIDE, _SIDE)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("decoder."))

    def forward(self, images: Drawings, n_support: int | None = None) -> Float[Tensor, "n output"]:
        """Logits of the pixels, and the divergence."""
        drawings, model = ink(images), self.model
        context = model.context(drawings[:0]).expand(len(drawings), -1, -1, -1)
        posterior, prior = model.beliefs(drawings, context)
        logits = model.decoder(posterior.at(torch.randn_like(posterior.mean)), context)
        return torch.cat([logits.flatten(1), posterior.divergence(prior)[:, None]], dim=1)


def minus_bound(outputs: Float[Tensor, "n output"], labels: Float[Tensor, "n output"]) -> Float[Tensor, ""]:
    """Minus the mean bound of drawings, from the outputs of `Adaptable` and the labels of `drawing_task`."""
    pixels = F.binary_cross_entropy_with_logits(outputs[:, :-1], labels[:, :-1], reduction="none").sum(1)
    return (pixels + outputs[:, -1]).mean()


def drawing_task(
    support_images: Float[Tensor, "task support 1 28 28"], query_images: Float[Tensor, "task query 1 28 28"]
) -> Episode:
    """Tasks of redrawing drawings: labels are their pixels, and a zero for the divergence."""
    labels = [F.pad(ink(images).flatten(2), (0, 1)) for images in (support_images, query_images)]
    return Episode(support_images, labels[0], query_images, labels[1], n_way=_SIDE**2 + 1)


# --- networks ---


class Looking(nn.Module):
    """What can be seen in a drawing: three convolutions, two of which halve it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width // 2, 3, 2, 1), nn.Conv2d(width // 2, width, 3, 2, 1)
        self.third = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, images: Drawings) -> Maps:
        """Feature maps of a quarter of the side."""
        if images.shape[1:] != (1, _SIDE, _SIDE):
            raise ValueError(f"expected drawings [n, 1, {_SIDE}, {_SIDE}], got {list(images.shape)}; resize them")
        maps = F.silu(self.second(F.silu(self.first(images))))
        return maps + self.third(F.silu(maps))


class Belief(nn.Module):
    """Feature maps to a Gaussian for the latent numbers."""

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, 16, 1)
        self.wide = nn.Linear(16 * _QUARTER**2, 128)
        self.last = nn.Linear(128, 2 * latent)

    def forward(self, maps: Maps) -> Gaussian:
        """Means, and logarithms of standard deviations from -5 to 2."""
        hidden = F.silu(self.wide(F.silu(self.narrow(maps)).flatten(1)))
        mean, log_scale = self.last(hidden).chunk(2, dim=1)
        return Gaussian(mean, log_scale.clamp(-5, 2))


class Decoder(nn.Module):
    """Latent numbers and context to the logits of pixels, by convolutions whose channels become pixels twice."""

    def __init__(self, latent: int, channels: int, width: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.spread = nn.Linear(latent, width * _QUARTER**2)
        self.join = nn.Conv2d(width + channels, width, 3, 1, 1)
        self.at_7 = nn.Conv2d(width, width, 3, 1, 1)
        self.up_to_14 = nn.Conv2d(width, 4 * half, 3, 1, 1)
        self.at_14 = nn.Conv2d(half, half, 3, 1, 1)
        self.up_to_28 = nn.Conv2d(half, 4 * quarter, 3, 1, 1)
        self.last = nn.Conv2d(quarter, 1, 3, 1, 1)

    def forward(self, values: Float[Tensor, "n latent"], context: Maps) -> Float[Tensor, "n 1 28 28"]:
        """7×7 to 14×14 to 28×28."""
        spread = self.spread(values).view(len(values), -1, _QUARTER, _QUARTER)
        maps = self.join(torch.cat([F.silu(spread), context], dim=1))
        maps = maps + self.at_7(F.silu(maps))
        maps = F.pixel_shuffle(self.up_to_14(F.silu(maps)), 2)
        maps = maps + self.at_14(F.silu(maps))
        return self.last(F.silu(F.pixel_shuffle(self.up_to_28(F.silu(maps)), 2)))


# --- where a drawing lies ---


def placed(logits: Float[Tensor, "n 1 28 28"], places: Float[Tensor, "n 6"]) -> Float[Tensor, "n 1 28 28"]:
    """Every image moved by an affine map, bilinearly; what comes from beyond the margin is paper.

    The pixel at `p`, measured from the middle in half-widths, is fetched from `p + A p + t`; `places` are `A` and `t`,
    row by row: `[A11, A12, t1, A21, A22, t2]`.
    """
    maps = torch.eye(2, 3).to(logits) + places.view(-1, 2, 3)
    grid = F.affine_grid(maps, list(logits.shape), align_corners=False)
    return F.grid_sample(logits - _PAPER, grid, align_corners=False) + _PAPER


def spread_of_places(drawings: Float[Tensor, "class drawing 1 28 28"]) -> Float[Tensor, " 6"]:
    """How much drawings of one character differ in width, slant, height and place: standard deviations for `placed`.

    The ink of each drawing has a middle and second moments around it. From these come the logarithms of its standard
    deviations across and down, and a slant, the covariance over the mean of both variances. What counts is how they
    differ between the drawings of a character.
    """
    axis = (torch.arange(_SIDE) + 0.5) / (_SIDE / 2) - 1
    weights = ink(drawings).squeeze(2) + 1e-6  # [class, drawing, row, column]
    weights = weights / weights.sum((2, 3), keepdim=True)
    middles = [(weights * at).sum((2, 3), keepdim=True) for at in (axis, axis[:, None])]
    x, y = axis - middles[0], axis[:, None] - middles[1]
    across, down, both = ((weights * product).sum((2, 3)) for product in (x * x, y * y, x * y))
    found = (across.log() / 2, 2 * both / (across + down), middles[0].flatten(1), down.log() / 2, middles[1].flatten(1))
    width, slant, to_right, height, to_below = (of.var(1).mean().sqrt() for of in found)
    return torch.stack([width, slant, to_right, torch.zeros(()), height, to_below])


def _context(
    sums: Float[Tensor, "*batch channel 7 7"], counts: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch more 7 7"]:
    """The mean of feature maps, and a channel that says how few they are: `1 / (1 + n)`."""
    counts = counts[..., None, None, None]
    few = (1 / (1 + counts)).expand(*sums.shape[:-3], 1, *sums.shape[-2:])
    return torch.cat([sums / counts.clamp(min=1), few], dim=-3)


def _noise(shape: torch.Size | tuple[int, int], generator: torch.Generator, model: nn.Module) -> Tensor:
    return torch.randn(shape, generator=generator).to(next(model.parameters()))
