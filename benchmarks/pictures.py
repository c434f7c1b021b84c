"""Pictures from end to end, Fourstroke against every peer: live processes that take turns in one run.

For each case: the median seconds of text encoder, UNet step, VAE and the whole, how they compare with the first peer's,
peak memory, and how near the picture is to that of Fourstroke's float32 eager mode from the same noise. Where memory
does not hold all peers at once (--live), they run in groups, and the first peer is in every group: a ratio is always
one of processes that took turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cases import CASES, ON_CPU, ON_GPU, PEERS, REFERENCE, Case
from timing import Row, arguments, summary, write
from weights import CACHE

HERE = Path(__file__).parent
PARTS = ("text", "unet", "control", "vae")
SEED = 1
Answer = dict[str, Any]


class PeerError(RuntimeError):
    """A peer's process ended; the message is the last line of its errors."""


class Process:
    """A live peer: it loads at once and paints when asked."""

    def __init__(self, module: str, job: dict[str, Any], threads: int):
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", f"peers.{module}", json.dumps({**job, "threads": threads})]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            command, cwd=HERE, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )

    def answer(self) -> Answer:
        """The next line that it says.

        Raises:
            PeerError: it has ended instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        if code < 0:
            raise PeerError(f"killed by signal {-code}; for want of memory, if that is 9: try a smaller --live")
        raise PeerError(lines[-1] if lines else f"ended with code {code}")

    def ask(self, **change: Any) -> Answer:
        """Let it do its job once, with this ``change``.

        Raises:
            PeerError: it ended.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(change) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Let it go."""
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()
        self.errors.close()


Jobs = dict[str, tuple[str, dict[str, Any]]]


def groups(names: Sequence[str], live: int) -> Iterator[list[str]]:
    """The peers in groups of at most ``live``; the first peer is in every group, unless they run one by one."""
    first, others = names[0], names[1:]
    if live < 2 or not others:
        yield from ([name] for name in names)
        return
    for i in range(0, len(others), live - 1):
        yield [first, *others[i : i + live - 1]]


def take_turns(jobs: Jobs, changes: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Start a process a job, and let each answer each of ``changes``, in turn.

    Returns:
        name -> its answers, the one when it was ready first; or the `PeerError` that ended it.
    """
    processes: dict[str, Process] = {}
    found: dict[str, Any] = {}
    try:
        for name, (module, job) in jobs.items():
            processes[name] = Process(module, job, options.threads)
            try:  # one after the other, so that a first compilation has the machine to itself
                found[name] = [processes[name].answer()]
            except PeerError as error:
                found[name] = error
        for change in changes:
            for name, answers in found.items():
                if isinstance(answers, PeerError):
                    continue
                mine = {**change, "save": f"{change['save']}{name}.npy"} if "save" in change else change
                try:
                    answers.append(processes[name].ask(**mine))
                except PeerError as error:
                    found[name] = error
    finally:
        for process in processes.values():
            process.end()
    return found


def run_case(case: Case, names: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """The rows of a case: one a peer, and a note for each that cannot take part."""
    able = [name for name in names if PEERS[name].can(case)]
    rows: dict[str, Row] = {}
    repeats = 1 if options.tiny else options.repeats
    with tempfile.TemporaryDirectory() as folder:
        changes: list[dict[str, Any]] = [{"seed": SEED + i} for i in range(repeats)]
        changes[0]["save"] = f"{folder}/"
        jobs = {
            name: (PEERS[name].module, case.job(PEERS[name].options, options.cache, options.device)) for name in able
        }
        base: float | None = None
        for group in groups(able, options.live):
            found = take_turns({name: jobs[name] for name in group}, changes, options)
            if options.live > 1 or base is None:
                base = None if isinstance(found[group[0]], PeerError) else median_of(found[group[0]][1:])
            for name in group:
                if name not in rows:
                    rows[name] = row_of(case, name, found[name], base)
        if REFERENCE not in able:
            alone = {REFERENCE: (PEERS[REFERENCE].module, case.job(PEERS[REFERENCE].options, options.cache, "cpu"))}
            take_turns(alone, changes[:1], options)
        for name, row in rows.items():
            row |= closeness(Path(folder), case, name)
            row["note"] = row.pop("note", None)  # the last column
    return list(rows.values())


def median_of(answers: Sequence[Answer]) -> float:
    """The median seconds from end to end."""
    return median(answer["total"] for answer in answers)


def row_of(case: Case, name: str, answers: Any, base: float | None) -> Row:
    """A peer's row: times from end to end and by part, starting, and memory."""
    row: Row = {"case": case.name, "peer": name}
    if isinstance(answers, PeerError):
        return row | {"note": str(answers)[:200]}
    ready, *runs = answers
    row |= summary([run["total"] for run in runs], base)
    row["speedup"] = round(1 / row["ratio"], 3)
    for part in PARTS:
        seconds = [value for run in runs for value in run["parts"].get(part, [])]
        row[f"{part}_s"] = round(median(seconds), 5) if seconds else None
    row |= {"load_s": round(ready["load_s"], 3), "warm_up_s": round(ready["warm_up_s"], 3)}
    return row | {"peak_mb": round(max(answer["memory"] for answer in answers) / 2**20)}


def closeness(folder: Path, case: Case, name: str) -> Row:
    """PSNR and SSIM of a peer's first pictures to the reference's, where they began with the same noise."""
    files = folder / f"{name}.npy", folder / f"{REFERENCE}.npy"
    other_noise = PEERS[name].own_noise or name == "openvino-genai" and case.batch > 1
    if other_noise or not all(file.exists() for file in files):
        return {"psnr_db": None, "ssim": None}
    first, second = (np.load(file).astype(np.float64) for file in files)
    return {"psnr_db": round(psnr(first, second), 2), "ssim": round(ssim(first, second), 4)}


def psnr(first: np.ndarray, second: np.ndarray, peak: float = 255) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of one shape, pictures from 0 to 255; 99 for equal ones."""
    error = float(((first - second) ** 2).mean())
    return 10 * float(np.log10(peak**2 / error)) if error else 99.0


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004) of the luma, in windows of 8 x 8 pixels."""
    x, y = (np.lib.stride_tricks.sliding_window_view(a.mean(-1), (8, 8), (1, 2))[:, ::4, ::4] for a in (first, second))
    axes = (-2, -1)
    mean_x, mean_y = x.mean(axes), y.mean(axes)
    covariance = (x * y).mean(axes) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * (2 * covariance + c2) / (x.var(axes) + y.var(axes) + c2)).mean())


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options of every benchmark that runs peers."""
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="the first is what the others are held against")
    parser.add_argument("--live", type=int, default=2, help="processes alive at a time, as memory allows; default 2")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where models are written; default {CACHE}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def peers_of(options: argparse.Namespace) -> list[str]:
    """The peers that were asked for, or all of the device's."""
    return list(options.peers or (ON_CPU if options.device == "cpu" else ON_GPU))


def main() -> None:
    parser = add_options(arguments(__doc__, repeats=5))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default all")
    options = parser.parse_args()
    for name in options.cases:
        cases = [case.shrunk() if options.tiny else case for case in CASES[name]]
        write(name, [row for case in cases for row in run_case(case, peers_of(options), options)], options)


if __name__ == "__main__":
    main()
