"""Few-shot classification of your own pictures, which says how far to trust it."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from metatutor.data.images import plain
from metatutor.data.pictures import picture_of
from metatutor.episodes import Episode
from metatutor.files import decoding, replacing
from metatutor.heads import HeadName, LinearHead, fit_head
from metatutor.learner import Learner, computing, evaluating
from metatutor.pretrained import PictureNetwork, ahead, batched, kind_of_all, network_of, picture_network, suited

if TYPE_CHECKING:
    from PIL import Image

_LOOKED_AT = 64  # pictures, to find out their kind
_FORMAT = 1  # of saved files
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class SupportCheck:
    """What the support set says about itself when every picture is left out once.

    Attributes:
        accuracy: accuracy on the left-out pictures, 0 to 1; None: no class has two pictures.
        low: lower end of its 95% interval (Wilson).
        high: upper end.
        n: pictures that could be left out.
        confused: the two classes most often taken for each other, and how often; None: there were none.
        chance: accuracy of guessing.
    """

    accuracy: float | None
    low: float
    high: float
    n: int
    confused: tuple[str, str, int] | None
    chance: float


@dataclass(frozen=True)
class Answers:
    """What was found out about some query pictures.

    Attributes:
        probabilities: the probability of each class, `[query, way]`.
        cosines: cosines to the nearest support pictures, the nearest first, `[query, 3]` or fewer.
        nearest: the numbers of these support pictures.
        novel: whether a picture is too far from every class, `[query]`.
    """

    probabilities: Float[Tensor, "query way"]
    cosines: Float[Tensor, "query near"]
    nearest: Int64[Tensor, "query near"]
    novel: Bool[Tensor, " query"]


class FewShotClassifier:
    """Learns classes from a few pictures of each and names others, in the style of scikit-learn.

    A trained network embeds every picture once; the head is fitted to the embeddings in closed form.

    Args:
        backbone: `"auto"`, which looks at the pictures; `"omniglot"`, `"photos"` or `"torchvision:NAME"` (see
            `picture_network`); or a `PictureNetwork` of your own.
        head: `"auto"`, `"ridge"`, `"gaussians"` or `"prototypes"` (see `fit_head`); or a `Learner` that takes any
            number of ways, which answers with a network of its own.
        weights: a file of other weights for the backbone.

    Attributes:
        classes_: the names of the classes, sorted.
        check_: what the support set says about itself, a `SupportCheck`.
        warnings_: what the reader should know, one sentence each.
        threshold_: the cosine below which a picture is too far from every class.

    Example:
        >>> from PIL import Image, ImageDraw
        >>> def drawing(shape, at):
        ...     paper = Image.new("L", (105, 105), "white")
        ...     getattr(ImageDraw.Draw(paper), shape)((at, at, at + 60, at + 60), outline="black", width=3)
        ...     return paper
        >>> support = [drawing(shape, at) for shape in ("ellipse", "rectangle") for at in (15, 20, 25)]
        >>> classifier = FewShotClassifier().fit(support, ["circle"] * 3 + ["square"] * 3)
        >>> classifier.predict([drawing("ellipse", 30), drawing("rectangle", 10)]).tolist()
        ['circle', 'square']
        >>> classifier.backbone_, classifier.check_.accuracy
        ('omniglot', 1.0)

    Reference:
        Chen et al. (2019), A closer look at few-shot classification: a frozen network and a new head are hard to beat.
    """

    def __init__(
        self,
        backbone: str | PictureNetwork = "auto",
        head: HeadName | Learner = "auto",
        *,
        weights: Path | str | None = None,
    ) -> None:
        if isinstance(head, Learner) and head.ways is not None:
            raise ValueError(f"{type(head).__name__} takes tasks of {head.ways} ways only; give one that takes any")
        self.backbone, self.weights = backbone, weights
        self.head: HeadName | Learner = head

    def fit(self, images: Iterable[Any], names: Iterable[Hashable]) -> FewShotClassifier:
        """Learn from pictures and the names of their classes; classes may have different numbers of pictures.

        Args:
            images: PIL images, paths, arrays or tensors, each of any size (see `picture_of`).
            names: one per picture.

        Raises:
            ValueError: if there are fewer than two classes, names do not match, or a picture cannot be read.
        """
        return self.fit_pairs((picture_of(image), name) for image, name in _paired(images, names))

    def fit_pairs(self, pairs: Iterable[tuple[Image.Image, Hashable]]) -> FewShotClassifier:
        """The same for pairs of a picture, `"RGB"` or `"L"`, and a name; they need not be in memory all at once."""
        pairs = iter(pairs)
        first = list(islice(pairs, _LOOKED_AT))
        if not first:
            raise ValueError("there are no pictures to learn from")
        looked_at = [picture for picture, _ in first]
        self.network_ = self._network(looked_at)
        self.backbone_ = self.network_.name
        self.warnings_ = _warnings_of_kind(self.network_, looked_at)
        given, embeddings, prepared, self.thumbnails_ = [], [], [], []
        for tensors, pictures, names in self._prepared_pairs(chain(first, pairs)):
            embeddings.append(self.network_.embed(tensors))
            given += names
            self.thumbnails_ += [thumbnail(picture) for picture in pictures]
            if isinstance(self.head, Learner):
                prepared.append(tensors)
        self.classes_ = _sorted(given)
        if len(self.classes_) < 2:
            raise ValueError(f"all pictures are of one class, {given[0]}; give pictures of at least two")
        numbers = {name: i for i, name in enumerate(self.classes_.tolist())}
        self.labels_ = torch.tensor([numbers[name] for name in given])
        self.support_ = F.normalize(torch.cat(embeddings), dim=1)
        self._fit_head(torch.cat(prepared) if prepared else None)
        self.threshold_ = novelty_threshold(self.support_)
        return self

    def predict(self, images: Iterable[Any]) -> Shaped[np.ndarray, " query"]:
        """The name of the likeliest class of each picture."""
        chances = self.predict_proba(images)
        return self.classes_[chances.argmax(1)]

    def predict_proba(self, images: Iterable[Any]) -> Float[np.ndarray, "query way"]:
        """Probabilities in the order of `classes_`; their scale comes from the left-out support pictures."""
        found = [answers.probabilities for answers in self.answers(map(picture_of, images))]
        return torch.cat([torch.zeros(0, len(self.classes_)), *found]).numpy()

    def score(self, images: Iterable[Any], names: Sequence[Hashable]) -> float:
        """The fraction of pictures that are named correctly."""
        right = [answer == name for answer, name in _paired(self.predict(images).tolist(), names)]
        return sum(right) / max(1, len(right))

    def novel(self, images: Iterable[Any]) -> Bool[np.ndarray, " query"]:
        """Whether a picture is too far from every class: another kind, another camera, another laboratory."""
        found = [answers.novel for answers in self.answers(map(picture_of, images))]
        return torch.cat([torch.zeros(0, dtype=torch.bool), *found]).numpy()

    def answers(self, pictures: Iterable[Image.Image]) -> Iterator[Answers]:
        """Everything found out about pictures, a few at a time, so that any number of them fits into memory."""
        return (found for found, _ in self.answer_pairs((picture, None) for picture in pictures))

    def answer_pairs(self, pairs: Iterable[tuple[Image.Image, Any]]) -> Iterator[tuple[Answers, list[Any]]]:
        """The same for pairs of a picture and anything; with the answers comes a list of the latter."""
        self._check_fitted()
        for tensors, _, others in self._prepared_pairs(pairs):
            embeddings = F.normalize(self.network_.embed(tensors), dim=1)
            cosines, nearest = (embeddings @ self.support_.mT).topk(min(3, len(self.support_)), dim=1)
            logits = self._logits(embeddings, tensors)
            yield Answers(logits.softmax(1), cosines, nearest, cosines[:, 0] < self.threshold_), others

    # --- inside ---

    def _check_fitted(self) -> None:
        if not hasattr(self, "labels_"):
            raise ValueError("the classifier knows no classes yet; call fit first")

    def _prepared_pairs(
        self, pairs: Iterable[tuple[Image.Image, Any]]
    ) -> Iterator[tuple[Tensor, list[Any], list[Any]]]:
        """Prepared pictures, a few at a time, the pictures, and what comes with them; prepares the next meanwhile."""

        def prepared() -> Iterator[tuple[Tensor, list[Any], list[Any]]]:
            for some in batched(pairs, self.network_.batch):
                pictures, others = (list(part) for part in zip(*some, strict=True))
                yield torch.stack([self.network_.prepared(picture) for picture in pictures]), pictures, others

        return ahead(prepared())

    def _network(self, looked_at: Sequence[Image.Image]) -> PictureNetwork:
        if isinstance(self.head, Learner):
            return network_of(self.head)
        if isinstance(self.backbone, PictureNetwork):
            return self.backbone
        return picture_network(suited(looked_at) if self.backbone == "auto" else self.backbone, self.weights)

    def _fit_head(self, prepared: Float[Tensor, "n channel h w"] | None) -> None:
        self._prepared = prepared
        if isinstance(self.head, Learner):
            left_out = _left_out(self.head, prepared, self.labels_, len(self.classes_))
        else:
            self.head_ = fit_head(self.support_, self.labels_, len(self.classes_), self.head)
            left_out = self.head_.left_out
        self.check_ = support_check(left_out, self.labels_, [str(name) for name in self.classes_])

    def _logits(self, embeddings: Tensor, prepared: Tensor) -> Float[Tensor, "n way"]:
        if not isinstance(self.head, Learner):
            return self.head_(embeddings)
        return _answered(self.head, self._prepared, self.labels_, prepared, len(self.classes_))

    # --- files ---

    def save(self, path: Path | str) -> None:
        """Write what was fitted to a file that `FewShotClassifier.load` reads: safetensors, no pickle.

        It holds no weights of the backbone, but small copies of the support pictures.

        Raises:
            ValueError: if the head is a `Learner`, which has a `save` of its own.
        """
        if isinstance(self.head, Learner):
            raise ValueError("only closed-form heads are saved; a learner needs its support pictures, so keep those")
        thumbnails = torch.frombuffer(bytearray(b"".join(self.thumbnails_)), dtype=torch.uint8)
        tensors = {"center": self.head_.center, "weights": self.head_.weights, "bias": self.head_.bias}
        tensors |= {"left_out": self.head_.left_out, "support": self.support_, "labels": self.labels_}
        tensors |= {"thumbnails": thumbnails, "lengths": torch.tensor([len(data) for data in self.thumbnails_])}
        tensors |= {"probe": _probe(self.network_)}
        about = {"format": _FORMAT, "backbone": self.backbone_, "head": self.head, "classes": self.classes_.tolist()}
        about |= {"threshold": self.threshold_, "check": asdict(self.check_), "warnings": self.warnings_}
        try:
            text = json.dumps(about)
        except TypeError:
            raise ValueError("only names that are text, numbers or tuples of these can be saved") from None
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(save({n: t.contiguous() for n, t in tensors.items()}, {"classifier": text}))

    @classmethod
    def load(
        cls, path: Path | str, *, backbone: str | PictureNetwork | None = None, weights: Path | str | None = None
    ) -> FewShotClassifier:
        """Read a classifier that `save` wrote.

        Args:
            path: the file.
            backbone: the network it was fitted with, if that is your own.
            weights: the file of weights it was fitted with, if there was one.

        Raises:
            ValueError: if it is not such a file, or the network embeds differently from the one it was fitted with.
        """
        with decoding(f"{path} is not a file that classify --save wrote"), safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["classifier"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            parts = tensors["thumbnails"].split(tensors["lengths"].tolist())
            check = SupportCheck(**about["check"] | {"confused": tuple(about["check"]["confused"] or ()) or None})
            made = cls(backbone or about["backbone"], about["head"], weights=weights)
            made.head_ = LinearHead(*(tensors[name] for name in ("center", "weights", "bias", "left_out")))
            made.backbone_ = str(about["backbone"])
            made.classes_ = _array([tuple(n) if isinstance(n, list) else n for n in about["classes"]])
            made.support_, made.labels_ = tensors["support"], tensors["labels"]
            made.threshold_, made.warnings_ = float(about["threshold"]), list(about["warnings"])
            made.thumbnails_ = [part.numpy().tobytes() for part in parts]
        made.check_ = check
        made.network_, made._prepared = made._network([]), None
        probe = _probe(made.network_)
        if probe.shape != tensors["probe"].shape or F.cosine_similarity(probe, tensors["probe"], dim=0) < 0.999:
            raise ValueError(f"{path} was fitted with other weights of {made.backbone_}; give them with --weights")
        return made


def interval(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of an accuracy, from `right` correct answers of `n` (Wilson).

    Example:
        >>> [round(end, 2) for end in interval(9, 10)]
        [0.6, 0.98]
    """
    if not n:
        return 0.0, 1.0
    z, share = 1.96, right / n
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def support_check(left_out: Float[Tensor, "n way"], labels: Int64[Tensor, " n"], names: list[str]) -> SupportCheck:
    """What the logits of left-out pictures say; NaNs are skipped."""
    known = ~left_out.isnan().any(1)
    truth, found = labels[known].tolist(), left_out[known].argmax(1).tolist()
    right = sum(a == b for a, b in zip(truth, found, strict=True))
    pairs = Counter((min(a, b), max(a, b)) for a, b in zip(truth, found, strict=True) if a != b)
    confused = next(((names[a], names[b], times) for (a, b), times in pairs.most_common(1)), None)
    accuracy = right / len(truth) if truth else None
    return SupportCheck(accuracy, *interval(right, len(truth)), len(truth), confused, 1 / len(names))


