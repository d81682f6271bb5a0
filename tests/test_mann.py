"""MANN and its controls: against loops written from the paper's equations, and what no stream may give away."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from metatutor import learner as learner_module
from metatutor.backbones import ConvNet, Normalization, Pixels
from metatutor.episodes import ClassImages, Episode, EpisodeSpec, StreamSampler
from metatutor.evaluation import confidence95, instance_accuracies, instances
from metatutor.memory import MANN, FeedForward, MANNConfig, PlainLSTM
from metatutor.memory import stream as stream_module
from metatutor.memory.codes import Codes, strings
from metatutor.memory.mann import Memory, cosine, least_used, write
from metatutor.memory.stream import StreamLearner, lstm, told_late
from metatutor.training import TrainConfig, train

small_mann = partial(MANN, hidden_size=5, slots=7, width=3, heads=2)
METHODS: dict[str, Callable[..., StreamLearner]] = {
    "mann": small_mann,
    "mann, as in the paper": partial(small_mann, sharpen=False),
    "mann, letters": partial(small_mann, labels="letters"),
    "plain lstm": partial(PlainLSTM, hidden_size=5),
    "plain lstm, letters": partial(PlainLSTM, hidden_size=5, labels="letters"),
    "feed-forward": partial(FeedForward, hidden_size=5),
    "feed-forward, letters": partial(FeedForward, hidden_size=5, labels="letters"),
}
every_method = pytest.mark.parametrize("name", METHODS)
every_sharpness = pytest.mark.parametrize("sharpen", [True, False], ids=["sharpened", "as in the paper"])


def vivid(method: nn.Module, seed: int = 0) -> None:
    """Make every parameter random and large, so that nothing that is computed fails to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in method.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)


def learner(name: str, *, n_way: int = 3, **more) -> StreamLearner:
    method = METHODS[name](Pixels(2), n_way=n_way, **more).double().eval()
    vivid(method)
    return method


def mann(**more) -> MANN:
    method = small_mann(Pixels(2), n_way=3, **more).double().eval()
    vivid(method)
    return method


def stream(n_tasks: int = 2, n_way: int = 3, k_shot: int = 2, n_query: int = 2, seed: int = 0) -> Episode:
    """Random float64 pixels, the support images in random order; two images of a class have nothing in common."""
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.arange(n_way).repeat_interleave(n).repeat(n_tasks, 1) for n in (k_shot, n_query)]
    images = [torch.rand(*of.shape, 1, 8, 8, generator=generator, dtype=torch.float64) for of in labels]
    orders = [torch.randperm(n_way * k_shot, generator=generator) for _ in range(n_tasks)]
    support_labels = torch.stack([of_task[order] for of_task, order in zip(labels[0], orders, strict=True)])
    return Episode(images[0], support_labels, images[1], labels[1], n_way)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def differs(one: Tensor, other: Tensor) -> list[bool]:
    """Whether two sequences of answers, `[task, time, ...]`, differ at each time."""
    return ((one - other).abs() > 1e-12).any(-1).any(0).tolist()


# --- the equations, one number at a time ------------------------------------------------------------------------

Vector = list[float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dot(a: Vector, b: Vector) -> float:
    return sum((x * y for x, y in zip(a, b, strict=True)), 0.0)


def linear(layer: nn.Linear, x: Vector) -> Vector:
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + b for row, b in zip(layer.weight.tolist(), bias, strict=True)]


def lstm_by_hand(gates: Vector, cell: Vector) -> tuple[Vector, Vector]:
    """Output and cell; the gates are those of input, forgetting, the new and output, one block after the other."""
    n = len(cell)
    kept = [sigmoid(gates[n + j]) * cell[j] + sigmoid(gates[j]) * math.tanh(gates[2 * n + j]) for j in range(n)]
    return [sigmoid(gates[3 * n + j]) * math.tanh(kept[j]) for j in range(n)], kept


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
    config, heads, width = method.config, range(method.config.heads), range(method.config.width)
    slots = range(config.slots)
    from_inputs = linear(method.enter, seen)
    from_before = linear(method.recur, old.h + [x for read in old.read for x in read])
    h, cell = lstm_by_hand([a + b for a, b in zip(from_inputs, from_before, strict=True)], old.cell)
    control = linear(method.control, h)
    keys = [[math.tanh(control[head * config.width + j]) for j in width] for head in heads]
    after_keys = config.heads * config.width
    gates = [sigmoid(control[after_keys + head]) for head in heads]
    strengths = [1.0] * config.heads
    if config.sharpen:
        strengths = [1 + math.log(1 + math.exp(control[after_keys + config.heads + head])) for head in heads]
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
    usage = [config.usage_decay * old.usage[i] + sum(reads[r][i] + writes[r][i] for r in heads) for i in slots]
    answer = linear(method.out, h + [x for of_head in read for x in of_head])
    return ByHand(h, cell, matrix, usage, reads, writes, read), answer


