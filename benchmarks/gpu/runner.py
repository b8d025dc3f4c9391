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

#: Largest part of a file, in bytes, that the archive takes: half of it from each end.
LARGEST = 1 << 20
#: Largest number of starts of a step that goes on after CUDA errors.
STARTS = 32
#: Seconds after which the archive is written again while steps write results.
RENEW = 0.5

#: Suffixes of files that steps write.
WRITTEN = (".log", ".csv", ".jsonl")

_process = ctypes.CDLL(None)


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: Names its log.
        command: Program and arguments.
        seconds: Time limit.
        environment: Variables besides those of all steps.
        left_out: Why it does not run; empty if it does.
        goes_on: Whether another start continues after the case that ended the process.
    """

    name: str
    command: list[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    left_out: str = ""
    goes_on: bool = False


class Outcome(NamedTuple):
    """How a step ended.

    Attributes:
        result: ``"ok"``, ``"failed (status)"``, ``"left out: reason"``, ``"interrupted"``,
            ``"stopped after its time"``, ``"running"`` or ``"not reached"``.
        seconds: Time that it took.
        last: The last line of its log.
    """

    result: str
    seconds: float = 0.0
    last: str = ""

    @property
    def done(self) -> bool:
        """Whether a resumed run skips it."""
        return self.result.startswith(("ok", "failed", "left out"))


@dataclass
class Run:
    """Phases of steps: the steps of a phase run side by side, the phases one after the other.

    Attributes:
        phases: Steps with unique names.
        folder: Folder of logs, results, state and summary.
        archive: The folder as a ``.tar.gz`` file, outside of the folder.
        deadline: Seconds after which everything has ended, the archive included.
        summarise: Makes the summary's text from the outcomes.
        environment: Variables of all steps.
        cwd: Working directory of all steps.
        label: For example the device; a run resumes one with the same label only.
        resume: Whether to skip what an earlier run in this folder has done.
        grace: Seconds between asking a step to stop and killing it.
    """

    phases: list[list[Step]]
    folder: Path
    archive: Path
    deadline: float
    summarise: Callable[[dict[str, Outcome]], str]
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    cwd: Path | None = None
    label: str = ""
    resume: bool = False
    grace: float = 5.0

    def __post_init__(self) -> None:
        self.start = time.monotonic()
        self.grace = min(self.grace, self.deadline / 20)
        #: Time at which steps have to stop: ending them, summary and archive take a while.
        self.end = self.deadline - min(10.0, self.deadline / 10) - self.grace
        self.interrupted = False
        self.saved, self.written = 0.0, 0
        names = [step.name for steps in self.phases for step in steps]
        if len(set(names)) < len(names):
            raise ValueError(f"names of steps must differ, got {names}")
        before = self._earlier()
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
        if state["label"] != self.label:
            raise SystemExit(
                f"{self.folder} holds a run of {state['label']!r}; {self.label!r} cannot resume it"
            )
        found = {name: Outcome(**entry) for name, entry in state["outcomes"].items()}
        # The reason for leaving out a step may be gone.
        return {n: o for n, o in found.items() if o.done and not o.result.startswith("left out")}

    def go(self) -> dict[str, Outcome]:
        """Run all steps that are not done; returns the outcome of each step."""

        def interrupt(number: int, frame: Any) -> None:
            self.interrupted = True

        handled = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
        before = {number: signal.signal(number, interrupt) for number in handled}
        try:
            self._save()
            for steps in self.phases:
                running = [self._run(s) for s in steps if not self.outcomes[s.name].done]
                while running:
                    running = [step for step in running if next(step, True) is None]
                    if running and time.monotonic() - self.saved > RENEW:
                        self._save(if_new=True)
                    time.sleep(0.05 if running else 0)
        finally:
            self._save()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.outcomes

    def _clock(self) -> float:
        return time.monotonic() - self.start

    # ---- one step: yields None until it has ended ----

    def _run(self, step: Step) -> Iterator[None]:
        begun, starts, why = self._clock(), 0, ""
        if self.interrupted:
            return
        if step.left_out:
            self._ended(step, Outcome(f"left out: {step.left_out}"))
            return
        if begun > self.end:
            return
        limit = min(begun + step.seconds, self.end)
        again = True
        while again:
            starts += 1
            try:
                process = self._start(step)
            except OSError as error:
                why = f"left out: cannot start {step.command[0]}: {error.strerror}"
                self._ended(step, Outcome(why))
                return
            yield
            why = yield from self._wait(process, limit)
            code = process.returncode or 0
            crashed = code == POISONED or code < 0
            again = step.goes_on and crashed and not why and starts < STARTS
        last = _last_line(self.folder / f"{step.name}.log")
        result = "ok" if code == 0 else f"failed ({code})"
        if code == LEFT_OUT:
            result = f"left out: {last}"
        if starts > 1:
            result += f", {starts} starts"
        self._ended(step, Outcome(why or result, self._clock() - begun, last))

    def _start(self, step: Step) -> subprocess.Popen[bytes]:
        with (self.folder / f"{step.name}.log").open("ab") as log:
            log.write(f"--- {self._clock():.0f} s: {' '.join(step.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env={**self.environment, **step.environment},
                start_new_session=True,  # a group, to stop the step's own children with it
                preexec_fn=_prepare_child,
            )
        self.outcomes[step.name] = Outcome("running")
        return process

    def _wait(self, process: subprocess.Popen[bytes], limit: float) -> Iterator[None]:
        """Wait for a process, and stop it at its limit; returns why it was stopped."""
        why = ""
        while process.poll() is None and not (self.interrupted or self._clock() > limit):
            yield
        if process.returncode is None:
            why = "interrupted" if self.interrupted else "stopped after its time"
            # SIGINT lets pytest print a summary. A process that the driver holds may not even die.
            for number, seconds in ((signal.SIGINT, self.grace), (signal.SIGKILL, self.grace / 2)):
                _signal_group(process, number)
                patience = self._clock() + seconds
                while process.poll() is None and self._clock() < patience:
                    yield
        _signal_group(process, signal.SIGKILL)  # its children
        return why

    def _ended(self, step: Step, outcome: Outcome) -> None:
        self.outcomes[step.name] = outcome
        self._save()
        text = f"{outcome.result} ({outcome.seconds:.0f} s) {outcome.last[:110]}"
        print(f"[{self._clock():.0f} s] {step.name}: {text}", flush=True)

    # ---- files ----

    def _save(self, if_new: bool = False) -> None:
        """Write state, summary and archive; with ``if_new`` only after steps have written."""
        self.saved = time.monotonic()
        files = (path for path in self.folder.rglob("*") if path.suffix in WRITTEN)
        written = sum(path.stat().st_size for path in files)
        if if_new and written == self.written:
            return
        self.written = written
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
