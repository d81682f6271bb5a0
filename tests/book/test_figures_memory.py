"""Figures of memories: they draw, and the page shows what the tensors hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from browser import BROWSER, found_in_the_browser

from metatutor.backbones import ConvNet, Pixels
from metatutor.book import figures
from metatutor.book.figures import Picture
from metatutor.book.figures.filling import filling_memory
from metatutor.book.figures.memory import DIVERGING, bookkeeping, chosen_slots, first_written
from metatutor.episodes import Episode
from metatutor.memory import MANN, SNAIL, MetaNet


def stream(time: int = 8, slots: int = 12, width: int = 5, *, seed: int = 0) -> dict[str, Any]:
    """What `filling_memory` is given: two heads, the first writes slot after slot, both read somewhere."""
    generator = torch.Generator().manual_seed(seed)
    write = torch.zeros(time, 2, slots)
    write[range(time), 0, [(5 * t) % slots for t in range(time)]] = 0.9
    return {
        "images": torch.rand(time, 4, 6, generator=generator),
        "labels": torch.arange(time) % 3,
        "answers": (torch.arange(time) - 1) % 4 - 1,  # -1: no class
        "matrix": torch.randn(time, slots, width, generator=generator),
        "read_weights": torch.rand(time, 2, slots, generator=generator).pow(6),
        "write_weights": write,
        "usage": 3 * torch.rand(time, slots, generator=generator),
    }


MEMORY = ("matrix", "read_weights", "write_weights", "usage")


def memory_steps(steps: list[int], **arguments: Any) -> Picture:
    shown = stream()
    return figures.memory_steps(**{name: shown[name] for name in MEMORY}, steps=steps, **arguments)


def attention(n: int = 5, blocks: int = 2, **arguments: Any) -> Picture:
    images, labels, weights = torch.rand(n, 28, 28), torch.arange(n) % 5, torch.rand(blocks, n + 1).softmax(-1)
    names = [f"block {i + 1}" for i in range(blocks)]
    return figures.attention_on_support(images, labels, images[0], weights, names, **arguments)


def fast_weights() -> Picture:
    fast, images, taken = torch.randn(5, 5, 64), torch.rand(5, 28, 28), torch.rand(5).softmax(-1)
    read = torch.einsum("s,srh->rh", taken, fast)
    return figures.fast_weights(fast, images, torch.arange(5), read, taken, images[2])


ALL: dict[str, Callable[[], Picture]] = {
    "memory_steps, three": lambda: memory_steps([0, 3, 7]),
    "memory_steps, four": lambda: memory_steps([0, 3, 5, 7], rows=4),
    "usage_over_time": lambda: figures.usage_over_time(stream()["usage"], stream()["write_weights"]),
    "attention, one shot": lambda: attention(query_label=2),
    "attention, five shots": lambda: attention(12, 3),
    "fast_weights": fast_weights,
}


@pytest.mark.parametrize("name", ALL)
def test_draws_without_touching_the_settings_no_wider_than_a_phone_can_show(name: str) -> None:
    before = dict(matplotlib.rcParams)
    torch.manual_seed(0)
    text = ALL[name]().svg()
    assert dict(matplotlib.rcParams) == before
    torch.manual_seed(0)
    assert ALL[name]().svg() == text
    assert len(text) < 200_000
    width = re.search(r'width="([\d.]+)pt"', text)
    assert width is not None and float(width.group(1)) <= 5.5 * 72


def test_the_rows_are_the_slots_read_most_sorted_by_first_writing() -> None:
    read, write = torch.zeros(4, 2, 6), torch.zeros(4, 2, 6)
    read[1, 0, 4], read[2, 1, 1], read[3, 0, 0] = 0.5, 0.8, 0.05
    write[0, 0, 5], write[1, 0, 4], write[2, 1, 2], write[3, 0, 1] = 0.3, 0.9, 0.9, 0.9
    write[0, :, 3] = 0.06  # noticeable, by both heads together
    assert first_written(write).tolist() == [4, 3, 2, 0, 1, 0]
    assert chosen_slots(read, write, rows=24) == [3, 5, 4, 2, 1]
    assert chosen_slots(read, write, rows=3) == [4, 2, 1]
    assert chosen_slots(read, write, rows=2) == [4, 1]


def test_what_has_no_rows_or_no_such_step() -> None:
    nothing = torch.zeros(3, 2, 6)
    with pytest.raises(ValueError, match="no slot is ever written or read with a weight above 0.1"):
        chosen_slots(nothing, nothing, rows=24)
    with pytest.raises(ValueError, match="rows must be positive, got 0"):
        memory_steps([0], rows=0)
    with pytest.raises(ValueError, match="steps must be from 0 to 7, the images of the stream, got 8"):
        memory_steps([0, 8])
    with pytest.raises(ValueError, match="steps must be from 0 to 7, the images of the stream, got -1"):
        filling_memory(**stream(), start=-1)


def test_attention_is_written_in_percent_and_the_class_stands_out_without_colour() -> None:
    images, weights = torch.rand(3, 28, 28), torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    labels = torch.tensor([1, 0, 1])
    drawn = figures.attention_on_support(images, labels, images[0], weights, ["block"], query_label=1)
    texts = drawn.axes[0].texts
    assert [text.get_text() for text in texts if "%" in text.get_text()] == ["10%", "25%", "50%", "15%"]
    bold = [text.get_text() for text in texts if text.get_fontweight() == "bold"]
    assert bold == ["class\n1", "class\n1"]


def test_support_images_are_drawn_class_by_class_in_whatever_order_they_come() -> None:
    torch.manual_seed(0)
    images, labels, order = torch.rand(5, 28, 28), torch.arange(5), torch.tensor([3, 0, 4, 1, 2])
    attention, fast = torch.rand(2, 6).softmax(-1), torch.randn(5, 5, 8)

    def attended(order: torch.Tensor) -> str:
        weights, names = attention[:, [*order.tolist(), 5]], ["one", "two"]
        return figures.attention_on_support(images[order], labels[order], images[0], weights, names).svg()

    def left(order: torch.Tensor) -> str:
        taken = attention[0, order]
        return figures.fast_weights(fast[order], images[order], labels[order], fast[0], taken, images[0]).svg()

    assert attended(order) == attended(labels) and left(order) == left(labels)


def test_images_of_three_channels_are_drawn_in_their_colours() -> None:
    images, labels, weights = torch.rand(5, 3, 28, 28), torch.arange(5), torch.rand(1, 6).softmax(-1)
    attended = figures.attention_on_support(images, labels, images[0], weights, ["one"])
    fast = torch.randn(5, 5, 8)
    left = figures.fast_weights(fast, images, labels, fast[0], weights[0, :5], images[0])
    drawn: list[Any] = [image.get_array() for of in (attended, left) for axes in of.axes for image in axes.images]
    assert [pixels.shape for pixels in drawn].count((28, 28, 3)) == 12


def test_takes_what_the_learners_give() -> None:
    labels = torch.tensor([[0, 1, 2, 0, 1, 2]])
    images = torch.rand(1, 6, 1, 28, 28)
    episode = Episode(images, labels, images, labels, n_way=3)
    mann = MANN(Pixels(8), n_way=3, hidden_size=8, slots=9, width=4, heads=2)
    states = mann.trace(episode)
    memory: dict[str, Any] = {name: torch.stack([getattr(state, name)[0] for state in states]) for name in MEMORY}
    figures.filling_memory(images[0, :, 0], labels[0], mann.stream_answers(episode)[0], **memory)
    figures.memory_steps(**memory, steps=[0, 5])

    snail = SNAIL(ConvNet(filters=4), n_way=3, embedding=8, filters=4, attention=(4, 4))
    weights = torch.stack([of_block[0, 2] for of_block in snail.attention(episode)])
    assert torch.allclose(weights.sum(1), torch.ones(2))
    figures.attention_on_support(images[0, :, 0], labels[0], images[0, 2, 0], weights, ["1", "2"], query_label=2)

    metanet = MetaNet(ConvNet(filters=4), n_way=3, hidden_size=8)
    with torch.no_grad():
        kept, query = metanet.memory(episode), metanet.embed(episode)[1]
        taken, read = metanet.attend(kept, query)[0, 2], metanet.recall(kept, query)["last"][0, 2]
    figures.fast_weights(kept.fast["last"][0], images[0, :, 0], labels[0], read, taken, images[0, 2, 0])


# --- the page ---


def test_a_filling_memory_is_small_and_needs_no_network() -> None:
    shown = stream(time=30, slots=128, width=40)
    shown["images"] = torch.rand(30, 28, 28)
    page = figures.filling_memory(**shown)
    assert len(page) < 100_000 and page == page._repr_html_()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "src=" not in page
    assert page.count("<script") == page.count("</script") == 1 and "FILL_" not in page
    assert page.count("setInterval") == 1 and "animation" not in page and "transition" not in page
    assert 'value="29"' in page and 'value="4"' in figures.filling_memory(**shown, start=4)
    assert "24 of the 128 slots" in page and "<noscript>This figure needs JavaScript" in page
    name = re.search(r'<input type="range" id="([^"]+)"', page)
    assert name and f'<label for="{name[1]}">' in page and 'aria-live="polite"' in page


STEPS = """
<script>
const box = document.querySelector("div[id^=memory]"), slider = box.querySelector("input"), found = [];
const [back, play, next] = box.querySelectorAll("button"), all = (what) => [...box.querySelectorAll(what)];
const pixels = (what) => {
  const canvas = box.querySelector(what);
  return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
};
const note = () => found.push({
  t: Number(slider.value), asked: pixels(".asked canvas"), numbers: pixels(".memory canvas"),
  bars: all(".memory svg").map((chart) => [...chart.children].map((bar) => Number(bar.getAttribute("width")))),
  told: all("dd").map((text) => text.textContent), slots: all(".slots li").map((text) => text.textContent),
  when: all(".when li").map((text) => text.textContent), past: all(".past div").map((made) => made.className.trim()),
  names: all(".past span").map((text) => text.textContent), share: box.querySelector(".share").textContent,
  output: box.querySelector("output").textContent, spoken: slider.getAttribute("aria-valuetext"),
  play: play.textContent, off: [back.disabled, next.disabled], live: box.querySelector("dl").ariaLive,
});
let tick = null;
window.setInterval = (does) => { tick = does; return 1; };
window.clearInterval = () => { tick = null; };
note();
back.click(); note();
next.click(); note();
for (let t = 0; t < 8; t++) { slider.value = t; slider.dispatchEvent(new Event("input")); note(); }
play.click(); note(); tick(); note();
play.click(); note();
slider.value = 6; play.click(); note(); tick(); note();
found.push(tick === null, box.scrollWidth <= box.clientWidth);
document.body.dataset.found = JSON.stringify(found);
</script>
"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
def test_the_page_shows_coloured_images_in_their_colours(tmp_path: Path) -> None:
    shown: dict[str, Any] = stream()
    shown["images"] = torch.rand(8, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    states = found_in_the_browser(tmp_path, figures.filling_memory(**shown, rows=6), STEPS)[:-2]
    for state in states:
        colours = torch.tensor(state["asked"]).view(4, 6, 4)[..., :3].movedim(-1, 0) / 255
        assert torch.allclose(colours, shown["images"][state["t"]], atol=0.005)


@pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
def test_the_page_shows_the_memory_after_each_image(tmp_path: Path) -> None:
    shown = stream()
    *states, stopped, fits = found_in_the_browser(tmp_path, figures.filling_memory(**shown, rows=6), STEPS)
    assert stopped and fits
    assert [state["t"] for state in states] == [7, 6, 7, *range(8), 0, 1, 1, 6, 7]
    assert [state["play"] for state in states[-5:]] == ["pause", "pause", "play", "pause", "play"]
    assert [state["live"] for state in states[-5:]] == ["off", "off", "polite", "off", "polite"]
    assert states[0]["off"] == [False, True] and states[3]["off"] == [True, False]

    read, write, labels = shown["read_weights"], shown["write_weights"], shown["labels"].tolist()
    slots = chosen_slots(read, write, 6)
    matrix, bars = shown["matrix"][:, slots], bookkeeping(read, write, shown["usage"], slots)
    scaled = matrix / matrix.abs().max() / 2 + 0.5
    for state in states:
        t = state["t"]
        assert state["slots"] == [str(slot) for slot in slots]
        rgb, opacity = (torch.tensor(state["numbers"]).view(6, 5, 4) / 255).split([3, 1], -1)
        expected = torch.from_numpy(DIVERGING(scaled[t].numpy())[..., :3])
        assert torch.allclose((1 - opacity * (1 - rgb)).double(), expected, atol=0.02), t  # on white
        ink = 1 - torch.tensor(state["asked"]).view(4, 6, 4)[..., 0] / 255
        assert torch.allclose(ink, shown["images"][t], atol=0.005)
        lengths = torch.tensor(state["bars"]) / 255 * bars.amax((1, 2))[:, None]
        assert torch.allclose(lengths, bars[:, t], atol=0.01)
        written = [[i for i in range(t + 1) if bars[0, i, row] > 0.1] for row in range(6)]
        assert state["when"] == [str(images[-1] + 1) if images else "–" for images in written]
        share = [100 * of[t].sum(0)[slots].sum() / of[t].sum() for of in (write, read)]
        assert state["share"] == f"{share[0]:.0f}% of what is written now, {share[1]:.0f}% of what is read."
        assert state["output"] == state["spoken"] == f"{t + 1} of 8"
        same = [i for i in range(t) if labels[i] == labels[t]]
        assert [i for i, name in enumerate(state["past"]) if "same" in name] == same
        assert [i for i, name in enumerate(state["past"]) if "told" in name] == [t - 1] * (t > 0)
        assert [i for i, name in enumerate(state["past"]) if name == "later"] == list(range(t, 8))
        assert state["names"] == [str(label) for label in labels]

    told = {state["t"]: state["told"] for state in states}
    assert shown["answers"].tolist() == [2, -1, 0, 1, 2, -1, 0, 1] and labels == [0, 1, 2, 0, 1, 2, 0, 1]
    assert told[0] == ["none yet", "2 ✗ wrong, it is 0", "not yet: it can only guess"]
    assert told[1] == ["0, of image 1", "no class ✗ wrong, it is 1", "not yet: it can only guess"]
    assert told[3] == ["2, of image 3", "1 ✗ wrong, it is 0", "image 1"]
    assert told[6] == ["2, of image 6", "0 ✓ right", "images 1, 4"]
