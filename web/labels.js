// What the pack shows before and behind the name of a widget. The name is a person's to change at any time, in a field that begins
// with all that is shown: what stands around the name is no part of it, and is never saved.
const labels = new WeakMap(); // widget: its own name, what is around that, and the label that both make

// `around` has `before`, `behind` or both; what it leaves out stays.
export function decorate(node, widget, around) {
  const known = labels.get(widget) ?? { name: nameIn(widget.label, around), shown: widget.label };
  if (widget.label !== known.shown) known.name = nameIn(widget.label, known);
  const input = node.inputs?.find(({ name }) => name === widget.name);
  if (input?.label) input.label = nameIn(input.label, known);
  const { before = "", behind = "" } = Object.assign(known, around);
  known.shown = before || behind ? `${before}${known.name ?? widget.name}${behind}` : known.name;
  widget.label = known.shown;
  labels.set(widget, known);
}

function nameIn(label = "", { before = "", behind = "" }) {
  const start = label.startsWith(before) ? before.length : 0;
  const end = label.endsWith(behind) ? label.length - behind.length : label.length;
  return label.slice(start, end) || undefined;
}
