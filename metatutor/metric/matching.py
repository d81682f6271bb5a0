"""Matching Networks: attention over the support set; every support image votes for its class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import embedding_size
from metatutor.checks import check_positive
from metatutor.embedding import EmbeddingLearner, Logits, Query, Support
from metatutor.episodes import Episode
from metatutor.functional import Labels
from metatutor.learner import Loss


class Matching(EmbeddingLearner):
    """Answers with the labels of the support images, weighted by attention.

    `P(c | query) = sum of a(query, x) over the support images x of class c`, where the attention
    `a = softmax over the support set of scale * cosine(f(query), g(x))`; the logits are `log P`.

    Without full context, `f = g` is the network. With it, both see the support set as a whole: a bidirectional LSTM
    runs over the support embeddings (so their order matters), and an LSTM reads the result `reading_steps` times with
    the query in mind.

    Args:
        network: the embedding (see `EmbeddingLearner`).
        scale: factor of the cosines. The paper uses 1, which leaves even a perfect match unsure of itself.
        full_context: whether to use full-context embeddings.
        reading_steps: steps of the LSTM that embeds a query with full context.
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.
        loss: function of logits and labels; default: cross-entropy.

    Example:
        >>> from metatutor import ConvNet, Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> learner = Matching(ConvNet(filters=8), full_context=True)
        >>> learner(Episode(images, labels, images)).exp().sum(-1).allclose(torch.ones(2, 5))
        True

    Reference:
        Vinyals et al. (2016), equations 1 and 2; full context: section 2.1.2 and appendix A, equations 3 to 7.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        scale: float = 1.0,
        full_context: bool = False,
        reading_steps: int = 5,
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr, loss=loss)
        check_positive(scale=scale, reading_steps=reading_steps)
        self.scale = scale
        self.context = FullContext(embedding_size(self.network, "Matching"), reading_steps) if full_context else None

    def answer(self, episode: Episode) -> Logits:
        """The logarithm of each class's share of the attention."""
        support, query = self.embed(episode)
        if self.context is not None:
            support, query = self.context(support, query)
        cosines = F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).mT
        return attend(self.scale * cosines, episode.support_labels, episode.n_way)


class FullContext(nn.Module):
    """Embeddings of support and query images that know the whole support set.

    `g(x) = forward h + backward h + g'(x)` from a bidirectional LSTM over the support embeddings `g'(x)`. A query
    starts from `h = f'(query)` and reads `reading_steps` times: `read = sum of softmax(h · g(x)) g(x)`, then one step
    of an LSTM whose input is `f'(query)` and whose state is `[h, read]`, and `h` becomes its output plus `f'(query)`.
    """

    def __init__(self, size: int, reading_steps: int) -> None:
        super().__init__()
        self.reading_steps = reading_steps
        self.over_support = nn.LSTM(size, size, bidirectional=True, batch_first=True)
        self.gates = nn.Linear(3 * size, 4 * size)

    def forward(self, support: Support, query: Query) -> tuple[Support, Query]:
        """`g(x)` of all support images and `f(query)` of all query images."""
        forward, backward = self.over_support(support)[0].chunk(2, dim=-1)
        support = forward + backward + support
        h, cell = query, torch.zeros_like(query)
        for _ in range(self.reading_steps):
            read = (h @ support.mT).softmax(-1) @ support
            gates = self.gates(torch.cat([query, h, read], dim=-1))
            enter, keep, show, new = gates.chunk(4, dim=-1)
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            h = show.sigmoid() * cell.tanh() + query
        return support, h


def attend(scores: Float[Tensor, "task query support"], labels: Labels, n_way: int) -> Logits:
    """The logarithm of the attention that each class receives: `log sum of softmax(scores)` over its members."""
    shares = scores.log_softmax(-1)[:, :, None]  # [task, query, 1, support]
    others = labels[:, None] != torch.arange(n_way, device=labels.device)[:, None]  # [task, way, support]
    return shares.masked_fill(others[:, None], -torch.inf).logsumexp(-1)
