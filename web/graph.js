// Queries about nodes and graphs that several extensions share.
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

// Where an input comes from: {source}, the linked node, or {owner, name}, the node whose widget it is. The input of a node inside
// a subgraph may come from outside: `around` are the nodes that stand for the enclosing subgraphs, innermost first.
export function origin(node, name, around) {
  const input = linkedInput(node, name);
  const link = input && node.graph?.links.get(input.link);
  if (!link) return { owner: node, name };
  const source = node.graph.getNodeById(link.origin_id);
  if (source) return { source, around };
  const [outside, ...further] = around;
  return outside ? origin(outside, outside.inputs[link.origin_slot].name, further) : {};
}

// All values of `around` for nodes of a graph, one for each use of the graph: the nodes that stand for it and for the enclosing
// subgraphs, innermost first.
export function usesOf(graph) {
  const root = app.rootGraph ?? app.graph;
  if (graph === root) return [[]];
  const all = [root, ...(root.subgraphs?.values() ?? [])].flatMap(({ nodes }) => nodes);
  return all.filter(({ subgraph }) => subgraph && subgraph === graph).flatMap((node) => usesOf(node.graph).map((around) => [node, ...around]));
}

// The value of an input; undefined if another node computes it.
export function valueOf(node, name, around) {
  const { source, around: outside, owner, name: widget } = origin(node, name, around);
  if (source?.comfyClass === "Mochi1Length") return toFrames(valueOf(source, "seconds", outside));
  return owner?.widgets?.find(({ name }) => name === widget)?.value;
}

// The server's id of a node: 7:12 is node 12 in the subgraph of node 7.
export const idOf = (node, around) => [node, ...around].map(({ id }) => id).reverse().join(":");

// The node with that id, followed by those around it, innermost first.
export function pathTo(id) {
  const path = [];
  for (const part of String(id).split(":")) {
    const graph = path.length ? path[0]?.subgraph : app.rootGraph ?? app.graph;
    path.unshift(graph?.getNodeById(part));
  }
  return path;
}

export const nodeById = (id) => pathTo(id)[0];

const FPS = 30, TEMPORAL_COMPRESSION = 6;

export const toSeconds = (frames) => +(frames / FPS).toFixed(1);
export const toFrames = (seconds) => TEMPORAL_COMPRESSION * Math.round((seconds * FPS) / TEMPORAL_COMPRESSION) + 1;
