// What several extensions ask of nodes and graphs.
import { app } from "/scripts/app.js";

export function after(object, method, action) {
  const original = object[method];
  object[method] = function (...args) {
    const result = original?.apply(this, args);
    action();
    return result;
  };
}

export const linkedInput = (node, name) => node.inputs?.find((input) => input.name === name && input.link != null);

// Where an input comes from: {source}, the node that is linked, or {owner, name}, the node whose widget it is. The input of a
// node inside a subgraph may come from the node outside that stands for it.
export function origin(node, name) {
  const input = linkedInput(node, name);
  const link = input && node.graph?.links.get(input.link);
  if (!link) return { owner: node, name };
  const source = node.graph.getNodeById(link.origin_id);
  if (source) return { source };
  const outside = standIn(node);
  return outside ? origin(outside, outside.inputs[link.origin_slot].name) : {};
}

// The node that stands for the subgraph that a node is in.
export const standIn = (node) => (app.rootGraph ?? app.graph).nodes.find((other) => other.subgraph && other.subgraph === node.graph);

// The value of an input; undefined if another node computes it.
export function valueOf(node, name) {
  const { source, owner, name: widget } = origin(node, name);
  if (source?.comfyClass === "Mochi1Length") return toFrames(valueOf(source, "seconds"));
  return owner?.widgets?.find(({ name }) => name === widget)?.value;
}

// A node by the id that the server calls it: 12, or 7:12 for node 12 in the subgraph of node 7.
export function nodeById(id) {
  let node, graph = app.rootGraph ?? app.graph;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

const FPS = 30, TEMPORAL_COMPRESSION = 6;

export const toSeconds = (frames) => +(frames / FPS).toFixed(1);
export const toFrames = (seconds) => TEMPORAL_COMPRESSION * Math.round((seconds * FPS) / TEMPORAL_COMPRESSION) + 1;
