"""Prototypical and Matching Networks beside easyfsl's, on the same embeddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from easyfsl.methods import FewShotClassifier, MatchingNetworks, PrototypicalNetworks
from torch import Tensor, nn

from metatutor.backbones import ConvNet
from metatutor.embedding import EmbeddingLearner
from metatutor.episodes import Episode
from metatutor.metric import Matching, Prototypical

N_WAY, K_SHOT, N_QUERY, SIZE = 4, 3, 5, 64


def task() -> Episode:
    generator = torch.Generator().manual_seed(0)
    support = torch.rand(1, N_WAY * K_SHOT, 1, 8, 8, generator=generator, dtype=torch.float64)
    query = torch.rand(1, N_QUERY, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randperm(N_WAY * K_SHOT, generator=generator) % N_WAY
    return Episode(support, labels[None], query, torch.zeros(1, N_QUERY, dtype=torch.long), N_WAY)


def ours(build: Callable[..., EmbeddingLearner], **arguments) -> EmbeddingLearner:
    """With a network that does not look at the other images of its call, as easyfsl embeds support and query apart."""
    torch.manual_seed(0)
    network = ConvNet(filters=16, n_blocks=2, image_size=8, normalization="group")
    return build(network, **arguments).double().eval()


def theirs(method: FewShotClassifier, episode: Episode) -> Tensor:
    method.eval()
    method.process_support_set(episode.support_images[0], episode.support_labels[0])
    if isinstance(method, MatchingNetworks):
        method.one_hot_support_labels = method.one_hot_support_labels.double()
    return method(episode.query_images[0])


def test_prototypical_with_euclidean_distance_is_theirs():
    learner = ours(Prototypical, distance="euclidean")
    expected = theirs(PrototypicalNetworks(backbone=learner.network), task())
    assert torch.allclose(learner(task())[0], expected, atol=1e-6)


def test_prototypical_as_in_the_paper_is_their_square():
    """easyfsl leaves the square out; Snell et al. (2017), section 2.3, take squared Euclidean distances."""
    learner = ours(Prototypical)
    expected = theirs(PrototypicalNetworks(backbone=learner.network), task())
    assert torch.allclose(learner(task())[0], -expected.square())
    assert not torch.allclose(learner(task())[0], expected)


class Nothing(nn.Module):
    """An encoder that adds no context: easyfsl has Matching Networks with full context only."""

    def forward(self, images: Tensor, state: object = None) -> tuple[Tensor, Tensor]:
        if state is None:  # of the support set: forward and backward
            return images.new_zeros(*images.shape[:-1], 2 * SIZE), images
        return images.new_zeros(len(images), SIZE), images


def matching(learner: EmbeddingLearner, **more) -> MatchingNetworks:
    return MatchingNetworks(backbone=learner.network, feature_dimension=SIZE, **more)


def test_matching_is_theirs_where_query_embeddings_have_unit_length():
    """easyfsl scales the attention of a query by the length of its embedding; the paper's equation has cosines."""
    learner = ours(Matching)
    plain = {"support_encoder": Nothing(), "query_encoder": Nothing()}
    expected = theirs(matching(learner, **plain, feature_normalization=2.0), task())
    assert torch.allclose(learner(task())[0], expected, atol=1e-4)  # they add 1e-6 before the logarithm
    assert not torch.allclose(learner(task())[0], theirs(matching(learner, **plain), task()), atol=1e-2)


def test_full_context_embeddings_are_theirs():
    """With as many reading steps as support images, which is what easyfsl takes, and the same weights."""
    learner = ours(Matching, full_context=True, reading_steps=N_WAY * K_SHOT)
    assert isinstance(learner, Matching) and learner.context is not None
    other = matching(learner).double()
    other.support_features_encoder.load_state_dict(learner.context.over_support.state_dict())
    weight, bias = learner.context.gates.weight.detach(), learner.context.gates.bias.detach()
    query, h, read = weight.unflatten(0, (4, SIZE))[[0, 1, 3, 2]].flatten(0, 1).split(SIZE, dim=1)  # gates: i, f, g, o
    other.query_features_encoding_cell.load_state_dict(
        {
            "weight_ih": torch.cat([query, read], dim=1),
            "weight_hh": h,
            "bias_ih": bias.unflatten(0, (4, SIZE))[[0, 1, 3, 2]].flatten(),
            "bias_hh": torch.zeros_like(bias),
        }
    )
    expected = theirs(other, task())
    support, asked = learner.context(*learner.embed(task()))
    assert torch.allclose(support[0], other.contextualized_support_features)
    embedded = other.compute_features(task().query_images[0])
    assert torch.allclose(asked[0], other.encode_query_features(embedded))
    lengths = asked[0].norm(dim=-1, keepdim=True)  # again theirs, where ours has cosines
    cosines = F.normalize(asked[0], dim=-1) @ F.normalize(support[0], dim=-1).T
    attention = (lengths * cosines).softmax(-1) @ F.one_hot(task().support_labels[0], N_WAY).double()
    assert torch.allclose(attention.log(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["embed", "answer"])
def test_the_network_here_sees_images_one_by_one(name: str):
    """Else the comparisons above would compare normalisations."""
    learner, episode = ours(Prototypical), task()
    alone = Episode(
        episode.support_images, episode.support_labels, episode.query_images[:, :1], episode.query_labels[:, :1], N_WAY
    )
    together, apart = getattr(learner, name)(episode), getattr(learner, name)(alone)
    if name == "embed":
        assert torch.allclose(together[1][:, :1], apart[1])
    else:
        assert torch.allclose(together[:, :1], apart)
