# SPDX-License-Identifier: Apache-2.0
"""Runs steps until a deadline; at any moment one archive holds all results so far.

Each step is a process with a time limit and a log. After each change, state and summary are written
again, then the archive; a step counts as done only when the archive has it. Files are written under
a temporary name and renamed, so that a kill leaves whole files.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .record import LEFT_OUT, POISONED

LARGEST = 1 << 20  # most bytes of a file that the archive takes, half of them from each end
STARTS = 32  # most starts of a step that goes on after CUDA errors
RENEW = 0.5  # seconds between archives while steps write results
WRITTEN = (".log", ".csv", ".jsonl")  # suffixes of files that steps write

_process = ctypes.CDLL(None)


@dataclass(frozen=True)
class Step:
    name: str  # also of its log
    command: list[str]
    seconds: float  # time limit
    environment: Mapping[str, str] = field(default_factory=dict)  # besides that of all steps
    left_out: str = ""  # why it does not run, if so
    goes_on: bool = False  # whether another start continues after the case that ended the process


class Outcome(NamedTuple):
    """How a step ended, if it has."""

    result: str  # ok, failed (1), left out: why, interrupted, stopped ..., running, not reached
    seconds: float = 0.0
    last: str = ""  # last line of its log

    @property
    def done(self) -> bool:
        """Whether a resumed run skips it. The reason for leaving out a step may be gone by then."""
        return self.result.startswith(("ok", "failed"))


@dataclass
class Run:
    """Phases of steps: the steps of a phase run side by side, the phases one after the other."""

    phases: list[list[Step]]  # names of steps are unique
    folder: Path  # of logs, results, state and summary
    archive: Path  # the folder as a .tar.gz file, outside of the folder
    deadline: float  # seconds after which everything has ended, the archive included
    summarise: Callable[[dict[str, Outcome]], str]  # makes the summary's text
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    cwd: Path | None = None
    label: str = ""  # a run resumes one with the same label only
    resume: bool = False  # whether to skip what an earlier run in this folder has done
    grace: float = 5.0  # seconds between asking a step to stop and killing it

    def __post_init__(self) -> None:
        self.start = time.monotonic()
        self.grace = min(self.grace, self.deadline / 20)
        # Steps have to stop early: stopping them, summary and archive take some time.
        self.end = self.deadline - min(10.0, self.deadline / 10) - self.grace
        self.interrupted = False
        self.saved, self.written = 0.0, 0  # time of the last archive, and bytes that steps wrote
        before = self._earlier()
        names = (step.name for steps in self.phases for step in steps)
        self.outcomes = {name: before.get(name, Outcome("not reached")) for name in names}
        self.folder.mkdir(parents=True, exist_ok=True)

    def _earlier(self) -> dict[str, Outcome]:
        """Outcomes that a resumed run keeps; a new run removes the folder of an earlier one."""
        path = self.folder / "state.json"
        if not path.is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise SystemExit(f"{self.folder} is not empty and not of an earlier run")
            return {}
        if not self.resume:
            shutil.rmtree(self.folder)
            return {}
        state = json.loads(path.read_text(encoding="utf-8"))
        label = state["label"]
        if label != self.label:
            raise SystemExit(f"{self.folder} holds a run of {label!r}, not of {self.label!r}")
        found = {name: Outcome(**entry) for name, entry in state["outcomes"].items()}
        return {name: outcome for name, outcome in found.items() if outcome.done}

    def go(self) -> dict[str, Outcome]:
        """Run all steps that are not done; returns the outcome of each step."""

        def interrupt(number: int, frame: Any) -> None:
            self.interrupted = True

        handled = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
        before = [(number, signal.signal(number, interrupt)) for number in handled]
        self._save()
        for steps in self.phases:
            running = [self._run(step) for step in steps]
            while running := [step for step in running if next(step, True) is None]:
                if time.monotonic() - self.saved > RENEW:
                    self._save(if_new=True)
                time.sleep(0.05)
        self._save()
        for number, handler in before:
            signal.signal(number, handler)
        return self.outcomes

    def _clock(self) -> float:
        return time.monotonic() - self.start

    def _run(self, step: Step) -> Iterator[None]:
        """One step, as a generator that yields until the step has ended."""
        begun = self._clock()
        if self.interrupted or self.outcomes[step.name].done or begun > self.end:
            return
        if step.left_out:
            self._end(step, Outcome(f"left out: {step.left_out}"))
            return
        starts = 0
        while True:
            starts += 1
            try:
                process = self._start(step)
            except OSError as error:
                result = f"left out: cannot start {step.command[0]}: {error.strerror}"
                self._end(step, Outcome(result))
                return
            stopped = yield from self._wait(process, min(begun + step.seconds, self.end))
            code = process.returncode or 0
            crashed = code == POISONED or code < 0
            if stopped or not (step.goes_on and crashed and starts < STARTS):
                break
        last = _last_line(self.folder / f"{step.name}.log")
        result = {0: "ok", LEFT_OUT: f"left out: {last}"}.get(code, f"failed ({code})")
        result += f", {starts} starts" if starts > 1 else ""
        self._end(step, Outcome(stopped or result, self._clock() - begun, last))

    def _start(self, step: Step) -> subprocess.Popen[bytes]:
        with (self.folder / f"{step.name}.log").open("ab") as log:
            log.write(f"--- {self._clock():.0f} s: {' '.join(step.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self.cwd,
                env={**self.environment, **step.environment}, preexec_fn=_prepare_child,
                start_new_session=True,  # a group, to stop the step's own children with it
            )  # fmt: skip
        self.outcomes[step.name] = Outcome("running")
        return process

    def _wait(self, process: subprocess.Popen[bytes], limit: float) -> Iterator[None]:
        """Wait for a process, and stop it at its limit; returns why it was stopped, if so."""
        stopped = ""
        while process.poll() is None and not (self.interrupted or self._clock() > limit):
            yield
        if process.returncode is None:
            stopped = "interrupted" if self.interrupted else "stopped after its time"
            # SIGINT lets pytest print a summary. A process that the driver holds may not even die.
            for number, seconds in ((signal.SIGINT, self.grace), (signal.SIGKILL, self.grace / 2)):
                _signal_group(process, number)
                patience = self._clock() + seconds
                while process.poll() is None and self._clock() < patience:
                    yield
        _signal_group(process, signal.SIGKILL)  # its children
        return stopped

    def _end(self, step: Step, outcome: Outcome) -> None:
        self.outcomes[step.name] = outcome
        self._save()
        text = f"{outcome.result} ({outcome.seconds:.0f} s) {outcome.last[:110]}"
        print(f"[{self._clock():.0f} s] {step.name}: {text}", flush=True)

    def _save(self, if_new: bool = False) -> None:
        """Write state, summary and archive; with ``if_new`` only if steps have written."""
        self.saved, before = time.monotonic(), self.written
        files = (path for path in self.folder.rglob("*") if path.suffix in WRITTEN)
        self.written = sum(path.stat().st_size for path in files)
        if if_new and self.written == before:
            return
        try:
            text = self.summarise(self.outcomes)
        except Exception as error:  # a failing table must not cost the results
            text = f"no summary: {type(error).__name__}: {error}\n"
        outcomes = {name: outcome._asdict() for name, outcome in self.outcomes.items()}
        state = json.dumps({"label": self.label, "outcomes": outcomes}, indent=1)
        try:
            for name, content in (("state.json", state), ("summary.md", text)):
                with replacing(self.folder / name) as temporary:
                    temporary.write_text(content, encoding="utf-8")
            pack(self.folder, self.archive)
        except OSError as error:
            print(f"could not save: {error}", flush=True)


def _prepare_child() -> None:
    """In a new process: let it die with the run, and let it handle SIGINT."""
    if hasattr(_process, "prctl"):
        _process.prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, whose file replaces the one at ``path`` in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    yield temporary
    temporary.replace(path)


def pack(folder: Path, archive: Path) -> None:
    """Replace the archive of a folder, whose files may grow meanwhile."""
    with replacing(archive) as temporary, tarfile.open(temporary, "w:gz", compresslevel=3) as tar:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.suffix == ".new":
                continue
            content = path.read_bytes()
            if len(content) > LARGEST:
                note = f"\n... {len(content) - LARGEST} bytes are left out ...\n".encode()
                content = content[: LARGEST // 2] + note + content[-LARGEST // 2 :]
            entry = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder)}")
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
