/* SPDX-License-Identifier: Apache-2.0 */
/* The frontier of a plan as SVG: error over cost, in the colors of the page. */
const frontierFigure = (plan, width, words) => {
  const NS = document.getElementById("planner-svg").namespaceURI;
  const make = (name, fields, text) => {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(fields)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const height = Math.round(Math.min(Math.max(0.6 * width, 260), 440));
  const left = 46, right = 14, top = 26, bottom = 44;
  const others = plan.setting.limits.slice(1);
  const shown = plan.places.filter(one =>
    others.every(([unit, limit]) => one.spent[unit] <= limit * (1 + 1e-9)) && one.cost > 0);
  const costs = [...shown.map(one => one.cost), plan.limit].filter(isFinite);
  const lowest = Math.min(...shown.map(one => one.cost)), highest = Math.max(...shown.map(one => one.cost));
  const limit = Math.min(Math.max(plan.limit, lowest / 2), highest * 2);
  const from = Math.log10(Math.min(...costs.filter(c => c >= lowest / 2), limit)) - 0.08;
  const to = Math.log10(Math.max(highest, limit)) + 0.08;
  const ends = plan.interval ?? [plan.predicted_error, plan.predicted_error];
  const errors = [...shown.map(one => one.error), ...ends];
  const least = Math.min(...errors), most = Math.max(...errors), pad = 0.06 * (most - least) || 0.01;
  const x = cost => left + (width - left - right) * (Math.log10(cost) - from) / (to - from);
  const y = error => top + (height - top - bottom) * (most + pad - error) / (most - least + 2 * pad);
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label":
    `Predicted error over ${words.unit}: ${plan.frontier.length} places on the frontier; ` +
    `the choice is ${words.place(plan)} with ${plan.predicted_error.toFixed(3)}.`});
  // Ticks: round errors; powers of ten, and 2 and 5 where there are few of them.
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    .find(s => (most - least + 2 * pad) / s <= 7) ?? 1;
  for (let e = Math.ceil((least - pad) / step) * step; e <= most + pad; e += step) {
    svg.append(make("line", {x1: left, x2: width - right, y1: y(e), y2: y(e), class: "axis"}),
      make("text", {x: left - 6, y: y(e) + 4, "text-anchor": "end", class: "soft"},
        e.toFixed(step < 0.01 ? 3 : 2)));
  }
  const factors = to - from > 3 ? [1] : [1, 2, 5];
  let free = left - 20;
  for (let power = Math.floor(from); power <= to; power++) for (const factor of factors) {
    const cost = factor * 10 ** power;
    if (Math.log10(cost) < from || Math.log10(cost) > to || x(cost) < free + 26) continue;
    free = x(cost) + 26;
    svg.append(make("line", {x1: x(cost), x2: x(cost), y1: height - bottom, y2: height - bottom + 5,
      class: "axis"}), make("text", {x: x(cost), y: height - bottom + 18, "text-anchor": "middle",
      class: "soft"}, words.amount(cost)));
  }
  svg.append(make("line", {x1: left, x2: width - right, y1: height - bottom, y2: height - bottom,
    class: "axis"}));
  svg.append(make("text", {x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle",
    class: "soft"}, words.unit));
  svg.append(make("text", {x: 4, y: 11, class: "soft"}, "error"));
  if (plan.limit <= highest * 2) {
    svg.append(make("line", {x1: x(limit), x2: x(limit), y1: top, y2: height - bottom, class: "budget"}));
  }
  const steps = plan.frontier.slice().sort((a, b) => a.cost - b.cost);
  const path = steps.map((one, i) => (i ? `H${x(one.cost)}V${y(one.error)}`
    : `M${x(one.cost)} ${y(one.error)}`)).join("");
  svg.append(make("path", {d: path, class: "frontier"}));
  const key = one => [one.N, one.V, one.compressor].join(" ");
  const best = new Set(steps.map(key));
  for (const one of [...shown].sort((a, b) => best.has(key(a)) - best.has(key(b)))) {
    const mark = make("circle", {cx: x(one.cost), cy: y(one.error), r: best.has(key(one)) ? 4 : 3,
      class: best.has(key(one)) ? "best" : "mark"});
    mark.append(make("title", {}, `${words.place(one)}: error ${one.error.toFixed(4)} at ` +
      `${words.amount(one.cost)} ${words.unit}`));
    svg.append(mark);
  }
  const chosen = {...plan, cost: plan.cost.amount, error: plan.predicted_error};
  svg.append(make("line", {x1: x(chosen.cost), x2: x(chosen.cost), y1: y(ends[0]), y2: y(ends[1]),
    class: "chosen"}), make("circle", {cx: x(chosen.cost), cy: y(chosen.error), r: 8, class: "chosen"}));
  // Names: the choice first, then the frontier from its better end, where there is room.
  const taken = shown.map(one => [x(one.cost) - 4, y(one.error) - 4, x(one.cost) + 4, y(one.error) + 4]);
  const room = box => !taken.some(other => box[0] < other[2] && other[0] < box[2] &&
    box[1] < other[3] && other[1] < box[3]);
  for (const one of [chosen, ...steps.slice().reverse()]) {
    const text = words.short(one), wide = 7 * text.length;
    for (const [dx, dy, anchor] of [[10, -8, "start"], [-10, 16, "end"], [10, 16, "start"], [-10, -8, "end"]]) {
      const at = x(one.cost) + dx, low = y(one.error) + dy;
      const box = anchor === "start" ? [at, low - 12, at + wide, low + 2] : [at - wide, low - 12, at, low + 2];
      if (box[0] < left || box[2] > width || box[1] < 0 || box[3] > height - bottom || !room(box)) continue;
      if (one !== chosen && key(one) === key(chosen)) break;
      taken.push(box);
      svg.append(make("text", {x: at, y: low, "text-anchor": anchor,
        ...(one === chosen ? {"font-weight": 600} : {class: "soft"})}, text));
      break;
    }
  }
  return svg;
};
