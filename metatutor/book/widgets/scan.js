// ---- the scan: 105×105 pixels of ink or paper, shrunk to 28×28 as Omniglot was: in whole numbers, like Pillow ----
const lanczos = range(28).map((i) => {
  const wave = (x) => (x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1), zoom = 105 / 28, middle = (i + 0.5) * zoom;
  const first = Math.max(0, Math.trunc(middle - 3 * zoom + 0.5));
  const end = Math.min(105, Math.trunc(middle + 3 * zoom + 0.5));
  const shares = range(end - first).map((k) => (k + first - middle + 0.5) / zoom)
    .map((x) => (x >= -3 && x < 3 ? wave(x) * wave(x / 3) : 0)), total = sum(shares);
  return {first, shares: shares.map((v) => Math.trunc(v / total * 2 ** 22 + (v < 0 ? -0.5 : 0.5)))};
});
const along = (pixels, step, at) => lanczos.map(({first, shares}) => {
  let total = 2 ** 21;
  shares.forEach((share, k) => { total += share * pixels[at + step * (first + k)]; });
  return Math.max(0, Math.min(255, Math.floor(total / 2 ** 22)));
});
const shrink = (bitmap) => {
  const paper = Uint8Array.from(bitmap, (v) => (v ? 0 : 255));
  const level = range(105).flatMap((y) => along(paper, 1, 105 * y)); // first all rows, then all columns
  const columns = range(28).map((x) => along(level, 28, x));
  return Uint8Array.from(range(784), (i) => 255 - columns[i % 28][Math.floor(i / 28)]);
};
const scan = (strokes) => { // a round pen, as thick as the lines of Omniglot
  const bitmap = new Uint8Array(105 * 105), pen = 2.6;
  strokes.forEach((stroke) => stroke.forEach(([x1, y1], i) => {
    const [x0, y0] = stroke[Math.max(0, i - 1)], dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy;
    const reach = (a, b) => [Math.floor(Math.min(a, b) - pen), Math.ceil(Math.max(a, b) + pen)]
      .map((v) => Math.max(0, Math.min(104, v)));
    const [[left, right], [top, bottom]] = [reach(x0, x1), reach(y0, y1)];
    for (let y = top; y <= bottom; y++) for (let x = left; x <= right; x++) {
      const u = x + 0.5 - x0, v = y + 0.5 - y0; // the nearest point of the stroke is at a share t of this piece
      const t = length ? Math.max(0, Math.min(1, (u * dx + v * dy) / length)) : 0;
      if (Math.hypot(u - t * dx, v - t * dy) <= pen) bitmap[105 * y + x] = 1;
    }
  }));
  return bitmap;
};
