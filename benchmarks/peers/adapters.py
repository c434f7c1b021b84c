"""Loading, switching and re-weighing LoRAs, in either library: both have the same names for it.

One run starts without LoRAs, loads all of them, switches between two mixes and back, and times steps of the UNet.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from .protocol import Clock, Job, Paint, serve, status

MIX_A: dict[str, float] = {"lcm": 1.0, "style-1": 0.8}
MIX_B: dict[str, float] = {"lcm": 1.0, "style-2": 0.6, "style-3": 0.9}


def load(job: Job, clock: Clock) -> Paint:
    library: Any = importlib.import_module(job["library"])
    ours = job["library"] == "fourstroke"
    if not ours:
        importlib.import_module("peft")  # which it would import when it loads the first LoRA
    pipe = library.DiffusionPipeline.from_pretrained(
        job["files"]["repository"], torch_dtype=getattr(torch, job["dtype"]), vae=None
    ).to(job["device"])
    loras = {"lcm": job["files"]["lcm-lora"]}
    loras |= {f"style-{i + 1}": path for i, path in enumerate(job["files"]["styles"])}
    mixes = [{name: weight for name, weight in mix.items() if name in loras} for mix in (MIX_A, MIX_B)]

    def use(mix: dict[str, float]) -> None:
        """Make the weights those of ``mix``: so that a step costs the same whatever is active."""
        pipe.set_adapters(list(mix), list(mix.values()))
        if ours:
            pipe.merge_adapters()
        else:
            pipe.fuse_lora(adapter_names=list(mix))

    def switch(mix: dict[str, float]) -> None:
        if not ours:
            pipe.unfuse_lora()
        use(mix)

    def measure(job: Job) -> Any:
        seconds: dict[str, Any] = {}

        def timed(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
            clock.sync()
            start = time.perf_counter()
            function(*args, **options)
            clock.sync()
            seconds[name] = time.perf_counter() - start

        if job["steps"]:
            timed("step, no LoRA", step)
        before = status("VmRSS")
        for name, path in loras.items():
            timed(f"load {name}", pipe.load_lora_weights, path, adapter_name=name)
        timed("use one", use, {"lcm": 1.0})
        if job["steps"]:
            timed("step, one LoRA", step)
        switch(mixes[0])
        first = fingerprint(pipe.unet)
        timed("switch A to B", switch, mixes[1])
        timed("re-weigh B", switch, {name: weight / 2 for name, weight in mixes[1].items()})
        timed("switch back to A", switch, mixes[0])
        exact = fingerprint(pipe.unet) == first
        everything = dict.fromkeys(loras, 0.5)
        timed("switch to all", switch, everything)
        if job["steps"]:
            timed("step, all LoRAs", step)
        added.append(status("VmRSS") - before)
        timed("unload", unload)
        return {"seconds": seconds, "exact": exact, "added": added[0]}

    def unload() -> None:
        """Give the weights back as they were without a LoRA."""
        if not ours:
            pipe.unfuse_lora()
        pipe.unload_lora_weights()
        if ours:
            pipe.merge_adapters()

    step = make_step(pipe, job)
    added: list[int] = []  # the first run's, as memory that was used once may stay with the process
    return measure


def make_step(pipe: Any, job: Job) -> Callable[[], Any]:
    """A step of the UNet with a fixed input."""
    config, side, dtype = pipe.unet.config, job["size"] // 8, pipe.unet.dtype
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(job["device"], dtype)

    added = None
    if job["xl"]:
        ids = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - ids
        added = {"text_embeds": random(1, pooled), "time_ids": random(1, 6)}
    sample, text = random(1, 4, side, side), random(1, 77, config["cross_attention_dim"])
    timestep = torch.tensor(999, device=job["device"])

    @torch.no_grad()
    def step() -> Any:
        return pipe.unet(sample, timestep, text, added_cond_kwargs=added)

    return step


def fingerprint(network: torch.nn.Module) -> str:
    """A digest of all weights, to the bit."""
    digest = hashlib.blake2b()
    for name, tensor in network.state_dict().items():
        if "lora_" not in name:
            digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


if __name__ == "__main__":
    serve(load)
