"""What driver and peers say to each other, so that several live processes can take turns in one run.

A process gets its job as a JSON object on the command line, loads, and writes a line when it is ready. From then on it
paints once for each line that it reads (a JSON object: what differs from the job, and where to save the pictures) and
answers with a line: the seconds of each part, of the whole, and the peak memory. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Paint = Callable[[Job], Any]


class Clock:
    """Seconds spent in the parts of a picture; ``sync`` waits for a device that works by itself."""

    def __init__(self, sync: Callable[[], None] = lambda: None):
        self.parts: dict[str, list[float]] = {}
        self.sync = sync

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """``function``, its calls timed as ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.sync()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.sync()
            self.parts.setdefault(part, []).append(time.perf_counter() - start)
            return result

        return call

    def watch(self, network: Any, part: str) -> None:
        """Time the calls of a module, whatever its forward is or becomes; None is none."""
        if network is None:
            return

        def before(*unused: Any) -> None:
            self.sync()
            self.parts.setdefault(part, []).append(-time.perf_counter())

        def after(*unused: Any) -> None:
            self.sync()
            self.parts[part][-1] += time.perf_counter()

        network.register_forward_pre_hook(before)
        network.register_forward_hook(after)


class Private:
    """The most private memory, in bytes, since `reset`: what the system cannot take back as it can mapped files.

    The system keeps no peak of it, so a thread looks fifty times a second; it runs only where a job asks for it.
    """

    def __init__(self) -> None:
        self.reset()
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        """Count anew from here on."""
        self.peak = status("RssAnon")

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(0.02)


class Timed:
    """A stand-in for a network that times its calls: for those that are compiled, and so cannot be changed inside."""

    def __init__(self, network: Any, clock: Clock, part: str):
        self._network, self._call = network, clock.timed(network, part)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def serve(load: Callable[[Job, Clock], Paint]) -> None:
    """Load, warm up, and answer until the input ends.

    Args:
        load: makes, of the job, the function that paints once and returns pictures, (N, H, W, 3) or a list of PIL's.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the errors

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    job = json.loads(sys.argv[1])
    clock, private = Clock(device_sync(job["device"])), Private() if job.get("private") else None
    start = time.perf_counter()
    paint = load(job, clock)
    loaded = time.perf_counter()
    if job["warm_up"]:
        paint({**job, "seed": 12345})
    answer(load_s=loaded - start, warm_up_s=time.perf_counter() - loaded, **memory(job["device"], private))
    for line in sys.stdin:
        change = json.loads(line)
        clock.parts.clear()
        reset_peak_memory(job["device"])
        if private is not None:
            private.reset()
        clock.sync()
        start = time.perf_counter()
        result = paint({**job, **change})
        clock.sync()
        seconds = time.perf_counter() - start
        if change.get("save"):
            np.save(Path(change["save"]), as_array(result))
        more = result if isinstance(result, dict) else {}
        answer(total=seconds, parts=clock.parts, **memory(job["device"], private), **more)


def memory(device: str, private: Private | None) -> dict[str, int]:
    """What an answer tells of memory."""
    return {"memory": peak_memory(device)} | ({} if private is None else {"private": private.peak})


def as_array(pictures: Any) -> np.ndarray:
    """Pictures as (N, H, W, 3) bytes; floats are from 0 to 1."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return array if array.dtype == np.uint8 else (array * 255).round().clip(0, 255).astype(np.uint8)


def prompts(job: Job) -> list[str]:
    """The prompts of a batch; every seed has its own, so that nothing can be kept from the run before."""
    return [f"a red fox in the snow, number {job['seed'] + i}" for i in range(job["batch"])]


def picture(job: Job) -> Any:
    """A start or control picture: soft blobs of colour."""
    import PIL.Image

    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((job["size"], job["size"]))


def device_sync(device: str) -> Callable[[], None]:
    """What waits until the device is done."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def reset_peak_memory(device: str) -> None:
    """Count the peak anew from here on, where the system can."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str = "cpu") -> int:
    """Bytes: the largest resident set, or what was allocated on the GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    return status("VmHWM")


def status(field: str) -> int:
    """Bytes that ``/proc/self/status`` tells of this process: ``VmHWM`` is the peak, ``VmRSS`` what it is now,
    ``RssAnon`` what of it is no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
