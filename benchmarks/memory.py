"""Peak memory of loading a repository, and of two pictures in every mode, each in a process of its own.

Loading is counted from after the imports on: what the process grows by at most, over the size of the weight files. Of
a picture's peak the private part is what cannot be taken back as pages of files can. With --limit pictures are painted
where there is no more memory than that, files in the system's cache included (Linux; it needs root).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import weights
from cases import PEERS, Case
from pictures import HERE, PeerError, add_options, peers_of, take_turns
from timing import Row, arguments, python, write

LOAD = """
import importlib, json, sys
import safetensors.torch, tokenizers, torch
from peers.protocol import peak_memory, reset_peak_memory, status
name, dtype, warm, folder = sys.argv[1:]
library = importlib.import_module(name)
load = lambda place: library.DiffusionPipeline.from_pretrained(place, torch_dtype=getattr(torch, dtype))
load(warm)
reset_peak_memory("cpu")
before = status("VmRSS")
pipe = load(folder)
print(json.dumps({"peak": peak_memory() - before, "stays": status("VmRSS") - before}))
"""


def main() -> None:
    parser = add_options(arguments(__doc__, repeats=1))
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--limit", type=float, metavar="GB", help="let a picture have so much memory, in 2^30 bytes")
    options = parser.parse_args()
    size = 512 if options.model == "sd15" else 1024
    case = Case("memory", options.model, size=size)
    case = case.shrunk() if options.tiny else case
    rows = loading(case, options)
    if options.limit is not None:
        confine(options.limit)
    write(f"memory_{options.model}", [*rows, *painting(case, options)], options)


def loading(case: Case, options: argparse.Namespace) -> list[Row]:
    """Rows of loading in the files' own format and in float32."""
    folder = weights.find(case.model, "repository", options.cache)
    warm = weights.find("tiny" if case.model in ("sd15", "tiny") else "tiny-xl", "repository", options.cache)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    rows: list[Row] = []
    for library in ("diffusers", "fourstroke"):
        for dtype in ("float16", "float32"):
            command = python(LOAD, library, dtype, str(warm), str(folder))
            env = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
            run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            told = json.loads(run.stdout.splitlines()[-1])
            row: Row = {"what": f"load {dtype}", "who": library, "peak_mb": round(told["peak"] / 2**20)}
            row |= {"files_mb": round(size / 2**20), "over_files": round(told["peak"] / size, 3)}
            rows.append(row)
    return rows


def painting(case: Case, options: argparse.Namespace) -> list[Row]:
    """Rows of a process that loads and paints two pictures; what is compiled or calibrated comes with the first."""
    rows: list[Row] = []
    for name in peers_of(options):
        job = case.job(PEERS[name].options, options.cache, options.device)
        job |= {"warm_up": False, "private": True}
        (answers,) = take_turns({name: (PEERS[name].module, job)}, [{"seed": 0}, {"seed": 1}], options).values()
        what = "pictures" if options.limit is None else f"pictures in {options.limit:g} GB"
        row: Row = {"what": what, "who": name}
        if isinstance(answers, PeerError):
            rows.append(row | {"note": str(answers)[:200]})
            continue
        for column, told in (("peak_mb", "memory"), ("private_mb", "private")):
            row[column] = round(max(answer[told] for answer in answers) / 2**20)
        loaded, first, second = answers
        row |= {"first_s": round(loaded["load_s"] + first["total"], 1), "second_s": round(second["total"], 1)}
        rows.append(row)
    return rows


def confine(gigabytes: float) -> None:
    """Put this process and those that it starts into a group with so much memory, and empty the cache of files.

    Raises:
        OSError: there are no groups here that this user may make.
    """
    root = Path("/sys/fs/cgroup")
    old = root / "memory"
    group = (old if old.is_dir() else root) / "fourstroke-bench"
    group.mkdir(exist_ok=True)
    (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(int(gigabytes * 2**30)))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


if __name__ == "__main__":
    main()