def thumbnail(picture: Image.Image) -> bytes:
    """A small copy of a picture, as JPEG."""
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def _paired(images: Iterable[Any], names: Iterable[Hashable]) -> Iterator[tuple[Any, Hashable]]:
    try:
        yield from zip(images, map(plain, names), strict=True)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ValueError("there are not as many names as pictures; give one name per picture") from None


def _sorted(names: Iterable[Hashable]) -> Shaped[np.ndarray, " way"]:
    """Each name once; kept as objects if of several types, or of a type that arrays do not have."""
    return _array(sorted(set(names), key=lambda name: (str(type(name)), name)))


def _array(names: list[Any]) -> Shaped[np.ndarray, " way"]:
    of_one_kind = len({type(name) for name in names}) == 1 and isinstance(names[0], str | int)
    if of_one_kind:
        return np.array(names)
    array = np.empty(len(names), object)
    for i, name in enumerate(names):  # tuples would become a second dimension
        array[i] = name
    return array


def _warnings_of_kind(network: PictureNetwork, pictures: Sequence[Image.Image]) -> list[str]:
    if not network.of_drawings or kind_of_all(pictures) != "photos":
        return []
    return [f"these look like photos, but {network.name} knows only drawn strokes; use the backbone photos"]


def nearest_cosine(
    embeddings: Float[Tensor, "query embedding"], support: Float[Tensor, "n embedding"]
) -> Float[Tensor, " query"]:
    """The largest cosine to a support picture, of embeddings of length one."""
    return (embeddings @ support.mT).amax(1)


