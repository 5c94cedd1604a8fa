// Converts the open workflow, if it was made for MochiWrapper or ComfyUI's built-in Mochi, and opens the result in a new tab.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const COMMAND = "mochinodes.Convert";
const BUILT_IN = "EmptyMochiLatentVideo", OURS = "Mochi1", OFFERED = "mochinodes.Offered";
const WRAPPERS = /^(DownloadAndLoad)?Mochi(ModelLoader|Model|VAELoader|VAEEncoderLoader|TextEncode|Sampler|Decode|ImageEncode)/;
const WAY = "menu, Extensions, Mochi Nodes, Convert to Mochi Nodes.";

const toast = (severity, summary, detail, life = 12000) => app.extensionManager.toast.add({ severity, summary, detail, life });

async function convert() {
  const response = await api.fetchApi("/mochi-nodes/migrate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify((app.rootGraph ?? app.graph).serialize()),
  });
  const answer = await response.json().catch(() => ({ error: "The server could not convert this workflow; its console says why." }));
  if (!response.ok) return toast("warn", "Mochi Nodes", answer.error);
  const name = app.extensionManager.workflow.activeWorkflow?.filename ?? "Mochi";
  await app.loadGraphData(answer.workflow, true, true, name);
  toast("success", "Mochi Nodes", answer.notes.length ? "Converted; a note in the graph says what changed." : "Everything was carried over.");
}

function offer() {
  const types = app.graph.nodes.map((node) => node.type);
  // Nodes that are not installed cannot run: this is shown every time.
  if (types.some((type) => WRAPPERS.test(type) && !(type in LiteGraph.registered_node_types)))
    return toast("info", "Mochi Nodes", `This workflow was made for MochiWrapper, which is not installed. To continue with Mochi Nodes: ${WAY}`);
  if (localStorage.getItem(OFFERED) || !types.includes(BUILT_IN) || types.some((type) => type.startsWith(OURS))) return;
  localStorage.setItem(OFFERED, "1"); // offering more than once would be a nuisance
  toast("info", "Mochi Nodes", `This workflow uses ComfyUI's built-in Mochi, which works. To use Mochi Nodes: ${WAY}`);
}

app.registerExtension({
  name: "mochinodes.Convert",
  commands: [{ id: COMMAND, label: "Convert to Mochi Nodes", icon: "pi pi-sync", function: convert }],
  menuCommands: [{ path: ["Extensions", "Mochi Nodes"], commands: [COMMAND] }],
  afterConfigureGraph() {
    setTimeout(offer, 1000); // messages are lost before the page is complete
  },
});
