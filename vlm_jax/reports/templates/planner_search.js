{# SPDX-License-Identifier: Apache-2.0 #}
{# Inside planner.js: what may be chosen, the search, how sure it is, limits, warnings, refusals. #}

  /* --- What may be chosen -------------------------------------------------------------------- */

  /* The LLMs and the V of each compressor (planning.choices); of several families what all allow,
     and measured places alone where no form of a family fits. */
  const offered = s => {
    const of = data.offers[s.cost];
    if (s.mix === null) return of.own;
    const law = lawOf(s), weighted = law.filter(([, w]) => w).map(([f]) => f);
    const cells = byCells(law), first = of[weighted[0].name];
    const both = (a, b) => a.filter(x => b.includes(x));
    if (cells.length) {
      const key = (n, v) => n + " " + v;
      const places = cells.map(f => new Set(f.cells.N.map((n, i) => key(n, f.cells.V[i]))
        .filter((_, i) => Math.abs(Math.log(f.cells.frames[i])) <= 1e-3)));
      const common = [...places[0]].filter(p => places.every(of => of.has(p)))
        .map(p => p.split(" ").map(Number));
      const axis = i => [...new Set(common.map(p => p[i]))].sort((a, b) => a - b);
      return {names: first.names, llms: data.listed.llms ? first.llms : axis(0),
        tokens: data.listed.tokens ? first.tokens
          : Object.fromEntries(Object.keys(first.tokens).map(kind => [kind, axis(1)]))};
    }
    let {llms, tokens} = first;
    for (const other of weighted.slice(1).map(f => of[f.name])) {
      llms = both(llms, other.llms);
      tokens = Object.fromEntries(Object.entries(tokens).map(([kind, V]) =>
        [kind, both(V, other.tokens[kind] ?? [])]));
    }
    tokens = Object.fromEntries(Object.entries(tokens).filter(([, V]) => V.length));
    if (!llms.length || !Object.keys(tokens).length) throw new Refusal(
      "no LLM and V lie within twice the range on which the laws of all these families were fitted: " +
      "give fewer of them a weight");
    return {names: first.names, llms, tokens};
  };

  const answersAt = (law, N, V) => byCells(law).every(f => cell(f, N, V) >= 0);
  const rank = (a, b) => a.error - b.error || a.cost - b.cost;

  /* Every place that has an answer, with its error and the amounts of all limits. */
  const places = (s, offer, cost) => {
    const found = [];
    for (const [kind, tokens] of Object.entries(offer.tokens)) {
      const law = lawOf(s, kind);
      for (const V of tokens) for (const N of offer.llms) {
        if (!answersAt(law, N, V)) continue;
        found.push({N, V, compressor: kind,
          error: sum(s.texts.map(([Q, share]) => share * errorOf(law, N, V, Q))),
          spent: Object.fromEntries(s.limits.map(([unit]) => [unit, cost.amount(unit, N, V, kind)]))});
      }
    }
    return found;
  };
  const within = (one, limits) => limits.every(([unit, limit]) => one.spent[unit] <= limit * (1 + 1e-9));
  /* Candidates within limits, best first, with their cost in the unit of the first one. */
  const candidates = (all, limits) => all.filter(one => within(one, limits))
    .map(one => ({...one, cost: one.spent[limits[0][0]]})).sort(rank);

  /* --- How sure it is ------------------------------------------------------------------------ */

  const drawsOf = (s, one) => {
    const total = new Float64Array(WORLDS);
    for (const [Q, share] of s.texts)
      for (const [family, w] of lawOf(s, one.compressor)) {
        // A family without a weight has no answer where it was not measured, and needs none.
        if (!w) continue;
        const errors = draws(family, one.N, one.V, Q);
        if (errors === null) return null;
        for (let d = 0; d < WORLDS; d++) total[d] += share * w * errors[d];
      }
    return total;
  };
  const sure = (s, everyone) => {
    const columns = everyone.map(one => drawsOf(s, one));
    if (columns.includes(null)) return null;
    const best = new Array(everyone.length).fill(0), regret = [...best], lost = [];
    for (let d = 0; d < WORLDS; d++) {
      let least = 0;
      for (let i = 1; i < columns.length; i++) if (columns[i][d] < columns[least][d]) least = i;
      best[least] += 1 / WORLDS;
      columns.forEach((c, i) => { regret[i] += (c[d] - columns[least][d]) / WORLDS; });
      lost.push(columns[0][d] - columns[least][d]);
    }
    return {best, regret, regret_95: quantile(lost, 0.95)};
  };

  const gain = (chosen, better, unit, limit) => ({N: better.N, V: better.V,
    compressor: better.compressor, needs: better.spent[unit],
    more: better.spent[unit] / limit - 1, error_saved: chosen.error - better.error});
  const limitsOf = (s, all, chosen) => s.limits.map(([unit, limit]) => {
    const kept = s.limits.filter(([other]) => other !== unit);
    const better = candidates(all, [...kept, [unit, Infinity]])
      .filter(one => one.error < chosen.error);
    const entry = {unit, words: data.units[unit], limit, used: chosen.spent[unit],
      binds: better.length > 0};
    if (!better.length) return entry;
    const cheapest = better.reduce((a, b) => (b.spent[unit] < a.spent[unit] ? b : a));
    return {...entry, next: gain(chosen, cheapest, unit, limit),
      without: gain(chosen, better[0], unit, limit)};
  });

  /* --- Words --------------------------------------------------------------------------------- */

  const nothing = (s, offer, cost) => {
    const words = [];
    for (const [unit, limit] of s.limits) {
      let least = null;
      for (const [kind, tokens] of Object.entries(offer.tokens)) {
        const V = Math.min(...tokens);
        for (const N of offer.llms) {
          const amount = cost.amount(unit, N, V, kind);
          if (!least || amount < least[0] || amount === least[0] && kind < least[1]) least = [amount, kind, V, N];
        }
      }
      const [amount, kind, V, N] = least;
      if (amount > limit) words.push(`the cheapest is N=${g(N)} billion, V=${g(V)}, ${kind}: ` +
        `${g(amount, 4)} ${data.units[unit]}, and the limit is ${g(limit, 4)}`);
    }
    return "nothing meets the budget: " +
      (words.join("; ") || "no candidate meets all limits together");
  };

  const AXES = {N: "billion LLM parameters", V: "visual tokens", Q: "text tokens", frames: "frames"};
  const warnings = (s, offer, chosen) => {
    const said = [], law = lawOf(s, chosen.compressor);
    for (const [Q] of s.texts) for (const [axis, value] of Object.entries({N: chosen.N, V: chosen.V, Q,
      frames: 1})) {
      const ends = domain(law, axis);
      if (!ends) continue;
      const [low, high] = ends, {N, V} = chosen;
      if (axis === "Q" && errorOf(law, N, V, low) === errorOf(law, N, V, value)) continue;
      const words = `extrapolates ${axis}: ${g(value, 4)} ${AXES[axis]}, ` +
        `fitted on ${g(low, 4)} to ${g(high, 4)}`;
      if (!(low * (1 - 1e-9) <= value && value <= high * (1 + 1e-9)) && !said.includes(words))
        said.push(words);
    }
    if (law.some(([f]) => !Object.keys(f.domain).length)) said.push(
      "the law does not say on which N, V and Q it was fitted: extrapolation goes unnoticed");
    for (const [family, w] of law) if (w && family.warning) said.push(family.warning);
    if (law.some(([f]) => f.frames))
      said.push("the law counts frames, and this plan is for one: --frames=T");
    const {method, kind} = s.mix === null ? data.laws.own : data.laws.families;
    const kinds = Object.keys(offer.tokens);
    const unknown = s.mix === null ? kinds.filter(k => !(k in data.laws.kinds)) : kinds;
    const other = unknown.filter(k => method && k !== kind);
    if (other.length) said.push(
      `the law was fitted with ${method}: it does not know the errors of ${other.join(", ")}`);
    else if (unknown.length > 1) said.push(
      "the law holds for the compressor it was fitted with: others are compared by cost alone");
    if (s.cost === "full") {
      if (data.quantized) said.push(
        "the law was fitted without quantization: what it costs in error is not predicted");
      const most = data.sizes[data.sizes.length - 1];
      if (chosen.N > most * (1 + 1e-9))
        said.push(`no LLM above N=${g(most)} is described: its cost is extrapolated`);
      if (s.chip !== null && data.calibration.ideal) said.push(
        "times are the roofline's, which no system reaches: " +
        "give --efficiency, --calibration or --measured");
    }
    return said;
  };

  /* The setting with everything that follows from it; a Refusal for one that Python refuses. */
  const checked = setting => {
    const s = {...setting, limits: setting.limits.map(pair => [...pair])};
    const number = (x, name, least) => {
      if (!(x >= least && x < Infinity))
        throw new Refusal(`${name}: '${x}' is not a number of at least ${g(least)}`);
    };
    if (!s.limits.length) throw new Refusal(
      "0 budgets: give one of flops, ms, dollars_per_million, hbm_bytes, ...");
    for (const [unit, limit] of s.limits) number(limit, `the budget in ${data.units[unit]}`, 1e-300);
    if (!(s.batch >= 1)) throw new Refusal(`--batch=${s.batch}: at least 1`);
    for (const [Q] of s.texts) number(Q, "--text-tokens", 0);
    number(s.G, "--new-tokens", 0);
    if (s.mix && !(sum(s.mix.map(([, w]) => w)) > 0))
      throw new Refusal("every weight is 0: give a family a weight");
    if (s.cost === "paper" && s.chip !== null) throw new Refusal(
      "the paper's cost has no chip: add --cost=full, or leave the chip out");
    for (const [unit] of s.limits) if (unit === "tpot" && s.G < 2)
      throw new Refusal("--tpot-ms needs answers of at least 2 tokens: --new-tokens");
    if (s.cost === "full" && !data.offers.full) throw new Refusal(data.without_full);
    const timed = s.limits.find(([unit]) => data.times.includes(unit));
    if (s.cost === "paper") {
      const other = s.limits.find(([unit]) => unit !== "flops" && unit !== "lifetime");
      if (other) throw new Refusal(
        `the paper's cost is FLOPs; a limit in ${data.units[other[0]]} needs --cost=full`);
      return s;
    }
    if (timed && s.chip === null)
      throw new Refusal(`a budget in ${data.units[timed[0]]} needs --chip`);
    const chip = s.chip === null ? null : data.chips[s.chip], price = s.price || (chip && chip.price);
    if (!price && s.limits.some(([unit]) => unit.endsWith("dollars")))
      throw new Refusal("a budget in dollars needs --price-per-hour, the price of one chip");
    s.hourly = (price || 0) * data.chips_together;
    if (chip) {
      const asked = s.limits.find(([unit]) => unit === "hbm");
      if (!asked) s.limits.push(["hbm", chip.memory]);
      else if (asked[1] > chip.memory) throw new Refusal(
        `a budget of ${g(asked[1], 4)} bytes is more than ${chip.name} can use, ` +
        `${g(chip.memory, 4)} bytes: lower it, or raise --chips`);
    }
    return s;
  };

  /* Places that no other one beats in cost and error, of those that meet all other limits. */
  const frontier = (s, all) => {
    const unit = s.limits[0][0];
    const rivals = candidates(all, [[unit, Infinity], ...s.limits.slice(1)]);
    return rivals.filter(a => !rivals.some(b => b.cost <= a.cost && b.error <= a.error &&
      (b.cost < a.cost || b.error < a.error)));
  };

  const plan = setting => {
    try {
      const s = checked(setting), offer = offered(s), cost = costs(s);
      const all = places(s, offer, cost), found = candidates(all, s.limits);
      if (!found.length) throw new Refusal(nothing(s, offer, cost));
      const [chosen] = found, law = lawOf(s, chosen.compressor), {N, V} = chosen;
      const known = sure(s, found), parts = cost.parts(N, V, chosen.compressor);
      const ends = law.map(([f, w]) => [w, w ? intervalOf(f, N, V, cost.Q) : [0, 0]]);
      const listed = found.map((one, i) => ({...one,
        p_best: known && known.best[i], regret: known && known.regret[i]}));
      return {
        N, V, compressor: chosen.compressor,
        llm: (offer.names.find(([n]) => n === N) ?? [N, null])[1],
        predicted_error: chosen.error,
        interval: ends.some(([, e]) => e === null) ? null
          : [0, 1].map(i => sum(ends.map(([w, e]) => w * e[i]))),
        cost_model: s.cost, cost: {amount: chosen.cost, unit: data.units[s.limits[0][0]], ...parts},
        limit: s.limits[0][1],
        latency: parts.ms ? {
          time_to_first_token_ms: sum(Object.values(parts.ttft)),
          time_per_output_token_ms: s.G > 1 ? parts.tpot.decode : null} : null,
        decision: {p_best: known && known.best[0], regret: known && known.regret[0],
          regret_95: known && known.regret_95, candidates: found.length, epsilon: data.epsilon},
        runner_ups: listed.slice(1).filter(one => one.error - chosen.error <= data.epsilon),
        limits: limitsOf(s, all, chosen),
        warnings: warnings(s, offer, chosen),
        // For the page alone:
        setting: s, names: offer.names, candidates: listed,
        places: all.map(one => ({...one, cost: one.spent[s.limits[0][0]]})),
        frontier: frontier(s, all),
      };
    } catch (problem) {
      if (problem instanceof Refusal) return {error: problem.message};
      throw problem;
    }
  };
  /* What every place costs in a unit, in no order; empty where Python would refuse. */
  const amounts = (setting, unit) => {
    try {
      const s = checked(setting), offer = offered(s), cost = costs(s);
      return Object.entries(offer.tokens).flatMap(([kind, tokens]) =>
        tokens.flatMap(V => offer.llms.map(N => cost.amount(unit, N, V, kind))));
    } catch (problem) {
      if (problem instanceof Refusal) return [];
      throw problem;
    }
  };
  return {plan, amounts, format: g, sum};
