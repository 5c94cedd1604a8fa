// Beside the name of a widget what its value means: a length in the other unit, or the input that counts in its place.
import { app } from "/scripts/app.js";
import { after, linkedInput, toFrames, toSeconds } from "./graph.js";

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
  const label = widget.label ?? widget.name;
  let shown = widget.label;
  const update = () => {
    const instead = linkedInput(node, replacement);
    widget.disabled = Boolean(instead);
    if (widget.label !== shown) return; // somebody has given it another name
    if (instead) shown = `${label} ← ${instead.label ?? instead.localized_name ?? instead.name}`;
    else if (inOtherUnit && !linkedInput(node, widget.name)) shown = `${label} ${inOtherUnit(widget.value)}`;
    else shown = label;
    widget.label = shown;
  };
  after(widget, "callback", update);
  after(node, "onConfigure", update);
  after(node, "onConnectionsChange", update);
  update();
}

app.registerExtension({
  name: "mochinodes.Lengths",
  nodeCreated(node) {
    const units = IN_OTHER_UNIT[node.comfyClass] ?? {}, replacements = REPLACED_BY[node.comfyClass] ?? {};
    for (const widget of node.widgets ?? []) {
      const [replacement, inOtherUnit] = [replacements[widget.name], units[widget.name]];
      if (replacement || inOtherUnit) annotate(node, widget, replacement, inOtherUnit);
    }
  },
});
