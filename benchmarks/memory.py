"""Peak memory of loading a repository, and of one picture in every mode, each in a process of its own.

Loading is counted from after the imports on: what the process grows by at most, over the size of the weight files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess

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
    options = parser.parse_args()
    size = 512 if options.model == "sd15" else 1024
    case = Case("memory", options.model, size=size)
    case = case.shrunk() if options.tiny else case
    write(f"memory_{options.model}", [*loading(case, options), *painting(case, options)], options)


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
    """Rows of a process that loads and paints one picture."""
    rows: list[Row] = []
    for name in peers_of(options):
        job = case.job(PEERS[name].options, options.cache, options.device) | {"warm_up": False}
        (answers,) = take_turns({name: (PEERS[name].module, job)}, [{"seed": 0}], options).values()
        row: Row = {"what": "one picture", "who": name}
        if isinstance(answers, PeerError):
            rows.append(row | {"note": str(answers)[:200]})
            continue
        rows.append(row | {"peak_mb": round(max(answer["memory"] for answer in answers) / 2**20)})
    return rows


if __name__ == "__main__":
    main()
