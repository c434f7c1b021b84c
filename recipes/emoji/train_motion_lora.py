"""Motion LoRAs: ``python recipes/emoji/train_motion_lora.py zoom-in --steps 200``, and the same for ``pan-left``.

Low-rank pairs on the attention layers of the trained motion adapter, as AnimateDiff's published ones (Guo et al. 2023,
sec. 4.3), learn clips that all move alike (`clips.CAMERA`). The names are the camera's: it comes nearer, or it turns to
the left and what it sees moves to the right. Last, the pipeline paints with the exported files, with the LoRA and
without, and says how far the picture grew and moved from the first frame to the last.
"""

from __future__ import annotations

from pathlib import Path

import torch
from clips import CAMERA, clips
from data import CACHE, load, save_grid
from loop import Run, arguments, say, train, use
from tokenizer import MAX_LENGTH
from torch import Tensor, nn
from torch.func import functional_call
from train_motion import PROMPTS, SHORT, STEPS, Denoiser, MotionSheet, ink, jerk, motion_loss, trained_motion
from train_motion import export as export_adapter
from train_text import Captions, tokenizer_of_ours

from fourstroke import AnimateDiffPipeline, LCMScheduler, MotionAdapter
from fourstroke.lora import Lora, LoraPair, save_lora
from fourstroke.lora.layers import effective_weights, init_pairs
from fourstroke.models.motion import SLOT
from fourstroke.models.unet import UNet2DConditionModel

RANK = 8
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CLIPS = 200
FILE = "diffusion_pytorch_model.safetensors"  # as the published motion LoRAs name it


class MotionPairs(nn.Module):
    """The pairs, by parameter name; their tensors are this module's parameters, so that the loop averages and saves
    them."""

    def __init__(self, unet: UNet2DConditionModel, seed: int = 0):
        super().__init__()
        names = [name for name, _ in unet.named_modules() if SLOT in name and name.endswith(TARGETS)]
        generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[str, LoraPair] = {}
        for path, pair in init_pairs(unet, names, rank=RANK, generator=generator).items():
            down, up = nn.Parameter(pair.down.detach()), nn.Parameter(pair.up.detach())
            self.register_parameter(f"{path.replace('.', '/')}/down", down)
            self.register_parameter(f"{path.replace('.', '/')}/up", up)
            self.pairs[path] = LoraPair(down, up, pair.alpha)


class LoraSheet(MotionSheet):
    """Videos by the LCM-LoRA and the pairs as far as they are averaged."""

    student: MotionPairs

    def weights(self) -> dict[str, Tensor]:
        """The LCM-LoRA's weights, and those of the motion modules with the pairs in them."""
        moved = effective_weights(self.unet, self.student.pairs)
        return super().weights() | {name: weight.detach() for name, weight in moved.items()}


def growth(videos: Tensor) -> float:
    """How many times as large as in the first frame things are in the last: videos (V, F, 3, H, W) in -1..1.

    The square root of the ratio of drawn areas, the median of the videos.
    """
    area = ink(videos).float().mean((2, 3)).clamp(min=1e-6)
    return (area[:, -1] / area[:, 0]).sqrt().median().item()


def pan(videos: Tensor) -> float:
    """How far the middle of what is drawn moves to the right from the first frame to the last, in widths; a median."""
    drawn = ink(videos).float().sum(2)  # (V, F, W)
    places = torch.arange(drawn.shape[-1]) + 0.5
    middle = (drawn * places).sum(2) / drawn.sum(2).clamp(min=1) / drawn.shape[-1]
    return (middle[:, -1] - middle[:, 0]).median().item()


def export(folder: Path, name: str) -> None:
    """The LoRA ``zoom-in`` or ``pan-left``: fp16, in the layout that diffusers writes, alpha equal to the rank."""
    student = MotionPairs(trained_motion()[0])
    student.load_state_dict(torch.load(CACHE / "train" / f"{name}.ema.pt", weights_only=True)["pairs"])
    pairs = {path: LoraPair(p.down.detach(), p.up.detach(), p.alpha) for path, p in student.pairs.items()}
    steps = torch.load(CACHE / "train" / f"{name}.pt", weights_only=True)["steps"]
    about = {"base_model": "emoji/motion-adapter", "rank": str(RANK), "alpha": str(RANK), "steps": str(steps),
             "method": f"noise prediction on {CLIPS} clips"}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    lora = Lora(f"{name}-lora", {"unet": pairs})
    save_lora(folder / FILE, lora, layout="peft", dtype=torch.float16, metadata=about)


def measure(name: str) -> None:
    """Export to the cache, paint through `AnimateDiffPipeline` with and without the LoRA, and say what moved."""
    exported = CACHE / "motion"
    export_adapter(exported / "motion-adapter")
    export(exported / f"{name}-lora", name)
    adapter = MotionAdapter.from_pretrained(exported / "motion-adapter")
    pipe = AnimateDiffPipeline.from_pretrained("emoji/base", motion_adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights("emoji/lcm-lora", adapter_name="lcm")
    pipe.load_lora_weights(exported / f"{name}-lora", adapter_name="motion")
    for what, weight in (("without", 0.0), ("with", 1.0)):
        pipe.set_adapters(["lcm", "motion"], [1.0, weight])
        made = pipe(
            list(PROMPTS), num_frames=SHORT, num_inference_steps=STEPS, guidance_scale=1.0, output_type="pt",
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        videos = made.frames.float() * 2 - 1
        say(
            f"{what} {name}, {SHORT} frames in {STEPS} steps: grown {growth(videos):.2f} times, moved "
            f"{pan(videos):+.2f} widths to the right, jerk {jerk(videos):.2f}"
        )
        path = CACHE / "samples" / f"{name}-{what}.png"
        save_grid(videos.flatten(0, 1), path, columns=SHORT)


def main() -> None:
    """Train one LoRA, then measure what it does."""
    parser = arguments(__doc__, minutes=2)
    parser.add_argument("motion", choices=sorted(CAMERA))
    parser.add_argument("--rate", type=float, default=4e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = options.motion
    emojis = load()[1]
    tokenizer = tokenizer_of_ours(emojis)
    moving = clips(name, CLIPS)
    unet, encoder, _ = trained_motion()
    student = MotionPairs(unet, options.seed)
    sheet = LoraSheet(unet, encoder, tokenizer, name)
    sheet.student = student
    run = Run(
        name, CACHE / "train", options.steps, options.minutes, warmup=20, ema_decay=0.98, seed=options.seed,
        after=sheet, after_every=100,
    )  # fmt: skip

    def denoiser() -> Denoiser:
        weights = effective_weights(unet, student.pairs)
        return lambda sample, timesteps, text, frames: functional_call(
            unet, weights, (sample, timesteps, text), {"frames": frames}
        )

    loss = motion_loss(denoiser, encoder, moving, Captions(emojis, tokenizer, MAX_LENGTH))
    optimizer = torch.optim.AdamW(student.parameters(), options.rate, betas=(0.9, 0.99), weight_decay=0.0)
    averages = train(run, {"pairs": student}, [optimizer], loss)
    with use({"pairs": student}, averages):
        sheet(999_999)
    measure(name)


if __name__ == "__main__":
    main()
