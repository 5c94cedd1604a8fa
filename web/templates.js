// A link opens a template of this pack by its title.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

// The host's own links, ?template=NAME&source=PACK, refuse names with spaces.
async function openLinked() {
  const query = new URLSearchParams(location.search);
  const title = query.get("template");
  if (query.get("source") !== PACK || !title?.includes(" ")) return;
  const response = await api.fetchApi(`/workflow_templates/${PACK}/${encodeURIComponent(title)}.json`);
  history.replaceState(history.state, "", location.pathname);
  if (!response.ok) {
    const detail = `There is no template named ${title}; the menu lists all of them under Templates, Extensions.`;
    return app.extensionManager.toast.add({ severity: "warn", summary: "Mochi Nodes", detail, life: 12000 });
  }
  await app.loadGraphData(await response.json(), true, true, title, { openSource: "template" });
}

let opened = false;

app.registerExtension({
  name: "mochinodes.Templates",
  afterConfigureGraph() {
    if (!opened) setTimeout(openLinked); // after the workflow that the host opens first
    opened = true;
  },
});
