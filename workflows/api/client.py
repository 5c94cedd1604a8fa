"""Run a workflow in API form on a ComfyUI server and download its videos. Needs `pip install websockets`.

Usage: python client.py http://127.0.0.1:8188 text_to_video.json 6.seed=7 4.prompt="A red kite" (NODE.INPUT=VALUE)"""

import json
import sys
from pathlib import Path
from urllib import error, parse, request

from websockets.sync.client import connect


def run(graph, server, folder="."):
    """Queue `graph`, show its progress, return the paths of its downloaded files; a failure is a RuntimeError."""
    with connect(server.replace("http", "ws", 1) + "/ws", max_size=None, ping_interval=None) as events:
        body = {"prompt": graph, "client_id": json.loads(events.recv())["data"]["sid"]}
        try:
            answer = json.load(request.urlopen(f"{server}/prompt", json.dumps(body).encode()))
        except error.HTTPError as refusal:
            answer = json.load(refusal)
        problems = [problem for node in answer["node_errors"].values() for problem in node["errors"]]
        if problems or "error" in answer:
            raise RuntimeError("\n".join(f"{p['message']}: {p['details']}" for p in problems or [answer["error"]]))
        for event in (json.loads(text) for text in events if isinstance(text, str) and answer["prompt_id"] in text):
            if event["type"] == "progress":
                print("\rnode {node}: {value} of {max}".format(**event["data"]), end=" ", flush=True)
            elif event["type"] == "executing" and event["data"]["node"] is None:
                break
    done = json.load(request.urlopen(f"{server}/history/{answer['prompt_id']}"))[answer["prompt_id"]]
    if not done["status"]["completed"]:
        raise RuntimeError(done["status"]["messages"][-1][1].get("exception_message", "The run was cancelled."))
    files = [file for output in done["outputs"].values() for file in output.get("images", [])]
    return [request.urlretrieve(f"{server}/view?{parse.urlencode(f)}", Path(folder, f["filename"]))[0] for f in files]


if __name__ == "__main__":
    sys.tracebacklimit, graph = 0, json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    for node, name, value in (change.replace("=", ".", 1).split(".", 2) for change in sys.argv[3:]):
        graph[node]["inputs"][name] = value if isinstance(graph[node]["inputs"][name], str) else json.loads(value)
    print("", *run(graph, sys.argv[1]), sep="\n")
