"""Any sequence of operations ends at the bits that the final state gives when it is computed from fresh weights."""

from __future__ import annotations

from typing import Any

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
# One rule with all operations: of several rules hypothesis leaves most out of any one run.
OPERATIONS = st.one_of(
    st.tuples(st.just("load"), NAMES, st.integers(0, 4)),
    st.tuples(st.just("load"), NAMES, st.integers(0, 4)),
    st.tuples(st.just("choose"), st.lists(NAMES, unique=True), st.lists(WEIGHTS, min_size=3, max_size=3)),
    st.tuples(st.just("fuse"), WEIGHTS, PARTS),
    st.tuples(st.just("unfuse"), PARTS),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("unload")),
    st.tuples(st.just("switch"), st.booleans()),
    st.tuples(st.just("rescale"), WEIGHTS),
)


def make_lora(index: int) -> Lora:
    """Of the UNet, of the text encoder, of both, and so on."""
    model = toy()
    unet = lora(model, seed=10 * index).components["unet"]
    text = lora(model, seed=10 * index + 5, component="text_encoder").components["text_encoder"]
    return Lora(str(index), [{"unet": unet}, {"text_encoder": text}, {"unet": unet, "text_encoder": text}][index % 3])


LORAS = [make_lora(index) for index in range(5)]


class Sequence(RuleBasedStateMachine):
    """Drives an `AdapterSet` and a plain account of what should act: fused and active entries a component."""

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        weights=st.lists(WEIGHTS, min_size=3, max_size=3),
    )
    def start(self, dtype: torch.dtype, weights: list[float]) -> None:
        """Three adapters act at first, or else many runs would hardly load any."""
        self.models = {"unet": toy(dtype, 1), "text_encoder": toy(dtype, 2)}
        self.base: dict[str, dict[str, Tensor]] = {part: snapshot(model) for part, model in self.models.items()}
        self.adapters = AdapterSet(self.models)
        self.loaded: dict[str, Lora] = {}
        self.weight: dict[tuple[str, str], float] = {}
        self.active: dict[str, list[str]] = {part: [] for part in COMPONENTS}
        self.fused: dict[str, list[tuple[Lora, float]]] = {part: [] for part in COMPONENTS}
        self.enabled, self.scale = True, 1.0
        for index, name in enumerate("abc"):
            self.load(name, index)
        self.choose(["b", "c", "a"], weights)

    @rule(operation=OPERATIONS, look=st.booleans())
    def do(self, operation: tuple[Any, ...], look: bool) -> None:
        """One operation, and a look at the weights or none: what is noted may be applied now or later."""
        name, *arguments = operation
        getattr(self, name)(*arguments)
        if look:
            self.apply()

    def within(self, part: str) -> list[str]:
        return [name for name, loaded in self.loaded.items() if part in loaded.components]

    def load(self, name: str, index: int) -> None:
        if LORAS[index] in self.loaded.values():
            return
        replaces, acting = name in self.loaded, any(name in active for active in self.active.values())
        self.adapters.add(name, LORAS[index], hotswap=replaces)
        self.loaded[name] = LORAS[index]
        for part in LORAS[index].components:
            self.weight.setdefault((part, name), 1.0)
            if not replaces:
                self.active[part] = [name]
            elif acting and name not in self.active[part]:
                self.active[part].append(name)
        self.drop_stale()

    def drop_stale(self) -> None:
        """Forget what is not loaded; where nothing acts any more, the oldest adapter does."""
        self.weight = {(part, name): w for (part, name), w in self.weight.items() if name in self.within(part)}
        for part, active in self.active.items():
            kept = [name for name in active if name in self.within(part)]
            self.active[part] = kept or self.within(part)[:1] if active else []

    def choose(self, names: list[str], weights: list[float]) -> None:
        names = [name for name in names if name in self.loaded]
        self.adapters.set(names, weights[: len(names)])
        for part in COMPONENTS:
            self.active[part] = [name for name in names if name in self.within(part)]
        for name, weight in zip(names, weights, strict=False):
            for part in self.loaded[name].components:
                self.weight[part, name] = weight

    def fuse(self, scale: float, parts: list[str] | None) -> None:
        self.adapters.fuse(scale=scale, components=parts)
        for part in parts or COMPONENTS:
            for name in self.active[part]:
                if all(entry is not self.loaded[name] for entry, _ in self.fused[part]):
                    self.fused[part].append((self.loaded[name], self.weight[part, name] * scale))

    def unfuse(self, parts: list[str] | None) -> None:
        self.adapters.unfuse(parts)
        for part in parts or COMPONENTS:
            self.fused[part] = []

    def delete(self, name: str) -> None:
        if name not in self.loaded:
            return
        self.adapters.delete(name)
        del self.loaded[name]
        self.drop_stale()

    def unload(self) -> None:
        self.adapters.clear()
        self.loaded, self.weight, self.active, self.enabled = {}, {}, {part: [] for part in COMPONENTS}, True

    def switch(self, enabled: bool) -> None:
        (self.adapters.enable if enabled else self.adapters.disable)()
        self.enabled = enabled

    def rescale(self, scale: float) -> None:
        self.adapters.scale = self.scale = scale

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
