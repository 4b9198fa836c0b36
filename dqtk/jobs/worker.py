"""Scores that a program of the user's computes, in an environment of its own: ImageReward, HPSv3, DOVER, Q-Align and the like.

Their packages pin versions of transformers, numpy and torch that exclude each other and this one, so none is imported here: the
user names a command, and it is spoken to in JSON, a line each way (docs/preference.md; ``metrics/jobs/worker.py``: an example)::

    worker -> {"protocol": 1, "name": "ImageReward-v1.0", "version": "1.5", "label": "ImageReward",
               "higher_is_better": true, "of": "pictures"}
    dqtk   -> {"id": 0, "samples": [{"files": ["/out/0000-0.png"], "prompt": "a red circle"}]}
    worker -> {"id": 0, "values": [0.73]}        or  {"id": 0, "error": "what went wrong"}

``of`` is "pictures" or "clips"; the files of a clip are its frames in order. The end of its input is the end of the worker. What it
writes to its standard error is shown only where something goes wrong. A worker that is not there, dies, hangs, or answers anything
else is a ``WorkerError`` that says which; a job turns it into "not measured", never into a number.
"""

import json
import math
import os
import queue
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .files import key_of, sha256

PROTOCOL = 1
KINDS = ("pictures", "clips")
_GREETING = {"name": str, "version": str, "higher_is_better": bool}
_DIGITS = range(16)  # that may be shown after the point; a float has no more
_GRACE = 10.0  # seconds between the end of a worker's input and its own
_TAIL = 12  # lines of its standard error that are shown


class WorkerError(RuntimeError):
    """A worker could not be asked, or did not answer as it must."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Greeting:
    """What a worker says of itself: model and version, direction, unit, digits to show, and what it looks at."""

    name: str
    version: str
    label: str
    higher_is_better: bool
    of: str
    unit: str
    digits: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A picture, or the frames of a clip in order, and its prompt (None where nobody knows)."""

    files: tuple[Path, ...]
    prompt: str | None


