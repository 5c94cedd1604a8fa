// A value that a run has refused: the server's sentence, which the editor itself shows only behind a click, and a mark at the input.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { nodeById, origin } from "./graph.js";

const OURS = /^Mochi1/;
const SENTENCES = ["ValueError", "FileNotFoundError"]; // what else goes wrong has a traceback, for which the click is
const SHOWN = 30_000; // milliseconds
const MARK = "⚠ ";

let message;
const marked = new Map(); // widget: the value that was refused

function tell({ node_id, node_type, exception_type, exception_message }) {
  const node = nodeById(node_id);
  if (!node || !OURS.test(node_type) || !SENTENCES.includes(exception_type)) return;
  const detail = exception_message.trim();
  const input = node.inputs?.find(({ name }) => detail.startsWith(`${name} is `));
  const summary = input ? `${node.title}: ${input.label ?? input.localized_name ?? input.name}` : node.title;
  message = { severity: "error", summary, detail, life: SHOWN };
  app.extensionManager.toast.add(message);
  if (input) mark(node, input.name);
}

// In a subgraph also the widget outside, which the value comes from.
function mark(node, name) {
  const from = origin(node, name);
  for (const [{ widgets }, called] of [[node, name], [from.owner ?? {}, from.name]]) {
    const widget = widgets?.find((widget) => widget.name === called);
    if (!widget || marked.has(widget)) continue;
    marked.set(widget, widget.value);
    widget.label = MARK + (widget.label ?? widget.name);
  }
  app.canvas.setDirty(true, true);
}

function unmark(which = () => true) {
  for (const [widget, refused] of [...marked]) {
    if (!which(widget, refused)) continue;
    marked.delete(widget);
    if (widget.label?.startsWith(MARK)) widget.label = widget.label.slice(MARK.length);
    if (widget.value !== refused) widget.callback?.(widget.value); // for what else its label says
  }
}

app.registerExtension({
  name: "mochinodes.Errors",
  setup() {
    api.addEventListener("execution_error", ({ detail }) => tell(detail));
    api.addEventListener("execution_start", () => {
      if (message) app.extensionManager.toast.remove(message);
      unmark();
    });
    api.addEventListener("graphChanged", () => unmark((widget, refused) => widget.value !== refused));
  },
});
