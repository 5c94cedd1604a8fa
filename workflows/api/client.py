"""Run a workflow in API form on a ComfyUI server and download its videos. Needs `python -m pip install websockets`.

Usage:
    python client.py SERVER WORKFLOW.json [NODE.INPUT=VALUE ...]
    python client.py http://127.0.0.1:8188 text_to_video.json 6.seed=7 4.prompt="A red kite over the sea"
"""

import json
import sys
from pathlib import Path
from urllib import error, parse, request

try:
    from websockets.exceptions import ConnectionClosed, WebSocketException
    from websockets.sync.client import connect
except ModuleNotFoundError:
    sys.exit("client.py needs a package that is not installed; run: python -m pip install websockets")


def run(graph, server, folder="."):
    """Queue a workflow, show its progress, and download the files that it made into `folder`; returns their paths.

    RuntimeError: the server refused it, or the run failed. OSError: the server cannot be reached, or went away.
    """
    server = (server if "://" in server else f"http://{server}").rstrip("/")
    with connected(server) as events:
        client_id = json.loads(events.recv())["data"]["sid"]
        prompt_id = queue(graph, server, client_id)
        follow(events, prompt_id, graph)
    return [download(file, server, folder) for file in made_files(prompt_id, server)]


def connected(server):
    try:
        return connect(server.replace("http", "ws", 1) + "/ws", max_size=None, ping_interval=None)
    except (OSError, WebSocketException) as problem:
        raise ConnectionError(f"No ComfyUI answers at {server}: {problem}") from None


def queue(graph, server, client_id):
    """Queue a workflow on the server; returns the id of the run."""
    body = json.dumps({"prompt": graph, "client_id": client_id}).encode()
    try:
        response = request.urlopen(f"{server}/prompt", body)
    except error.HTTPError as refusal:
        response = refusal
    answer = parsed(response)
    if "node_errors" not in answer:  # something in front of ComfyUI has answered
        raise RuntimeError(f"{server} answers {response.status} {response.reason}, and not as ComfyUI does.")
    # Even an accepted run can have problems: the server makes the outputs that it can.
    problems = [problem for node in answer["node_errors"].values() for problem in node["errors"]]
    if problems or "error" in answer:
        raise RuntimeError("\n".join(f"{p['message']}: {p['details']}" for p in problems or [answer["error"]]))
    return answer["prompt_id"]


def parsed(response):
    """A JSON object; empty for any other answer."""
    try:
        answer = json.load(response)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def follow(events, prompt_id, graph):
    """Show the steps of a run until it ends. Binary messages are preview images, and skipped."""
    shown = None
    try:
        for event in (json.loads(text) for text in events if isinstance(text, str) and prompt_id in text):
            data = event["data"]
            if event["type"] == "progress" and data != shown:  # ComfyUI reports some steps twice
                shown = data
                show(title(graph.get(data["node"])), data["value"], data["max"])
            elif event["type"] == "executing" and data["node"] is None:
                return show("", 0, 0)
    except ConnectionClosed:
        pass
    raise ConnectionError("The server went away before the run ended; its console may say why.")


def show(name, value, total):
    """In a terminal, update one line with every step; elsewhere, such as in a log, print a line when a node is done."""
    step = f"{name}: {value} of {total}" if total else ""
    if sys.stdout.isatty():
        print(f"\r{step:<78}", end="\r", flush=True)
    elif total and value == total:
        print(step, flush=True)


def made_files(prompt_id, server):
    """The files of a finished run, as the server describes them."""
    done = json.load(request.urlopen(f"{server}/history/{prompt_id}"))[prompt_id]
    if not done["status"]["completed"]:
        raise RuntimeError(done["status"]["messages"][-1][1].get("exception_message", "The run was cancelled.").strip())
    return [file for output in done["outputs"].values() for file in output.get("images", [])]


def download(file, server, folder):
    return request.urlretrieve(f"{server}/view?{parse.urlencode(file)}", Path(folder, Path(file["filename"]).name))[0]


def read(path):
    """Read a workflow in API form from a file."""
    try:
        graph = json.loads(Path(path).read_text(encoding="utf-8"))
        assert all("class_type" in node for node in graph.values())
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}; the workflows are in workflows/api.") from None
    except (ValueError, AttributeError, TypeError, AssertionError):
        raise ValueError(f"{path} is not a workflow in API form; the editor's menu has File, Export (API).") from None
    return graph


def change(graph, text):
    """Set an input of a workflow from NODE.INPUT=VALUE: text is taken verbatim, everything else is JSON."""
    place, equals, value = text.partition("=")
    node, dot, name = place.partition(".")
    if not (equals and dot):
        raise ValueError(f"{text}: say what to change as NODE.INPUT=VALUE, such as 6.seed=7.")
    if node not in graph:
        nodes = ", ".join(f"{key} ({title(node)})" for key, node in graph.items())
        raise ValueError(f"{text}: there is no node {node}; there are {nodes}.")
    inputs = graph[node]["inputs"]
    if name not in inputs:
        raise ValueError(f"{text}: {title(graph[node])} has no input {name}; it has {', '.join(inputs)}.")
    try:
        inputs[name] = value if isinstance(inputs[name], str) else json.loads(value)
    except json.JSONDecodeError:
        raise ValueError(f"{text}: {value} cannot take the place of {json.dumps(inputs[name])}.") from None


def title(node):
    """A node's title in the editor; nodes that the server added during the run are not in the workflow."""
    return node.get("_meta", {}).get("title", node["class_type"]) if node else "..."


def main(arguments):
    if len(arguments) < 2:
        sys.exit(__doc__)
    server, workflow, *changes = arguments
    try:
        graph = read(workflow)
        for text in changes:
            change(graph, text)
        print(*run(graph, server), sep="\n")
    except (OSError, RuntimeError, ValueError) as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main(sys.argv[1:])
