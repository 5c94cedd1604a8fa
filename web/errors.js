// For a value that a run refused: shows the server's message, which the editor itself shows only on a click, and marks the input.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { nodeById, origin, pathTo, valueOf } from "./graph.js";
import { decorate } from "./labels.js";

const OURS = /^Mochi1/;
const SENTENCES = ["ValueError", "FileNotFoundError"]; // other errors have a traceback, which a click shows
const SHOWN = 30_000; // milliseconds
const MARK = "⚠ ";

const refusals = new Map(); // node id: its message, where to mark it, and whether the refused value is still there
let marked = new Map(); // widget: its node

function tell({ node_id, node_type, exception_type, exception_message, current_inputs }) {
  if (!OURS.test(node_type) || !SENTENCES.includes(exception_type)) return;
  forget(node_id);
  const [found, ...around] = pathTo(node_id);
  const node = found?.comfyClass === node_type ? found : undefined; // another workflow may have been opened in the meantime
  const detail = exception_message.trim();
  const input = node?.inputs?.find(({ name }) => detail.startsWith(`${name} is `));
  const title = node?.title ?? LiteGraph.registered_node_types[node_type].title;
  const summary = input ? `${title}: ${input.label ?? input.localized_name ?? input.name}` : title;
  const message = { severity: "error", summary, detail, life: SHOWN };
  app.extensionManager.toast.add(message);
  refusals.set(node_id, { message, places: [], ...(input && where(node_id, node, input.name, around, current_inputs)) });
  update();
}

// At the input and, if its value comes from outside the subgraph, also there. A value computed by another node is undefined.
function where(id, node, name, around, { [name]: [refused] = [] }) {
  const { owner, name: outside } = origin(node, name, around);
  const value = () => valueOf(node, name, around);
  const expected = value() === undefined ? undefined : refused;
  return { places: [[node, name], [owner, outside]], holds: () => nodeById(id) === node && value() === expected };
}

function forget(id) {
  if (refusals.has(id)) app.extensionManager.toast.remove(refusals.get(id).message);
  refusals.delete(id);
}

function update() {
  const wanted = new Map();
  for (const { places, holds } of refusals.values()) {
    for (const [node, name] of places) {
      const widget = node?.widgets?.find((widget) => widget.name === name);
      if (widget && holds()) wanted.set(widget, node);
    }
  }
  for (const [widget, node] of marked) if (!wanted.has(widget)) decorate(node, widget, { before: "" });
  for (const [widget, node] of wanted) decorate(node, widget, { before: MARK });
  marked = wanted;
  app.canvas.setDirty(true, true);
}

app.registerExtension({
  name: "mochinodes.Errors",
  setup() {
    api.addEventListener("execution_error", ({ detail }) => tell(detail));
    api.addEventListener("promptQueueing", () => { // not when a run starts: one queued before the error would hide it
      for (const id of refusals.keys()) forget(id);
      update();
    });
    api.addEventListener("graphChanged", update);
    for (const typed of ["keyup", "focusout"]) window.addEventListener(typed, update); // otherwise noticed only at the next click
  },
});
