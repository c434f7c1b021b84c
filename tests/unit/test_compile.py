"""torch.compile as an option: what is compiled and how often, and what is kept on disk."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fourstroke
from fourstroke import GenerateRequest
from fourstroke.runtime import compile as compiling
from fourstroke.runtime.compile import Compiled, cache_folder, compile_, load_artifacts, save_artifacts, uncompile_
from fourstroke.runtime.cudagraph import cudagraph_
from tests.unit import tiny
from tests.unit.test_cudagraph import inputs, plain
from tests.unit.test_runtime import lora


class Counting:
    """A backend that runs what it is given, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        return module.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def unet() -> Iterator[Any]:
    with torch.no_grad():
        yield tiny.unet()


@pytest.fixture
def backend() -> Counting:
    return Counting()


def test_a_graph_a_shape_and_the_eager_result(unet: Any, backend: Counting) -> None:
    compile_(unet, backend=backend, cache=False)
    for call in (inputs(), inputs(), inputs(timestep=7), inputs(timestep=torch.tensor(8)), inputs(size=8)):
        torch.testing.assert_close(unet(**call), plain(unet, call))
    assert backend.graphs == 2  # nothing of the network runs outside of them


def test_one_graph_for_all_shapes(unet: Any, backend: Counting) -> None:
    compile_(unet, backend=backend, dynamic=True, cache=False)
    for size in (8, 12, 16):
        call = inputs(size=size, batch=2)
        torch.testing.assert_close(unet(**call), plain(unet, call))
    assert backend.graphs == 1


@pytest.mark.parametrize("make", [tiny.sd, tiny.xl])
def test_adapters_switch_without_compiling_anew(make: Callable[[], Any], backend: Counting) -> None:
    pipe, reference = make(), make()
    compile_(pipe.unet, backend=backend, cache=False)
    request = GenerateRequest(prompt="a red fox", seed=3, output_type="np")
    plain_picture = pipe.generate(request).images
    assert backend.graphs == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for strength in (0.5, -0.5):
            for each in (pipe, reference):
                each.load_lora_weights(lora(each, strength), adapter_name=str(strength))
            changed = pipe.generate(request).images
            assert abs(changed - reference.generate(request).images).max() <= 1 / 255
            assert abs(changed - plain_picture).max() > 1 / 255
        pipe.set_adapters(["0.5", "-0.5"], [0.3, 0.1])
        pipe.generate(request)
        pipe.unload_lora_weights()
        assert (pipe.generate(request).images == plain_picture).all()
    assert backend.graphs == 1


def test_a_decoder_with_its_autoencoder(backend: Counting) -> None:
    vae, latents = tiny.vae(), torch.randn(1, 4, 4, 4)
    wanted = vae.decode(latents)
    compile_(vae.decoder, backend=backend, cache=False)
    torch.testing.assert_close(vae.decode(latents), wanted)
    assert backend.graphs == 1


def test_two_networks_of_a_class_do_not_mix(backend: Counting) -> None:
    first, second = tiny.unet(), tiny.unet()
    call = inputs()
    with torch.no_grad():
        for network in (first, second):
            compile_(network, backend=backend, cache=False)
        for network in (first, second):
            torch.testing.assert_close(network(**call), plain(network, call))


def test_undo_is_exact(unet: Any) -> None:
    before, names = dict(vars(unet)), [*unet.state_dict()]
    compiled = compile_(unet, backend="eager", cache=False)
    unet(**inputs())
    assert unet.forward is compiled and isinstance(unet, fourstroke.UNet2DConditionModel)
    assert [*unet.state_dict()] == names
    uncompile_(unet)
    assert vars(unet) == before
    uncompile_(unet)  # nothing to undo
    assert vars(unet) == before


def test_one_backend_at_a_time(unet: Any) -> None:
    compile_(unet, backend="eager")
    compile_(unet, backend="eager", dynamic=True)
    with pytest.raises(RuntimeError, match="is a Compiled already, and a Graphs would replace it"):
        cudagraph_(unet)


def test_copies_compile_for_themselves(unet: Any, tmp_path: Path) -> None:
    compile_(unet, backend="eager", cache=tmp_path)
    twin = copy.deepcopy(unet)
    assert twin.forward.network is twin and twin.forward.folder == tmp_path and twin.forward.backend == "eager"
    call = inputs()
    assert torch.equal(twin(**call), plain(unet, call))


def test_results_of_torchs_own_graphs_are_copies(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(None))
    compiled = Compiled(unet, backend="eager")
    shared = torch.zeros(1)
    compiled.mode, compiled._run = "reduce-overhead", lambda *_, **__: shared
    result = compiled(**inputs())
    assert torch.equal(result, shared) and result is not shared and len(steps) == 1