def inputs_by_hand(method: StreamLearner, task: Episode) -> list[Vector]:
    """What a learner of one-hot labels sees of one task at each step: an image, and the label of the one before."""
    told, inputs = [0.0] * task.n_way, []
    for image, label in zip(task.support_images[0], task.support_labels[0].tolist(), strict=True):
        inputs.append(method.network.embed(image[None])[0].tolist() + told)
        told = [1.0 if way == label else 0.0 for way in range(task.n_way)]
    return inputs


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
    keys = method.config.heads * method.config.width
    method.control.weight.data[keys : keys + method.config.heads] = 0
    method.control.bias.data[keys : keys + method.config.heads] = value


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


# --- what a stream tells, and when ------------------------------------------------------------------------------


@pytest.fixture
def same_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strings of the classes stay the same, whatever the labels: to see what the labels themselves do."""
    fixed = strings(torch.arange(6)[None], 6)[:, :3]
    monkeypatch.setattr(stream_module, "strings", lambda labels, n_way: fixed.expand(len(labels), -1, -1))


@every_method
def test_a_later_image_never_changes_an_earlier_answer(name: str):
    method, task = learner(name), stream(k_shot=3)
    logits = method.stream_logits(task)
    for time in range(9):
        images = task.support_images.clone()
        images[:, time] = 1 - images[:, time]
        changed = differs(method.stream_logits(replace(task, support_images=images)), logits)
        after = [name.startswith("feed") is False] * (8 - time)
        assert changed == [False] * time + [True] + after


@every_method
def test_a_label_is_told_one_step_late(name: str, same_strings: None):
    """It never changes the answer to its own image, nor an earlier one; it always changes the next."""
    method, task = learner(name), stream(k_shot=3)
    logits = method.stream_logits(task)
    for time in range(9):
        labels = task.support_labels.clone()
        labels[:, time] = (labels[:, time] + 1) % 3
        changed = differs(method.stream_logits(replace(task, support_labels=labels)), logits)
        remembered = [name.startswith("feed") is False] * (7 - time)
        assert changed == [False] * (time + 1) + ([True, *remembered] if time < 8 else [])


def test_nothing_is_told_at_first_and_then_the_label_before():
    codes = noise(2, 4, 3)
    told = told_late(codes)
    assert told.shape == codes.shape and (told[:, 0] == 0).all()
    assert all(torch.equal(told[:, time], codes[:, time - 1]) for time in range(1, 4))


@every_method
def test_the_last_label_is_told_to_the_queries(name: str, same_strings: None):
    method, task = learner(name), stream()
    labels = task.support_labels.clone()
    labels[:, -1] = (labels[:, -1] + 1) % 3
    changed = replace(task, support_labels=labels)
    assert differs(method(changed), method(task)) == [True] * 6
    assert close(method.stream_logits(changed), method.stream_logits(task))


@every_method
def test_a_query_is_what_one_more_image_of_the_stream_would_be(name: str, same_strings: None):
    method, task = learner(name), stream()
    for query in range(6):
        longer = replace(
            task,
            support_images=torch.cat([task.support_images, task.query_images[:, query : query + 1]], dim=1),
            support_labels=torch.cat([task.support_labels, task.query_labels[:, query : query + 1]], dim=1),
        )
        assert close(method(task)[:, query], method.stream_logits(longer)[:, -1])


@every_method
def test_the_labels_that_were_told_matter(name: str):
    method, task = learner(name), stream()
    assert not close(method(replace(task, support_labels=(task.support_labels + 1) % 3)), method(task))


@every_method
def test_every_stream_begins_anew(name: str):
    method, task, other = learner(name), stream(), stream(seed=1)
    answers, logits, loss = method(task), method.stream_logits(task), method.meta_loss(task)
    for _ in range(2):
        for ask in (method, method.meta_loss, method.stream_logits):
            ask(other)
        assert torch.equal(method(task), answers)
        assert torch.equal(method.stream_logits(task), logits)
        assert torch.equal(method.meta_loss(task), loss)


@every_method
def test_a_batch_of_tasks_is_the_tasks_one_by_one(name: str):
    method, tasks = learner(name), stream(3)
    alone = [tasks.task(i) for i in range(3)]
    assert close(method(tasks), torch.cat([method(task) for task in alone]))
    assert close(method.stream_logits(tasks), torch.cat([method.stream_logits(task) for task in alone]))
    assert close(method.meta_loss(tasks), torch.stack([method.meta_loss(task) for task in alone]).mean())
    assert torch.equal(method.stream_answers(tasks), torch.cat([method.stream_answers(task) for task in alone]))


def test_a_network_that_normalises_each_image_by_itself():
    torch.manual_seed(0)
    network = ConvNet(filters=4, n_blocks=2, image_size=8, normalization="group")
    method, tasks = small_mann(network, n_way=3).double(), stream(3)
    before = method.stream_logits(tasks)
    images = tasks.support_images.clone()
    images[:, -1] = 1 - images[:, -1]
    assert differs(method.stream_logits(replace(tasks, support_images=images)), before) == [False] * 5 + [True]


@pytest.mark.parametrize("normalization", ["batch", "support"])
@pytest.mark.parametrize("method", [MANN, PlainLSTM, FeedForward])
def test_a_network_that_lets_later_images_change_earlier_answers(
    method: type[StreamLearner], normalization: Normalization
):
    with pytest.raises(ValueError, match=f"normalization = '{normalization}'.*normalization='group', or take Pixels"):
        method(ConvNet(filters=4, normalization=normalization))


@pytest.mark.parametrize("network", [Pixels(3), ConvNet(filters=4, n_blocks=2, image_size=8, normalization="group")])
def test_tasks_side_by_side_are_tasks_in_turn(network: Pixels | ConvNet, monkeypatch: pytest.MonkeyPatch):
    """What a GPU does, and what a CPU does."""
    method, tasks = small_mann(network, n_way=3).double(), stream(3)
    in_turn, loss = method(tasks), method.meta_loss(tasks)
    side_by_side = partial(learner_module.each_task, side_by_side=True)
    monkeypatch.setattr(learner_module, "each_task", side_by_side)
    monkeypatch.setattr(stream_module, "each_task", side_by_side)
    assert close(method(tasks), in_turn)
    assert close(method.meta_loss(tasks), loss)


@every_method
def test_queries_do_not_see_one_another(name: str):
    method, task = learner(name), stream()
    images = task.query_images.clone()
    images[:, 0] = 1 - images[:, 0]
    assert differs(method(replace(task, query_images=images)), method(task)) == [True] + [False] * 5
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    permuted = replace(task, query_images=task.query_images[:, order], query_labels=task.query_labels[:, order])
    assert close(method(permuted), method(task)[:, order])


@every_method
@pytest.mark.parametrize("steps", [0, 2])
def test_query_labels_are_not_read(name: str, steps: int):
    method, task = learner(name, finetune_steps=steps), stream()
    unlabelled = replace(task, query_labels=torch.full_like(task.query_labels, -1))
    assert torch.equal(method(unlabelled), method(task))
    assert torch.equal(method.meta_loss(unlabelled), method.meta_loss(task))


@every_method
def test_query_images_take_no_part_in_the_meta_loss(name: str):
    method, task = learner(name), stream()
    assert torch.equal(method.meta_loss(replace(task, query_images=1 - task.query_images)), method.meta_loss(task))


@every_method
@pytest.mark.parametrize(("n_way", "k_shot", "n_query"), [(2, 1, 1), (5, 3, 2), (1, 2, 1)])
def test_any_way_and_shot(name: str, n_way: int, k_shot: int, n_query: int):
    method, task = learner(name, n_way=n_way), stream(2, n_way, k_shot, n_query)
    assert method(task).shape == (2, n_way * n_query, n_way)
    assert method.stream_logits(task).shape == (2, n_way * k_shot, n_way)
    assert method.meta_loss(task).isfinite()


@every_method
def test_tasks_come_in_random_order_in_training_and_in_test(name: str, class_images: Callable[..., ClassImages]):
    """A stream sorted by class would give its labels away."""
    method, spec = learner(name), EpisodeSpec(3, 3, 1)
    for sampler in (method.sampler(class_images(), spec, seed=4), method.test_sampler(class_images(), spec, seed=4)):
        labels = sampler.sample(20).support_labels
        assert not (labels == labels.sort().values).all(1).any()
        again = StreamSampler(class_images(), spec, seed=4).sample(20)
        assert torch.equal(labels, again.support_labels)


# --- losses and letters -----------------------------------------------------------------------------------------


def test_the_loss_of_one_hot_labels_by_a_loop():
    method, task = mann(), stream()
    losses = []
    for logits, labels in zip(method.stream_logits(task), task.support_labels.tolist(), strict=True):
        for of_image, label in zip(logits.tolist(), labels, strict=True):
            losses.append(math.log(sum(math.exp(logit) for logit in of_image)) - of_image[label])
    assert math.isclose(method.meta_loss(task).item(), sum(losses) / 12, rel_tol=1e-9)


def test_the_loss_of_letters_by_a_loop():
    """Minus the log-probabilities of the five letters, each among five, with nothing to tell it which strings exist."""
    method, task = mann(labels="letters"), stream()
    codes = method.codes(task)
    assert codes.strings is not None
    _, answers = method.read(method.embed_stream(task.support_images), codes.of(task.support_labels))
    losses = []
    for i in range(2):
        for time, label in enumerate(task.support_labels[i].tolist()):
            loss = 0.0
            for place, letter in enumerate(codes.strings[i, label].tolist()):
                scores = answers[i, time, 5 * place : 5 * place + 5].tolist()
                loss -= math.log(math.exp(scores[letter]) / sum(math.exp(score) for score in scores))
            losses.append(loss)
    assert math.isclose(method.meta_loss(task).item(), sum(losses) / 12, rel_tol=1e-9)


def test_strings_are_distinct_and_random():
    labels = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(30)])
    drawn = strings(labels, 40)
    assert drawn.shape == (30, 40, 5) and drawn.min() == 0 and drawn.max() == 4
    spelled = [["".join(map(str, string)) for string in of_task.tolist()] for of_task in drawn]
    assert all(len(set(of_task)) == 40 for of_task in spelled)
    assert len({string for of_task in spelled for string in of_task}) > 700  # of about 1200 drawn from 3125
    for place in range(5):
        counts = drawn[..., place].flatten().bincount(minlength=5)
        assert ((counts - 240).abs() < 5 * (1200 * 0.2 * 0.8) ** 0.5).all()
    every = strings(torch.zeros(1, 1, dtype=torch.int64), 3125)[0]
    assert len(set(map(tuple, every.tolist()))) == 3125


def test_strings_depend_on_the_order_of_a_tasks_labels_and_on_nothing_else():
    labels = torch.tensor([[0, 1, 2, 0], [0, 2, 1, 0], [0, 1, 2, 0]])
    torch.manual_seed(1)
    drawn = strings(labels, 3)
    torch.manual_seed(2)
    assert torch.equal(strings(labels, 3), drawn)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(strings(labels[1:2], 3), drawn[1:2])
    long = torch.arange(100).repeat(10)[None]  # the seed stays a number that a generator takes
    assert not torch.equal(strings(long, 100), strings(long.flip(1), 100))
    method, task = mann(labels="letters"), stream()
    spelled = method.codes(task).strings
    assert spelled is not None
    assert torch.equal(spelled, strings(task.support_labels, 3))


def test_more_classes_than_strings():
    with pytest.raises(ValueError, match="n_way = 3126 exceeds the 3125 strings of five letters; lower n_way"):
        strings(torch.zeros(1, 2, dtype=torch.int64), 3126)


def test_codes_by_loops():
    labels = torch.tensor([[2, 0, 1, 1], [1, 1, 2, 0]])
    drawn, answers = strings(labels, 3), noise(2, 4, 25)
    codes = Codes(drawn, torch.float64)
    written, logits = codes.of(labels), codes.logits(answers)
    assert written.shape == (2, 4, 25) and written.dtype == torch.float64
    for task in range(2):
        for time in range(4):
            for place, letter in enumerate(drawn[task, labels[task, time]].tolist()):
                one = [1.0 if i == letter else 0.0 for i in range(5)]
                assert written[task, time, 5 * place : 5 * place + 5].tolist() == one
            for way in range(3):
                total = 0.0
                for place, letter in enumerate(drawn[task, way].tolist()):
                    scores = answers[task, time, 5 * place : 5 * place + 5]
                    total += scores.log_softmax(0)[letter].item()
                assert math.isclose(logits[task, time, way].item(), total, rel_tol=1e-9)


def test_an_answer_names_the_class_whose_string_it_spells():
    labels = torch.tensor([[2, 0, 1, 1], [1, 1, 2, 0]])
    drawn = strings(labels, 3)
    codes = Codes(drawn, torch.float64)
    spelled = codes.of(labels) + 0.1 * noise(2, 4, 25).tanh()
    assert torch.equal(codes.named(spelled), labels)
    spelled[0, 2, 10:15] = spelled[0, 2, 10:15].roll(1)  # one letter wrong: a string that nobody has
    assert codes.named(spelled).tolist() == [[2, 0, -1, 1], [1, 1, 2, 0]]
    assert codes.logits(spelled).argmax(-1).tolist() == labels.tolist()  # the nearest is still the right one


def test_one_hot_codes():
    codes, labels = Codes(None, torch.float64, 3), torch.tensor([[2, 0, 1]])
    assert codes.of(labels).tolist() == [[[0, 0, 1], [1, 0, 0], [0, 1, 0]]]
    answers = noise(1, 3, 3)
    assert torch.equal(codes.logits(answers), answers)
    assert torch.equal(codes.named(answers), answers.argmax(-1))


@every_method
def test_stream_answers_are_the_most_probable_ones(name: str):
    method, task = learner(name), stream(4, k_shot=5)
    answers = method.stream_answers(task)
    if not name.endswith("letters"):
        assert torch.equal(answers, method.stream_logits(task).argmax(-1))
        return
    codes = method.codes(task)
    assert codes.strings is not None
    _, letters = method.read(method.embed_stream(task.support_images), codes.of(task.support_labels))
    for i in range(4):
        known = {tuple(string): way for way, string in enumerate(codes.strings[i].tolist())}
        for time in range(15):
            spelled = tuple(int(letters[i, time, 5 * p : 5 * p + 5].argmax()) for p in range(5))
            assert answers[i, time] == known.get(spelled, -1)


# --- the controls -----------------------------------------------------------------------------------------------


def test_the_plain_lstm_is_the_lstm_of_pytorch():
    method, task = learner("plain lstm"), stream(3, k_shot=3)
    assert isinstance(method, PlainLSTM)
    theirs = nn.LSTM(method.input_size, 5, batch_first=True).double()
    theirs.load_state_dict(
        {
            "weight_ih_l0": method.enter.weight,
            "weight_hh_l0": method.recur.weight,
            "bias_ih_l0": method.enter.bias,
            "bias_hh_l0": torch.zeros(20, dtype=torch.float64),
        }
    )
    seen = torch.tensor([inputs_by_hand(method, task.task(i)) for i in range(3)], dtype=torch.float64)
    h, _ = theirs(seen)
    assert close(method.stream_logits(task), method.out(h))


def test_the_feed_forward_control_sees_an_image_and_the_label_before_it():
    method, task = learner("feed-forward"), stream()
    assert isinstance(method, FeedForward)
    found = method.stream_logits(task)
    for i in range(2):
        for time, seen in enumerate(inputs_by_hand(method, task.task(i))):
            hidden = [max(0.0, x) for x in linear(method.hidden, seen)]
            assert close(found[i, time], torch.tensor(linear(method.out, hidden), dtype=torch.float64))
    order = [4, 2, 0, 1, 3, 5]  # another past, the same last image
    reordered = replace(
        task, support_images=task.support_images[:, order], support_labels=task.support_labels[:, order]
    )
    assert close(method(reordered), method(task))
    assert not close(method.stream_logits(reordered), found[:, order])


@pytest.mark.parametrize("name", ["mann", "plain lstm"])
def test_forget_gates_are_open_at_first(name: str):
    torch.manual_seed(0)
    method = METHODS[name](Pixels(2), n_way=3)
    assert isinstance(method, MANN | PlainLSTM)
    bound = 1 / math.sqrt(method.input_size)
    bias = method.enter.bias.detach().view(4, 5)
    assert ((bias[1] - 1).abs() <= bound).all()
    assert (bias[[0, 2, 3]].abs() <= bound).all()


# --- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_gradients_against_finite_differences(name: str):
    """Of every parameter and of the images, through a stream of six steps."""
    method, task = METHODS[name](Pixels(1), n_way=3).double(), stream(1)
    generator = torch.Generator().manual_seed(0)
    for parameter in method.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    names = [n for n, _ in method.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in method.parameters()]

    def loss(images: Tensor, *values: Tensor) -> Tensor:
        own = dict(zip(names, values, strict=True))
        return method.under(own, method.meta_loss, replace(task, support_images=images))

    assert gradcheck(loss, [task.support_images.clone().requires_grad_(), *parameters], atol=1e-6, fast_mode=True)


def test_what_is_learned_reaches_back_to_the_first_image():
    """The loss of the last answer alone has a gradient for the first image: through the memory, nothing is cut."""
    method, task = mann(), stream(1)
    images = task.support_images.clone().requires_grad_()
    method.stream_logits(replace(task, support_images=images))[0, -1, 0].backward()
    assert images.grad is not None
    assert (images.grad[0].abs().amax((1, 2, 3)) > 0).all()


# --- learning ---------------------------------------------------------------------------------------------------


class Always:
    """Draws the same task again and again."""

    def __init__(self, task: Episode) -> None:
        self.task, self.generator = task, torch.Generator()

    def sample(self, n_tasks: int) -> Episode:
        return self.task


@pytest.mark.parametrize("name", ["mann", "mann, letters", "plain lstm"])
def test_learns_one_episode_by_heart(name: str):
    torch.manual_seed(0)
    method, task = METHODS[name](Pixels(2), n_way=3).double(), stream(1)
    before = method.meta_loss(task).item()
    config = TrainConfig(iterations=120, tasks_per_step=1, outer_lr=0.05, warmup=0)
    train(method, Always(task), config, progress_bar=False, device="cpu")
    assert method.meta_loss(task).item() < 0.05 * before
    assert torch.equal(method.stream_answers(task), task.support_labels)


def test_same_seed_same_parameters(class_images: Callable[..., ClassImages]):
    def trained(seed: int) -> MANN:
        torch.manual_seed(0)
        method = small_mann(Pixels(4), n_way=3)
        sampler = method.sampler(class_images(), EpisodeSpec(3, 2, 1), seed=seed)
        train(method, sampler, TrainConfig(iterations=4, tasks_per_step=3), progress_bar=False, device="cpu")
        return method

    one, same, other = (trained(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert all(not torch.equal(one[n], other[n]) for n in one)


@every_method
def test_the_parameters_are_all_that_a_learner_knows(name: str):
    """Loaded into another learner, they give the same answers; nothing of the last stream is among them."""
    method, task = learner(name), stream()
    method.meta_loss(task)
    other = METHODS[name](Pixels(2), n_way=3).double()
    assert not close(other.stream_logits(task), method.stream_logits(task))
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.stream_logits(task), method.stream_logits(task))
    assert torch.equal(other(task), method(task))
    assert method.state_dict().keys() == {n for n, _ in method.named_parameters()}


@every_method
def test_finetuning_descends_on_the_support_images_asked_as_queries(name: str):
    """One step by hand, of the cross-entropy of the answers; and the learner's own parameters stay."""
    method, task = learner(name, finetune_steps=1, finetune_lr=0.05), stream(1)
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    tuned = method.finetune(task)
    asked = replace(task, query_images=task.support_images, query_labels=task.support_labels)
    F.cross_entropy(method.answer(asked)[0], task.support_labels[0]).backward()
    for n, p in method.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        assert close(tuned[n], before[n] - 0.05 * gradient)
        assert torch.equal(p, before[n])
    plain = learner(name)
    assert not close(method(task), plain(task))
    assert close(method.train()(task), plain(task))  # training is not fine-tuned
    plain.load_state_dict(tuned)
    assert close(method.eval()(task), plain(task))


