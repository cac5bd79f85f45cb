"""The network rewritten for inference by torch, on any device.

Batch norms are folded into their convolutions, memory is channels_last, activations work in
place, and nothing runs after the deepest requested layer.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from r2ncli.architectures import Preprocessing
from r2ncli.model import Res2Net, conv_bn_pairs


class FoldedNetwork:
    """A copy of a Res2Net for inference; several threads may call it at once.

    Parameters
    ----------
    network : Res2Net
        In eval mode, float32, on the CPU; it is copied, not changed.
    outputs : sequence of str
        Names of modules (`layer_shapes`) whose outputs are wanted.
    pool : str
        ``avg`` or ``max`` over height and width, or ``none``.
    preprocessing : Preprocessing
        Gives the mean and standard deviation; the batches decide the size.
    device, dtype
        Where it runs, and in which type.

    Attributes
    ----------
    modules : Res2Net
        The rewritten network that it runs.
    """

    def __init__(
        self,
        network: Res2Net,
        outputs: Sequence[str],
        pool: str,
        preprocessing: Preprocessing,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._outputs = tuple(outputs)
        self._pool = pool
        self._dtype = dtype
        self._captured = threading.local()
        fast = rewritten(network, outputs).to(device, dtype)
        self.modules = fast.to(memory_format=torch.channels_last)
        self._shift, self._scale = 255 * torch.tensor(  # in grey levels
            (preprocessing.mean, preprocessing.std), dtype=torch.float32, device=device
        )
        for name in outputs:
            self.modules.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: self._capture(name, output)
            )

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the outputs by layer, float32 and contiguous, for uint8 pixels [N, H, W, 3].

        The pixels are on the network's device, and so are the outputs.
        """
        x = ((pixels - self._shift) / self._scale).to(self._dtype)
        self.modules(x.permute(0, 3, 1, 2))  # NHWC in memory is channels_last
        captured = vars(self._captured)  # of this thread; an output that is given is dropped
        return {name: captured.pop(name) for name in self._outputs}

    def _capture(self, name: str, output: Tensor) -> None:
        """Keep a copy of an output, because the next activation works in place."""
        full = output.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        vars(self._captured)[name] = pooled(full, self._pool)


def pooled(full: Tensor, pool: str) -> Tensor:
    """Pool a feature map [N, C, H, W] over its last two axes; return others unchanged."""
    if full.ndim != 4 or pool == "none":
        return full
    return full.mean((2, 3)) if pool == "avg" else full.amax((2, 3))


def rewritten(network: Res2Net, outputs: Sequence[str]) -> Res2Net:
    """Return a copy of `network` for inference; modules named in `outputs` give the same values."""
    fast = folded(network, {_maker(network, name) for name in outputs})
    for module in fast.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    children = [name for name, _ in fast.named_children()]
    deepest = max(children.index(name.partition(".")[0]) for name in outputs)
    for name in children[deepest + 1 :]:
        fast.set_submodule(name, nn.Identity())
    return fast


def folded(network: Res2Net, unfolded: Collection[str] = ()) -> Res2Net:
    """Return a copy of `network` (in eval mode) with batch norms folded into convolutions.

    The convolutions named in `unfolded`, whose own outputs are wanted, stay as they are.
    """
    network = copy.deepcopy(network)
    for convolution, norm in conv_bn_pairs(network):
        if convolution not in unfolded:
            conv = cast(nn.Conv2d, network.get_submodule(convolution))
            bn = cast(nn.BatchNorm2d, network.get_submodule(norm))
            network.set_submodule(convolution, fuse_conv_bn_eval(conv, bn))
            network.set_submodule(norm, nn.Identity())
    return network


def _maker(network: Res2Net, name: str) -> str:
    """Return the name of the module that computes the output of `name`: a sequence's last one."""
    module = network.get_submodule(name)
    if not isinstance(module, nn.Sequential):
        return name
    return _maker(network, f"{name}.{len(module) - 1}")
