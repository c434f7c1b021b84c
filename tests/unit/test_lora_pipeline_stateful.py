"""Any sequence of a pipeline's LoRA methods ends at the bits of a fresh pipeline that is brought to the final state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fourstroke import CLIPTextModel, StableDiffusionPipeline, UNet2DConditionModel
from fourstroke.lora import AdapterWeights, Lora, save_lora

from . import tiny
from .lora_toys import lora, same, snapshot

PARTS = ("unet", "text_encoder")
NAMES = st.sampled_from(["a", "b", "c"])
FILES = st.integers(0, 2)
SCALES = st.sampled_from([-0.5, 0.0, 0.3, 1.0, 2.0])
BLOCKS = {"unet": {"down": 0.5, "up": {"block_1": [2.0, 0.0]}}, "text_encoder": 0.25}
WEIGHTS = st.one_of(SCALES, st.sampled_from([BLOCKS, {"text_encoder": 0.0}]))
# One rule with all operations: of several rules hypothesis leaves most out of any one run.
OPERATIONS = st.one_of(
    st.tuples(st.just("load"), NAMES, FILES),
    st.tuples(st.just("load"), NAMES, FILES),
    st.tuples(st.just("choose"), st.lists(NAMES, unique=True), st.lists(WEIGHTS, min_size=3, max_size=3)),
    st.tuples(st.just("fuse"), SCALES, st.one_of(st.none(), NAMES)),
    st.tuples(st.just("unfuse")),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("unload")),
    st.tuples(st.just("switch"), st.booleans()),
)


@dataclass(eq=False)
class Adapter:
    """A loaded file; the same file may be loaded more than once."""

    file: int
    weight: Any = 1.0


class Sequence(RuleBasedStateMachine):
    """Drives a pipeline and a plain account of what is loaded, active and fused."""

    folder: ClassVar[Path]

    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16]), weights=st.tuples(WEIGHTS, WEIGHTS))
    def start(self, dtype: torch.dtype, weights: tuple[Any, Any]) -> None:
        """Two LoRAs act at first, or else many runs would hardly load any."""
        self.dtype = dtype
        self.pipe = StableDiffusionPipeline.from_pretrained(self.folder / "model", torch_dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = {part: snapshot(getattr(self.pipe, part)) for part in PARTS}
        self.loaded: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.fused: list[tuple[Adapter, Any, float]] = []
        self.enabled = True
        self.load("a", 0)
        self.load("b", 1)
        self.choose(["b", "a"], list(weights))

    @rule(operation=OPERATIONS, paint=st.booleans())
    def do(self, operation: tuple[Any, ...], paint: bool) -> None:
        """One operation, and a picture or none: the weights change when one is asked for, now or later."""
        name, *arguments = operation
        getattr(self, name)(*arguments)
        if paint:
            self.latents(self.pipe, 1.0)

    def fresh(self) -> StableDiffusionPipeline:
        """Another pipeline; the parts that no LoRA changes are shared, for speed."""
        kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
        options = {"torch_dtype": self.dtype}
        networks = {part: kinds[part].from_pretrained(self.folder / "model" / part, **options) for part in PARTS}
        pipe = StableDiffusionPipeline(**{**self.pipe.components, **networks}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def path(self, file: int) -> Path:
        return self.folder / f"{file}.safetensors"

    def load(self, name: str, file: int) -> None:
        replaces = name in self.loaded
        self.pipe.load_lora_weights(self.path(file), adapter_name=name, hotswap=replaces)
        if replaces:
            self.loaded[name] = Adapter(file, self.loaded[name].weight)
        else:
            self.loaded[name], self.active = Adapter(file), [name]

    def choose(self, names: list[str], weights: list[Any]) -> None:
        self.active = [name for name in names if name in self.loaded]
        self.pipe.set_adapters(self.active, weights[: len(self.active)])
        for name, weight in zip(self.active, weights, strict=False):
            self.loaded[name].weight = weight

    def fuse(self, scale: float, name: str | None) -> None:
        names = None if name not in self.loaded else [name]
        self.pipe.fuse_lora(lora_scale=scale, adapter_names=names)
        for adapter in (self.loaded[name] for name in names or self.active):
            if all(adapter is not other for other, _, _ in self.fused):
                self.fused.append((adapter, adapter.weight, scale))

    def unfuse(self) -> None:
        self.pipe.unfuse_lora()
        self.fused = []

    def delete(self, name: str) -> None:
        if name not in self.loaded:
            return
        self.pipe.delete_adapters(name)
        del self.loaded[name]
        if name in self.active:
            self.active.remove(name)
            self.active = self.active or list(self.loaded)[:1]

    def unload(self) -> None:
        self.pipe.unload_lora_weights()
        self.loaded, self.active, self.enabled = {}, [], True

    def switch(self, enabled: bool) -> None:
        (self.pipe.enable_lora if enabled else self.pipe.disable_lora)()
        self.enabled = enabled

    def latents(self, pipe: StableDiffusionPipeline, scale: float) -> torch.Tensor:
        options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        return pipe("fox", generator=generator, cross_attention_kwargs={"scale": scale}, **options).images

    def brought_here(self, pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
        """``pipe`` in the state of the account, by the shortest way."""
        gone = [adapter for adapter, _, _ in self.fused if adapter not in self.loaded.values()]
        names = {adapter: f"gone {i}" for i, adapter in enumerate(gone)}
        names |= {adapter: name for name, adapter in self.loaded.items()}
        for adapter, name in names.items():
            pipe.load_lora_weights(self.path(adapter.file), adapter_name=name)
        for adapter, weight, scale in self.fused:
            pipe.set_adapters([names[adapter]], [weight])
            pipe.fuse_lora(lora_scale=scale)
        pipe.delete_adapters([names[adapter] for adapter in gone])
        pipe.set_adapters(self.active, [self.loaded[name].weight for name in self.active])
        if not self.enabled:
            pipe.disable_lora()
        return pipe

    @invariant()
    def lists_agree(self) -> None:
        if hasattr(self, "pipe"):
            assert self.pipe.get_active_adapters() == self.active
            assert self.pipe.get_list_adapters() == ({part: [*self.loaded] for part in PARTS} if self.loaded else {})

    def teardown(self) -> None:
        """The weights and a picture are those of a fresh pipeline; without LoRAs, those of the files."""
        if hasattr(self, "pipe"):
            again = self.brought_here(self.fresh())
            for scale in (1.0, 0.3):
                assert torch.equal(self.latents(self.pipe, scale), self.latents(again, scale))
                for part in PARTS:
                    assert same(getattr(self.pipe, part), snapshot(getattr(again, part))), part
            self.pipe.unload_lora_weights()
            self.pipe.unfuse_lora()
            self.latents(self.pipe, 1.0)
            assert all(same(getattr(self.pipe, part), self.base[part]) for part in PARTS)


def some(weights: Mapping[str, AdapterWeights]) -> dict[str, AdapterWeights]:
    """A few layers of every kind, for speed."""
    return {name: value for name, value in weights.items() if re.search(r"attn2\.to_[kv]|conv1|conv_in|q_proj", name)}


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tiny pipeline and three LoRAs of both its networks, on disk."""
    Sequence.folder = tmp_path_factory.mktemp("lora")
    pipe = tiny.sd()
    pipe.save_pretrained(Sequence.folder / "model")
    for file in range(3):
        adapted = [lora(getattr(pipe, part), seed=100 * file, component=part, skip="norm") for part in PARTS]
        weights = {part: some(found.components[part]) for part, found in zip(PARTS, adapted, strict=True)}
        save_lora(Sequence.folder / f"{file}.safetensors", Lora(str(file), weights))


TestSequence = Sequence.TestCase
TestSequence.settings = settings(
    max_examples=20,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