# --- what a stream does not give away ---------------------------------------------------------------------------


def bound(n_way: int) -> float:
    """The best accuracy on the first image of a class: a guess among the labels not yet told, one fewer each time."""
    return sum(1 / left for left in range(1, n_way + 1)) / n_way


def mean_and_error(of_streams: Tensor) -> tuple[float, float]:
    """The mean over streams, and its standard error."""
    return of_streams.mean().item(), confidence95(of_streams) / 1.96


class Oracle(FeedForward):
    """Knows every class by its pixels, remembers all that was told, and guesses among the labels that were not."""

    def __init__(self, n_way: int) -> None:
        super().__init__(Pixels(1), n_way=n_way, hidden_size=1)
        self.generator = torch.Generator().manual_seed(0)

    def stream_answers(self, episode: Episode) -> Tensor:
        answers = torch.zeros_like(episode.support_labels)
        known = (255 * episode.support_images[:, :, 0, 0, 0]).round().int().tolist()  # the class of every image
        for task, labels in enumerate(episode.support_labels.tolist()):
            told: dict[int, int] = {}
            for time, (of_class, label) in enumerate(zip(known[task], labels, strict=True)):
                left = sorted(set(range(self.n_way)) - set(told.values()))
                guess = int(torch.randint(len(left), (), generator=self.generator)) if left else 0
                answers[task, time] = told[of_class] if of_class in told else left[guess]
                told[of_class] = label
        return answers


