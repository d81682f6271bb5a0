"""What streams tell, and when; how labels are written; the controls; and what no stream may give away."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metatutor.backbones import ConvNet, Normalization, Pixels
from metatutor.episodes import ClassImages, Episode, EpisodeSpec
from metatutor.evaluation import confidence95, scores
from metatutor.memory import MANN, FeedForward, PlainLSTM
from metatutor.memory import stream as stream_module
from metatutor.memory.stream import Codes, StreamLearner, instances, shift_labels, strings
from metatutor.testing import check_learner
from metatutor.training import TrainConfig, train
from tests.streams import METHODS, inputs_by_hand, learner, linear, mann, noise, small_mann, stream, vivid
from tests.tasks import close

every_method = pytest.mark.parametrize("name", METHODS)


def differs(one: Tensor, other: Tensor) -> list[bool]:
    """Whether two sequences of answers, `[task, time, ...]`, differ at each time."""
    return ((one - other).abs() > 1e-12).any(-1).any(0).tolist()


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
    told = shift_labels(codes)
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


@pytest.mark.parametrize("name", ["mann, as in the paper", "feed-forward, letters"])
def test_variants_keep_the_contract_too(name: str):
    check_learner(METHODS[name](Pixels(3), n_way=3), image_shape=(1, 8, 8))


@every_method
def test_a_batch_of_tasks_is_the_tasks_one_by_one(name: str):
    method, tasks = learner(name), stream(3)
    alone = [tasks.task(i) for i in range(3)]
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
    with pytest.raises(ValueError, match=f"normalization = '{normalization}'.*ConvNet.normalization='group'.*Pixels"):
        method(ConvNet(filters=4, normalization=normalization))


@every_method
def test_query_images_take_no_part_in_the_meta_loss(name: str):
    method, task = learner(name), stream()
    others = replace(task, query_images=1 - task.query_images, query_labels=None)
    assert torch.equal(method.meta_loss(others), method.meta_loss(task))


@every_method
@pytest.mark.parametrize(("n_way", "k_shot", "n_query"), [(2, 1, 1), (5, 3, 2), (1, 2, 1)])
def test_any_way_and_shot(name: str, n_way: int, k_shot: int, n_query: int):
    method, task = learner(name, n_way=n_way), stream(2, n_way, k_shot, n_query)
    assert method(task).shape == (2, n_way * n_query, n_way)
    assert method.stream_logits(task).shape == (2, n_way * k_shot, n_way)
    assert method.meta_loss(task).isfinite()


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
    sampler = classes.sampler(EpisodeSpec(n_way, 4, 1), seed=0)
    found = scores(Oracle(n_way), sampler, n_episodes, stream=True, tasks_per_batch=500)
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
    config = TrainConfig(iterations=180, tasks_per_step=16, outer_lr=0.05, warmup=10)
    train(method, sides(0), STREAMS, config, progress_bar=False, device="cpu")
    return method


@pytest.fixture(scope="module")
def trained() -> StreamLearner:
    """A MANN that has learned to bind an image to the label told after it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return taught(MANN(Pixels(2), n_way=2, hidden_size=20, slots=6, width=4, heads=2))


def test_a_trained_learner_remembers_labels_but_cannot_foresee_them(trained: StreamLearner):
    found = scores(trained, sides(1).sampler(STREAMS, seed=1), 1000, stream=True, tasks_per_batch=500)
    first, error = mean_and_error(found[:, 0])
    assert bound(2) - 0.1 < first < bound(2) + 4 * error
    assert (found[:, 1:].mean(0) > 0.95).all()
    test = sides(1).sampler(STREAMS, seed=2).sample(500)
    assert (trained(test).argmax(-1) == test.query_labels).double().mean() > 0.95


