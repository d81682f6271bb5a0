"""Figures with which a reader can play in the static page: a script, and neither kernel nor network."""

from __future__ import annotations

import json
from string import Template
from zlib import crc32

from jaxtyping import Float, Int
from torch import Tensor

from metatutor.figures.metric import REACH
from metatutor.figures.shown import Shown
from metatutor.figures.style import COLOURS


def movable_plane(
    support: Float[Tensor, "n 2"], labels: Int[Tensor, " n"], query: Float[Tensor, " 2"], *, scale: float = 10.0
) -> Shown:
    """Support points and a query point to be moved, by pointer or arrow keys, and how three methods answer.

    Args:
        support: places from -3 to 3 in both directions.
        labels: their classes.
        query: the place of the query point.
        scale: of the cosines.

    Returns:
        HTML with its script.

    Example:
        >>> import torch
        >>> "prototype" in movable_plane(torch.zeros(2, 2), torch.arange(2), torch.ones(2))
        True
    """
    state = {
        "support": [[round(v, 4) for v in point] for point in support.tolist()],
        "labels": labels.tolist(),
        "query": [round(v, 4) for v in query.tolist()],
        "scale": scale,
        "reach": REACH,
        "colours": COLOURS[: int(labels.max()) + 1],
    }
    text = json.dumps(state, separators=(",", ":"))
    return Shown(_PLANE.substitute(state=text, id=f"plane-{crc32(text.encode()):08x}").strip())