@pytest.mark.parametrize("n_way", [2, 5])
def test_the_first_image_of_a_class_can_only_be_guessed(n_way: int):
    """An oracle that makes no mistake comes to the bound, and is right ever after."""
    pixels = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1, 1).expand(20, 5, 1, 2, 2).contiguous()
    classes, n_episodes = ClassImages(pixels, [str(i) for i in range(20)]), 1500
    sampler = StreamSampler(classes, EpisodeSpec(n_way, 4, 1), seed=0)
    found = instance_accuracies(Oracle(n_way), sampler, n_episodes, tasks_per_batch=500)
    first, error = mean_and_error(found[:, 0])
    assert abs(first - bound(n_way)) < 4 * error
    assert 0 < error < 0.01
    assert (found[:, 1:] == 1).all()


def test_the_bound_of_five_classes():
    assert bound(5) == pytest.approx((1 / 5 + 1 / 4 + 1 / 3 + 1 / 2 + 1) / 5)
    assert round(100 * bound(5), 1) == 45.7
    assert bound(2) == 0.75


STREAMS = EpisodeSpec(n_way=2, k_shot=3, n_query=1)


def sides(seed: int) -> ClassImages:
    """Two classes, dark above or dark below, under noise. Which is called 0 is drawn anew with every stream."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.tensor([[200, 200, 0, 0], [0, 0, 200, 200]]).view(2, 1, 1, 2, 2)
    drawings = halves + torch.randint(0, 56, (2, 12, 1, 2, 2), generator=generator)
    return ClassImages(drawings.to(torch.uint8), ["above", "below"])


def taught(method: StreamLearner) -> StreamLearner:
    config = TrainConfig(iterations=250, tasks_per_step=16, outer_lr=0.05, warmup=10)
    train(method, method.sampler(sides(0), STREAMS), config, progress_bar=False, device="cpu")
    return method


@pytest.fixture(scope="module")
def trained() -> StreamLearner:
    """A MANN that has learned to bind an image to the label told after it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return taught(MANN(Pixels(2), n_way=2, hidden_size=20, slots=6, width=4, heads=2))


