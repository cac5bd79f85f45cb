"""What all tests share: a tiny network in a file, images, and no settings of this machine."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.networks import TINY_ARCHITECTURE
from support.reference_weights import reference_state_dict

from r2ncli.architectures import DEFAULT_NETWORK
from r2ncli.model import Res2Net


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny network with labels, input 32 x 32."""
    torch.manual_seed(0)
    network = Res2Net(TINY_ARCHITECTURE)
    for module in network.modules():  # untrained statistics would make all images alike
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    metadata = {
        "labels": ["ant", "bee", "cow", "doe", "eel", "fox"],
        "preprocessing": {"image_size": 32, "resize_size": 36},
    }
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(network.state_dict(), path, {"r2n": json.dumps(metadata)})
    return path


@pytest.fixture(scope="session")
def reference_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference weights of the default network in a file, which no test may change."""
    path = tmp_path_factory.mktemp("reference") / "reference.pth"
    torch.save(reference_state_dict(DEFAULT_NETWORK), path)
    return path


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., Path]:
    """A function that fills a folder with `count` different small JPEGs."""

    def fill(folder: Path, count: int, seed: int = 0) -> Path:
        random = np.random.default_rng(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            coarse.resize((50, 40)).save(folder / f"{number:05d}.jpg")
        return folder

    return fill


@pytest.fixture
def pictures(tmp_path: Path, make_pictures: Callable[..., Path]) -> Path:
    """A folder of twenty images."""
    return make_pictures(tmp_path / "pictures", 20)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run torch on one thread: small networks are slower on several busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep compiled networks for the session, in a cache folder that is not the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("R2N_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep weights, proxies and networks of this machine away from every test."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first use
    monkeypatch.delenv("R2N_WEIGHTS", raising=False)
    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", "http://127.0.0.1:9/nowhere")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """torch.hub's folder, empty."""
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder
