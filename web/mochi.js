// Beside the name of a length in frames, the same in seconds; beside one in seconds, the frames.
import { app } from "/scripts/app.js";

const FPS = 30, TEMPORAL_COMPRESSION = 6;
const IN_OTHER_UNIT = {
  Mochi1Sampler: { num_frames: (frames) => `${+(frames / FPS).toFixed(1)} s` },
  Mochi1Length: {
    seconds: (seconds) => `${TEMPORAL_COMPRESSION * Math.round((seconds * FPS) / TEMPORAL_COMPRESSION) + 1} frames`,
  },
};

const isLinked = (node, widget) => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);

function after(object, method, action) {
  const original = object[method];
  object[method] = function (...args) {
    const result = original?.apply(this, args);
    action();
    return result;
  };
}

function annotate(node, widget, inOtherUnit) {
  const label = widget.label ?? widget.name;
  let shown = widget.label;
  const update = () => {
    if (widget.label !== shown) return; // somebody has given it another name
    shown = isLinked(node, widget) ? label : `${label} (${inOtherUnit(widget.value)})`;
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
    for (const [name, inOtherUnit] of Object.entries(IN_OTHER_UNIT[node.comfyClass] ?? {})) {
      const widget = node.widgets?.find((widget) => widget.name === name);
      if (widget) annotate(node, widget, inOtherUnit);
    }
  },
});
