// The game on the landing page: endless 5-way 1-shot tasks of invented characters.
// A character is a few pen strokes; a drawing of it moves every point a little and tilts the whole.
// The first task is already in the page (it shows without this script); node task.js SEED prints such a task.

function generator(seed) { // mulberry32: small, seeded, the same everywhere
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const between = (random, low, high) => low + (high - low) * random();

function inventCharacter(random) {
  const spots = Array.from({ length: 25 }, (_, i) => [18 + 16 * (i % 5), 18 + 16 * Math.floor(i / 5)]);
  const take = (last, before) => { // an unused spot, neither close by nor sharply back
    const fits = ([x, y]) => {
      const step = [x - last[0], y - last[1]];
      if (Math.hypot(...step) < 24) return false;
      if (!before) return true;
      const came = [last[0] - before[0], last[1] - before[1]];
      return step[0] * came[0] + step[1] * came[1] > -0.75 * Math.hypot(...step) * Math.hypot(...came);
    };
    const free = last ? spots.filter(fits) : spots;
    const chosen = free[Math.floor(free.length * random())];
    if (chosen) spots.splice(spots.indexOf(chosen), 1);
    return chosen;
  };
  const strokes = [];
  const count = 2 + Math.floor(2 * random());
  for (let s = 0; s < count; s += 1) {
    const stroke = [];
    if (s > 0 && random() < 0.65) { // most strokes set out from an earlier one
      const earlier = strokes[Math.floor(s * random())];
      stroke.push(earlier[Math.floor(earlier.length * random())]);
    }
    const points = 2 + Math.floor(2.5 * random());
    while (stroke.length < points) {
      const next = take(stroke[stroke.length - 1], stroke[stroke.length - 2]);
      if (!next) break;
      stroke.push(next);
    }
    if (stroke.length > 1) strokes.push(stroke);
  }
  return fill(strokes);
}

function fill(strokes) { // centred, and as large as the card allows
  const reach = [0, 1].map((k) => strokes.flat().map((point) => point[k]));
  const [low, high] = [reach.map((r) => Math.min(...r)), reach.map((r) => Math.max(...r))];
  const scale = [0, 1].map((k) => Math.min(2, 62 / Math.max(20, high[k] - low[k])));
  return strokes.map((stroke) => stroke.map((point) => point.map((v, k) => 50 + (v - (low[k] + high[k]) / 2) * scale[k])));
}

function drawAgain(character, random) {
  const [turn, shear] = [between(random, -0.16, 0.16), between(random, -0.12, 0.12)];
  const [wide, high] = [between(random, 0.88, 1.08), between(random, 0.88, 1.08)];
  return character.map((stroke) => stroke.map(([x, y]) => {
    const u = (x - 50) * wide + (y - 50) * shear + between(random, -4, 4);
    const v = (y - 50) * high + between(random, -4, 4);
    return [50 + u * Math.cos(turn) - v * Math.sin(turn), 50 + u * Math.sin(turn) + v * Math.cos(turn)];
  }));
}

function pathOf(stroke) { // a Catmull-Rom curve through the points, as cubic Béziers
  const at = (i) => stroke[Math.max(0, Math.min(stroke.length - 1, i))];
  const round = (number) => Math.round(number);
  let path = `M${at(0).map(round).join(" ")}`;
  for (let i = 0; i + 1 < stroke.length; i += 1) {
    const control = (from, a, b, sign) => [0, 1].map((k) => round(from[k] + (sign * (b[k] - a[k])) / 5));
    const first = control(at(i), at(i - 1), at(i + 1), 1);
    const second = control(at(i + 1), at(i), at(i + 2), -1);
    path += `C${[...first, ...second, ...at(i + 1).map(round)].join(" ")}`;
  }
  return path;
}

const picture = (drawing) => drawing.map((stroke) => `<path pathLength="1" d="${pathOf(stroke)}"/>`).join("");

function inventTask(seed) {
  const random = generator(seed);
  const characters = Array.from({ length: 5 }, () => inventCharacter(random));
  const answer = Math.floor(5 * random());
  return {
    answer,
    support: characters.map((character) => picture(drawAgain(character, random))),
    query: picture(drawAgain(characters[answer], random)),
  };
}

function play(figure) {
  const cards = [...figure.querySelectorAll(".mt-card")];
  const query = figure.querySelector(".mt-query svg");
  const verdict = figure.querySelector(".mt-verdict");
  const next = figure.querySelector(".mt-next");
  const ordinals = [`the first one`, `the second one`, `the third one`, `the fourth one`, `the fifth one`];
  const score = { right: 0, tasks: 0 };
  let answer = Number(figure.dataset.answer);
  let seed = Date.now() % 1e9;

  const choose = (chosen) => {
    if (!next.hidden) return;
    const right = chosen === answer;
    score.tasks += 1;
    score.right += right ? 1 : 0;
    cards[chosen].classList.add(right ? "mt-right" : "mt-wrong");
    cards[answer].classList.add("mt-right");
    const name = ordinals[answer];
    verdict.textContent = (right ? `Yes, it is ${name}.` : `No, it is ${name}.`) + " "
      + `You: ${score.right} of ${score.tasks}, from one drawing a character.`;
    next.hidden = false;
  };
  const renew = () => {
    const task = inventTask((seed += 1));
    answer = task.answer;
    cards.forEach((card, i) => {
      card.classList.remove("mt-right", "mt-wrong");
      card.querySelector("svg").innerHTML = task.support[i];
    });
    query.innerHTML = task.query;
    verdict.textContent = `Which of the five is it?`;
    next.hidden = true;
    cards[0].focus({ preventScroll: true });
  };
  cards.forEach((card, i) => {
    card.disabled = false;
    card.addEventListener("click", () => choose(i));
  });
  next.addEventListener("click", renew);
}

if (typeof document === "undefined") console.log(JSON.stringify(inventTask(Number(process.argv[2])), null, 1));
else document.querySelectorAll(".mt-task").forEach(play);
