// Shows next to a widget's name what its value means: a length in the other unit, or the input that replaces it.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { after, linkedInput, toFrames, toSeconds } from "./graph.js";
import { decorate } from "./labels.js";

const IN_OTHER_UNIT = {
  Mochi1Sampler: { num_frames: (frames) => `(${toSeconds(frames)} s)` },
  Mochi1Length: { seconds: (seconds) => `(${toFrames(seconds)} frames)` },
};
const REPLACED_BY = {
  Mochi1Sampler: {
    width: "latent", height: "latent", num_frames: "latent", batch_size: "latent", steps: "sigmas", denoise: "sigmas",
  },
};

function annotate(node, widget, replacement, inOtherUnit) {
  const instead = linkedInput(node, replacement);
  widget.disabled = Boolean(instead);
  let behind = "";
  if (instead) behind = ` ← ${instead.label ?? instead.localized_name ?? instead.name}`;
  else if (inOtherUnit && !linkedInput(node, widget.name)) behind = ` ${inOtherUnit(widget.value)}`;
  decorate(node, widget, { behind });
}

function annotateAll(node) {
  const units = IN_OTHER_UNIT[node.comfyClass], replacements = REPLACED_BY[node.comfyClass] ?? {};
  for (const widget of node.widgets) {
    const [replacement, inOtherUnit] = [replacements[widget.name], units[widget.name]];
    if (replacement || inOtherUnit) annotate(node, widget, replacement, inOtherUnit);
  }
}

const nodes = new Set();

app.registerExtension({
  name: "mochinodes.Lengths",
  setup() {
    api.addEventListener("graphChanged", () => nodes.forEach(annotateAll)); // a widget may have been renamed
  },
  nodeCreated(node) {
    if (!(node.comfyClass in IN_OTHER_UNIT)) return;
    const update = () => annotateAll(node);
    for (const widget of node.widgets) after(widget, "callback", update);
    for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, update);
    after(node, "onAdded", () => nodes.add(node));
    after(node, "onRemoved", () => nodes.delete(node));
    update();
  },
});
