"""What the import costs beside torch's own: ``import fourstroke`` and two of its names against ``import torch``."""

from __future__ import annotations

import argparse

from timing import interleave, python, report, versions

COMMANDS = {
    "torch": "import torch",
    "fourstroke": "import fourstroke; from fourstroke import StableDiffusionXLPipeline, LCMScheduler",
    "diffusers": "from diffusers import StableDiffusionXLPipeline, LCMScheduler",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    commands = {name: python(script) for name, script in COMMANDS.items()}
    seconds = interleave(commands, options.repeats, {"OMP_NUM_THREADS": str(options.threads)})
    report("import_time", seconds, versions("torch", "fourstroke", "diffusers", "transformers"), options.threads)


if __name__ == "__main__":
    main()
