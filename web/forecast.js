// A line in a node that forecasts a run: the tokens of a prompt, or the memory that a video takes on this server; and while the
// node runs, the time left.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { after, idOf, linkedInput, nodeById, origin, usesOf, valueOf } from "./graph.js";

const PAUSE = 300; // milliseconds after the last change
const ROW = 15, MAX_ROWS = 4, LETTER = 6.5; // pixels of a line of text, and of a character
const BYPASSED = 4;
const LONGEST_BADGE = 60; // characters
const LINE_STYLE = { font: `12px/${ROW}px sans-serif`, color: "var(--descrip-text, #999)", overflow: "hidden", maxHeight: `${MAX_ROWS * ROW}px` };

// What to ask the server about a node, given the nodes `around` it: [route, question], or nothing.
const QUESTIONS = {
  Mochi1T5Encode(node, around) {
    const prompt = valueOf(node, "prompt", around);
    return prompt !== undefined && ["tokens", { prompt }];
  },
  Mochi1Sampler(node, around) {
    const size = Object.fromEntries(
      ["width", "height", "num_frames", "batch_size"].map((name) => [name, valueOf(node, name, around)]),
    );
    const known = !linkedInput(node, "latent") && Object.values(size).every(Number.isInteger);
    return known && ["memory", { ...size, ...modelOf(node, around) }];
  },
  Mochi1TiledVAEDecode: () => null,
  Mochi1VAEEncode: () => null,
};

// The file of a sampler's MODEL, if from our loader, and the context window used for sampling.
function modelOf(node, around) {
  const model = {};
  for (let at = origin(node, "model", around); at.source; at = origin(at.source, "model", at.around)) {
    if (at.source.comfyClass === "Mochi1LoadTransformer") {
      model.model_name = valueOf(at.source, "model_name", at.around);
      model.weight_dtype = valueOf(at.source, "weight_dtype", at.around);
    } else if (at.source.mode !== BYPASSED) {
      model.window ??= valueOf(at.source, "context_length", at.around); // of Context Windows
    }
  }
  return model;
}

// The forecast for one use of a node: nodes in a subgraph that is used twice have two, each with its own values.
class Forecast {
  constructor(line) {
    Object.assign(this, { line, text: "", forecast: "", working: false });
  }

  async ask() {
    const { node } = this.line;
    const question = JSON.stringify(QUESTIONS[node.comfyClass](node, this.around) || null);
    if (question === this.question) return;
    this.question = question;
    const forecast = question === "null" ? "" : await answer(...JSON.parse(question));
    if (question !== this.question) return; // another one has been asked in the meantime
    this.forecast = forecast;
    this.rest();
  }

  // Time left, from the steps since the first one seen: earlier work, such as loading, is not repeated.
  progress(run, value, max) {
    if (run !== this.run || value < this.last) [this.run, this.first, this.started] = [run, value, performance.now()];
    this.last = value;
    if (value >= max) return this.rest();
    const perStep = (performance.now() - this.started) / (value - this.first);
    const left = value > this.first ? `, ${clock((perStep * (max - value)) / 1000)} left` : "";
    this.say(`${value} of ${max}${left}`, true);
  }

  rest() {
    this.say(this.forecast, false);
  }

  say(text, working) {
    Object.assign(this, { text, working });
    this.line.show();
  }
}

// The common text of several forecasts, of running nodes if there are any; empty unless all agree.
function agreed(forecasts) {
  const working = forecasts.filter((forecast) => forecast.working);
  const texts = new Set((working.length ? working : forecasts).map(({ text }) => text));
  return texts.size === 1 ? [...texts][0] : "";
}

class Line {
  constructor(node) {
    this.node = node;
    this.forecasts = new Map(); // by the server's id for the node
    this.signs = new Map(); // by the outside node that shows them
    this.element = document.createElement("div");
    this.element.className = "mochinodes-line";
    Object.assign(this.element.style, { ...LINE_STYLE, padding: "0 6px" });
    const widget = node.addDOMWidget("forecast", "mochinodes-line", this.element, { serialize: false, margin: 4 });
    widget.serialize = false; // neither saved nor sent
    widget.computeLayoutSize = undefined; // would otherwise share the node's free space with the prompt
    widget.computeSize = () => [0, this.height()];
  }

