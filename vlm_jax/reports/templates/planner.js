/* SPDX-License-Identifier: Apache-2.0 */
/* Plans from exported numbers (vlm_jax/planning/exported.py) as vlm_jax/planning does in Python.
   planner(data).plan(setting) gives the fields of a plan, or {error: words} where Python refuses.
   It touches no page: planner_page.js does. */
const planner = data => {
  "use strict";
  class Refusal extends Error {}
  const sum = list => list.reduce((a, b) => a + b, 0);
  const poly = (c, Q, p) => {
    const x = [1, Q, Q * Q, p, p * p, p * Q];
    let y = 0;
    for (let i = 0; i < c.length; i++) y += c[i] * x[i];
    return y;
  };

  /* Python's format of numbers: digits significant ones, no zeros at the end. */
  const strip = s => (s.includes(".") ? s.replace(/\.?0+$/, "") : s);
  const g = (x, digits = 6) => {
    if (x === 0) return "0";
    if (!isFinite(x)) return x > 0 ? "inf" : "-inf";
    const [mantissa, e] = x.toExponential(digits - 1).split("e");
    if (+e >= -4 && +e < digits) return strip(x.toFixed(Math.max(digits - 1 - e, 0)));
    return strip(mantissa) + "e" + (e < 0 ? "-" : "+") + String(Math.abs(e)).padStart(2, "0");
  };

  /* --- What it costs ------------------------------------------------------------------------- */

  /* Cost of one described size: unit -> part -> amount (costs.FullCost.details). */
  const details = (terms, s) => {
    const chip = s.chip === null ? null : data.chips[s.chip];
    const w = data.widths.indexOf(chip ? chip.width : 2), B = s.batch, p = Math.max(s.G - 1, 0);
    const totals = {};
    const add = (unit, name, value, largest) => {
      const of = totals[unit] ??= {};
      of[name] = largest ? Math.max(of[name] ?? 0, value) : (of[name] ?? 0) + value;
    };
    for (const [Q, share] of s.texts) {
      const [weights, cache, V, held, encoder, small, large, most] = terms.memory[w], t = Q + V;
      const prefill = t <= most ? small[0] + small[1] * t + small[2] * t * t : large[0] + large[1] * t;
      // Memory must hold the longest text, the others are means.
      add("hbm", "weights", weights, true);
      add("hbm", "cache", B * cache * (Q + held + s.G), true);
      add("hbm", "activations", B * Math.max(encoder, prefill), true);
      const ms = {};
      data.phases.forEach((phase, i) => {
        const asks = phase !== "question" || Q > 0;
        const flops = asks ? poly(terms.flops[i], Q, p) : 0;
        add("flops", phase, share * flops);
        if (!chip) return;
        const [fixed, each] = terms.bytes[w][i], c = data.calibration;
        const bytes = asks ? poly(fixed, Q, p) + B * poly(each, Q, p) : 0;
        const of_llm = i > 1, through = terms.passes[i][0] + terms.passes[i][1] * p;
        let sent = 0;
        if (chip.count > 1 && asks) {
          const [steps, ring] = terms.sent[w][i];
          sent = poly(steps, Q, p) + B * poly(ring, Q, p) / chip.link;
        }
        ms[phase] = 1e3 * (Math.max(B * flops / (of_llm ? chip.llm_peak : chip.peak),
          bytes / chip.bandwidth) / (c.efficiency[phase] ?? 1) + sent + through * c.step);
      });
      if (!chip) continue;
      if (data.calibration.request) ms.request = 1e3 * data.calibration.request;
      const price = s.hourly / 3.6e6 / B * 1e6;
      for (const [phase, time] of Object.entries(ms)) {
        add("ms", phase, share * time);
        if (phase !== "decode") add("ttft", phase, share * time);
        add("dollars", phase, share * price * time);
      }
      add("tpot", "decode", share * ms.decode / Math.max(s.G - 1, 1));
    }
    if (data.requests !== null) {
      const all = unit => sum(Object.values(totals[unit]));
      totals.lifetime = {training: terms.training, requests: data.requests * all("flops")};
      if (chip) totals.lifetime_dollars = {
        training: terms.training / (chip.peak * data.training_efficiency) * s.hourly / 3600,
        requests: data.requests / 1e6 * all("dollars")};
    }
    return totals;
  };

  /* y at x on the line through the points, extrapolated at the end (costs._line). */
  const line = (x, xs, ys) => {
    const n = xs.length;
    if (n === 1) return ys[0] * x / xs[0];
    if (x > xs[n - 1]) {
      const rise = ys[n - 1] > ys[n - 2] ? (ys[n - 1] - ys[n - 2]) / (xs[n - 1] - xs[n - 2])
        : Math.max(ys[n - 1] / xs[n - 1], 1e-300);
      return ys[n - 1] + (x - xs[n - 1]) * rise;
    }
    const at = xs.findIndex(known => known >= x);
    if (at <= 0 || xs[at] === x) return ys[Math.max(at, 0)];
    const share = (x - xs[at - 1]) / (xs[at] - xs[at - 1]);
    return ys[at - 1] + share * (ys[at] - ys[at - 1]);
  };

  const near = (pairs, V) => (pairs.find(([v]) => v === V) ?? [])[1];

  /* The cost model of a setting: amount(unit, N, V, kind) and parts. */
  const costs = s => {
    const memory = new Map();
    const of = (V, kind) => {
      const key = kind + " " + V;
      if (!memory.has(key)) memory.set(key, near(data.terms[kind], V).map(t => details(t, s)));
      return memory.get(key);
    };
    const Q = sum(s.texts.map(([q, share]) => q * share));
    if (s.cost === "paper") {
      const flops = (N, V) => 2e9 * N * ((data.cached_text ? 0 : Q) + s.G + V);
      const life = (N, V) => ({training: N * near(data.paper_training, V),
        requests: data.requests * flops(N, V)});
      return {Q,
        amount: (unit, N, V) => unit === "flops" ? flops(N, V) : sum(Object.values(life(N, V))),
        parts: (N, V) => data.requests === null ? {} : {lifetime: life(N, V)}};
    }
    return {Q,
      amount: (unit, N, V, kind) => line(N, data.sizes,
        of(V, kind).map(d => sum(Object.values(d[unit])))),
      parts: (N, V, kind) => {
        const all = of(V, kind), found = {};
        for (const unit of Object.keys(all[0])) {
          found[unit] = {};
          for (const name of Object.keys(all[0][unit]))
            found[unit][name] = line(N, data.sizes, all.map(d => d[unit][name]));
        }
        return found;
      }};
  };

  /* --- What it errs -------------------------------------------------------------------------- */

  const REGRESSORS = {
    "lnN": (n, t) => n, "-lnN": n => -n, "lnT": (n, t) => t, "lnN lnT": (n, t) => n * t,
    "lnframes": () => 0, "-lnframes": () => 0,
  };
  const logs = new WeakMap();  // parameter vectors with the logarithms of their coefficients
  const logarithmic = (terms, vector) => {
    if (!logs.has(vector)) logs.set(vector, vector.map((x, i) =>
      i < terms ? Math.log(Math.max(x, 1e-300)) : x));
    return logs.get(vector);
  };
  /* A form at one place: parameter vector -> error. */
  const at = (name, N, V, Q) => {
    const form = data.forms[name], n = Math.log(N), t = Math.log(form.total ? V + Q : V);
    const K = form.terms.length;
    const design = form.terms.map(term => term.map(([e, name]) => [K + 1 + e, REGRESSORS[name](n, t)]));
    return vector => {
      const x = logarithmic(K, vector);
      let error = x[K];
      for (let k = 0; k < K; k++) {
        let power = 0;
        for (const [i, value] of design[k]) power += x[i] * value;
        error += Math.exp(x[k] - power);
      }
      return error;
    };
  };
  const clip = x => Math.min(Math.max(x, 0), 1);
  /* The cell measured at a place, of one frame: an image. */
  const cell = (family, N, V) => family.cells.N.findIndex((n, i) => Math.max(Math.abs(Math.log(N / n)),
    Math.abs(Math.log(V / family.cells.V[i])), Math.abs(Math.log(family.cells.frames[i]))) <= 1e-3);
  const quantile = (values, q) => {
    const x = Float64Array.from(values).sort(), place = q * (x.length - 1), low = Math.floor(place);
    return x[low] + (place - low) * (x[Math.min(low + 1, x.length - 1)] - x[low]);
  };

  const expected = (family, N, V, Q) => family.by === "cells" ? family.cells.error[cell(family, N, V)]
    : sum(family.forms.map(f => f.share * at(f.form, N, V, Q)(f.values)));

  /* The order of draws of a measured cell: the hash of law.answer.orders. */
  const WORLDS = 1000, ordered = new Map();
  const orderOf = column => {
    if (!ordered.has(column)) {
      const keys = Array.from({length: WORLDS}, (_, i) => {
        let x = (column * WORLDS + i) >>> 0;
        x = Math.imul(x ^ (x >>> 16), 0x85ebca6b) >>> 0;
        x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35) >>> 0;
        return (x ^ (x >>> 16)) >>> 0;
      });
      ordered.set(column, keys.map((_, i) => i).sort((a, b) => keys[a] - keys[b]));
    }
    return ordered.get(column);
  };

  /* Paired draws of a family at a place, in the family's order; null without draws. */
  const drawn = new Map();
  const draws = (family, N, V, Q) => {
    const key = [family.id, N, V, family.by === "cells" ? 0 : Q].join(" ");
    if (drawn.has(key)) return drawn.get(key);
    let raw;
    if (family.by === "cells") {
      const i = cell(family, N, V), {error, sd} = family.cells, order = orderOf(i);
      const t = near(data.student, family.dof);
      raw = order.map(k => clip(error[i] + sd[i] * t[k]));
    } else if (family.forms.some(f => !f.draws)) raw = null;
    else raw = family.forms.flatMap(f => {
      const error = at(f.form, N, V, Q);
      return Array.from({length: f.worlds}, (_, d) => clip(error(f.draws[d % f.draws.length])));
    });
    const found = raw && Float64Array.from(family.order, d => raw[d]);
    if (drawn.size > 20000) drawn.clear();
    drawn.set(key, found);
    return found;
  };

  const intervalOf = (family, N, V, Q) => {
    if (family.by === "cells") return family.cells.interval[cell(family, N, V)];
    const ends = values => [0.025, 0.975].map(q => clip(quantile(values, q)));
    if (family.interval === "form") {
      const [f] = family.forms;
      return ends(f.draws.map(at(f.form, N, V, Q)));
    }
    if (family.interval === "forms") {
      let total = 0, before = 0;
      const share = sum(family.forms.map(f => f.share)), values = [];
      for (const f of family.forms) {
        total += f.share;
        const end = rint(total / share * 4000), error = at(f.form, N, V, Q);
        for (let d = 0; d < end - before; d++) values.push(clip(error(f.draws[d % f.draws.length])));
        before = end;
      }
      return ends(values);
    }
    if (family.interval === "residuals") {
      const middle = at(family.law.form, N, V, Q)(family.law.values);
      return [-1, 1].map(sign => middle + sign * 1.96 * family.rmse);
    }
    return null;
  };
  const rint = x => {  // to even, as numpy rounds
    const r = Math.round(x);
    return Math.abs(x % 1) === 0.5 && r % 2 ? r - 1 : r;
  };

  let count = 0;
  for (const mixture of [data.laws.own, data.laws.families, ...Object.values(data.laws.kinds)])
    for (const family of mixture ? mixture.families : []) family.id = count++;

  /* What answers under a setting: of a compressor, families with weights. */
  const lawOf = (s, kind) => {
    if (s.mix === null) {
      const own = data.laws.kinds[kind] ?? data.laws.own;
      return own.families.map((family, i) => [family, own.weights[i][1]]);
    }
    const total = sum(s.mix.map(([, w]) => w));
    return s.mix.map(([name, w]) => [data.laws.families.families.find(f => f.name === name), w / total]);
  };
  const domain = (law, axis) => {
    const ends = law.filter(([f, w]) => w && f.domain[axis]).map(([f]) => f.domain[axis]);
    return ends.length ? [Math.max(...ends.map(e => e[0])), Math.min(...ends.map(e => e[1]))] : null;
  };
  const errorOf = (law, N, V, Q) => sum(law.map(([f, w]) => w * expected(f, N, V, Q)));
  const byCells = law => law.filter(([f, w]) => w && f.by === "cells").map(([f]) => f);
{% include "planner_search.js" %}
};
