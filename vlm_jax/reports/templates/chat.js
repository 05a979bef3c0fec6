/* SPDX-License-Identifier: Apache-2.0 */
/* A conversation with the server, once for each of two budgets: each has its own history. */
(() => {
  "use strict";
  const {model, supported, default: usual} = JSON.parse(document.getElementById("chat-data").textContent);
  const find = id => document.getElementById(id);
  const make = (name, className, text = "") => Object.assign(document.createElement(name), {className, textContent: text});
  const sliders = ["first", "second"].map(find), auto = find("first-auto"), compare = find("compare");
  const handles = new Map();  // data URI -> the handle that stands for it at the server
  let histories = [[], []], picture = null, stopping = null;

  /* --- Budgets ------------------------------------------------------------------------------- */

  const one = supported.length === 1;
  sliders.forEach((slider, i) => {
    slider.max = supported.length - 1;
    slider.value = i ? 0 : supported.indexOf(usual);
    slider.addEventListener("input", show);
  });
  sliders[0].disabled = compare.disabled = one;
  if (one) find("budget-said").textContent = `This model gives V = ${usual} and no other.`;
  const budget = i => (i === 0 && auto.checked ? "auto" : supported[+sliders[i].value]);
  function show() {
    sliders[0].disabled = one || auto.checked;
    sliders[1].disabled = !compare.checked;
    sliders.forEach((slider, i) => {
      find(slider.id + "-said").value = i && !compare.checked ? "" : `V = ${budget(i)}`;
    });
  }
  auto.addEventListener("change", show);
  compare.addEventListener("change", () => {
    // The second side begins where the first one is.
    if (compare.checked) histories[1] = structuredClone(histories[0]);
    show();
  });
  show();

  /* --- The picture --------------------------------------------------------------------------- */

  find("image").addEventListener("change", event => {
    const [file] = event.target.files;
    picture = null;
    find("preview").hidden = true;
    if (!file) return;
    const reader = new FileReader();
    reader.addEventListener("load", () => {
      picture = reader.result;
      find("preview").src = picture;
      find("preview").hidden = false;
    });
    reader.readAsDataURL(file);
  });

  /* --- Asking -------------------------------------------------------------------------------- */

  const sent = messages => messages.map(message => typeof message.content === "string" ? message
    : {...message, content: message.content.map(part => part.type !== "image_url" ? part
      : {type: "image_url", image_url: {url: handles.get(part.image_url.url) ?? part.image_url.url}})});
  const pictures = messages => messages.flatMap(message => typeof message.content === "string" ? []
    : message.content.filter(part => part.type === "image_url").map(part => part.image_url.url));

  /* Data of the events of a response, as they come. */
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  }

  async function post(body, signal) {
    const headers = {"Content-Type": "application/json"};
    if (find("key")) headers.Authorization = "Bearer " + find("key").value;
    const response = await fetch("v1/chat/completions", {method: "POST", headers, body: JSON.stringify(body), signal});
    if (response.ok) return response;
    const {error} = await response.json();
    throw Object.assign(new Error(error.message), {code: error.code});
  }

  async function ask(i, messages, V, answer, signal) {
    const body = {model, stream: true, stream_options: {include_usage: true}, temperature: +find("temperature").value};
    if (pictures(messages).length && !one) body.visual_tokens = V;
    if (find("tokens").value) body.max_tokens = +find("tokens").value;
    const text = answer.querySelector(".text"), numbers = answer.querySelector(".numbers");
    let response;
    try {
      response = await post({...body, messages: sent(messages)}, signal);
    } catch (problem) {
      if (problem.code !== "image_not_found") throw problem;
      handles.clear();  // the server has forgotten them: send the pictures again
      response = await post({...body, messages: sent(messages)}, signal);
    }
    let usage = null, more = null;
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      text.textContent += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
      more = chunk.vlm_jax ?? more;
    }
    pictures(messages).forEach((url, k) => { if (more?.images[k]) handles.set(url, more.images[k]); });
    numbers.textContent = more && usage ? said(more, usage) : "";
    return text.textContent;
  }

  const UNITS = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1, ""]];
  const amount = x => {
    const [factor, prefix] = UNITS.find(([least]) => x >= least) ?? [1, ""];
    return `${(x / factor).toPrecision(3)} ${prefix}FLOP`;
  };
  const said = (more, usage) => [
    more.budget ? `V = ${more.budget.visual_tokens} (${more.budget.why})` : "no picture",
    `${usage.image_tokens} image + ${usage.text_tokens} text tokens`,
    `first token after ${more.first_token_seconds?.toFixed(2) ?? "?"} s`,
    more.tokens_per_second ? `${more.tokens_per_second.toFixed(1)} tokens/s` : `${usage.completion_tokens} new`,
    amount(Object.values(more.flops).reduce((a, b) => a + b, 0)),
  ].join(" · ");

  find("ask").addEventListener("submit", async event => {
    event.preventDefault();
    const question = find("question").value, sides = compare.checked ? [0, 1] : [0];
    const shown = picture;
    const content = shown ? [{type: "image_url", image_url: {url: shown}}, {type: "text", text: question}] : question;
    const asked = make("div", "asked");
    if (shown) asked.append(Object.assign(make("img"), {src: shown, alt: "The picture of this question"}));
    asked.append(make("p", "text", question));
    const answers = make("div", "answers");
    find("talk").append(asked, answers);
    find("send").disabled = true;
    find("stop").disabled = false;
    find("said").textContent = "Answering …";
    stopping = new AbortController();
    const results = await Promise.allSettled(sides.map(async i => {
      const answer = make("div", "answer");
      answer.append(make("p", "text"), make("p", "numbers"));
      answers.append(answer);
      const messages = [...histories[i], {role: "user", content}];
      try {
        const text = await ask(i, messages, budget(i), answer, stopping.signal);
        return [...messages, {role: "assistant", content: text}];
      } catch (problem) {
        answer.classList.add("failed");
        answer.querySelector(".numbers").textContent = problem.name === "AbortError" ? "stopped" : problem.message;
        throw problem;
      }
    }));
    const failed = results.filter(result => result.status === "rejected").length;
    find("said").textContent = failed ? "Not answered: the conversation is as it was." : "Answered.";
    find("send").disabled = false;
    find("stop").disabled = true;
    if (failed) return;
    sides.forEach((i, k) => { histories[i] = results[k].value; });
    find("question").value = "";
    find("image").value = "";  // it is part of the conversation now
    picture = null;
    find("preview").hidden = true;
  });
  find("stop").addEventListener("click", () => stopping?.abort());
  find("again").addEventListener("click", () => {
    stopping?.abort();
    histories = [[], []];
    find("talk").replaceChildren();
    find("said").textContent = "";
  });
})();
