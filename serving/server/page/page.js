// The live page. Whatever comes from the server is put in as text, never as markup.
"use strict";

import { drawGraph, svg } from "./graph.js";

const POLL_MS = 1000;       // between two answers
const TIMEOUT_MS = 10000;   // of a request for the state
const STALE_S = 5;          // a state older than this is said to be old
const KEY = "tenure-admin-key";
const STAGES = {
  queued: "queued", sharing: "waiting for pages of another request", loading: "loading", loaded: "loaded, waiting for a place",
  prefill: "reading the prompt", decode: "answering",
};
const URGENCIES = { demand: "a request waits", write_back: "saved before it is evicted", prefetch: "ahead of a call", eager: "saved in advance" };
const TIERS = { device: "Device", host: "Host", disk: "Disk" };
const PARTS = [
  ["pinned", "used by requests or copies"], ["kept", "kept for later, may be evicted"], ["reserved", "reserved for requests in progress"],
  ["arriving", "being copied in"], ["free", "free"],
];

const find = id => document.getElementById(id);
let key = sessionStorage.getItem(KEY), paused = false, timer = 0, last = null, received = 0, chosen = null;

// Elements and texts ---------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function setText(id, text) {
  const element = find(id);
  if (element.textContent !== text) element.textContent = text;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

const whole = count => Math.round(count).toLocaleString("en");
const rated = count => count > 0 && count < 9.95 ? count.toFixed(1) : whole(count);

