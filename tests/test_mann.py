"""MANN against loops written from the paper's equations, one number at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from metatutor.backbones import Pixels
from metatutor.memory import MANN
from metatutor.memory.mann import Memory, cosine, least_used, write
from metatutor.memory.stream import lstm
from tests.streams import Vector, dot, inputs_by_hand, linear, lstm_by_hand, mann, noise, sigmoid, stream
from tests.tasks import close

every_sharpness = pytest.mark.parametrize("sharpen", [True, False], ids=["sharpened", "as in the paper"])


def cosine_by_hand(a: Vector, b: Vector) -> float:
    lengths = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / lengths if lengths else 0.0


def least_by_hand(usage: Vector, heads: int) -> list[int]:
    return sorted(range(len(usage)), key=lambda slot: usage[slot])[:heads]


@dataclass
class ByHand:
    """The memory of one task, in numbers."""

    h: Vector
    cell: Vector
    matrix: list[Vector]  # [slot][width]
    usage: Vector
    read_weights: list[Vector]  # [head][slot]
    write_weights: list[Vector]
    read: list[Vector]  # [head][width]

    @classmethod
    def of(cls, state: Memory, task: int) -> ByHand:
        return cls(*(tensor[task].tolist() for tensor in state))

    def equals(self, state: Memory, task: int) -> bool:
        return all(
            close(tensor[task], torch.tensor(vars(self)[n], dtype=torch.float64))
            for n, tensor in state._asdict().items()
        )


def step_by_hand(method: MANN, old: ByHand, seen: Vector, unused: list[int]) -> tuple[ByHand, Vector]:
    """Equations 2 to 8 and the controller; `unused` are the least used slots, one a head."""
    heads, width, slots = range(method.heads), range(method.width), range(method.slots)
    from_inputs = linear(method.enter, seen)
    from_before = linear(method.recur, old.h + [x for read in old.read for x in read])
    h, cell = lstm_by_hand([a + b for a, b in zip(from_inputs, from_before, strict=True)], old.cell)
    control = linear(method.control, h)
    keys = [[math.tanh(control[head * method.width + j]) for j in width] for head in heads]
    after_keys = method.heads * method.width
    gates = [sigmoid(control[after_keys + head]) for head in heads]
    strengths = [1.0] * method.heads
    if method.sharpen:
        strengths = [1 + math.log(1 + math.exp(control[after_keys + method.heads + head])) for head in heads]
    reads: list[Vector] = []
    for r in heads:
        powers = [math.exp(strengths[r] * cosine_by_hand(keys[r], row)) for row in old.matrix]
        reads.append([power / sum(powers) for power in powers])
    read = [[dot(reads[r], [row[j] for row in old.matrix]) for j in width] for r in heads]
    writes = [
        [gates[r] * old.read_weights[r][i] + (1 - gates[r]) * (1.0 if i == unused[r] else 0.0) for i in slots]
        for r in heads
    ]
    matrix = [
        [(0.0 if i in unused else old.matrix[i][j]) + sum(writes[r][i] * keys[r][j] for r in heads) for j in width]
        for i in slots
    ]
    usage = [method.usage_decay * old.usage[i] + sum(reads[r][i] + writes[r][i] for r in heads) for i in slots]
    answer = linear(method.out, h + [x for of_head in read for x in of_head])
    return ByHand(h, cell, matrix, usage, reads, writes, read), answer


def any_memory(method: MANN, n_tasks: int) -> Memory:
    """A memory that has seen things: nothing is zero, and no two slots are used equally."""
    shapes = [tensor.shape for tensor in method.start(n_tasks)]
    state = Memory(*(noise(*shape, seed=i) for i, shape in enumerate(shapes)))
    weights = {name: getattr(state, name).softmax(-1) for name in ("read_weights", "write_weights")}
    return state._replace(usage=state.usage.abs(), **weights)


def test_cosine_by_a_loop():
    keys, matrix = noise(2, 3, 4), noise(2, 5, 4, seed=1)
    found = cosine(keys, matrix)
    for task in range(2):
        for head in range(3):
            for slot in range(5):
                a, b = keys[task, head].tolist(), matrix[task, slot].tolist()
                assert math.isclose(found[task, head, slot].item(), cosine_by_hand(a, b), rel_tol=1e-12)
    assert close(found, F.cosine_similarity(keys[:, :, None], matrix[:, None], dim=-1))
    assert close(cosine(keys, 1e-6 * matrix), found)  # however faintly it was written


def test_a_cosine_is_1_with_oneself_and_0_with_nothing():
    matrix = noise(1, 4, 3)
    matrix[0, 2] = 0
    found = cosine(5 * matrix, 0.1 * matrix)[0]
    assert close(found.diagonal()[[0, 1, 3]], torch.ones(3, dtype=torch.float64))
    assert (found[2] == 0).all() and (found[:, 2] == 0).all()


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_least_used_by_a_loop(heads: int):
    usage = noise(4, 6).abs()
    expected = torch.zeros(4, heads, 6, dtype=torch.float64)
    for task in range(4):
        for head, slot in enumerate(least_by_hand(usage[task].tolist(), heads)):
            expected[task, head, slot] = 1
    assert torch.equal(least_used(usage, heads), expected)


def test_among_slots_used_equally_each_head_gets_one_of_its_own():
    marked = least_used(torch.tensor([[2.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 5]), heads=3)
    assert (marked.sum(-1) == 1).all() and (marked.sum(1) <= 1).all()
    assert marked[0].sum(0).tolist() == [0, 1, 1, 1, 0]


def test_of_slots_used_equally_the_first_are_taken():
    """The same on every machine, and as many slots as in the paper: an unstable choice shows in large memories only."""
    usage = torch.zeros(3, 128)
    usage[1, :50] = 1.0
    usage[2, ::2] = 1.0
    chosen = least_used(usage, heads=4).argmax(-1).tolist()
    assert chosen == [[0, 1, 2, 3], [50, 51, 52, 53], [1, 3, 5, 7]]


def test_write_by_a_loop():
    matrix, weights, keys = noise(2, 5, 3), noise(2, 2, 5, seed=1).softmax(-1), noise(2, 2, 3, seed=2)
    unused = least_used(noise(2, 5, seed=3), 2)
    before = matrix.clone()
    found = write(matrix, unused, weights, keys)
    for task in range(2):
        for slot in range(5):
            for j in range(3):
                kept = 0.0 if unused[task, :, slot].any() else matrix[task, slot, j].item()
                added = sum((weights[task, head, slot] * keys[task, head, j]).item() for head in range(2))
                assert math.isclose(found[task, slot, j].item(), kept + added, rel_tol=1e-12)
    assert torch.equal(matrix, before)  # a new memory; the old one is still there to be learned through


def test_an_lstm_by_a_loop():
    gates, cell = noise(3, 16), noise(3, 4, seed=1)
    h, kept = lstm(gates, cell)
    for task in range(3):
        by_hand = lstm_by_hand(gates[task].tolist(), cell[task].tolist())
        assert close(h[task], torch.tensor(by_hand[0], dtype=torch.float64))
        assert close(kept[task], torch.tensor(by_hand[1], dtype=torch.float64))


@every_sharpness
def test_one_step_by_a_loop(sharpen: bool):
    """From any memory at all: controller, gates, writing, reading, usage and answer."""
    method = mann(sharpen=sharpen, usage_decay=0.8)
    before, seen = any_memory(method, 2), noise(2, method.input_size, seed=9)
    after, answers = method.step(before, method.prepare(seen[:, None])[:, 0])
    for task in range(2):
        old = ByHand.of(before, task)
        new, answer = step_by_hand(method, old, seen[task].tolist(), least_by_hand(old.usage, 2))
        assert new.equals(after, task)
        assert close(answers[task], torch.tensor(answer, dtype=torch.float64))


@every_sharpness
def test_a_stream_by_a_loop(sharpen: bool):
    """From the empty memory to the last query image. Of slots that are used equally, any may be written."""
    method, task = mann(sharpen=sharpen, usage_decay=0.8), stream(1, k_shot=4)
    state, found, states = ByHand.of(method.start(1), 0), method.stream_logits(task), method.trace(task)

    def unused() -> list[int]:
        slots = least_used(torch.tensor([state.usage]).double(), 2)[0].argmax(-1).tolist()
        assert [state.usage[slot] for slot in slots] == [state.usage[slot] for slot in least_by_hand(state.usage, 2)]
        return slots

    for time, seen in enumerate(inputs_by_hand(method, task)):
        state, answer = step_by_hand(method, state, seen, unused())
        assert close(found[0, time], torch.tensor(answer, dtype=torch.float64))
        assert state.equals(states[time], 0)
    last = F.one_hot(task.support_labels[0, -1], 3).double().tolist()
    for image, logits in zip(task.query_images[0], method(task)[0], strict=True):
        _, answer = step_by_hand(method, state, method.network.embed(image[None])[0].tolist() + last, unused())
        assert close(logits, torch.tensor(answer, dtype=torch.float64))


def test_a_stream_begins_with_an_empty_memory():
    start = mann().start(3)
    assert all((tensor == 0).all() for name, tensor in start._asdict().items() if name != "read_weights")
    assert torch.equal(start.read_weights, torch.eye(2, 7, dtype=torch.float64).expand(3, 2, 7))
    assert start.matrix.shape == (3, 7, 3) and start.usage.shape == (3, 7) and start.read.shape == (3, 2, 3)


@every_sharpness
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_weights_are_shares_and_usage_is_what_is_left_of_them(sharpen: bool, decay: float):
    method, task = mann(sharpen=sharpen, usage_decay=decay), stream(3, k_shot=5)
    states = method.trace(task)
    assert len(states) == 15
    for before, after in zip([method.start(3), *states[:-1]], states, strict=True):
        for weights in (after.read_weights, after.write_weights):
            assert (weights >= 0).all() and torch.allclose(weights.sum(-1), torch.ones(3, 2, dtype=torch.float64))
        now = (after.read_weights + after.write_weights).sum(1)
        assert close(after.usage, decay * before.usage + now)
        assert close(after.usage.sum(-1), decay * before.usage.sum(-1) + 4)  # two heads, each reads and writes
        assert close(after.read, torch.einsum("trs,tsw->trw", after.read_weights, before.matrix))


def gates_at(method: MANN, value: float) -> None:
    """Let the controller say this to every gate, whatever it sees."""
    keys = method.heads * method.width
    method.control.weight.data[keys : keys + method.heads] = 0
    method.control.bias.data[keys : keys + method.heads] = value


def test_a_closed_gate_writes_to_the_least_used_slots_only():
    method, task = mann(), stream(2, k_shot=5)
    gates_at(method, -1000.0)
    states = method.trace(task)
    for before, after in zip([method.start(2), *states[:-1]], states, strict=True):
        assert torch.equal(after.write_weights, least_used(before.usage, 2))
        written = after.write_weights.sum(1) == 1
        assert (written.sum(-1) == 2).all()
        assert torch.equal(after.matrix[~written], before.matrix[~written])
        assert (before.usage[written].view(2, 2).amax(1) <= before.usage[~written].view(2, 5).amin(1)).all()
        assert (after.matrix[written].abs() < 1).all()  # the old row is wiped: a key alone is between -1 and 1
    assert (states[3].matrix.norm(dim=-1) > 0).all()  # four steps, two heads: all seven slots are written


def test_an_open_gate_writes_where_was_just_read():
    method, task = mann(), stream(2, k_shot=5)
    gates_at(method, 1000.0)
    states = method.trace(task)
    for before, after in zip([method.start(2), *states[:-1]], states, strict=True):
        assert torch.equal(after.write_weights, before.read_weights)


def test_what_was_just_written_is_read_one_step_later():
    """The memory is read before it is written: the first image finds nothing, the second what the first has left."""
    method, task = mann(), stream(2)
    first, second = method.trace(task)[:2]
    assert (first.read == 0).all() and (first.matrix != 0).any()
    assert close(first.read_weights, torch.full((2, 2, 7), 1 / 7, dtype=torch.float64))
    assert (second.read != 0).all()


def test_reading_is_sharp_at_first():
    """Or a memory of many slots would show nothing but their mean."""
    torch.manual_seed(0)
    method = MANN(Pixels(2), n_way=3, slots=128)
    assert (method.control.bias[-4:] == 10).all() and (method.control.bias[:-4].abs() < 1).all()
    before = method.start(1)
    before = before._replace(matrix=F.one_hot(torch.arange(128) % 40, 40).float()[None])
    weights = [
        m.step(before, m.prepare(torch.rand(1, 1, m.input_size))[:, 0])[0].read_weights.amax().item()
        for m in (method, MANN(Pixels(2), n_way=3, slots=128, sharpen=False))
    ]
    assert weights[0] > 2 * weights[1]


def test_strength_sharpens():
    """The same controller reads more sharply with strengths, and never less so than the paper's."""
    sharp, plain = mann(), mann(sharpen=False)
    after_gates = 2 * 3 + 2
    for layer in ("enter", "recur", "out"):
        getattr(plain, layer).load_state_dict(getattr(sharp, layer).state_dict())
    plain.control.weight.data, plain.control.bias.data = (
        sharp.control.weight[:after_gates].detach().clone(),
        sharp.control.bias[:after_gates].detach().clone(),
    )
    before, seen = any_memory(sharp, 2), noise(2, sharp.input_size)
    weights = []
    for strength in (None, -1000.0, 0.0, 3.0):
        method = plain if strength is None else sharp
        if strength is not None:
            sharp.control.weight.data[after_gates:], sharp.control.bias.data[after_gates:] = 0, strength
        weights.append(method.step(before, method.prepare(seen[:, None])[:, 0])[0].read_weights.amax(-1))
    assert close(weights[0], weights[1])  # a strength of 1
    assert (weights[1] < weights[2]).all() and (weights[2] < weights[3]).all()


def test_what_is_learned_reaches_back_to_the_first_image():
    """The loss of the last answer alone has a gradient for the first image: through the memory, nothing is cut."""
    method, task = mann(), stream(1)
    images = task.support_images.clone().requires_grad_()
    method.stream_logits(replace(task, support_images=images))[0, -1, 0].backward()
    assert images.grad is not None
    assert (images.grad[0].abs().amax((1, 2, 3)) > 0).all()


def test_as_many_heads_as_slots_and_no_decay_are_allowed():
    assert mann(slots=2, usage_decay=0.0).stream_logits(stream()).isfinite().all()
    assert mann(slots=2, usage_decay=1.0).stream_logits(stream()).isfinite().all()
