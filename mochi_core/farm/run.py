"""Hand out jobs to workers until each is done or has failed, and write a report."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, deque
from pathlib import Path

from tqdm import tqdm

from ..generate import pipeline_arguments, say
from ..output_files import check_writable, folder, replacing
from ..shown import sentence
from .cluster import Worker, WorkerDied, cluster, finished, room
from .jobs import Job, read_jobs

ATTEMPTS = 3
"""Most processes that may die while making one video, or in succession while loading the models."""
LOOK_EVERY = 1.0
"""Seconds between two checks of the workers' progress."""
REPORT = "report.json"
ENDED = "its process died {} times, as happens when main memory runs out; Ray's logs may say more."


def farm(options: argparse.Namespace) -> int:
    """Make the videos in a file of prompts that do not exist yet; returns 0 if all exist at the end, 1 if some failed.

    Raises:
        ValueError: an option or a line of the file is invalid, Ray cannot be used, or no worker could start.
        OSError: the file cannot be read, or a video cannot be written.
    """
    for name in ("workers", "gpus_per_worker"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name} is {value}; use 1 or more.")
    if options.device.startswith("cuda:"):
        raise ValueError(f"device is {options.device}, but Ray gives each worker a GPU; use --device cuda.")
    jobs = read_jobs(options.prompts, options)
    with folder(options.output):
        check_writable(options.output / REPORT)
    for job in jobs:
        if (options.output / job.file).exists():
            job.status = "kept"
    try:
        if any(job.status == "waiting" for job in jobs):
            with cluster(options.address):
                count, cores = room(options.gpus_per_worker if options.device == "cuda" else 0, options.workers)
                waiting = sum(job.status == "waiting" for job in jobs)
                workers = [Worker(options, cores) for _ in range(min(count, waiting))]
                Farm(jobs, workers, options.output).run()
    finally:
        report(jobs, options.output / REPORT)
    return int(any(job.status == "failed" for job in jobs))


class Farm:
    """The loop that hands out jobs. A job whose worker died goes first, to the next free worker."""

    def __init__(self, jobs: list[Job], workers: list[Worker], output: Path) -> None:
        self.jobs, self.workers, self.output = jobs, workers, output
        self.waiting = deque(job for job in jobs if job.status == "waiting")
        self.at_work: dict[Worker, Job] = {}
        self.starts = dict.fromkeys(workers, 0)
        """Processes of each worker that have died since one last loaded the models."""
        self.problem = ""

    def run(self) -> None:
        with tqdm(total=sum(job.steps for job in self.waiting), unit="step") as bar:
            try:
                for worker in self.workers:
                    worker.start()
                while self.waiting or self.at_work:
                    if not self.workers:
                        raise ValueError(f"No worker could start: {self.problem}")
                    for worker in finished(self.workers, LOOK_EVERY):
                        self._receive(worker)
                    self._hand_out()
                    self._show(bar)
            finally:
                for worker in self.workers:
                    worker.stop()

    def _hand_out(self) -> None:
        for worker in self.workers:
            while self.waiting and not worker.pending:
                job = self.waiting.popleft()
                job.attempts += 1
                try:
                    arguments = pipeline_arguments(job.options)
                except (ValueError, OSError) as error:  # such as an image that no longer exists
                    self._fail(job, sentence(error))
                    continue
                self.at_work[worker] = job
                worker.make(arguments)

    def _receive(self, worker: Worker) -> None:
        job = self.at_work.pop(worker, None)
        try:
            outcome = worker.outcome()
        except WorkerDied:
            self._lost(worker, job)
            return
        if outcome is None:
            return
        for warning in outcome.warnings:
            say(f"warning: {job.name + ': ' if job else ''}{warning}")
        if job is None:
            self.starts[worker] = 0
            if outcome.error:
                self._dismiss(worker, outcome.error)
        elif outcome.error:
            self._fail(job, outcome.error)
            if outcome.broken:
                worker.start()
        else:
            path = self.output / job.file
            with replacing(path) as temporary:
                temporary.write_bytes(outcome.video)
            job.status = "made"
            tqdm.write(str(path), file=sys.stdout)

    def _lost(self, worker: Worker, job: Job | None) -> None:
        self.starts[worker] += 1
        if job is not None and job.attempts < ATTEMPTS:
            say(f"note: the process making {job.name} died; trying again.")
            self.waiting.appendleft(job)
        elif job is not None:
            self._fail(job, ENDED.format(ATTEMPTS))
        if self.starts[worker] < ATTEMPTS:
            worker.start()
        else:
            self._dismiss(worker, ENDED.format(ATTEMPTS))

    def _dismiss(self, worker: Worker, problem: str) -> None:
        say(f"note: a worker cannot start: {problem}")
        worker.stop()
        self.workers.remove(worker)
        self.problem = problem

    def _fail(self, job: Job, error: str) -> None:
        job.status, job.error = "failed", error
        say(f"failed: {job.name}: {error}")

    def _show(self, bar: tqdm) -> None:
        ended = sum(job.steps for job in self.jobs if job.attempts and job.status in ("made", "failed"))
        bar.update(ended + sum(worker.look() for worker in self.at_work) - bar.n)
        made = sum(job.status in ("made", "kept") for job in self.jobs)
        is_loading = not any(job.attempts for job in self.jobs)
        bar.set_postfix_str("loading the models" if is_loading else f"{made} of {len(self.jobs)} videos")


def report(jobs: list[Job], path: Path) -> None:
    """Write the state of every job, and print how many are in each."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([job.report() for job in jobs], indent=1) + "\n", encoding="utf-8")
    counts = Counter(job.status for job in jobs)
    said = {"made": "made", "kept": "already there", "failed": "failed", "waiting": "not started"}
    counted = ", ".join(f"{counts[key]} {word}" for key, word in said.items() if counts[key])
    tqdm.write(f"{counted}: {path}", file=sys.stdout)
