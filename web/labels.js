// What the pack shows before and after the name of a widget. Users can change the name at any time, in a field that starts with the
// whole label: what surrounds the name is not part of it, and is never saved.
const labels = new WeakMap(); // widget: its own name, what surrounds it, and the resulting label

// `around` has `before`, `behind` or both; whatever is missing stays.
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