def test_a_trained_learner_remembers_labels_but_cannot_foresee_them(trained: StreamLearner):
    found = instance_accuracies(trained, StreamSampler(sides(1), STREAMS, seed=1), 1000, tasks_per_batch=500)
    first, error = mean_and_error(found[:, 0])
    assert bound(2) - 0.1 < first < bound(2) + 4 * error
    assert (found[:, 1:].mean(0) > 0.95).all()
    test = StreamSampler(sides(1), STREAMS, seed=2).sample(500)
    assert (trained(test).argmax(-1) == test.query_labels).double().mean() > 0.95


def test_without_a_memory_the_same_training_is_in_vain():
    """All that is left is to name another class than the one just told: right in 3 of 5 cases."""
    torch.manual_seed(0)
    found = instance_accuracies(
        taught(FeedForward(Pixels(2), n_way=2, hidden_size=20)), StreamSampler(sides(1), STREAMS, seed=1), 1000
    )
    assert (found[:, 1:].mean(0) < 0.7).all()


@pytest.mark.parametrize("which", ["trained", "untrained"])
def test_labels_that_were_never_told_are_not_known(which: str, trained: StreamLearner):
    """Told nonsense in place of the labels, a learner is at chance, on the stream and on the queries."""
    method = trained
    if which == "untrained":
        method = small_mann(Pixels(2), n_way=2)
        vivid(method)
        method.float()
    generator = torch.Generator().manual_seed(0)
    task = StreamSampler(sides(1), STREAMS, seed=5).sample(1500)
    nonsense = replace(task, support_labels=torch.randint(2, task.support_labels.shape, generator=generator))
    for answers, truth in (
        (method.stream_answers(nonsense), task.support_labels),
        (method(nonsense).argmax(-1), task.query_labels),
    ):
        accuracy, error = mean_and_error((answers == truth).double().mean(1))
        assert abs(accuracy - 1 / 2) < 4 * error
        assert error < 0.015


