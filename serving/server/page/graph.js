// Draws a workflow as SVG: layers by the number of edges from the agents that are called first, boxes in layers.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const BOX = { width: 148, height: 50 };
const GAP = { along: 62, across: 22 };
const MARGIN = 20;
const SMALLEST = 0.8;

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// The place of each agent: its layer, and its row in the layer.
function layers(agents, edges) {
  const next = agents.map(() => []);
  const entered = agents.map(() => 0);
  for (const [source, target] of edges) {
    if (source === target) continue;
    next[source].push(target);
    entered[target] += 1;
  }
  const layer = new Array(agents.length).fill(-1);
  const starts = agents.map((_, place) => place).filter(place => entered[place] === 0);
  // Every agent is reached: one without predecessors first, else the one declared first.
  for (const start of [...starts, ...agents.keys()]) {
    if (layer[start] >= 0) continue;
    layer[start] = 0;
    for (let queue = [start]; queue.length;) {
      const place = queue.shift();
      for (const other of next[place]) {
        if (layer[other] < 0) {
          layer[other] = layer[place] + 1;
          queue.push(other);
        }
      }
    }
  }
  const rows = [];
  layer.forEach((depth, place) => (rows[depth] ??= []).push(place));
  return rows;
}

function shortened(text, length = 19) {
  const characters = [...text];
  return characters.length <= length ? text : characters.slice(0, length - 1).join("") + "…";
}

// A curve's control points for it to reach `target` in its middle, from ends that are at `mean` on average.
const control = (mean, target) => (4 * target - mean) / 3;

// An arrow between two boxes: straight on, or back around everything up to `beyond`; `down`: layers lie below each other.
function arrow(from, to, down, beyond) {
  const { width, height } = BOX;
  const forward = to.depth > from.depth;
  const [a, b] = down === forward ? [0, height / 2] : [width / 2, 0];
  const [x0, y0] = [from.x + a, from.y + b];
  const [x1, y1] = forward ? [to.x - a, to.y - b] : [to.x + a, to.y + b];
  const middle = { x: (x0 + x1) / 2, y: (y0 + y1) / 2 };
  if (forward) {
    const turns = down ? `${x0} ${middle.y} ${x1} ${middle.y}` : `${middle.x} ${y0} ${middle.x} ${y1}`;
    return { d: `M${x0} ${y0}C${turns} ${x1} ${y1}`, ...middle };
  }
  const side = control(down ? middle.x : middle.y, beyond);
  const turns = down ? `${side} ${y0} ${side} ${y1}` : `${x0} ${side} ${x1} ${side}`;
  return { d: `M${x0} ${y0}C${turns} ${x1} ${y1}`, x: down ? beyond : middle.x, y: down ? middle.y : beyond };
}

// Where an arrow back passes: beyond all boxes of the layers between its ends, further out the more layers there are.
function detour(from, to, places, down) {
  const between = places.filter(place => place.depth >= to.depth && place.depth <= from.depth);
  const edges = between.map(place => down ? place.x + BOX.width / 2 : place.y + BOX.height / 2);
  return Math.max(...edges) + 16 + 5 * Math.min(4, from.depth - to.depth);
}

// The drawing of a workflow in a space of `room` pixels; `when` is the line below an agent's name.
export function drawGraph(flow, room, when) {
  const rows = layers(flow.agents, flow.edges);
  const widest = Math.max(1, ...rows.map(row => row.length));
  const along = rows.length * (BOX.width + GAP.along) - GAP.along;
  const across = widest * (BOX.width + GAP.across) - GAP.across;
  const down = along + 2 * MARGIN > room && across < along;
  const places = [];
  rows.forEach((row, depth) => row.forEach((place, number) => {
    const offset = number - (row.length - 1) / 2;
    places[place] = down
      ? { x: MARGIN + across / 2 + offset * (BOX.width + GAP.across), y: MARGIN + BOX.height / 2 + depth * (BOX.height + 44), depth }
      : { x: MARGIN + BOX.width / 2 + depth * (BOX.width + GAP.along),
          y: MARGIN + widest * (BOX.height + GAP.across) / 2 - GAP.across / 2 + offset * (BOX.height + GAP.across), depth };
  }));
  const drawing = svg("svg", { class: "graph", role: "img", "aria-label": `${flow.agents.length} agents; the table below has the same` });
  const head = svg("marker", { id: "head", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, orient: "auto" },
    svg("path", { d: "M0 0L8 4L0 8z" }));
  drawing.append(svg("defs", {}, head));
  let width = Math.max(...places.map(place => place.x)) + BOX.width / 2;
  let height = Math.max(...places.map(place => place.y)) + BOX.height / 2;
  const loops = new Map(), labels = [];
  for (const [source, target, chance] of flow.edges) {
    if (source === target) {
      loops.set(source, chance);
      continue;
    }
    const [from, to] = [places[source], places[target]];
    const line = arrow(from, to, down, detour(from, to, places, down));
    drawing.append(svg("path", { d: line.d, class: chance < 1 ? "branch" : "", "marker-end": "url(#head)" }));
    width = Math.max(width, down ? line.x + 8 : 0);
    height = Math.max(height, down ? 0 : line.y);
    if (chance < 1) {
      const label = svg("text", { x: line.x, y: line.y + 4, class: "chance" });
      label.textContent = chance.toFixed(2).replace(/0$/, "");
      labels.push(label);
    }
  }
  width += MARGIN;
  height += MARGIN;
  flow.agents.forEach((agent, place) => {
    const { x, y } = places[place];
    const soon = agent.steps !== null && agent.steps <= 1;
    const group = svg("g", { class: agent.running ? "running" : soon ? "soon" : "" });
    const title = svg("title"), name = svg("text", { x, y: y - 4 }), below = svg("text", { x, y: y + 14, class: "when" });
    title.textContent = agent.agent;
    name.textContent = shortened(agent.agent) + (loops.has(place) ? ` ↺ ${loops.get(place).toFixed(1)}` : "");
    below.textContent = when(agent);
    const box = { x: x - BOX.width / 2, y: y - BOX.height / 2, width: BOX.width, height: BOX.height };
    group.append(title, svg("rect", { ...box, rx: agent.joins ? 0 : 8 }), name, below);
    drawing.append(group);
  });
  drawing.append(...labels);
  // A drawing that is a little too wide is made smaller; others are scrolled.
  const scale = width > room && width * SMALLEST < room ? room / width : 1;
  for (const [name, value] of Object.entries({ width: scale * width, height: scale * height })) drawing.setAttribute(name, value);
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return drawing;
}