_PLANE = Template("""
<style>
#$id{max-width:28rem;margin:1rem 0;font-size:.95em}
#$id .how{display:flex;flex-wrap:wrap;gap:.3rem;margin-bottom:.5rem}
#$id .how input{position:absolute;opacity:0}
#$id .how label{cursor:pointer;padding:.25rem .7rem;border-radius:.5rem;
border:1px solid var(--pst-color-border,#aaa)}
#$id .how input:checked+label{background:var(--pst-color-primary,#0072B2);color:var(--pst-color-background,#fff)}
#$id .how input:focus-visible+label{outline:3px solid var(--pst-color-primary,#0072B2);outline-offset:2px}
#$id .board{position:relative;aspect-ratio:1;background:#fff;border:1px solid #888;border-radius:.4rem;overflow:hidden}
#$id :is(canvas,svg){position:absolute;inset:0;width:100%;height:100%;display:block}
#$id svg{touch-action:none}
#$id .move{cursor:grab;stroke:#000;stroke-width:.7}
#$id .move:focus{outline:none;stroke-width:1.6}
#$id .cross{stroke:#000;stroke-width:.6;pointer-events:none}
#$id line{stroke:#000;pointer-events:none}
#$id table{margin:.6rem 0 0;border:0;width:100%;font-variant-numeric:tabular-nums}
#$id :is(td,th){border:0;padding:.1rem .6rem .1rem 0;text-align:left;font-weight:inherit;background:none}
#$id :is(td,th){white-space:nowrap}
#$id td:last-child{width:100%}
#$id i{display:block;height:.7rem;border-radius:.2rem}
</style>
<div id="$id" role="group" aria-label="Support points and a query point in the plane; all can be moved">
<div class="how" role="radiogroup" aria-label="method"></div>
<div class="board"><canvas width="160" height="160" aria-hidden="true"></canvas><svg viewBox="0 0 100 100"></svg></div>
<table aria-live="polite"></table>
<noscript>This figure needs JavaScript; the one above shows the same points.</noscript>
</div>
<script>
(() => {
const s = $state, box = document.getElementById("$id"), svg = box.querySelector("svg"), ways = s.colours.length;
const start = JSON.stringify([s.support, s.query]), eachWay = [...Array(ways).keys()];
const methods = {
  "prototypes": (q, means) => means.map((c) => -((q[0] - c[0]) ** 2 + (q[1] - c[1]) ** 2)),
  "prototypes, cosine": (q, means) => means.map((c) => s.scale * cosine(q, c)),
  "matching": (q) => {
    const a = softmax(s.support.map((x) => s.scale * cosine(q, x)));
    return eachWay.map((way) => Math.log(a.reduce((sum, v, i) => sum + (s.labels[i] === way) * v, 1e-12)));
  },
};
const cosine = (a, b) => (a[0] * b[0] + a[1] * b[1]) / Math.max(Math.hypot(...a) * Math.hypot(...b), 1e-12);
const softmax = (z) => {
  const top = Math.max(...z), e = z.map((v) => Math.exp(v - top)), sum = e.reduce((a, b) => a + b);
  return e.map((v) => v / sum);
};
const prototypes = () => eachWay.map((way) => {
  const own = s.support.filter((_, i) => s.labels[i] === way);
  return [0, 1].map((axis) => own.reduce((sum, x) => sum + x[axis], 0) / own.length);
});
const make = (tag, attributes, parent) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  return parent.appendChild(made);
};
const onBoard = ([x, y]) => [50 + 50 * x / s.reach, 50 - 50 * y / s.reach];
const how = box.querySelector(".how"), table = box.querySelector("table");
Object.keys(methods).forEach((name, i) => {
  how.insertAdjacentHTML("beforeend", '<input type="radio" name="$id" id="$id-' + i + '"' + (i ? "" : " checked")
    + '><label for="$id-' + i + '">' + name + "</label>");
  how.querySelectorAll("input")[i].addEventListener("change", () => { chosen = name; draw(); });
});
how.insertAdjacentHTML("beforeend", '<button type="button">start again</button>');
how.querySelector("button").addEventListener("click", () => { [s.support, s.query] = JSON.parse(start); draw(); });
eachWay.forEach((way) => table.insertAdjacentHTML("beforeend",
  "<tr><th>class " + way + '</th><td></td><td><i style="background:' + s.colours[way] + '"></i></td></tr>'));
const shapes = ["M-2.4 0a2.4 2.4 0 1 0 4.8 0a2.4 2.4 0 1 0-4.8 0z", "M-2.1-2.1h4.2v4.2h-4.2z", "M0-3l3 3l-3 3l-3-3z",
  "M0 3l3-5h-6z"];
const star = "M0-4.2l1.2 2.6 2.9.3-2.1 2 .6 2.9-2.6-1.5-2.6 1.5.6-2.9-2.1-2 2.9-.3z";
const lines = make("g", {}, svg), origin = make("path", {d: "M48 50h4M50 48v4", stroke: "#444"}, svg);
const crosses = eachWay.map((way) =>
  make("path", {d: "M-3-3l1-1 2 2 2-2 1 1-2 2 2 2-1 1-2-2-2 2-1-1 2-2z", class: "cross", fill: s.colours[way]}, svg));
const movable = [...s.support.keys(), -1].map((i) => {
  const name = i < 0 ? "query point" : "support point of class " + s.labels[i];
  const point = make("path", {class: "move", tabindex: 0, role: "img", d: i < 0 ? star : shapes[s.labels[i] % 4],
    "aria-label": name + "; arrow keys move it", fill: i < 0 ? "#000" : s.colours[s.labels[i]]}, svg);
  const to = (place) => {
    const held = place.map((v) => Math.max(-s.reach, Math.min(s.reach, v)));
    if (i < 0) s.query = held; else s.support[i] = held;
    draw();
  };
  point.addEventListener("pointerdown", (event) => { point.setPointerCapture(event.pointerId); });
  point.addEventListener("pointermove", (event) => {
    if (!point.hasPointerCapture(event.pointerId)) return;
    const {left, top, width} = svg.getBoundingClientRect();
    to([(event.clientX - left) / width * 2 - 1, 1 - (event.clientY - top) / width * 2].map((v) => v * s.reach));
  });
  point.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[event.key];
    if (!step) return;
    event.preventDefault();
    to((i < 0 ? s.query : s.support[i]).map((v, axis) => v + 0.1 * step[axis]));
  });
  return point;
});
let chosen = "prototypes";
const paint = () => {
  const canvas = box.querySelector("canvas"), n = canvas.width, context = canvas.getContext("2d");
  const rgb = s.colours.map((colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)));
  const image = context.createImageData(n, n), means = prototypes();
  for (let row = 0; row < n; row++) for (let column = 0; column < n; column++) {
    const place = [2 * (column + 0.5) / n - 1, 1 - 2 * (row + 0.5) / n].map((v) => v * s.reach);
    const z = methods[chosen](place, means);
    image.data.set([...rgb[z.indexOf(Math.max(...z))], 64], 4 * (row * n + column));
  }
  context.putImageData(image, 0, 0);
};
const draw = () => {
  const means = prototypes(), voters = chosen === "matching" ? s.support : means;
  const p = softmax(methods[chosen](s.query, means));
  const weights = chosen === "matching" ? softmax(s.support.map((x) => s.scale * cosine(s.query, x))) : p;
  crosses.forEach((cross, way) => {
    cross.setAttribute("transform", "translate(" + onBoard(means[way]) + ")");
    cross.style.display = chosen === "matching" ? "none" : "";
  });
  origin.style.display = chosen === "prototypes" ? "none" : "";
  movable.forEach((point, i) => {
    point.setAttribute("transform", "translate(" + onBoard(i < s.support.length ? s.support[i] : s.query) + ")");
  });
  lines.replaceChildren();
  voters.forEach((place, i) => {
    const [x1, y1] = onBoard(place), [x2, y2] = onBoard(s.query);
    make("line", {x1, y1, x2, y2, "stroke-width": 2.5 * weights[i]}, lines);
  });
  [...table.rows].forEach((row, way) => {
    row.cells[1].textContent = Math.round(100 * p[way]) + "%";
    row.querySelector("i").style.width = 100 * p[way] + "%";
  });
  box.dataset.probabilities = JSON.stringify(p);
  paint();
};
draw();
})();
</script>
""")
