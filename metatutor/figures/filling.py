"""A memory that fills as a stream goes by, to be stepped through in the static page."""

from __future__ import annotations

import base64
import json
from string import Template
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metatutor.figures.memory import KINDS, NOTICEABLE, Weights, bookkeeping, check_steps, chosen_slots
from metatutor.figures.shown import Shown
from metatutor.figures.style import BLUE, RED


def filling_memory(
    images: Float[Tensor, "time height width"],
    labels: Int[Tensor, " time"],
    answers: Int[Tensor, " time"],
    matrix: Float[Tensor, "time slot number"],
    read_weights: Weights,
    write_weights: Weights,
    usage: Float[Tensor, "time slot"],
    *,
    rows: int = 24,
    start: int | None = None,
) -> Shown:
    """A MANN's memory as a stream goes by: what is asked, told and answered, and what is written and read.

    The reader goes from image to image by buttons or a slider, or lets the stream play. A row is a slot; the rows are
    those of `memory_steps`. The script holds the images and the numbers with 8 bits each.

    Args:
        images: the stream of one task.
        labels: their classes; the label of an image is told with the next one.
        answers: what the learner answers to each; -1: no class.
        matrix: the memory after every image.
        read_weights, write_weights: of every head.
        usage: of every slot.
        rows: the most slots that are drawn.
        start: the image shown at first, from 0; default: the last one.

    Returns:
        HTML with its script.

    Raises:
        ValueError: if `start` is not in the stream, or `rows` not positive.

    Example:
        >>> weights, labels = torch.eye(6, 9).view(6, 1, 9), torch.arange(6) % 2
        >>> numbers = torch.randn(6, 9, 4), weights, weights, torch.rand(6, 9)
        >>> "told now" in filling_memory(torch.rand(6, 28, 28), labels, labels, *numbers)
        True

    Reference:
        Santoro et al. (2016), figure 1.
    """
    start = len(images) - 1 if start is None else start
    check_steps([start], len(images))
    slots = chosen_slots(read_weights, write_weights, rows)
    state = {
        "size": list(images.shape[1:]),
        "images": _packed(255 * images.clamp(0, 1)),
        "labels": labels.tolist(),
        "answers": answers.tolist(),
        "slots": slots,
        "colours": [BLUE, RED],
    }
    state |= _memory(matrix[:, slots], bookkeeping(read_weights, write_weights, usage, slots))
    state["shares"] = _shares(write_weights, read_weights, slots)
    text = json.dumps(state, separators=(",", ":"))
    fill = dict(zip(("written", "read", "usage"), KINDS.values(), strict=True)) | {"low": BLUE, "high": RED}
    sizes = {"n": len(images), "last": len(images) - 1, "start": start, "rows": len(slots), "all": matrix.shape[1]}
    sizes["pitch"] = max(3, min(14, 420 // max(1, len(slots))))  # of the rows, in CSS pixels
    return Shown(_MEMORY.substitute(fill, **sizes, id=f"memory-{crc32(text.encode()):08x}", state=text).strip())


def _memory(matrix: Float[Tensor, "time row number"], bars: Float[Tensor, "3 time row"]) -> dict[str, object]:
    """The numbers of the memory and the lengths of the bars, packed, with their scales."""
    largest, longest = matrix.abs().max().item(), bars.amax((1, 2))
    written = bars[0] > NOTICEABLE
    when = torch.arange(len(matrix))[:, None].where(written, -1).cummax(0).values
    return {
        "width": matrix.shape[2],
        "largest": largest,
        "matrix": _packed(127 * matrix / max(largest, 1e-12)),
        "longest": longest.tolist(),
        "bars": _packed(255 * bars / longest.clamp_min(1e-12)[:, None, None]),
        "when": when.tolist(),  # each row was last written
    }


def _shares(write_weights: Weights, read_weights: Weights, slots: list[int]) -> list[list[int]]:
    """How much of the writing and of the reading goes to the rows drawn, in percent."""
    both = torch.stack([write_weights, read_weights]).sum(2)  # [2, time, slot]
    return (100 * both[:, :, slots].sum(-1) / both.sum(-1).clamp_min(1e-12)).round().int().T.tolist()


def _packed(values: Tensor) -> str:
    """Whole numbers from -127 to 255 as bytes, in base64."""
    bytes_ = (values.round().int() % 256).to(torch.uint8).cpu().numpy().tobytes()
    return base64.b64encode(bytes_).decode()


_MEMORY = Template("""
<style>
#$id{container-type:inline-size;max-width:46rem;margin:1rem 0;font-size:.95em;--accent:var(--pst-color-primary,#0072B2)}
#$id .do{display:flex;flex-wrap:wrap;align-items:center;gap:.3rem;margin-bottom:.6rem}
#$id button{cursor:pointer;margin:0;padding:.25rem .7rem;border-radius:.5rem;font:inherit;color:inherit;
background:none;border:1px solid var(--pst-color-border,#aaa)}
#$id button.play{min-width:4.2rem}
#$id button:disabled{opacity:.5;cursor:default}
#$id :is(button,input):focus-visible{outline:3px solid var(--accent);outline-offset:2px}
#$id .slide{display:flex;flex:1 1 12rem;align-items:center;gap:.5rem;margin-left:.3rem}
#$id [type=range]{flex:1;min-width:5rem;height:1.6rem;margin:0;accent-color:var(--accent)}
#$id output{min-width:4.2em;text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
#$id .parts{display:grid;gap:.8rem 1.2rem;align-items:start;grid-template:"asked" "memory" "so-far"/minmax(0,1fr)}
@container (min-width:36rem){
#$id .parts{grid-template:"asked memory" auto "so-far memory" 1fr/minmax(0,1fr) minmax(0,1fr)}
}
#$id .so-far{grid-area:so-far}
#$id .asked{grid-area:asked;display:flex;gap:.8rem;align-items:flex-start}
#$id canvas{image-rendering:pixelated;background:#fff}
#$id .asked canvas{flex:none;width:5.5rem;border:1px solid #888;border-radius:.4rem}
#$id dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .6rem;margin:0;
min-height:7.5em;align-content:start}
#$id :is(dt,dd){margin:0;padding:0;font-weight:inherit}
#$id dt{color:var(--pst-color-text-muted,inherit)}
#$id .past{display:grid;grid-template-columns:repeat(auto-fill,minmax(1.95rem,1fr));gap:.25rem;margin-top:.3rem}
#$id .past div{border:2px solid transparent;border-radius:.3rem;text-align:center;font-size:.8rem;line-height:1.25}
#$id .past canvas{display:block;width:100%;border-radius:.15rem}
#$id .past .later{visibility:hidden}
#$id .past .told span{text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:2px}
#$id .past .same{border-color:var(--accent);background:var(--accent);color:var(--pst-color-background,#fff);
font-weight:bold}
#$id p{margin:0;color:var(--pst-color-text-muted,inherit);font-size:.93em}
#$id .memory{grid-area:memory;display:grid;
grid-template-columns:max-content minmax(0,1fr) repeat(3,minmax(2.8rem,.32fr)) max-content;
gap:.2rem .4rem;padding:.5rem;background:#fff;color:#000;border:1px solid #888;border-radius:.4rem;font-size:.75rem}
#$id .memory b{font-weight:normal;line-height:1.15;align-self:end}
#$id .memory p{grid-column:1/-1;margin:.3rem 0 0;color:#000;font-size:1em}
#$id ol{list-style:none;margin:0;padding:0;text-align:right;font-variant-numeric:tabular-nums}
#$id li{height:${pitch}px;line-height:${pitch}px;font-size:11px;margin:0;padding:0;color:#000}
#$id .memory :is(canvas,svg){display:block;width:100%;height:calc($rows*${pitch}px)}
#$id .memory svg{border-left:1px solid #666;overflow:visible}
#$id .scale{display:flex;justify-content:space-between;font-variant-numeric:tabular-nums}
#$id .shades{padding-top:.55rem;background:linear-gradient(90deg,$low,#fff,$high) top/100% .5rem no-repeat}
</style>
<div id="$id" role="group" aria-label="The memory of a network while images go by; choose the image">
<div class="do"><button type="button">back</button><button type="button" class="play">play</button>
<button type="button">next</button>
<div class="slide"><label for="$id-step">image</label>
<input type="range" id="$id-step" min="0" max="$last" value="$start" autocomplete="off">
<output for="$id-step"></output></div></div>
<div class="parts">
<div class="asked"><canvas role="img" aria-label="the image that is asked now"></canvas>
<dl aria-live="polite"><dt>told now</dt><dd></dd><dt>answer</dt><dd></dd><dt>same class</dt><dd></dd></dl></div>
<div class="memory">
<b>slot</b><b>the numbers in it</b><b>written now</b><b>read now</b><b>usage</b><b>last<br>written</b>
<ol class="slots" aria-hidden="true"></ol><canvas role="img"></canvas>
<svg fill="$written" aria-hidden="true"></svg><svg fill="$read" aria-hidden="true"></svg>
<svg fill="$usage" aria-hidden="true"></svg><ol class="when" aria-hidden="true"></ol>
<span></span><span class="scale shades"></span><span class="scale"></span><span class="scale"></span>
<span class="scale"></span><span></span>
<p>$rows of the $all slots, those read most: <span class="share"></span></p></div>
<div class="so-far"><p>Images so far, with labels. Framed: the same class. Underlined: the label told now.</p>
<div class="past" aria-hidden="true"></div></div>
</div>
<noscript>This figure needs JavaScript; the picture below it shows the same memory after a few images.</noscript>
</div>
<script>
(() => {
const s = $state, box = document.getElementById("$id"), find = (what) => box.querySelector(what);
const every = (what) => [...box.querySelectorAll(what)], bytes = (text) => Uint8Array.from(atob(text),
  (letter) => letter.charCodeAt(0));
const images = bytes(s.images), matrix = Int8Array.from(bytes(s.matrix)), bars = bytes(s.bars);
const [height, width] = s.size, time = s.labels.length, rows = s.slots.length;
const slider = find("input"), [back, play, next] = every("button"), told = every("dd"), charts = every(".memory svg");
const [asked, numbers] = [find(".asked canvas"), find(".memory canvas")];
const rgb = s.colours.map((colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)));
const paint = (canvas, across, down, colour) => {
  [canvas.width, canvas.height] = [across, down];
  const context = canvas.getContext("2d"), shades = context.createImageData(across, down);
  for (let i = 0; i < across * down; i++) shades.data.set([...colour(i), 255], 4 * i);
  context.putImageData(shades, 0, 0);
};
const picture = (canvas, t) => paint(canvas, width, height, (i) => Array(3).fill(255 - images[t * width * height + i]));
const shade = (v) => rgb[v < 0 ? 0 : 1].map((c) => 255 + Math.abs(v) / 127 * (c - 255));
const short = (v) => Number(v.toPrecision(2));
const past = s.labels.map((label, t) => {
  const made = document.createElement("div"), canvas = made.appendChild(document.createElement("canvas"));
  picture(canvas, t);
  made.appendChild(document.createElement("span")).textContent = label;
  return find(".past").appendChild(made);
});
const spaced = (texts) => (item, row) => { item.textContent = row % Math.ceil(12 / $pitch) ? "" : texts[row]; };
every("ol").forEach((list) => { list.innerHTML = "<li></li>".repeat(rows); });
every(".slots li").forEach(spaced(s.slots));
charts.forEach((chart) => {
  chart.setAttribute("viewBox", "0 0 255 " + rows);
  chart.setAttribute("preserveAspectRatio", "none");
  s.slots.forEach((_, row) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    Object.entries({x: 0, y: row + 0.12, height: 0.76}).forEach(([name, v]) => bar.setAttribute(name, v));
    chart.appendChild(bar);
  });
});
every(".scale").forEach((scale, i) => {
  const ends = i ? ["", short(s.longest[i - 1])] : ["\u2212" + short(s.largest), 0, short(s.largest)];
  scale.innerHTML = ends.map((end) => "<span>" + end + "</span>").join("");
});
const most = (kind, t) => {
  const of = [...bars.subarray((kind * time + t) * rows, (kind * time + t + 1) * rows)];
  return s.slots[of.indexOf(Math.max(...of))];
};
const draw = () => {
  const t = Number(slider.value), label = s.labels[t], answer = s.answers[t];
  const before = [...Array(t).keys()].filter((i) => s.labels[i] === label);
  picture(asked, t);
  paint(numbers, s.width, rows, (i) => shade(matrix[t * rows * s.width + i]));
  charts.forEach((chart, kind) => [...chart.children].forEach((bar, row) => {
    bar.setAttribute("width", bars[(kind * time + t) * rows + row]);
  }));
  every(".when li").forEach(spaced(s.when[t].map((image) => image < 0 ? "\u2013" : image + 1)));
  past.forEach((made, i) => {
    made.className = i >= t ? "later" : (s.labels[i] === label ? "same " : "") + (i === t - 1 ? "told" : "");
  });
  told[0].textContent = t ? s.labels[t - 1] + ", of image " + t : "none yet";
  told[1].textContent = (answer < 0 ? "no class" : answer)
    + (answer === label ? " \u2713 right" : " \u2717 wrong, it is " + label);
  told[2].textContent = before.length ? (before.length > 1 ? "images " : "image ") + before.map((i) => i + 1).join(", ")
    : "not yet: it can only guess";
  find(".share").textContent = s.shares[t][0] + "% of what is written now, " + s.shares[t][1] + "% of what is read.";
  numbers.setAttribute("aria-label", "the memory after image " + (t + 1) + "; of these slots " + most(0, t)
    + " is written most now, " + most(1, t) + " read most");
  find("output").textContent = (t + 1) + " of " + time;
  slider.setAttribute("aria-valuetext", find("output").textContent);
  back.disabled = t === 0;
  next.disabled = t === time - 1;
};
let timer = 0;
const stop = () => {
  clearInterval(timer);
  timer = 0;
  play.textContent = "play";
  find("dl").setAttribute("aria-live", "polite");
};
const go = (by) => { slider.value = Number(slider.value) + by; draw(); };
play.addEventListener("click", () => { // it never plays by itself
  if (timer) return stop();
  if (Number(slider.value) === time - 1) slider.value = 0;
  play.textContent = "pause";
  find("dl").setAttribute("aria-live", "off");
  timer = setInterval(() => { go(1); if (Number(slider.value) === time - 1) stop(); }, 800);
  draw();
});
back.addEventListener("click", () => { stop(); go(-1); });
next.addEventListener("click", () => { stop(); go(1); });
slider.addEventListener("input", () => { stop(); draw(); });
draw();
})();
</script>
""")