def test_without_a_memory_the_same_training_is_in_vain():
    """All that is left is to name another class than the one just told: right in 3 of 5 cases."""
    torch.manual_seed(0)
    found = scores(
        taught(FeedForward(Pixels(2), n_way=2, hidden_size=20)), sides(1).sampler(STREAMS, seed=1), 1000, stream=True
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
    task = sides(1).sampler(STREAMS, seed=5).sample(1500)
    shuffled = torch.rand(1500, 6, generator=torch.Generator().manual_seed(0)).argsort(1)
    nonsense = replace(task, support_labels=task.support_labels.gather(1, shuffled))
    for answers, truth in (
        (method.stream_answers(nonsense), task.support_labels),
        (method(nonsense).argmax(-1), task.query_labels),
    ):
        accuracy, error = mean_and_error((answers == truth).double().mean(1))
        assert abs(accuracy - 1 / 2) < 4 * error
        assert error < 0.015


def test_names_of_classes_mean_nothing_to_a_trained_learner(trained: StreamLearner):
    """Told the labels the other way round, it answers the other way round, but for the first guess."""
    task = sides(1).sampler(STREAMS, seed=6).sample(500)
    renamed = replace(task, support_labels=1 - task.support_labels)
    again = instances(task.support_labels, 2) > 0
    assert (trained.stream_answers(renamed)[again] == 1 - trained.stream_answers(task)[again]).double().mean() > 0.95
    assert (trained(renamed).argmax(-1) == 1 - trained(task).argmax(-1)).double().mean() > 0.95


# --- training teaches labels, not their order ------------------------------------------------------------------------


def plain_classes(n_classes: int) -> ClassImages:
    """Every drawing of a class is the same, and of no other class."""
    pixels = (20 * torch.arange(n_classes, dtype=torch.uint8)).view(-1, 1, 1, 1, 1).expand(-1, 6, 1, 2, 2).contiguous()
    return ClassImages(pixels, [str(i) for i in range(n_classes)])


@given(n_way=st.integers(2, 5), k_shot=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_whoever_is_trained_sees_support_sets_in_random_order(n_way: int, k_shot: int, seed: int):
    """Every label is at every place equally often, and still the label of its image; in evaluation too."""
    seen: list[Episode] = []
    classes, spec, method = plain_classes(9), EpisodeSpec(n_way, k_shot, 1), FeedForward(Pixels(1), n_way=n_way)
    config = TrainConfig(iterations=1, tasks_per_step=300, seed=seed)
    train(method, classes, spec, config, transform=lambda e: seen.append(e) or e, progress_bar=False, device="cpu")
    for episode in (seen[0], classes.sampler(spec, seed=seed).sample(300)):
        labels, images = episode.support_labels, episode.support_images[:, :, 0, 0, 0]
        assert torch.equal(labels.sort().values, torch.arange(n_way).repeat_interleave(k_shot).expand(300, -1))
        at_each_place = nn.functional.one_hot(labels, n_way).double().mean(0)  # [time, way]
        assert ((at_each_place - 1 / n_way).abs() < 5 * (1 / n_way * (1 - 1 / n_way) / 300) ** 0.5).all()
        assert torch.equal(images[:, :, None] == images[:, None], labels[:, :, None] == labels[:, None])
        of_labels = episode.query_images[:, :, 0, 0, 0]  # one of each class, in the order of their labels
        assert torch.equal(images, of_labels.gather(1, labels))


def thirds(seed: int) -> ClassImages:
    """Three classes, with ink on the left, on the right or above, under noise."""
    ink = torch.zeros(3, 8, 1, 4, 4)
    ink[0, ..., :2], ink[1, ..., 2:], ink[2, ..., :2, :] = 200, 200, 200
    noise = torch.randint(0, 56, ink.shape, generator=torch.Generator().manual_seed(seed))
    return ClassImages((ink + noise).to(torch.uint8), ["left", "right", "above"])


def test_what_training_teaches_is_not_the_order_of_the_labels():
    """Of three classes, each image is found again by its label; and sorted tasks are answered no better."""
    torch.manual_seed(0)
    method, spec = PlainLSTM(Pixels(4), n_way=3, hidden_size=32), EpisodeSpec(3, 3, 1)
    config = TrainConfig(iterations=250, tasks_per_step=16, outer_lr=0.03, warmup=0)
    train(method, thirds(0), spec, config, progress_bar=False, device="cpu")
    task = thirds(1).sampler(spec, seed=1).sample(400)
    by_class = task.support_labels.argsort(1)
    images = task.support_images[torch.arange(400)[:, None], by_class]
    in_order = replace(task, support_images=images, support_labels=task.support_labels.gather(1, by_class))
    found, sorted_ones = (
        (method(asked).argmax(-1) == task.query_labels).double().mean().item() for asked in (task, in_order)
    )
    assert found > 0.95
    assert sorted_ones < found + 0.01
    first, error = mean_and_error(scores(method, thirds(1).sampler(spec, seed=2), 1000, stream=True)[:, 0])
    assert first < bound(3) + 4 * error  # nothing tells the label of a class that has not been named


# --- errors --------------------------------------------------------------------------------------------------------


@every_method
def test_other_ways_are_refused(name: str):
    method, task = learner(name, n_way=4), stream(n_way=3)
    message = "the episode has n_way = 3 but this learner was made for 4"
    for ask in (method, method.meta_loss, method.stream_logits, method.stream_answers):
        with pytest.raises(ValueError, match=f"^{message}$"):
            ask(task)
