// The playground: bodies of POST /v1/generate, answered by the console for the chosen key. Whatever a model says becomes
// a text node and nothing else.
"use strict";
(() => {
  const form = document.getElementById("play-form");
  if (!form) return;
  const models = JSON.parse(document.getElementById("play-models").textContent);
  const field = (name) => form.elements[name];
  const byId = (id) => document.getElementById(id);
  const sides = [makeSide("a"), makeSide("b")];
  let running = null;

  function make(tag, text = "", className = "") {
    const element = document.createElement(tag);
    element.textContent = text;
    element.className = className;
    return element;
  }

  function makeSide(letter) {
    const answer = byId(`answer-${letter}`);
    return {
      letter, answer, vector: byId(`vector-${letter}`), turns: [],
      shown: answer.querySelector(".play-turns"), facts: answer.querySelector(".play-facts"),
    };
  }

  // What is asked for

  for (const model of models) field("model").append(new Option(model.name, model.name, model.is_default, model.is_default));

  function showVectors() {
    const model = models.find((each) => each.name === field("model").value);
    for (const side of sides) {
      side.vector.replaceChildren();
      if (!model.adapters.length) {
        side.vector.append(make("p", "No adapter of this model is granted to the key.", "console-muted"));
        continue;
      }
      side.vector.append(make("p", side.letter === "a" ? "Adapters" : "Adapters of the second answer", "console-muted"));
      for (const adapter of model.adapters) side.vector.append(slider(side, adapter));
    }
  }

  function slider(side, adapter) {
    const row = make("label", "", "play-slider");
    const range = Object.assign(document.createElement("input"), { type: "range", min: -2, max: 2, step: 0.05, value: 0 });
    range.name = `${side.letter}:${adapter.name}`;
    const number = Object.assign(document.createElement("input"), { type: "number", min: -16, max: 16, step: 0.05, value: 0 });
    number.setAttribute("aria-label", `Scale of ${adapter.name}`);
    range.addEventListener("input", () => { number.value = range.value; });
    number.addEventListener("input", () => { range.value = number.value; });
    number.dataset.adapter = adapter.name;
    row.append(make("span", adapter.name), range, number);
    return row;
  }

  function adaptersOf(side) {
    return [...side.vector.querySelectorAll("[data-adapter]")]
      .map((input) => ({ name: input.dataset.adapter, scale: Number(input.value) }))
      .filter((each) => each.scale !== 0);
  }

  function bodyOf(side, stream) {
    const body = { model: field("model").value };
    const text = field("text").value;
    if (isChat()) {
      const system = field("system").value ? [{ role: "system", content: field("system").value }] : [];
      body.messages = [...system, ...side.turns, { role: "user", content: text }];
    } else {
      body.prompt = text;
    }
    for (const name of ["max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed"]) {
      if (field(name).value !== "") body[name] = Number(field(name).value);
    }
    if (field("stop").value) body.stop = [field("stop").value];
    body.adapters = adaptersOf(side);
    if (!field("cache").checked) body.cache = false;
    if (stream) body.stream = true;
    return body;
  }

  const isChat = () => form.querySelector("[name=mode]:checked").value === "chat";

  // Asking

  async function ask(side, signal) {
    const started = performance.now();
    const body = bodyOf(side, true);
    const user = { role: "user", content: field("text").value };
    if (!isChat() || !side.turns.length) side.shown.replaceChildren();
    if (isChat()) side.shown.append(make("div", user.content, "play-turn is-user"));
    const said = make("div", "", "play-turn is-model");
    side.shown.append(said);
    side.facts.replaceChildren();
    const state = { text: "", first: 0, done: null, answer: {} };
    try {
      const answer = await fetch(form.dataset.run, {
        method: "POST", signal, body: JSON.stringify(body),
        headers: { "Content-Type": "application/json", "X-CSRFToken": field("csrfmiddlewaretoken").value },
      });
      if (!answer.ok) throw new Error(await answer.text());
      for await (const event of events(answer.body)) take(event, state, said, started);
    } catch (error) {
      const words = error.name === "AbortError" ? "Stopped." : `The console does not answer: ${String(error.message).slice(0, 300)}`;
      side.shown.append(make("p", words, "console-bad"));
      return;
    }
    if (state.error) {
      said.remove();
      side.shown.append(make("p", `${state.error.code}: ${state.error.message}`, "console-bad play-error"));
    } else if (isChat()) {
      side.turns.push(user, { role: "assistant", content: state.text });
    }
    showFacts(side, state, started);
  }

  function take({ name, data }, state, said, started) {
    if (name === "answer") state.answer = data;
    else if (name === "delta") {
      state.first ||= performance.now() - started;
      state.text += data.text;
      said.append(document.createTextNode(data.text));
    } else if (name === "finished") state.done = data;
    else if (name === "error" || name === "reply") state.error = data;
  }

  async function* events(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
        const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
        if (name && data) yield { name, data: JSON.parse(data) };
      }
    }
  }

  function showFacts(side, state, started) {
    const facts = [];
    const { done, answer } = state;
    if (done) {
      const times = done.timings_ms;
      facts.push(["Tokens", `${done.usage.prompt_tokens} + ${done.usage.completion_tokens}`]);
      facts.push(["Ended by", done.finish_reason + (done.cached ? ", from the cache" : "")]);
      facts.push(["First token", `${Math.round(state.first)} ms`]);
      if (times) {
        facts.push(["Queue, prompt, output", `${times.queue} + ${times.prefill} + ${times.decode} ms`]);
        const speed = (done.usage.completion_tokens - 1) / (times.decode / 1000);
        if (done.usage.completion_tokens > 1 && times.decode > 0) facts.push(["Speed", `${speed.toFixed(0)} tokens/s`]);
      }
      if (done.drafts) facts.push(["Drafts right", `${done.drafts.accepted} of ${done.drafts.drafted}`]);
    }
    facts.push(["Here in all", `${Math.round(performance.now() - started)} ms`]);
    const left = answer.headers || {};
    if (left["x-ratelimit-remaining-requests"]) facts.push(["Requests left this minute", left["x-ratelimit-remaining-requests"]]);
    if (answer.request_id) facts.push(["Request", answer.request_id]);
    for (const [name, value] of facts) side.facts.append(make("dt", name), make("dd", value));
  }

  async function send(event) {
    event?.preventDefault();
    if (running || !form.reportValidity()) return;
    running = new AbortController();
    byId("play-send").disabled = true;
    byId("play-stop").disabled = false;
    const asked = field("compare").checked ? sides : sides.slice(0, 1);
    await Promise.all(asked.map((side) => ask(side, running.signal)));
    if (isChat() && asked.every((side) => side.turns.length)) field("text").value = "";
    running = null;
    byId("play-send").disabled = false;
    byId("play-stop").disabled = true;
    form.dataset.answers = Number(form.dataset.answers || 0) + 1;
  }

  // Copies

  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const python = (value) => JSON.stringify(value, null, 4)
    .replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g, (all, string, word) => string ?? { true: "True", false: "False", null: "None" }[word]);

  function curl() {
    const body = JSON.stringify(bodyOf(sides[0], true), null, 2);
    return `curl -N ${location.origin}/v1/generate -H "X-API-Key: $LLMSITE_KEY" -d ${quoted(body)}`;
  }

  function pythonCode() {
    return `import os\n\nimport httpx\n\nanswer = httpx.post(\n    "${location.origin}/v1/generate",\n`
      + `    headers={"X-API-Key": os.environ["LLMSITE_KEY"]},\n    json=${python(bodyOf(sides[0], false)).replaceAll("\n", "\n    ")},\n    timeout=120,\n)\n`
      + `answer.raise_for_status()\nprint(answer.json()["output"])\n`;
  }

  async function copy(event, text) {
    byId("play-copied").textContent = text;
    byId("play-copied").hidden = false;
    try {
      await navigator.clipboard.writeText(text);
      const words = event.target.textContent;
      event.target.textContent = "Copied";
      setTimeout(() => { event.target.textContent = words; }, 1500);
    } catch { // no clipboard without HTTPS: select it for Ctrl-C
      getSelection().selectAllChildren(byId("play-copied"));
    }
  }

  // The page

  function showMode() {
    byId("play-system").hidden = !isChat();
    byId("play-say").textContent = isChat() ? "Message" : "Prompt";
    clear();
  }

  function clear() {
    for (const side of sides) {
      side.turns = [];
      side.shown.replaceChildren();
      side.facts.replaceChildren();
    }
  }

  form.addEventListener("submit", send);
  field("text").addEventListener("keydown", (event) => { if (event.key === "Enter" && event.ctrlKey) send(event); });
  field("model").addEventListener("change", showVectors);
  for (const radio of form.querySelectorAll("[name=mode]")) radio.addEventListener("change", showMode);
  field("compare").addEventListener("change", () => {
    byId("vector-b").hidden = byId("answer-b").hidden = !field("compare").checked;
  });
  byId("play-stop").addEventListener("click", () => running?.abort());
  byId("play-clear").addEventListener("click", clear);
  byId("copy-curl").addEventListener("click", (event) => copy(event, curl()));
  byId("copy-python").addEventListener("click", (event) => copy(event, pythonCode()));
  showVectors();
})();
