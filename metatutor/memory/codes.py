"""How labels are written for a network that reads and answers them: one-hot, or as strings of letters."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from metatutor.functional import Labels

LabelCode = Literal["one-hot", "letters"]
N_LETTERS = 5  # letters in a string, and letters of the alphabet


class Codes:
    """How labels are written for a batch of tasks: one-hot, or as the letters of each class's string.

    With strings, a code is one one-hot letter after the other, and `n_way` is not needed: Santoro et al. (2016),
    section 4.1.2.
    """

    def __init__(self, strings: Int[Tensor, "task way letter"] | None, dtype: torch.dtype, n_way: int = 0) -> None:
        self.strings, self.dtype, self.n_way = strings, dtype, n_way

    def of(self, labels: Labels) -> Float[Tensor, "task support code"]:
        """The codes of labels."""
        if self.strings is None:
            return F.one_hot(labels, self.n_way).to(self.dtype)
        spelled = self.strings.gather(1, labels[..., None].expand(-1, -1, N_LETTERS))  # [task, support, letter]
        return F.one_hot(spelled, N_LETTERS).to(self.dtype).flatten(2)

    def logits(self, answers: Float[Tensor, "task time code"]) -> Float[Tensor, "task time way"]:
        """The logit of every class: for strings, the log-probability that the answer spells its string."""
        if self.strings is None:
            return answers
        letters = answers.unflatten(2, (N_LETTERS, N_LETTERS)).log_softmax(-1).flatten(2)  # [task, time, letter]
        return letters @ F.one_hot(self.strings, N_LETTERS).to(self.dtype).flatten(2).mT

    def named(self, answers: Float[Tensor, "task time code"]) -> Int[Tensor, "task time"]:
        """The label that an answer names; -1 if it spells a string that no class has."""
        if self.strings is None:
            return answers.argmax(-1)
        spelled = answers.unflatten(2, (N_LETTERS, N_LETTERS)).argmax(-1)  # [task, time, letter]
        same = (spelled[:, :, None] == self.strings[:, None]).all(-1)  # [task, time, way]
        return torch.where(same.any(-1), same.int().argmax(-1), -1)


def strings(labels: Labels, n_way: int) -> Int[Tensor, "task way letter"]:
    """A string of five letters, from 0 to 4, for each class of each task: distinct within a task, and random.

    They are drawn from a generator that the order of the task's labels seeds, so that a task is always written alike.
    """
    n_strings = N_LETTERS**N_LETTERS
    if n_way > n_strings:
        raise ValueError(f"n_way = {n_way} exceeds the {n_strings} strings of five letters; lower n_way")
    drawn = []
    for of_task in labels.tolist():
        seed = 0
        for label in of_task:
            seed = (seed * n_way + label) % (2**61 - 1)
        drawn.append(torch.randperm(n_strings, generator=torch.Generator().manual_seed(seed))[:n_way])
    places = N_LETTERS ** torch.arange(N_LETTERS)
    return (torch.stack(drawn)[..., None] // places % N_LETTERS).to(labels.device)
