"""What the import costs beside torch's own: ``import fourstroke`` and two of its names against ``import torch``."""

from __future__ import annotations

from timing import arguments, interleave, python, report

COMMANDS = {
    "torch": "import torch",
    "fourstroke": "import fourstroke; from fourstroke import StableDiffusionXLPipeline, LCMScheduler",
    "diffusers": "from diffusers import StableDiffusionXLPipeline, LCMScheduler",
}


def main() -> None:
    options = arguments(__doc__, repeats=9).parse_args()
    commands = {name: python(script) for name, script in COMMANDS.items()}
    env = {"OMP_NUM_THREADS": str(options.threads)}
    report("import_time", interleave(commands, 1 if options.tiny else options.repeats, env), options)


if __name__ == "__main__":
    main()
