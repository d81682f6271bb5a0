"""Waves and the networks that learn them: curves after some steps, drawn, or to be tried in the static page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from itertools import cycle
from string import Template
from zlib import crc32

from jaxtyping import Float
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from metatutor.backbones import MLP
from metatutor.data.sinusoids import Sinusoids
from metatutor.figures.shown import Shown
from metatutor.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Picture, picture, styled

MOST_POINTS = 20
LOOKS = {"-": BLUE, "-.": GREEN, ":": PURPLE, (0, (6, 1)): RED, (0, (3, 1, 1, 1)): SKY}  # dash to colour, after a step


@styled
def waves(
    panels: Mapping[str, Mapping[int, Float[Tensor, " x"]]],
    x: Float[Tensor, " x"],
    *,
    points: Float[Tensor, "n 2"],
    truth: Float[Tensor, " x"],
) -> Picture:
    """A wave, the points of it that are known, and a network's curves after some inner steps, panel below panel.

    Args:
        panels: title, such as the name of the initial parameters, to inner steps to the outputs for each `x`.
        x: where the curves are drawn, ascending.
        points: the support set, `x` and `y` of each.
        truth: the heights of the wave.

    Example:
        >>> import torch
        >>> x = torch.linspace(-5, 5, 101)
        >>> points = torch.stack([x, x.sin()], dim=1)[::25]
        >>> curves = {0: torch.zeros(101), 1: 0.5 * x.sin(), 10: 0.9 * x.sin()}
        >>> figure = waves({"MAML": curves}, x, points=points, truth=x.sin())
    """
    figure = picture(2.1 * len(panels) + 0.8)
    drawn = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    known = {"color": ORANGE, "mec": "black", "ms": 6, "zorder": 3}
    for axes, (title, curves) in zip(drawn, panels.items(), strict=True):
        axes.plot(x.numpy(), truth.numpy(), color="black", lw=0.8, label="true wave")
        axes.plot(*points.T.numpy(), "o", **known, label="support points")
        looks = cycle(LOOKS.items())
        for steps, heights in curves.items():
            dash, colour = next(looks) if steps else ("--", GREY)
            name = f"after {steps} step{'s' * (steps > 1)}" if steps else "before adaptation"
            axes.plot(x.numpy(), heights.numpy(), ls=dash, color=colour, label=name)
        axes.set(title=title, ylabel="y")
    drawn[-1].set(xlabel="x", xlim=(x[0].item(), x[-1].item()))
    names = {name: handle for axes in drawn for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(names.values()), list(names), loc="outside upper left", ncols=2, alignment="left")
    return figure


def adapting_wave(
    networks: Mapping[str, MLP],
    points: Float[Tensor, "n 2"],
    *,
    inner_lr: float,
    steps: int = 10,
    wave: Float[Tensor, " 2"] | None = None,
    waves: Sinusoids | None = None,
) -> Shown:
    """Points to be put down and moved, and the curve that a network draws after some gradient steps on them.

    The reader chooses the points, the initial parameters, the number of steps and their size. Each step descends the
    mean squared error of all points, as `MAML` does; an error above 10,000 is said to have diverged. The script holds
    the networks, rounded to 6 digits.

    Args:
        networks: name to initial parameters; one number goes in, one comes out.
        points: the support set at the beginning, `x` and `y` of each; 20 at most.
        inner_lr: step size at the beginning; the reader may have a tenth to ten times of it.
        steps: how many steps can be taken.
        wave: amplitude and phase of the wave that the points are of, if it is to be drawn.
        waves: where new waves come from, and how far the axes reach; default: those of the MAML paper.

    Returns:
        HTML with its script.

    Raises:
        ValueError: if there is no network or one of another shape, or an argument is out of range.

    Example:
        >>> import torch
        >>> "steps" in adapting_wave({"random": MLP()}, torch.tensor([[0.0, 1.0]]), inner_lr=0.01)
        True

    Reference:
        Finn, Abbeel & Levine (2017), section 5.1 and figure 2.
    """
    waves = waves or Sinusoids()
    reach = (waves.x, (-1.2 * waves.amplitude[1], 1.2 * waves.amplitude[1]))
    _check(networks, points, inner_lr, steps, reach)
    state = {
        "networks": [_layers(network) for network in networks.values()],
        "points": _rounded(points.tolist()),
        "wave": None if wave is None else _rounded(wave.tolist()),
        "rate": inner_lr,
        "steps": steps,
        "most": MOST_POINTS,
        "waves": vars(waves),
        "reach": reach,
        "ticks": [_ticks(*ends) for ends in reach],
    }
    text = json.dumps(state, separators=(",", ":"))
    name = f"wave-{crc32(text.encode()):08x}"
    radios = "".join(
        f'<input type="radio" name="{name}" id="{name}-{i}"{" checked" * (i == 0)}>'
        f'<label for="{name}-{i}">{escape(title)}</label>'
        for i, title in enumerate(networks)
    )
    colours = {"before": GREY, "after": BLUE, "point": ORANGE}
    return Shown(_WAVE.substitute(colours, id=name, radios=radios, steps=steps, state=text).strip())


def _check(
    networks: Mapping[str, MLP], points: Tensor, inner_lr: float, steps: int, reach: tuple[tuple[float, float], ...]
) -> None:
    if not networks:
        raise ValueError("networks must name at least one network")
    for name, network in networks.items():
        inputs = _linears(network)[0].in_features if isinstance(network, MLP) else None
        if inputs != 1 or network.n_outputs != 1:
            raise ValueError(
                f"networks[{name!r}] must be an MLP of one input and one output, "
                f"got {type(network).__name__} of {inputs} and {network.n_outputs}"
            )
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be [n, 2], an x and a y in each row, got {list(points.shape)}")
    if len(points) > MOST_POINTS:
        raise ValueError(f"there is room for {MOST_POINTS} points, got {len(points)}")
    low, high = points.new_tensor(reach).T
    if not ((low <= points) & (points <= high)).all():
        raise ValueError(f"points must lie within x from {reach[0][0]} to {reach[0][1]}, y up to ±{reach[1][1]}")
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if not inner_lr > 0:
        raise ValueError(f"inner_lr must be positive, got {inner_lr}")


def _ticks(low: float, high: float) -> list[float]:
    return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def _linears(network: MLP) -> list[nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def _layers(network: MLP) -> list[tuple[list[float], list[float]]]:
    """Weights, row after row, and biases of every layer."""
    return [(_rounded(layer.weight.flatten().tolist()), _rounded(layer.bias.tolist())) for layer in _linears(network)]


def _rounded(values: list) -> list:
    """The numbers of a list of lists to six digits."""
    return [_rounded(v) if isinstance(v, list) else float(f"{v:.6g}") for v in values]


_WAVE = Template("""
<style>
#$id{max-width:28rem;margin:1rem 0;font-size:.95em;--accent:var(--pst-color-primary,#0072B2)}
#$id :is(.how,.do){display:flex;flex-wrap:wrap;align-items:center;gap:.3rem;margin:.5rem 0}
#$id .how input{position:absolute;opacity:0}
#$id :is(.how label,button){cursor:pointer;margin:0;padding:.25rem .7rem;border-radius:.5rem;font:inherit;
color:inherit;background:none;border:1px solid var(--pst-color-border,#aaa)}
#$id button:disabled{opacity:.5;cursor:default}
#$id .how input:checked+label{background:var(--accent);color:var(--pst-color-background,#fff)}
#$id :is(.how input:focus-visible+label,button:focus-visible,input:focus-visible){
outline:3px solid var(--accent);outline-offset:2px}
#$id .slide{display:grid;grid-template-columns:max-content 1fr 3.2rem;gap:.2rem .7rem;align-items:center;
margin-bottom:.6rem}
#$id :is([type=range],[type=checkbox]){accent-color:var(--accent);margin:0}
#$id [type=range]{width:100%;height:1.6rem}
#$id output{font-variant-numeric:tabular-nums}
#$id svg.board{display:block;width:100%;background:#fff;border:1px solid #888;border-radius:.4rem;
touch-action:manipulation;cursor:crosshair;user-select:none;-webkit-user-select:none}
#$id .ticks path{stroke:#e4e4e4}
#$id .ticks text{fill:#444;font-size:11px}
#$id .curve{fill:none;stroke-linejoin:round}
#$id .truth{stroke:#000;stroke-width:1}
#$id .before{stroke:$before;stroke-width:2;stroke-dasharray:6 4}
#$id .after{stroke:$after;stroke-width:2.5}
#$id .point{fill:$point;stroke:#000}
#$id .move{cursor:grab}
#$id .halo{fill:transparent}
#$id .move:focus-visible .halo{fill:$after;fill-opacity:.3}
#$id .move:focus{outline:none}
#$id .move:focus .point{stroke-width:2.5}
#$id .lost{font-size:15px;font-weight:bold;text-anchor:middle;paint-order:stroke;stroke:#fff;stroke-width:4px}
#$id table{margin:.6rem 0 0;border:0;width:100%;font-size:.93em;font-variant-numeric:tabular-nums}
#$id :is(tr,td,th){border:0;background:none}
#$id :is(td,th){padding:.1rem .5rem .1rem 0;text-align:left;font-weight:inherit;white-space:nowrap}
#$id tr:first-child th{white-space:normal;vertical-align:bottom}
#$id .key{display:inline-block;width:22px;height:12px;margin-right:.25rem;background:#fff;border-radius:2px;
vertical-align:-1px}
#$id p{margin:.4rem 0 0;color:var(--pst-color-text-muted,inherit);font-size:.93em}
</style>
<div id="$id" role="group" aria-label="Points of a wave, and the curve of a network that adapts to them">
<div class="how" role="radiogroup" aria-label="initial parameters">$radios</div>
<div class="slide">
<label for="$id-steps">steps</label><input type="range" id="$id-steps" min="0" max="$steps" value="1">
<output for="$id-steps"></output>
<label for="$id-rate">inner learning rate</label>
<input type="range" id="$id-rate" min="-1" max="1" step="0.05" value="0"><output for="$id-rate"></output>
</div>
<svg class="board" viewBox="0 0 360 270" role="group" aria-label="plot of y over x; a click adds a point">
<clipPath id="$id-clip"><rect x="28" y="8" width="324" height="240"/></clipPath>
<g class="ticks"></g><rect class="plot" x="28" y="8" width="324" height="240" fill="transparent"/>
<g clip-path="url(#$id-clip)"><path class="curve truth"/><path class="curve before"/><path class="curve after"/></g>
<text class="lost" x="190" y="40"></text><g class="points"></g></svg>
<table aria-live="polite">
<tr><th>mean squared error</th>
<th><svg class="key" aria-hidden="true"><path class="curve before" d="M2 6h18"/></svg>before</th>
<th><svg class="key" aria-hidden="true"><path class="curve after" d="M1 6h20"/></svg><span></span></th></tr>
<tr><th><svg class="key" aria-hidden="true"><circle class="point" cx="11" cy="6" r="4.5"/></svg><span></span></th>
<td></td><td></td></tr>
<tr><th><svg class="key" aria-hidden="true"><path class="curve truth" d="M1 6h20"/></svg>true wave</th>
<td></td><td></td></tr>
</table>
<p>Click to add a point or to remove one, drag to move one. Keys: arrows, Delete.</p>
<div class="do"><button type="button">new wave</button><button type="button">add a point</button>
<button type="button">clear</button><button type="button">start again</button>
<label><input type="checkbox" checked> true wave</label></div>
<noscript>This figure needs JavaScript.</noscript>
</div>
<script>
(() => {
const s = $state, box = document.getElementById("$id"), find = (what) => box.querySelector(what);
const every = (what) => [...box.querySelectorAll(what)], start = JSON.stringify([s.points, s.wave]);
const board = find(".board"), plot = find(".plot"), table = find("table"), checkbox = find("[type=checkbox]");
const radios = every("[type=radio]"), sliders = every("[type=range]"), outputs = every("output");
const buttons = every("button");
const [[left, right], [low, high]] = s.reach, grid = [...Array(201).keys()].map((i) => left + (right - left) * i / 200);
const between = ([least, greatest]) => least + (greatest - least) * Math.random();
const height = (x) => s.wave[0] * Math.sin(x - s.wave[1]), shown = () => s.wave && checkbox.checked;

// the network: w holds the weights of a layer, row after row; numbers of several inputs stand one after the other
const initial = s.networks.map((layers) => layers.map((layer) => layer.map((values) => Float64Array.from(values))));
const activations = (layers, xs) => {
  const all = [Float64Array.from(xs)];
  layers.forEach(([w, b], l) => {
    const ins = w.length / b.length, below = all[l], here = new Float64Array(xs.length * b.length);
    for (let i = 0; i < xs.length; i++) for (let o = 0; o < b.length; o++) {
      let sum = b[o];
      for (let k = 0; k < ins; k++) sum += w[o * ins + k] * below[i * ins + k];
      here[i * b.length + o] = l < layers.length - 1 ? Math.max(sum, 0) : sum;
    }
    all.push(here);
  });
  return all;
};
const outputsOf = (layers, xs) => activations(layers, xs).pop();
const loss = (layers, xs, ys) => {
  const found = outputsOf(layers, xs);
  return ys.reduce((sum, y, i) => sum + (found[i] - y) ** 2 / ys.length, 0);
};
const descend = (layers, xs, ys, rate) => {
  const all = activations(layers, xs), moved = [];
  let slopes = all[layers.length].map((y, i) => 2 * (y - ys[i]) / ys.length);
  for (let l = layers.length - 1; l >= 0; l--) {
    const [w, b] = layers[l], ins = w.length / b.length, below = all[l], next = new Float64Array(below.length);
    const [newW, newB] = [w.slice(), b.slice()];
    for (let i = 0; i < xs.length; i++) for (let o = 0; o < b.length; o++) {
      const slope = slopes[i * b.length + o];
      newB[o] -= rate * slope;
      for (let k = 0; k < ins; k++) {
        newW[o * ins + k] -= rate * slope * below[i * ins + k];
        if (below[i * ins + k] > 0) next[i * ins + k] += slope * w[o * ins + k];
      }
    }
    moved.unshift([newW, newB]);
    slopes = next;
  }
  return moved;
};
let path = [], pathOf = "";
const adapted = (chosen, xs, ys, rate, steps) => {
  const key = JSON.stringify([chosen, xs, ys, rate]);
  if (key !== pathOf) [path, pathOf] = [[initial[chosen]], key];
  while (path.length <= steps) path.push(xs.length ? descend(path[path.length - 1], xs, ys, rate) : path[0]);
  return path[steps];
};

// the picture
const make = (tag, attributes, parent) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  return parent.appendChild(made);
};
const across = (x) => 28 + 324 * (x - left) / (right - left), down = (y) => 8 + 240 * (high - y) / (high - low);
const within = (v, least, greatest) => Math.max(least, Math.min(greatest, v));
const line = (ys) => "M" + grid.map((x, i) => across(x).toFixed(2) + " " + within(down(ys[i]), -999, 999).toFixed(2))
  .join("L");
const text = (v) => String(v).replace("-", "\u2212");
s.ticks[0].forEach((x) => {
  make("path", {d: "M" + across(x) + " 8v240"}, find(".ticks"));
  make("text", {x: across(x), y: 263, "text-anchor": "middle"}, find(".ticks")).textContent = text(x);
});
s.ticks[1].forEach((y) => {
  make("path", {d: "M28 " + down(y) + "h324"}, find(".ticks"));
  make("text", {x: 23, y: down(y) + 4, "text-anchor": "end"}, find(".ticks")).textContent = text(y);
});
const draw = () => {
  const chosen = radios.findIndex((radio) => radio.checked), wave = shown(), n = s.points.length;
  const steps = Number(sliders[0].value), rate = s.rate * 10 ** sliders[1].value;
  const [xs, ys] = [0, 1].map((axis) => s.points.map((point) => point[axis]));
  const both = [initial[chosen], adapted(chosen, xs, ys, rate, steps)];
  const curves = both.map((layers) => outputsOf(layers, grid));
  const losses = both.map((layers) => n ? loss(layers, xs, ys) : null), truth = wave ? grid.map(height) : [];
  const lost = !(losses[1] < 1e4 && curves[1].every(Number.isFinite));
  find("g .before").setAttribute("d", line(curves[0]));
  find("g .after").setAttribute("d", lost ? "" : line(curves[1]));
  find("g .truth").setAttribute("d", wave ? line(truth) : "");
  find(".lost").textContent = lost ? "diverged: the steps are too large" : "";
  movable.forEach((point, i) => {
    point.style.display = i < n ? "" : "none";
    if (i >= n) return;
    point.setAttribute("transform", "translate(" + across(xs[i]) + " " + down(ys[i]) + ")");
    point.setAttribute("aria-label", "point at x " + text(xs[i].toFixed(1)) + ", y " + text(ys[i].toFixed(1))
      + "; arrow keys move it, Delete removes it");
  });
  outputs[0].textContent = steps;
  outputs[1].textContent = Number(rate.toPrecision(2));
  sliders[1].setAttribute("aria-valuetext", outputs[1].textContent);
  const [after, where] = table.querySelectorAll("span"), [, onPoints, onWave] = table.rows;
  after.textContent = "after " + steps + (steps === 1 ? " step" : " steps");
  where.textContent = n + (n === 1 ? " point" : " points");
  const say = (v, i) => i && lost ? "diverged" : v === null ? "\u2013" : v < 100 ? v.toPrecision(2) : v.toFixed(0);
  both.forEach((layers, i) => {
    onPoints.cells[i + 1].textContent = say(losses[i], i);
    onWave.cells[i + 1].textContent = say(wave ? loss(layers, grid, truth) : null, i);
  });
  onWave.style.visibility = wave ? "" : "hidden";
  checkbox.disabled = !s.wave;
  buttons[1].disabled = n >= s.most;
  box.dataset.points = JSON.stringify(s.points);
  box.dataset.losses = JSON.stringify(lost ? [losses[0], null] : losses);
  box.dataset.curve = JSON.stringify(lost ? [] : [...curves[1]]);
};

// what the reader does
const hold = ([x, y]) => [within(x, left, right), within(y, low, high)];
const place = (event) => {
  const on = plot.getBoundingClientRect();
  return [left + (right - left) * (event.clientX - on.left) / on.width,
    high - (high - low) * (event.clientY - on.top) / on.height];
};
let held = {i: -1}; // the point under the pointer, if any, and where it was taken
const movable = [...Array(s.most).keys()].map((i) => {
  const point = make("g", {class: "move", tabindex: 0, role: "img"}, find(".points"));
  make("circle", {r: 12, class: "halo"}, point);
  make("circle", {r: 5, class: "point"}, point);
  point.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[event.key];
    if (step) s.points[i] = hold(s.points[i].map((v, axis) => v + 0.1 * step[axis]));
    else if (event.key === "Delete" || event.key === "Backspace") s.points.splice(i, 1);
    else return;
    event.preventDefault();
    draw();
    if (i >= s.points.length) (i ? movable[i - 1] : buttons[1]).focus();
  });
  return point;
});
board.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  held = {i: movable.indexOf(event.target.closest(".move")), at: [event.clientX, event.clientY], down: true};
});
window.addEventListener("pointermove", (event) => {
  if (!held.down || held.i < 0) return;
  held.moved ||= Math.hypot(event.clientX - held.at[0], event.clientY - held.at[1]) > 4;
  if (held.moved) { s.points[held.i] = hold(place(event)); draw(); }
});
board.addEventListener("touchmove", (event) => { // a finger on a point moves it; elsewhere it scrolls the page
  if (held.down && held.i >= 0) event.preventDefault();
}, {passive: false});
["pointerup", "pointercancel"].forEach((type) => window.addEventListener(type, () => { held.down = false; }));
board.addEventListener("click", (event) => {
  const at = place(event), {i, moved} = held;
  held = {i: -1};
  if (i >= 0 && !moved) s.points.splice(i, 1);
  else if (i < 0 && s.points.length < s.most && String(at) === String(hold(at))) s.points.push(at);
  draw();
});
const does = [
  () => {
    s.wave = [between(s.waves.amplitude), between(s.waves.phase)];
    s.points = [...Array(10)].map(() => between(s.waves.x)).map((x) => [x, height(x)]);
  },
  () => {
    const x = between(s.waves.x);
    s.points.push([x, shown() ? height(x) : 0]);
    draw();
    movable[s.points.length - 1].focus();
  },
  () => { s.points = []; },
  () => {
    [s.points, s.wave] = JSON.parse(start);
    box.querySelectorAll("input").forEach((input) => {
      [input.value, input.checked] = [input.defaultValue, input.defaultChecked];
    });
  },
];
buttons.forEach((button, i) => button.addEventListener("click", () => { does[i](); draw(); }));
box.addEventListener("input", draw);
window.addEventListener("pageshow", draw); // some browsers put sliders back where they were
draw();
})();
</script>
""")