def test_names_of_classes_mean_nothing_to_a_trained_learner(trained: StreamLearner):
    """Told the labels the other way round, it answers the other way round, but for the first guess."""
    task = StreamSampler(sides(1), STREAMS, seed=6).sample(500)
    renamed = replace(task, support_labels=1 - task.support_labels)
    again = instances(task.support_labels, 2) > 0
    assert (trained.stream_answers(renamed)[again] == 1 - trained.stream_answers(task)[again]).double().mean() > 0.95
    assert (trained(renamed).argmax(-1) == 1 - trained(task).argmax(-1)).double().mean() > 0.95


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MANN(Pixels(2), n_way=0), "n_way must be a positive integer, got 0"),
        (lambda: MANN(Pixels(2), hidden_size=0), "hidden_size must be a positive integer, got 0"),
        (lambda: MANN(Pixels(2), slots=0), "slots must be a positive integer, got 0"),
        (lambda: MANN(Pixels(2), width=-1), "width must be a positive integer, got -1"),
        (lambda: MANN(Pixels(2), heads=0), "heads must be a positive integer, got 0"),
        (lambda: MANN(Pixels(2), heads=5, slots=4), "heads = 5 exceeds slots = 4: each head needs a slot to write to"),
        (lambda: MANN(Pixels(2), usage_decay=1.1), "usage_decay must be from 0 to 1, got 1.1"),
        (lambda: MANN(Pixels(2), usage_decay=-0.1), "usage_decay must be from 0 to 1, got -0.1"),
        (lambda: MANN(Pixels(2), usage_decay=math.nan), "usage_decay must be from 0 to 1, got nan"),
        (lambda: MANNConfig(labels="words"), "labels must be 'one-hot' or 'letters', got 'words'"),  # pyright: ignore[reportArgumentType]
        (lambda: MANN(Pixels(2), finetune_steps=-1), "finetune_steps must not be negative, got -1"),
        (lambda: MANN(Pixels(2), finetune_lr=0.0), "finetune_lr must be positive, got 0.0"),
        (lambda: PlainLSTM(Pixels(2), hidden_size=0), "hidden_size must be a positive integer, got 0"),
        (lambda: PlainLSTM(Pixels(2), n_way=-2), "n_way must be a positive integer, got -2"),
        (lambda: PlainLSTM(Pixels(2), labels=""), "labels must be 'one-hot' or 'letters', got ''"),  # pyright: ignore[reportArgumentType]
        (lambda: FeedForward(Pixels(2), hidden_size=0), "hidden_size must be a positive integer, got 0"),
        (lambda: FeedForward(Pixels(2), labels="x"), "labels must be 'one-hot' or 'letters', got 'x'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_wrong_arguments_say_what_to_do(build: Callable[[], object], message: str, unchecked_types: None):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build()


def test_as_many_heads_as_slots_and_no_decay_are_allowed():
    assert mann(slots=2, usage_decay=0.0).stream_logits(stream()).isfinite().all()
    assert mann(slots=2, usage_decay=1.0).stream_logits(stream()).isfinite().all()


@every_method
def test_other_ways_are_refused(name: str):
    method, task = learner(name, n_way=4), stream(n_way=3)
    message = "the episode has n_way = 3 but this learner was made for 4"
    for ask in (method, method.meta_loss, method.stream_logits, method.stream_answers):
        with pytest.raises(ValueError, match=f"^{message}$"):
            ask(task)


def test_a_configuration_builds_its_learner():
    """Every argument arrives."""
    config = MANNConfig(
        n_way=3,
        hidden_size=5,
        slots=7,
        width=3,
        heads=2,
        usage_decay=0.5,
        sharpen=False,
        labels="letters",
        finetune_steps=2,
        finetune_lr=0.3,
    )
    method = config.build(Pixels(2))
    assert method.config == config
    assert (method.n_way, method.labels, method.finetune_steps, method.finetune_lr) == (3, "letters", 2, 0.3)
    assert method.control.out_features == 2 * (3 + 1) and method.out.out_features == 25
    for control in (PlainLSTM, FeedForward):
        built = control(Pixels(2), n_way=3, hidden_size=5, labels="letters", finetune_steps=2, finetune_lr=0.3)
        again = built.config.build(Pixels(2))
        assert again.config == built.config
        assert (again.n_way, again.labels, again.finetune_steps, again.finetune_lr) == (3, "letters", 2, 0.3)