  height() {
    const rows = Math.ceil((this.element.textContent.length * LETTER) / this.node.size[0]);
    return Math.min(rows, MAX_ROWS) * ROW + (rows && 8);
  }

  ask() {
    const before = this.forecasts;
    this.forecasts = new Map(
      usesOf(this.node.graph).map((around) => {
        const id = idOf(this.node, around);
        return [id, Object.assign(before.get(id) ?? new Forecast(this), { around })];
      }),
    );
    for (const forecast of this.forecasts.values()) forecast.ask();
    this.show(); // also outside, where the node may have been redrawn
  }

  show() {
    const forecasts = [...this.forecasts.values()];
    this.showInside(agreed(forecasts));
    if (!takesFromOutside(this.node)) return;
    for (const outside of new Set(forecasts.map(({ around }) => around[0]))) {
      if (!this.signs.has(outside)) this.signs.set(outside, new Sign(outside));
      this.signs.get(outside).show(agreed(forecasts.filter(({ around }) => around[0] === outside)));
    }
  }

  showInside(text) {
    if (text === this.element.textContent) return;
    this.element.textContent = this.element.title = text;
    const [width, height] = this.node.size;
    this.node.setSize([width, Math.max(height, this.node.computeSize()[1])]);
    this.node.setDirtyCanvas?.(true, true);
  }
}

// A line on a subgraph's node, which has no widgets but those of its inputs: the old renderer shows a badge, the other a row below
// the widgets.
class Sign {
  constructor(outside) {
    this.outside = outside;
    this.row = Object.assign(document.createElement("div"), { className: "mochinodes-outside" });
    Object.assign(this.row.style, { ...LINE_STYLE, padding: "0 12px" });
    this.badge = () => new LGraphBadge({ text: shortened(this.row.textContent) });
  }

  show(text) {
    const { outside, row, badge } = this;
    row.textContent = text;
    if (!outside.badges.includes(badge)) outside.badges.push(badge);
    outside.setDirtyCanvas?.(true, true);
    const body = app.canvas.graph === outside.graph && document.querySelector(`[data-testid="node-body-${outside.id}"]`);
    if (body && row.parentElement !== body) body.append(row);
  }
}

const takesFromOutside = (node) =>
  node.inputs?.some(({ link }) => link != null && !node.graph.getNodeById(node.graph.links.get(link)?.origin_id));

// The text up to a semicolon; details follow it.
function shortened(text) {
  const [first] = text.split(";");
  return first.length > LONGEST_BADGE ? `${first.slice(0, LONGEST_BADGE)} ...` : first;
}

async function answer(route, question) {
  try {
    const response = await api.fetchApi(`/mochi-nodes/${route}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
    });
    const { text, error } = await response.json();
    return text ?? error;
  } catch {
    return ""; // no server, which the editor itself reports
  }
}

function clock(seconds) {
  const total = Math.round(seconds), two = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(total / 3600), Math.floor(total / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(total % 60)}` : `${minutes}:${two(total % 60)}`;
}

const lines = new Map();
let timer;

function askSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    for (const line of lines.values()) line.ask();
  }, PAUSE);
}

app.registerExtension({
  name: "mochinodes.Forecast",
  setup() {
    api.addEventListener("graphChanged", askSoon);
    app.canvas.canvas.addEventListener("litegraph:set-graph", askSoon);
    api.addEventListener("progress", ({ detail }) => {
      lines.get(nodeById(detail.node))?.forecasts.get(detail.node)?.progress(detail.prompt_id, detail.value, detail.max);
    });
    for (const end of ["execution_error", "execution_interrupted"]) {
      api.addEventListener(end, () => lines.forEach(({ forecasts }) => forecasts.forEach((forecast) => forecast.rest())));
    }
  },
  nodeCreated(node) {
    if (!(node.comfyClass in QUESTIONS)) return;
    const line = new Line(node);
    for (const widget of node.widgets) after(widget, "callback", askSoon);
    for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, askSoon);
    after(node, "onAdded", () => (lines.set(node, line), askSoon()));
    after(node, "onRemoved", () => lines.delete(node));
  },
});
