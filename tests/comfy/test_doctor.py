"""The report about the machine in ComfyUI's log, if the environment asks for it."""

from tests.harness.comfy_process import run_in_comfyui

LOGS = """
import asyncio, logging, os
from pack.nodes.bridge import doctor
logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
doctor.examine = lambda device: device
doctor.render = lambda device: f"report for {device}"
for value in (None, "", "0", "1"):
    os.environ.pop("MOCHI_DOCTOR", None)
    os.environ |= {} if value is None else {"MOCHI_DOCTOR": value}
    logging.info("asked by %r", value)
    asyncio.run(doctor.log_report_if_asked())

def broken(_):
    raise RuntimeError("no such thing")

doctor.render = broken
asyncio.run(doctor.log_report_if_asked())
"""


def test_the_log_has_the_report_from_the_start(comfy_server):
    log = comfy_server.log.read_text(encoding="utf-8", errors="replace")
    start, _, _ = log.partition("To see the GUI go to")
    _, began, report = start.partition("Mochi doctor, for work on cpu")
    assert began
    assert ", ComfyUI " in report
    for line in (
        "versions: mochi-nodes",
        "device cpu: ",
        "  denoiser     ok",
        "  math         ok",
        "  int8         ok",
    ):
        assert line in report


def test_it_is_there_only_if_it_is_asked_for(comfy_path):
    said = run_in_comfyui(comfy_path, LOGS).stderr.splitlines()
    said = said[said.index("asked by None") :]
    assert said[:5] == ["asked by None", "asked by ''", "asked by '0'", "asked by '1'", "report for cpu"]
    assert said[5] == "The report that MOCHI_DOCTOR asks for could not be made."
    assert said[-1] == "RuntimeError: no such thing"
