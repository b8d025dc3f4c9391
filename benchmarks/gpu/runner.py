# SPDX-License-Identifier: Apache-2.0
"""Runs steps within a deadline, so that whatever happens, the results so far are in one archive.

Each step is a process of its own with a limit and a log. After each change the state and the
summary are written anew, and the archive after them; a step counts as done only when the archive
has it. Everything is written under a temporary name and renamed, so that a kill at any moment
leaves whole files.
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
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .record import LEFT_OUT, POISONED

#: Bytes of a file that the archive takes, its beginning and its end: a log may grow without end.
LARGEST = 1 << 20
#: How often a step is started at most, where it goes on after a CUDA error.
STARTS = 32


@dataclass(frozen=True)
class Step:
    """A command with what it needs.

    Attributes:
        name: Names its log.
        command: Program and arguments.
        seconds: Time after which it is stopped.
        environment: Variables on top of those of all steps.
        left_out: Why it does not run; empty if it does.
        goes_on: Whether a second start goes on after the case that ended the first one.
    """

    name: str
    command: list[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    left_out: str = ""
    goes_on: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

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
        """Whether a resumed run has no need to do it again."""
        return self.result.startswith(("ok", "failed", "left out"))


NOT_REACHED = Outcome("not reached")


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    started: float
    limit: float  # on the clock of the run
    starts: int = 1
    why: str = ""  # it was stopped
    kill_at: float = float("inf")
    given_up: bool = False  # it does not even die


class Run:
    """Phases of steps: the steps of a phase run side by side, the phases one after the other.

    Args:
        phases: What to run. Names of steps are unique.
        folder: Where logs, results, state and summary are.
        archive: The folder as a ``.tar.gz`` file, outside of it.
        deadline: Seconds after which everything has ended, the archive included.
        environment: Variables of all steps.
        cwd: Where all steps run.
        summarise: Makes the summary's text from the outcomes.
        label: What this is a run of, for example the device: a resumed run must have the same.
        resume: Whether to leave out what an earlier run in this folder has done.
        renew: Seconds after which the archive is made anew while steps run.
        grace: Seconds that a step has between being asked to stop and being killed.
    """

    def __init__(
        self,
        phases: list[list[Step]],
        folder: Path,
        archive: Path,
        *,
        deadline: float,
        summarise: Callable[[dict[str, Outcome]], str],
        environment: Mapping[str, str] = os.environ,
        cwd: Path | None = None,
        label: str = "",
        resume: bool = False,
        renew: float = 0.5,
        grace: float = 5.0,
    ) -> None:
        self.start = time.monotonic()
        self.phases, self.folder, self.archive = phases, folder, archive
        self.deadline, self.summarise, self.environment = deadline, summarise, environment
        self.cwd, self.label, self.renew = cwd, label, renew
        self.grace = min(grace, deadline / 20)
        # Stopping the last steps, the summary and the archive take some time.
        self.reserve = min(10.0, deadline / 10) + self.grace
        self.interrupted = False
        self.packed, self.content = 0.0, ""  # when the archive was made, and of what
        names = [step.name for steps in phases for step in steps]
        if len(set(names)) < len(names):
            raise ValueError(f"names of steps must differ, got {names}")
        before = self._earlier() if resume else {}
        self.outcomes = {name: before.get(name, NOT_REACHED) for name in names}
        if not resume:
            self._clear()
        folder.mkdir(parents=True, exist_ok=True)

    # ---- what was there before ----

    def _state(self) -> Path:
        return self.folder / "state.json"

    def _earlier(self) -> dict[str, Outcome]:
        """What an earlier run has done; what it left out may be possible by now."""
        if not self._state().is_file():
            return {}
        state = json.loads(self._state().read_text(encoding="utf-8"))
        if state["label"] != self.label:
            raise SystemExit(
                f"{self.folder} holds a run of {state['label']!r}, which one of {self.label!r} "
                "can't resume"
            )
        found = {name: Outcome(**entry) for name, entry in state["outcomes"].items()}
        return {n: o for n, o in found.items() if o.done and not o.result.startswith("left out")}

    def _clear(self) -> None:
        if not self.folder.exists():
            return
        if any(self.folder.iterdir()) and not self._state().is_file():
            raise SystemExit(f"{self.folder} is not empty, and no run of this program has made it")
        shutil.rmtree(self.folder)

    # ---- the run ----

    def go(self) -> dict[str, Outcome]:
        """Run everything that is not done yet, and return what became of each step."""
        handled = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
        before = {number: signal.signal(number, self._interrupt) for number in handled}
        try:
            self._save()
            for steps in self.phases:
                self._phase(steps)
        finally:
            self._save()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.outcomes

    def _interrupt(self, number: int, frame: Any) -> None:
        self.interrupted = True

    def _clock(self) -> float:
        return time.monotonic() - self.start

    def _phase(self, steps: list[Step]) -> None:
        running: list[_Running] = []
        for step in steps:
            if self.outcomes[step.name].done or self.interrupted:
                continue
            program = step.command[0]
            path = self.environment.get("PATH", os.defpath)
            if step.left_out:
                self._end(step.name, Outcome(f"left out: {step.left_out}"))
            elif shutil.which(program, path=path) is None:
                self._end(step.name, Outcome(f"left out: no {program} here"))
            elif self._clock() < self.deadline - self.reserve:
                running.append(self._start(step))
        if running:
            self._save()
        while running:
            time.sleep(0.05)
            for job in list(running):
                if job.process.poll() is None and not job.given_up:
                    self._limit(job)
                    continue
                running.remove(job)
                again = self._ended(job)
                if again is not None:
                    running.append(again)
            if running and time.monotonic() - self.packed > self.renew:
                self._save(if_new=True)

    def _start(self, step: Step, earlier: _Running | None = None) -> _Running:
        now = self._clock()
        with self._log(step).open("ab") as log:
            log.write(f"--- {now:.0f} s: {' '.join(step.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env={**self.environment, **step.environment},
                start_new_session=True,  # so that all that it starts can be stopped with it
                preexec_fn=_prepare_child,
            )
        self.outcomes[step.name] = Outcome("running")
        if earlier is not None:
            limit, starts = earlier.limit, earlier.starts + 1
            return _Running(step, process, earlier.started, limit, starts)
        return _Running(step, process, now, min(now + step.seconds, self.deadline - self.reserve))

    def _limit(self, job: _Running) -> None:
        """Ask a step to stop whose time is up, and kill it if it does not."""
        now = self._clock()
        if not job.why and (self.interrupted or now > job.limit):
            job.why = "interrupted" if self.interrupted else "stopped after its time"
            job.kill_at = now + self.grace
            _signal_all(job.process, signal.SIGINT)  # pytest then tells what it has
        elif now > job.kill_at:
            _signal_all(job.process, signal.SIGKILL)
            job.given_up = now > job.kill_at + self.grace / 2  # the driver holds it, say

    def _ended(self, job: _Running) -> _Running | None:
        """Note the result of a step, or start it once more after a CUDA error."""
        code = job.process.returncode or 0
        crashed = code == POISONED or code < 0
        if job.step.goes_on and crashed and not job.why and job.starts < STARTS:
            return self._start(job.step, job)
        _signal_all(job.process, signal.SIGKILL)  # what it has started and left behind
        last = _last_line(self._log(job.step))
        result = "ok" if code == 0 else f"failed ({code})"
        if code == LEFT_OUT:
            result = f"left out: {last}"
        if job.starts > 1:
            result += f", {job.starts} starts"
        self._end(job.step.name, Outcome(job.why or result, self._clock() - job.started, last))
        return None

    def _log(self, step: Step) -> Path:
        return self.folder / f"{step.name}.log"

    def _end(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self._save()
        text = f"{outcome.seconds:.0f} s) {outcome.last[:110]}"
        print(f"[{self._clock():.0f} s] {name}: {outcome.result} ({text}", flush=True)

    # ---- what stays ----

    def _save(self, if_new: bool = False) -> None:
        """Write state and summary, and the archive with everything in it."""
        self.packed = time.monotonic()
        content = _content(self.folder)
        if if_new and content == self.content:
            return
        self.content = content
        outcomes = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        state = {"label": self.label, "outcomes": outcomes}
        try:
            write(self._state(), json.dumps(state, indent=1))
            try:
                text = self.summarise(self.outcomes)
            except Exception as error:  # a table that fails must not take the results with it
                text = f"no summary: {type(error).__name__}: {error}\n"
            write(self.folder / "summary.md", text)
            pack(self.folder, self.archive)
        except OSError as error:
            print(f"could not save: {error}", flush=True)


def _content(folder: Path) -> str:
    """Changes with what steps write."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in (".log", ".csv"))
    return " ".join(f"{path.name} {path.stat().st_size}" for path in files)


def _prepare_child() -> None:
    """In a new process: no orphan goes on when the run is killed, and SIGINT can be caught."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal_all(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def new_archive(path: Path, mode: Any, **options: Any) -> Iterator[tarfile.TarFile]:
    """An archive to be filled, which replaces the file when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with tarfile.open(temporary, mode, **options) as tar:
        yield tar
    temporary.replace(path)


def pack(folder: Path, archive: Path) -> None:
    """Replace the archive of a folder; files are still being written meanwhile."""
    with new_archive(archive, "w:gz", compresslevel=3) as tar:
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