# -- the files -----------------------------------------------------------------------------------------------------


class Artifacts:
    """torch's part: what it was handed, and what it gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.loaded: list[bytes] = []
        self.content: bytes | None = b"compiled"
        monkeypatch.setattr(torch.compiler, "load_cache_artifacts", self.load)
        monkeypatch.setattr(torch.compiler, "save_cache_artifacts", self.save)

    def load(self, content: bytes) -> object:
        self.loaded.append(content)
        return object()

    def save(self) -> tuple[bytes, object] | None:
        return None if self.content is None else (self.content, object())


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    return Artifacts(monkeypatch)


def test_each_shape_is_written_once_and_read_by_the_next_start(unet: Any, artifacts: Artifacts, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    compile_(unet, backend="eager", cache=folder)
    for size in (4, 4, 8):
        unet(**inputs(size=size))
    files = sorted(folder.iterdir())
    assert len(files) == 2 and artifacts.loaded == []
    assert all(file.name.startswith(f"{torch.__version__}-") and file.read_bytes() == b"compiled" for file in files)
    assert folder.stat().st_mode & 0o077 == 0 and all(file.stat().st_mode & 0o077 == 0 for file in files)
    compile_(unet, backend="eager", cache=str(folder))
    unet(**inputs())
    unet(**inputs())
    assert artifacts.loaded == [b"compiled"] and sorted(folder.iterdir()) == files


def test_what_makes_other_code_has_another_file(artifacts: Artifacts, tmp_path: Path) -> None:
    def files(network: Any, **options: Any) -> set[str]:
        folder = tmp_path / "x"
        compile_(network, backend="eager", cache=folder, **options)
        with torch.no_grad():
            call = inputs()
            network(**{n: v.to(network.dtype) if n != "timestep" else v for n, v in call.items()})
        names = {file.name for file in folder.iterdir()}
        for file in folder.iterdir():
            file.unlink()
        return names

    same = files(tiny.unet())
    assert same == files(tiny.unet())
    others = [files(tiny.unet(), dynamic=True), files(tiny.unet().double()), files(tiny.unet(layers_per_block=2))]
    assert len(set.union(same, *others)) == 4


def test_one_file_for_all_shapes_when_dynamic(unet: Any, artifacts: Artifacts, tmp_path: Path) -> None:
    compile_(unet, backend="eager", dynamic=True, cache=tmp_path)
    for size in (4, 8):
        unet(**inputs(size=size))
    assert len([*tmp_path.iterdir()]) == 1


def test_nothing_is_kept_when_switched_off_or_when_there_is_nothing(
    unet: Any, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("compile") == tmp_path / "fourstroke" / "compile"
    compile_(unet, backend="eager", cache=False)
    unet(**inputs())
    artifacts.content = None
    compile_(unet, backend="eager")
    unet(**inputs())
    assert [*tmp_path.iterdir()] == []
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("compile") == Path.home() / ".cache" / "fourstroke" / "compile"


def test_a_folder_that_cannot_be_written_to_warns(unet: Any, artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    compile_(unet, backend="eager", cache=tmp_path / "file")
    with pytest.warns(UserWarning, match=r"cannot be kept in .*file .*cache=False"):
        unet(**inputs())
    unet(**inputs())  # once


def test_a_write_that_breaks_off_leaves_nothing(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiling.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert not save_artifacts(tmp_path / "a.bin")
    assert [*tmp_path.iterdir()] == []


def test_an_older_torch_has_no_such_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(b"compiled")
    for name in ("load_cache_artifacts", "save_cache_artifacts"):
        monkeypatch.delattr(torch.compiler, name)
    assert not load_artifacts(tmp_path / "a.bin") and not save_artifacts(tmp_path / "b.bin")


SCRIPT = """
import sys, torch, json
from pathlib import Path
from torch._dynamo.utils import counters
from fourstroke.runtime.compile import compile_
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()).eval().requires_grad_(False)
x = torch.randn(2, 8)
with torch.no_grad():
    wanted = network(x)
    compile_(network, cache=sys.argv[1])
    torch.testing.assert_close(network(x), wanted)
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
misses = counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]
print(hits > 0, misses > 0)
"""


@pytest.mark.slow
def test_a_second_start_takes_the_first_ones_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real compiler, each start with an empty folder for torch's own cache, as after a reboot."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    answers = []
    for start in ("first", "second"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / start))
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "ours")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        answers.append(run.stdout.split())
    assert answers == [["False", "True"], ["True", "False"]]


def test_unreadable_artifacts_are_compiled_anew(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x00garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on the first import of its compiler
        assert not load_artifacts(tmp_path / "a.bin")
