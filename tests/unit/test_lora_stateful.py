"""Any sequence of operations ends at the bits that the final state gives when it is computed from fresh weights."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from fourstroke.lora import AdapterSet, Lora, merge_weight

from .lora_toys import lora, same, snapshot, toy

COMPONENTS = ("unet", "text_encoder")
NAMES = st.sampled_from(["a", "b", "c"])
WEIGHTS = st.sampled_from([-0.5, 0.0, 0.3, 1.0, 2.0])
PARTS = st.sampled_from([None, ["unet"], ["text_encoder"], ["unet", "text_encoder"]])


def make_lora(index: int) -> Lora:
    """One of three: of the UNet, of the text encoder, of both."""
    model = toy()
    unet = lora(model, seed=10 * index).components["unet"]
    text = lora(model, seed=10 * index + 5, component="text_encoder").components["text_encoder"]
    return Lora(str(index), [{"unet": unet}, {"text_encoder": text}, {"unet": unet, "text_encoder": text}][index])


LORAS = [make_lora(index) for index in range(3)]


class Sequence(RuleBasedStateMachine):
    """Drives an `AdapterSet` and a plain account of what should act: fused and active entries a component."""

    @initialize(dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    def start(self, dtype: torch.dtype) -> None:
        self.models = {"unet": toy(dtype, 1), "text_encoder": toy(dtype, 2)}
        self.base: dict[str, dict[str, Tensor]] = {part: snapshot(model) for part, model in self.models.items()}
        self.adapters = AdapterSet(self.models)
        self.loaded: dict[str, Lora] = {}
        self.weight: dict[tuple[str, str], float] = {}
        self.active: dict[str, list[str]] = {part: [] for part in COMPONENTS}
        self.fused: dict[str, list[tuple[Lora, float]]] = {part: [] for part in COMPONENTS}
        self.enabled, self.scale, self.applied = True, 1.0, False

    def within(self, part: str) -> list[str]:
        return [name for name, loaded in self.loaded.items() if part in loaded.components]

    @rule(name=NAMES, index=st.integers(0, 2))
    def load(self, name: str, index: int) -> None:
        if name in self.loaded or LORAS[index] in self.loaded.values():
            return
        self.adapters.add(name, LORAS[index])
        self.loaded[name] = LORAS[index]
        for part in LORAS[index].components:
            self.weight[part, name] = 1.0
            self.active[part] = [name]

    @rule(names=st.lists(NAMES, unique=True), weights=st.lists(WEIGHTS, min_size=3, max_size=3))
    def choose(self, names: list[str], weights: list[float]) -> None:
        names = [name for name in names if name in self.loaded]
        self.adapters.set(names, weights[: len(names)])
        for part in COMPONENTS:
            self.active[part] = [name for name in names if name in self.within(part)]
        for name, weight in zip(names, weights, strict=False):
            for part in self.loaded[name].components:
                self.weight[part, name] = weight

    @rule(scale=WEIGHTS, parts=PARTS)
    def fuse(self, scale: float, parts: list[str] | None) -> None:
        self.adapters.fuse(scale=scale, components=parts)
        for part in parts or COMPONENTS:
            for name in self.active[part]:
                if all(entry is not self.loaded[name] for entry, _ in self.fused[part]):
                    self.fused[part].append((self.loaded[name], self.weight[part, name] * scale))

    @rule(parts=PARTS)
    def unfuse(self, parts: list[str] | None) -> None:
        self.adapters.unfuse(parts)
        for part in parts or COMPONENTS:
            self.fused[part] = []

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name not in self.loaded:
            return
        self.adapters.delete(name)
        del self.loaded[name]
        for part in COMPONENTS:
            if name in self.active[part]:
                self.active[part].remove(name)
                self.active[part] = self.active[part] or self.within(part)[:1]

    @rule()
    def unload(self) -> None:
        self.adapters.clear()
        self.loaded, self.active, self.enabled = {}, {part: [] for part in COMPONENTS}, True

    @rule(enabled=st.booleans())
    def switch(self, enabled: bool) -> None:
        (self.adapters.enable if enabled else self.adapters.disable)()
        self.enabled = enabled

    @rule(scale=WEIGHTS)
    def rescale(self, scale: float) -> None:
        self.adapters.scale = self.scale = scale

    @rule()
    def apply(self) -> None:
        self.adapters.apply()
        assert self.adapters.apply() == 0
        for part in COMPONENTS:
            assert same(self.models[part], self.expected(part))

    def expected(self, part: str) -> dict[str, Tensor]:
        loaded = list(self.loaded.values())
        acting = [entry for entry in self.fused[part] if self.enabled or entry[0] not in loaded]
        for name in self.active[part] if self.enabled else []:
            if all(entry is not self.loaded[name] for entry, _ in self.fused[part]):
                acting.append((self.loaded[name], self.weight[part, name] * self.scale))
        state = dict(self.base[part])
        for name in state:
            terms = [(found.components[part][name], weight) for found, weight in acting]
            state[name] = merge_weight(state[name], terms)
        return state

    @invariant()
    def notes_agree(self) -> None:
        if hasattr(self, "adapters"):
            assert list(self.adapters.names) == list(self.loaded)
            assert set(self.adapters.active) == {name for names in self.active.values() for name in names}

    def teardown(self) -> None:
        """Whatever was done: without adapters the weights are the first ones."""
        if hasattr(self, "adapters"):
            self.apply()
            self.adapters.clear()
            self.adapters.unfuse()
            self.adapters.apply()
            assert all(same(self.models[part], self.base[part]) for part in COMPONENTS)


TestSequence = Sequence.TestCase
TestSequence.settings = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