def novelty_threshold(support: Float[Tensor, "n embedding"]) -> float:
    """Two standard deviations below the mean cosine of a support picture to its nearest other one.

    The embeddings have length one. With fewer than three pictures there is no threshold: -1.
    """
    if len(support) < 3:
        return -1.0
    nearest = (support @ support.mT).fill_diagonal_(-1.0).amax(1)
    return (nearest.mean() - 2 * nearest.std()).item()


def _probe(network: PictureNetwork) -> Float[Tensor, " embedding"]:
    """A network's embedding of a fixed picture: a signature of its weights."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((64, 64)).rotate(30)
    return network.embed(network.prepared(picture)[None])[0].clone()


def _answered(learner: Learner, support: Any, labels: Tensor, query: Tensor, n_way: int) -> Float[Tensor, "n way"]:
    episode = Episode(support[None], labels[None], query[None], n_way=n_way)
    with evaluating(learner), computing(learner):
        return learner(learner.taken(episode))[0].cpu().float()


def _left_out(learner: Learner, support: Any, labels: Tensor, n_way: int) -> Float[Tensor, "n way"]:
    """Logits of every support picture, by the learner without it."""
    found = torch.full((len(labels), n_way), torch.nan)
    for i in (labels.bincount()[labels] > 1).nonzero().flatten().tolist():
        rest = torch.arange(len(labels)) != i
        found[i] = _answered(learner, support[rest], labels[rest], support[i : i + 1], n_way)[0]
    return found
