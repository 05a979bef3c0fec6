/* SPDX-License-Identifier: Apache-2.0 */
/* Inputs of the planner become a setting; its plan becomes words, a figure and tables. */
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("planner-data").textContent);
  const {plan, amounts, format, sum} = planner(data);
  const find = id => document.getElementById(id);
  const make = (name, fields = {}, ...content) => {
    const element = Object.assign(document.createElement(name), fields);
    element.append(...content);
    return element;
  };
  const LABELS = {flops: "FLOPs per request", ms: "ms per batch",
    ttft: "ms to the first token", tpot: "ms per output token",
    dollars: "Dollars per million requests", lifetime: "FLOPs of training and requests",
    lifetime_dollars: "Dollars of training and requests", hbm: "Bytes of memory"};
  const BIG = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const amount = x => {
    for (const [factor, prefix] of BIG)
      if (Math.abs(x) >= factor * 0.9995) return format(x / factor, 3) + "\u00a0" + prefix;
    return format(x, 3);
  };
  const size = N => (N >= 0.0995 ? format(N, 3) + "B" : N >= 0.9995e-3 ? format(N * 1e3, 3) + "M"
    : format(N * 1e6, 3) + "k");
  const parse = text => (text.trim() === "" ? NaN : Number(text.replace(/[\s_\u00a0]/g, "")));
  const several = Object.values(data.offers).some(of => Object.keys(of.own.tokens).length > 1);
  const nameOf = (names, N) => (names.find(([n]) => n === N) ?? [0, null])[1];
  const place = one => `${nameOf(data.offers.paper.own.names, one.N) ?? size(one.N)} with V = ${format(one.V, 4)}` +
    (several ? ` (${one.compressor})` : "");
  const short = one => {
    const name = nameOf(data.offers.paper.own.names, one.N);
    return `${name && name.length < 6 ? name : size(one.N)}·${format(one.V, 4)}`;
  };
  const percent = x => (100 * x).toFixed(Math.abs(x) < 0.0995 ? 1 : 0) + "\u00a0%";

  const setting = structuredClone(data.start);
  const OF_PAPER = ["flops", "lifetime"];
  const units = Object.keys(LABELS).filter(unit => (unit in Object.fromEntries(setting.limits)) ||
    (OF_PAPER.includes(unit) ? unit === "flops" || data.requests !== null : data.offers.full && Object.keys(data.chips).length &&
      (!unit.startsWith("lifetime") || data.requests !== null)));
  const limits = new Map(setting.limits);  // unit -> amount, of those that are ticked
  const kept = new Map(setting.limits);  // and of the others, as they were

  /* --- Inputs -------------------------------------------------------------------------------- */

  const rows = {};
  for (const unit of units) {
    const on = make("input", {type: "checkbox", id: "limit-" + unit});
    const value = make("input", {type: "text", inputMode: "decimal", id: "amount-" + unit,
      autocomplete: "off", ariaLabel: LABELS[unit]});
    const slide = make("input", {type: "range", min: 0, max: 200, step: 1,
      ariaLabel: LABELS[unit] + ", slider"});
    const row = make("div", {className: "row limit"},
      make("label", {htmlFor: on.id}, on, LABELS[unit]), value, slide);
    find("planner-limits").append(row);
    rows[unit] = {on, value, slide, range: null};
    on.addEventListener("change", () => {
      if (on.checked) limits.set(unit, kept.get(unit) ?? middle(unit));
      else limits.delete(unit);
      if (on.checked && !OF_PAPER.includes(unit)) needs(unit);
      update();
    });
    value.addEventListener("change", () => {
      const x = parse(value.value);
      kept.set(unit, x);
      limits.set(unit, x);
      if (!OF_PAPER.includes(unit)) needs(unit);
      update(value);
    });
    slide.addEventListener("input", () => {
      const [low, high] = rows[unit].range, x = +format(low * (high / low) ** (slide.value / 200), 3);
      kept.set(unit, x);
      limits.set(unit, x);
      if (!OF_PAPER.includes(unit)) needs(unit);
      update(slide);
    });
  }
  const needs = unit => {  // a limit that the paper's cost does not have
    setting.cost = "full";
    if (unit !== "hbm" && setting.chip === null) setting.chip = Object.keys(data.chips)[0];
  };
  const middle = unit => {
    const range = rows[unit].range ?? rangeOf(unit);
    return range ? +format(Math.sqrt(range[0] * range[1]), 3) : NaN;
  };
  /* What the places cost in a unit, from the cheapest to twice the dearest. */
  const rangeOf = unit => {
    const probe = {...setting, limits: [["flops", 1e300]], ...(OF_PAPER.includes(unit) ? {}
      : {cost: "full", chip: setting.chip ?? Object.keys(data.chips)[0], price: setting.price || 1})};
    if (probe.cost === "paper") probe.chip = null;
    const spent = amounts(probe, unit).filter(x => x > 0);
    return spent.length ? [Math.min(...spent), 2 * Math.max(...spent)] : null;
  };

  const bind = (key, read, write, slide) => {
    const text = find(key), range = find(key + "-slider");
    text.addEventListener("change", () => { read(text.value); update(text); });
    range.addEventListener("input", () => { read(String(slide(+range.value))); update(range); });
    return source => {
      if (source !== text) text.value = write();
      text.setAttribute("aria-invalid", text.value !== write());
    };
  };
  const textsOf = text => {
    const pairs = text.split(",").map(item => item.split(":").map(parse));
    if (!text.includes(":")) return [[parse(text), 1]];
    const total = sum(pairs.map(([, share]) => share));
    return pairs.map(([Q, share]) => [Q, share / total]);
  };
  // Lengths and batches grow by steps that one sees: 0, 1, 2, ... in squares and in doublings.
  const shows = [
    bind("text", x => { setting.texts = textsOf(x); }, () => setting.texts.length === 1
      ? format(setting.texts[0][0]) : setting.texts.map(([Q, w]) => `${format(Q)}:${format(w, 3)}`).join(","),
      x => Math.round(x * x / 1000)),
    bind("new", x => { setting.G = parse(x); }, () => format(setting.G), x => Math.round(x * x / 1000)),
    bind("batch", x => { setting.batch = Math.round(parse(x)); }, () => format(setting.batch),
      x => 2 ** x),
  ];
  const slide = () => {
    const root = x => Math.min(Math.round(Math.sqrt(1000 * Math.max(x, 0))), 1000);
    find("text-slider").value = root(sum(setting.texts.map(([Q, w]) => Q * w)));
    find("new-slider").value = root(setting.G);
    find("batch-slider").value = Math.log2(setting.batch);
    find("text-slider").ariaValueText = find("text").value + " tokens";
    find("new-slider").ariaValueText = find("new").value + " tokens";
    find("batch-slider").ariaValueText = find("batch").value + " requests";
  };

  find("chip").append(make("option", {value: ""}, "none"),
    ...Object.keys(data.chips).map(name => make("option", {value: name}, data.chips[name].name)));
  find("chip").addEventListener("change", event => {
    setting.chip = event.target.value || null;
    if (setting.chip !== null) setting.cost = "full";
    else for (const unit of data.times) limits.delete(unit);
    if (!limits.size) limits.set("flops", kept.get("flops") ?? middle("flops"));
    update();
  });
  find("price").addEventListener("change", event => {
    setting.price = event.target.value.trim() === "" ? null : parse(event.target.value);
    update();
  });
  find("cost").disabled = !data.offers.full;
  find("cost").addEventListener("change", event => {
    setting.cost = event.target.value;
    if (setting.cost === "paper") {
      setting.chip = null;
      for (const unit of limits.keys()) if (!OF_PAPER.includes(unit)) limits.delete(unit);
    }
    if (!limits.size) limits.set("flops", kept.get("flops") ?? middle("flops"));
    update();
  });
  const fixed = [...data.notes];
  if (!data.offers.full) fixed.push(`Counted is the paper's cost, 2N(Q+V+G), alone: ${data.without_full}.`);
  if (data.cached_text) fixed.push("The text's keys and values are cached.");
  if (data.requests !== null) fixed.push(`Requests of the model's life: ${amount(data.requests)}.`);
  for (const id of ["batch", "cost", "chip", "price"]) find(id).closest(".row").hidden = !data.offers.full;
  find("planner-fixed").textContent = fixed.join(" ");
  find("planner-fixed").hidden = !fixed.length;

  const weights = data.laws.families ? data.laws.families.weights.map(([name]) => name) : [];
  let mix = setting.mix ?? weights.map(name => [name, 1 / weights.length]);
  mix = weights.map(name => [name, (mix.find(([n]) => n === name) ?? [name, 0])[1]]);
  find("planner-mix").hidden = weights.length < 2;
  find("mixed").options[0].textContent = data.own_name;
  const weighers = weights.map((name, i) => {
    const range = make("input", {type: "range", min: 0, max: 100, step: 1, id: "weight-" + i});
    const shown = make("output", {htmlFor: range.id});
    find("planner-weights").append(make("div", {className: "row"},
      make("label", {htmlFor: range.id}, name), range, shown));
    range.value = 100 * mix[i][1];
    range.addEventListener("input", () => {
      mix = weights.map((name, k) => [name, +weighers[k].range.value / 100]);
      setting.mix = mix;
      update(range);
    });
    return {range, shown};
  });
  find("mixed").addEventListener("change", event => {
    setting.mix = event.target.value === "mix" ? mix : null;
    update();
  });

  const show = source => {
    for (const unit of units) {
      const {on, value, slide} = rows[unit], x = limits.get(unit) ?? kept.get(unit) ?? middle(unit);
      on.checked = limits.has(unit);
      const range = rows[unit].range;
      slide.disabled = !range;
      if (source !== value || !Number.isNaN(x)) value.value = Number.isNaN(x) ? value.value : format(x, 4);
      value.setAttribute("aria-invalid", Number.isNaN(x));
      if (range && source !== slide)
        slide.value = 200 * Math.log(x / range[0]) / Math.log(range[1] / range[0]);
      slide.ariaValueText = amount(x) + " " + LABELS[unit];
    }
    for (const showOne of shows) showOne(source);
    slide();
    find("cost").value = setting.cost;
    find("chip").value = setting.chip ?? "";
    find("chip").disabled = !data.offers.full;
    find("price").disabled = setting.chip === null;
    const own = setting.chip !== null && data.chips[setting.chip].price;
    find("price").value = setting.price === null ? "" : format(setting.price);
    find("price").placeholder = own ? format(own) : "not given";
    find("mixed").value = setting.mix === null ? "own" : "mix";
    const total = sum(mix.map(([, w]) => w));
    weighers.forEach(({range, shown}, i) => {
      range.disabled = setting.mix === null;
      shown.textContent = total ? percent(mix[i][1] / total) : "0";
      range.ariaValueText = shown.textContent;
    });
  };

  /* --- The answer ---------------------------------------------------------------------------- */

  let last = null;
  const said = (found, node) => {
    node.className = found.error ? "refused" : "";
    if (found.error) {
      node.replaceChildren(make("p", {className: "first"}, "No plan"), make("p", {}, found.error + "."));
      return;
    }
    const {decision, interval} = found, name = nameOf(found.names, found.N);
    const lines = [make("p", {className: "first"}, `${name ?? size(found.N)}, ` +
      `V = ${format(found.V, 4)} visual tokens (${found.compressor})`)];
    lines.push(make("p", {}, `Predicted error ${found.predicted_error.toFixed(4)}` +
      (interval ? ` (95 % interval ${interval.map(x => x.toFixed(3)).join(" to ")})` : "") + "."));
    lines.push(make("p", {}, `${amount(found.cost.amount)} of ${amount(found.limit)} ${found.cost.unit}` +
      (found.latency ? `; first token after ${format(found.latency.time_to_first_token_ms, 3)} ms` +
        (found.latency.time_per_output_token_ms === null ? "" :
          `, ${format(found.latency.time_per_output_token_ms, 3)} ms for each other`) : "") + "."));
    lines.push(make("p", {}, decision.p_best === null
      ? "How sure this is: not known, the law has no draws."
      : `Best of ${decision.candidates} with probability ${decision.p_best.toFixed(2)}; ` +
        `expected regret ${decision.regret.toFixed(4)}.`));
    node.replaceChildren(...lines);
  };

  const table = (node, caption, heads, lines) => {
    const head = make("tr", {}, ...heads.map((title, i) => make("th", {scope: "col",
      className: i ? "" : "words"}, title)));
    const body = lines.map(({good, cells}) => make("tr", {className: good ? "good" : ""},
      ...cells.map((cell, i) => make(i ? "td" : "th", i ? {} : {scope: "row"}, cell))));
    node.replaceChildren(make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
  };

  const tables = found => {
    const best = found.candidates[0];
    const good = one => one.error - best.error <= data.epsilon;
    const shown = found.candidates.filter((one, i) => i < 8 || good(one)).slice(0, 20);
    const chance = x => (x === null ? "–" : x.toFixed(2));
    table(find("planner-candidates"),
      `The best ${shown.length} of ${found.candidates.length} within the budget. Shaded: within ` +
      `${format(data.epsilon)} of the choice's error, as good; among these the cost should decide. ` +
      `Cost: ${found.cost.unit}.`, ["LLM", "V", "error", "P(best)", "regret", "cost"],
      shown.map(one => ({good: good(one), cells: [
        (nameOf(found.names, one.N) ?? size(one.N)) + (several ? `, ${one.compressor}` : ""),
        format(one.V, 4), one.error.toFixed(4), chance(one.p_best),
        one.regret === null ? "–" : one.regret.toFixed(4), amount(one.cost)]})));
    const {amount: _, unit: __, ...parts} = found.cost, lines = [];
    for (const [unit, of] of Object.entries(parts)) if (unit !== "ttft" && unit !== "tpot")
      for (const [name, value] of Object.entries(of))
        if (value) lines.push({cells: [`${data.units[unit]}: ${name}`, amount(value),
          percent(value / sum(Object.values(of)))]});
    if (!lines.length) lines.push({cells: [data.units.flops, amount(found.cost.amount), "100 %"]});
    table(find("planner-parts"), "Parts of the choice's cost.", ["part", "amount", "share"], lines);
  };

  const lists = found => {
    const items = found.limits.map(limit => {
      const used = `${limit.words[0].toUpperCase()}${limit.words.slice(1)}: ` +
        `${amount(limit.used)} of ${amount(limit.limit)}`;
      if (!limit.binds) return make("li", {}, `${used}. Does not bind.`);
      const {next, without} = limit;
      return make("li", {}, make("strong", {}, `${used}. Binds: `),
        `${percent(next.more)} more buys ${place(next)} and saves ${next.error_saved.toFixed(4)}; ` +
        `without this limit ${place(without)} saves ${without.error_saved.toFixed(4)}.`);
    });
    find("planner-limits-said").replaceChildren(...items);
    find("planner-warnings").replaceChildren(...(found.warnings.length
      ? found.warnings.map(words => make("li", {}, words[0].toUpperCase() + words.slice(1) + "."))
      : [make("li", {}, "Nothing beyond the interval.")]));
  };

  const draw = () => {
    const node = find("planner-figure");
    if (!last || last.error) return node.replaceChildren();
    node.replaceChildren(frontierFigure(last, Math.max(node.clientWidth, 280),
      {unit: last.cost.unit, amount, place, short}));
  };

  /* Words wait for a pause, so that a screen reader hears the answer and not every step. */
  let waiting = 0;
  const update = source => {
    setting.limits = units.filter(unit => limits.has(unit)).map(unit => [unit, limits.get(unit)]);
    last = plan(setting);
    for (const unit of units) rows[unit].range = rangeOf(unit);
    show(source);
    const found = last;
    clearTimeout(waiting);
    waiting = setTimeout(() => said(found, find("planner-choice")), source ? 120 : 0);
    for (const id of ["planner-candidates", "planner-parts", "planner-limits-said", "planner-warnings"])
      if (found.error) find(id).replaceChildren();
    if (!found.error) {
      tables(found);
      lists(found);
    }
    draw();
  };
  find("planner-form").addEventListener("submit", event => event.preventDefault());
  let wide = 0;
  new ResizeObserver(([entry]) => {
    if (Math.round(entry.contentRect.width) === wide) return;
    wide = Math.round(entry.contentRect.width);
    draw();
  }).observe(find("planner-figure"));
  update();
})();
