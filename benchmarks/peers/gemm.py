"""What the machine can do: the rate of a large matrix product, float32 and bfloat16 (float16 on a GPU)."""

from __future__ import annotations

import time
from typing import Any

import torch

from .protocol import Clock, Job, Paint, serve


def load(job: Job, clock: Clock) -> Paint:
    size, half = job["gemm"], torch.bfloat16 if job["device"] == "cpu" else torch.float16
    pairs = {
        name: [torch.randn(size, size, device=job["device"], dtype=dtype) for _ in range(2)]
        for name, dtype in (("fp32", torch.float32), ("half", half))
    }

    def measure(job: Job) -> Any:
        rates = {}
        for name, (first, second) in pairs.items():
            clock.sync()
            start = time.perf_counter()
            torch.matmul(first, second)
            clock.sync()
            rates[f"{name}_flops"] = 2 * size**3 / (time.perf_counter() - start)
        return rates

    return measure


if __name__ == "__main__":
    serve(load)