function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${Math.round(value / 3600)} h`;
}

const plural = (count, one, many = one + "s") => `${whole(count)} ${count === 1 ? one : many}`;
const more = count => count > 0 ? [make("p", { class: "more", text: `and ${whole(count)} more` })] : [];

function bar(parts, total, label) {
  const made = make("div", { class: "bar", role: "img", "aria-label": label });
  for (const [name, count] of parts) {
    const part = make("span", { class: name });
    part.style.width = `${total > 0 ? 100 * count / total : 0}%`;
    made.append(part);
  }
  return made;
}

function table(caption, columns, rows, kind = "wide") {
  const head = make("tr", {}, ...columns.map(([name, number]) => make("th", { scope: "col", class: number ? "number" : "", text: name })));
  const body = rows.map(row => make("tr", {}, ...row.map((text, place) => {
    const [name, number] = columns[place];
    return make("td", { "data-label": name, class: number ? "number" : "" }, make("span", { text }));
  })));
  return make("table", { class: kind, "aria-label": caption }, make("thead", {}, head), make("tbody", {}, ...body));
}

// The sections ---------------------------------------------------------------------------------------------------

function spark(intervals, count, label) {
  const drawing = svg("svg", { class: "spark", viewBox: "0 0 600 40", preserveAspectRatio: "none", role: "img", "aria-label": label });
  const rates = intervals.map(each => each.seconds > 0 ? count(each) / each.seconds : 0);
  const largest = Math.max(...rates, 0);
  drawing.append(svg("line", { x1: 0, x2: 600, y1: 39.5, y2: 39.5 }));
  intervals.forEach((each, place) => {
    const height = largest > 0 ? 38 * rates[place] / largest : 0;
    const end = 600 - 10 * each.ended_s, begin = Math.max(0, end - 10 * each.seconds);
    if (height > 0 && end > begin) {
      drawing.append(svg("rect", { x: begin, y: 39 - height, width: Math.max(1, end - begin - 1), height }));
    }
  });
  return drawing;
}

function showNumbers(state) {
  const { total, intervals } = state.recent;
  const rate = count => total.seconds > 0 ? count / total.seconds : 0;
  const live = Object.values(state.stages).reduce((sum, count) => sum + count, 0);
  const found = total.asked_tokens > 0 ? `${Math.round(100 * total.found_tokens / total.asked_tokens)} %` : "–";
  const entry = (name, value, note, ...rest) => make("div", {},
    make("dt", { text: name }), make("dd", { class: "value", text: value }), make("dd", { class: "note", text: note }),
    ...rest.map(each => make("dd", {}, each)));
  find("numbers").replaceChildren(
    entry("Answers", `${rated(rate(total.decode_tokens))} tokens/s`, plural(total.finished, "request") + " ended",
      spark(intervals, each => each.decode_tokens, "tokens of answers each second")),
    entry("Prompts computed", `${rated(rate(total.prefill_tokens))} tokens/s`, "not found in the cache",
      spark(intervals, each => each.prefill_tokens, "tokens of prompts computed each second")),
    entry("Found in the cache", found, `${whole(total.found_tokens)} of ${whole(total.asked_tokens)} prompt tokens`,
      spark(intervals, each => each.found_tokens, "prompt tokens found in the cache each second")),
    entry("Waiting for copies", seconds(total.stalled_s), "of all requests together",
      spark(intervals, each => each.stalled_s, "seconds of waiting, each second")),
    entry("In progress", plural(live, "request"), `${whole(state.stages.queued + state.stages.sharing)} waiting`),
  );
}

function tierCard(tier) {
  const free = Math.max(0, tier.capacity - tier.used);
  const counts = { pinned: tier.pinned, kept: tier.evictable, reserved: tier.reserved, arriving: tier.arriving, free };
  const label = PARTS.map(([name, text]) => `${bytes(counts[name])} ${text}`).join(", ");
  const largest = Math.max(1, tier.conversations, ...tier.agents.map(agent => agent.nbytes));
  const line = (name, nbytes, pinned, rest) => make("li", { class: rest ? "rest" : "" },
    make("span", { class: "name", title: name, text: name }),
    bar([["pinned", pinned], ["kept", nbytes - pinned]], largest, `${bytes(pinned)} of it in use`),
    make("span", { class: "amount", text: bytes(nbytes) }));
  const lines = tier.agents.map(agent => line(agent.agent, agent.nbytes, agent.pinned, false));
  if (tier.more_agents) lines.push(line(`${plural(tier.more_agents, "other agent")}`, tier.more_agent_bytes, 0, true));
  if (tier.conversations) lines.push(line("conversations", tier.conversations, 0, true));
  if (tier.not_inspected) lines.push(line("not inspected", tier.not_inspected, 0, true));
  const share = tier.capacity > 0 ? Math.round(100 * tier.used / tier.capacity) : 0;
  return make("article", { class: "card" },
    make("div", { class: "head" }, make("h3", { text: TIERS[tier.tier] }),
      make("span", { text: `${bytes(tier.used)} of ${bytes(tier.capacity)}, ${share} %` })),
    bar(PARTS.filter(([name]) => name !== "free").map(([name]) => [name, counts[name]]), tier.capacity, label),
    lines.length ? make("ul", { class: "agents" }, ...lines) : make("p", { class: "more", text: "nothing is stored here" }));
}

function showCopies(state) {
  if (!state.transfers.length) {
    find("copies").replaceChildren(make("p", { class: "empty", text: "No copy between tiers is under way." }));
    return;
  }
  const rows = state.transfers.map(job => [
    `${TIERS[job.source]} → ${TIERS[job.target]}`, job.agents.join(", ") || "a conversation", whole(job.tokens),
    `${bytes(job.done)} of ${bytes(job.nbytes)}`, (URGENCIES[job.urgency] ?? job.urgency) + (job.waiting > 1 ? ` (${job.waiting})` : ""),
  ]);
  const columns = [["Way"], ["Prompt of"], ["Tokens", true], ["Copied", true], ["Reason"]];
  find("copies").replaceChildren(table("Copies under way", columns, rows), ...more(state.more_transfers));
}

function when(agent) {
  if (agent.running) return agent.running > 1 ? `running, ${agent.running} calls` : "running";
  if (agent.steps === null && agent.seconds === null) return "not expected";
  const steps = agent.steps === null ? "" : agent.steps === 0 ? "next" : `in ${plural(agent.steps, "step")}`;
  return [steps, agent.seconds === null ? "" : `${seconds(agent.seconds)}`].filter(Boolean).join(" · ");
}

function showGraph(state) {
  const flows = state.workflows.filter(flow => flow.agents.length);
  const select = find("workflow"), names = flows.map(flow => flow.workflow);
  if (JSON.stringify(names) !== select.dataset.names) {
    select.dataset.names = JSON.stringify(names);
    select.replaceChildren(...names.map(name => make("option", { value: name, text: name })));
  }
  const flow = flows.find(each => each.workflow === chosen) ?? flows[0];
  find("choose").hidden = !flow;
  find("graph-empty").hidden = Boolean(flow);
  if (!flow) {
    setText("graph-empty", "No workflow is known. POST /v1/workflows declares one; the calls of named agents are learned.");
    find("graph").replaceChildren();
    find("steps").replaceChildren();
    return;
  }
  if (document.activeElement !== select) select.value = flow.workflow;
  find("graph").replaceChildren(drawGraph(flow, find("graph").clientWidth, when));
  const rows = flow.agents.map(agent => [
    agent.agent, agent.running ? plural(agent.running, "call") : "–", agent.steps === null ? "–" : whole(agent.steps),
    agent.seconds === null ? "–" : `in ${seconds(agent.seconds)}`,
  ]);
  const columns = [["Agent"], ["Running", true], ["Steps", true], ["Next call", true]];
  const beyond = flow.more_agents ? [make("p", { class: "more", text: `and ${plural(flow.more_agents, "more agent", "more agents")}` })] : [];
  const others = state.more_workflows ? [make("p", { class: "more", text: `and ${plural(state.more_workflows, "more workflow")}` })] : [];
  find("steps").replaceChildren(table("Agents of the workflow", columns, rows, "short"), ...beyond, ...others);
}

function showRequests(state, model) {
  const counts = Object.entries(state.stages).filter(([, count]) => count);
  find("stages").replaceChildren(...counts.map(([stage, count]) => make("li", {}, make("b", { text: whole(count) }), make("span", { text: STAGES[stage] }))));
  if (!state.requests.length) {
    const document_ = JSON.stringify({ model, messages: [{ role: "user", content: "Name three rivers." }], max_tokens: 64 });
    const auth = key === null ? "" : " -H 'Authorization: Bearer KEY'";
    const line = `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${auth} -d '${document_.replaceAll("'", "'\\''")}'`;
    find("requests").replaceChildren(make("p", { class: "empty", text: "No request is in progress. To send one:" }), make("pre", { text: line, tabindex: "0" }));
    return;
  }
  const clients = state.requests.some(request => request.client);
  const columns = [["Agent"], ...(clients ? [["Client"]] : []), ["Workflow"], ["Stage"], ["Age", true], ["Prompt tokens", true], ["Answer", true], ["Request"]];
  const rows = state.requests.map(request => [
    request.agent ?? "–", ...(clients ? [request.client || "–"] : []), request.workflow ?? "–", STAGES[request.stage], seconds(request.age_s),
    `${whole(request.prompt_tokens)}, ${whole(request.cached_tokens)} cached`,
    `${whole(request.output_tokens)} of ${whole(request.max_new_tokens)}`, request.id.length > 24 ? request.id.slice(0, 23) + "…" : request.id,
  ]);
  find("requests").replaceChildren(table("Requests in progress", columns, rows), ...more(state.more_requests));
}

function showFoot(answer, state) {
  const finished = Object.entries(state.finished).filter(([, count]) => count).map(([reason, count]) => `${whole(count)} ${reason.replace("_", " ")}`);
  find("foot").textContent = [
    `Up for ${seconds(answer.uptime_s)}`, `system ${state.system}`, `requests so far: ${finished.join(", ") || "none"}`,
    `${whole(state.prefetched)} prompts loaded ahead, ${whole(state.prefetched_used)} of them used`, plural(state.evictions, "eviction"),
    plural(state.preemptions, "preemption"),
  ].join(" · ") + ".";
}

// The state ------------------------------------------------------------------------------------------------------

function setStatus(status, notice = "") {
  find("status").dataset.status = status;
  setText("status", { ok: "live", dead: "stopped" }[status] ?? status);
  setText("notice", notice);
  find("notice").hidden = !notice;
  find("content").classList.toggle("stale", status === "disconnected" || status === "dead");
}

function showAge() {
  const age = last === null || last.age_s === null ? null : last.age_s + (performance.now() - received) / 1000;
  setText("updated", age === null ? "" : `state of ${seconds(age)} ago`);
}

function show(answer) {
  last = answer;
  received = performance.now();
  setText("model", answer.model);
  document.title = `tenure: ${answer.model}`;
  const notices = {
    draining: "The server takes no new requests; those in progress are being finished.",
    dead: "The engine has stopped after an error. The server’s log says why; this is the last known state.",
  };
  const slow = answer.age_s !== null && answer.age_s > STALE_S && answer.status === "ok";
  setStatus(answer.status, notices[answer.status] ?? (slow ? `The engine has been computing for ${seconds(answer.last_step_age_s)}; this is the state before.` : ""));
  const state = answer.snapshot;
  find("content").hidden = state === null;
  if (state === null) return;
  showNumbers(state);
  find("tiers").replaceChildren(...state.tiers.map(tierCard));
  showCopies(state);
  showGraph(state);
  showRequests(state, answer.model);
  showFoot(answer, state);
  showAge();
}

function askForKey(error) {
  find("login").hidden = false;
  find("content").hidden = true;
  find("forget").hidden = true;
  setStatus("connecting");
  setText("status", "a key is needed");
  setText("login-error", error);
  setText("updated", "");
  last = null;
}

async function poll() {
  clearTimeout(timer);
  if (paused || (key === null && document.documentElement.dataset.key === "required")) return;
  try {
    const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
    const response = await fetch("admin/state", { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (response.status === 401 || response.status === 403) {
      forget(response.status === 401 ? "The server does not know this key." : "This key is a client’s; an admin’s is needed.");
      return;
    }
    if (!response.ok) throw new Error(`status ${response.status}`);
    const answer = await response.json();
    find("login").hidden = true;
    find("forget").hidden = key === null;
    if (!paused) show(answer);
  } catch {
    const before = last === null ? "" : last.status === "draining" ? " It was stopping before." : " Below is the last known state.";
    setStatus("disconnected", `The server does not answer; trying again.${before}`);
  }
  timer = setTimeout(poll, document.hidden ? 10 * POLL_MS : POLL_MS);
}

function forget(error = "") {
  key = null;
  sessionStorage.removeItem(KEY);
  askForKey(error);
  find("key").value = "";
  find("key").focus();
}

find("login").addEventListener("submit", event => {
  event.preventDefault();
  const given = find("key").value.trim();
  if (!/^[!-~]+$/.test(given)) {
    setText("login-error", "A key has printable ASCII characters and no spaces.");
    return;
  }
  key = given;
  sessionStorage.setItem(KEY, key);
  setText("login-error", "");
  poll();
});
find("forget").addEventListener("click", () => forget());
find("pause").addEventListener("click", () => {
  paused = !paused;
  find("pause").setAttribute("aria-pressed", String(paused));
  if (paused) {
    clearTimeout(timer);
    setStatus("paused");
  } else {
    poll();
  }
});
find("workflow").addEventListener("change", event => {
  chosen = event.target.value;
  if (last !== null && last.snapshot !== null) showGraph(last.snapshot);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
addEventListener("resize", () => { if (last !== null && last.snapshot !== null) showGraph(last.snapshot); });
find("legend").replaceChildren(...PARTS.map(([name, text]) => make("li", {}, make("span", { class: `swatch ${name}` }), make("span", { text }))));
setInterval(showAge, 1000);
if (key === null && document.documentElement.dataset.key === "required") askForKey("");
else poll();
