"""R2-D2: ridge regression as the last layer, solved for every task in closed form and differentiated through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.checks import check_positive
from metatutor.embedding import EmbeddingLearner, Logits
from metatutor.episodes import Episode
from metatutor.learner import Loss


class R2D2(EmbeddingLearner):
    """Fits the last layer of each task by ridge regression on its support embeddings: no steps, one linear system.

    With the support embeddings as the rows of `X` and their classes, one-hot, as the rows of `Y`,
    `W = argmin |X W - Y|² + penalty |W|² = Xᵀ (X Xᵀ + penalty I)⁻¹ Y`, and `logits = scale * f(query) W + shift`. The
    system has as many unknowns as there are support images, however long the embeddings are. The outer loop learns the
    embedding, `penalty`, `scale` and `shift` by differentiating through the solution; of `penalty` and `scale`, which
    are positive, it learns the logarithms. (`shift` is the paper's; it is the same for all classes, so that no
    probability depends on it.)

    Args:
        network: the embedding `f` (see `EmbeddingLearner`).
        penalty: the initial penalty on large weights, to be compared with the squared lengths of embeddings.
        scale: the initial factor that turns regressed zeros and ones into logits.
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.
        loss: function of logits and labels; default: cross-entropy.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> R2D2(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Bertinetto, Henriques, Torr & Vedaldi (2019), section 3.2 and appendix A.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        penalty: float = 10.0,
        scale: float = 40.0,
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr, loss=loss)
        check_positive(penalty=penalty, scale=scale)
        self.log_penalty = nn.Parameter(torch.tensor(float(penalty)).log())
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.shift = nn.Parameter(torch.zeros(()))

    def answer(self, episode: Episode) -> Logits:
        """The regression's prediction for each query image, as logits."""
        support, query = self.embed(episode)
        labels = F.one_hot(episode.support_labels, episode.n_way).to(support.dtype)
        return self.log_scale.exp() * query @ ridge(support, labels, self.log_penalty.exp()) + self.shift


def ridge(
    inputs: Float[Tensor, "task example feature"],
    targets: Float[Tensor, "task example output"],
    penalty: Float[Tensor, ""] | float,
) -> Float[Tensor, "task feature output"]:
    """The weights `W` of each task that minimise `|inputs W - targets|² + penalty |W|²`.

    Example:
        >>> ridge(torch.ones(1, 1, 1), torch.ones(1, 1, 1), 1.0)
        tensor([[[0.5000]]])
    """
    gram = inputs @ inputs.mT  # [task, example, example]
    identity = torch.eye(len(gram[0]), dtype=gram.dtype, device=gram.device)
    return inputs.mT @ torch.linalg.solve(gram + penalty * identity, targets)
