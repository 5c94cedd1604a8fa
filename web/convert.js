// Converts the open workflow, if it was made for MochiWrapper or for ComfyUI's built-in Mochi, and opens the result beside it.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const COMMAND = "mochinodes.Convert";
const BUILT_IN = "EmptyMochiLatentVideo", OURS = "Mochi1", OFFERED = "mochinodes.Offered";

const toast = (severity, summary, detail, life = 12000) => app.extensionManager.toast.add({ severity, summary, detail, life });

async function convert() {
  const response = await api.fetchApi("/mochi-nodes/migrate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify((app.rootGraph ?? app.graph).serialize()),
  });
  const answer = await response.json().catch(() => ({ error: "The server could not convert this workflow; its console says why." }));
  if (!response.ok) return toast("warn", "Mochi Nodes", answer.error);
  await app.loadGraphData(answer.workflow, true, true, "mochi_nodes");
  toast("success", "Mochi Nodes", answer.notes.join(" ") || "Everything was carried over.", 30000);
}

app.registerExtension({
  name: "mochinodes.Convert",
  commands: [{ id: COMMAND, label: "Convert to Mochi Nodes", icon: "pi pi-sync", function: convert }],
  menuCommands: [{ path: ["Extensions", "Mochi Nodes"], commands: [COMMAND] }],
  afterConfigureGraph() {
    const types = app.graph.nodes.map((node) => node.type);
    if (localStorage.getItem(OFFERED) || !types.includes(BUILT_IN) || types.some((type) => type.startsWith(OURS))) return;
    localStorage.setItem(OFFERED, "1"); // once is an offer, more is a nuisance
    toast("info", "Mochi Nodes", "This workflow uses ComfyUI's built-in Mochi, which works. To use Mochi Nodes: menu, Extensions, Mochi Nodes.");
  },
});