def words_of(command: str, where: str) -> list[str]:
    """A command's words, as a shell splits them. Raises ``ValueError`` for quotes that do not close."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(f"{where} must be words as in a shell, got {command!r}: {error}. Close the quotes.") from None


class Worker:
    """A running command; started by ``greeting`` or ``values``, ended by the ``with`` block.

    command: as in a shell, without its operators. timeout: seconds that a greeting or an answer may take; models are large.
    """

    def __init__(self, name: str, command: str, *, timeout: float = 1800.0) -> None:
        self.name, self.timeout = name, timeout
        self.words = words_of(command, f"worker {name}: command")
        if not self.words:
            raise ValueError(f"worker {name}: command must name a program, got {command!r}. For example: python worker.py.")
        if not timeout > 0:
            raise ValueError(f"worker {name}: timeout must be above 0 seconds, got {timeout}. The default is 1800.")
        self._process: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._ears: list[threading.Thread] = []
        self._greeting: Greeting | None = None
        self._asked = 0

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    @property
    def identity(self) -> str:
        """What its values are filed under, without starting it: the command, and the contents of the files that it names."""
        return key_of(*(f"{word} {sha256(Path(word))}" if _is_file(word) else word for word in self.words))

    @property
    def greeting(self) -> Greeting:
        """What it says of itself. Raises ``WorkerError``."""
        if self._greeting is None:
            self._start()
            self._greeting = self._read_greeting()
        return self._greeting

    def values(self, samples: Sequence[Sample]) -> list[float]:
        """A finite number per sample. Raises ``WorkerError``; the worker is then ended, and starts afresh if asked again."""
        kind = self.greeting.of
        for sample in samples:
            if (len(sample.files) > 1) != (kind == "clips"):
                raise self._failed(f"samples must be {kind}", f"one of {len(sample.files)} files")
        number, self._asked = self._asked, self._asked + 1
        asked = [{"files": [str(file.resolve()) for file in sample.files], "prompt": sample.prompt} for sample in samples]
        self._write({"id": number, "samples": asked})
        answer = self._read("an answer")
        if answer.get("id") != number:
            raise self._failed(f"answer must have the id {number}", repr(answer.get("id")))
        if "error" in answer:
            raise self._failed("scores must be computed", f"the error: {answer['error']}")
        values = answer.get("values")
        if not isinstance(values, list) or len(values) != len(samples):
            got = f"{len(values)}" if isinstance(values, list) else repr(values)[:60]
            raise self._failed(f"answer must hold {len(samples)} values, one per sample", got)
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values):
            raise self._failed("values must be finite numbers", repr(values)[:60])
        return [float(value) for value in values]

    def close(self) -> None:
        """End the worker: its input ends, and after some seconds the process with all that it started."""
        process, self._process = self._process, None
        self._greeting = None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):  # it is gone already
            process.stdin.close()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            _kill(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        try:
            # A session of its own, so that what it started can be ended with it.
            process = subprocess.Popen(self.words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        except OSError as error:
            said = f"{error.strerror}: {self.words[0]}"
            raise WorkerError(f"worker {self.name}: command must be a program, got: {said}. Check its path.") from error
        self._process, self._lines, self._said = process, queue.Queue(), []
        pairs = ((_listen, process.stdout, self._lines.put), (_listen, process.stderr, self._overhear))
        self._ears = [threading.Thread(target=target, args=(stream, heard), daemon=True) for target, stream, heard in pairs]
        for ear in self._ears:
            ear.start()

    def _overhear(self, line: str | None) -> None:
        if line is not None:
            self._said.append(line.rstrip())
            del self._said[:-_TAIL]

    def _write(self, data: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(data) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died("a question") from None

    def _read(self, what: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self.timeout)
        except queue.Empty:
            raise self._failed(f"{what} must come within {self.timeout:g} s", "none") from None
        if line is None:
            raise self._died(what)
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            data = None
        if not isinstance(data, dict):
            remedy = "Only the protocol may go to standard output; send what libraries print to standard error"
            raise self._failed(f"{what} must be a JSON object on one line", f"{line.strip()!r:.80}", remedy)
        return data

    def _read_greeting(self) -> Greeting:
        data = self._read("a greeting")
        if data.get("protocol") != PROTOCOL:
            raise self._failed(f"greeting must speak protocol {PROTOCOL}", repr(data.get("protocol")))
        for key, kind in _GREETING.items():
            if not isinstance(data.get(key), kind):
                raise self._failed(f"greeting must have {key} ({kind.__name__})", repr(data.get(key)))
        if data.get("of") not in KINDS:
            raise self._failed(f"greeting must be of {' or '.join(KINDS)}", repr(data.get("of")))
        digits = data.get("digits", 4)
        if not isinstance(digits, int) or isinstance(digits, bool) or digits not in _DIGITS:
            raise self._failed(f"greeting must have digits from {_DIGITS[0]} to {_DIGITS[-1]}, or none", repr(digits))
        return Greeting(
            name=data["name"],
            version=data["version"],
            label=str(data.get("label") or data["name"]),
            higher_is_better=data["higher_is_better"],
            of=data["of"],
            unit=str(data.get("unit") or ""),
            digits=digits,
        )

    def _died(self, what: str) -> WorkerError:
        process = self._process
        assert process is not None
        try:
            status: Any = process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            status = "none yet"
        return self._failed(f"{what} must be answered", f"the end of the program (status {status})")

    def _failed(self, must: str, got: str, remedy: str = "Try the command by hand") -> WorkerError:
        """The error of a worker, which is ended: what it says next would be taken for another answer."""
        if self._process is not None:
            _kill(self._process)
            for ear in self._ears:
                ear.join(1.0)
        self.close()
        said = " | ".join(line for line in self._said if line.strip())
        return WorkerError(f"worker {self.name}: {must}, got {got}. {remedy}{f'; it said: {said[-600:]}' if said else '.'}")


def _is_file(word: str) -> bool:
    """Whether a word of a command names a file; one that is too long for a name, or holds a zero byte, names none."""
    try:
        return Path(word).is_file()
    except (OSError, ValueError):
        return False


def _listen(stream: IO[str], heard: Callable[[str | None], None]) -> None:
    """Every line of a stream, and None at its end."""
    with suppress(ValueError):  # closed while it was read
        for line in stream:
            heard(line)
    heard(None)


def _kill(process: subprocess.Popen) -> None:
    """End a process that was started here, and what it started."""
    with suppress(ProcessLookupError, PermissionError):  # gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
