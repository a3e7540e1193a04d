"""A layer of the backbone: the shell around its mixer, residuals and norms, a channel MLP where the protocol has one.

Axes: B batch, L length, D width, G blocks (I inputs and O outputs each).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.config import Backbone as Settings
from bench.config import Shell as ShellSettings
from bench.directions import directed
from bench.mixers.base import Mixer
from bench.shells.base import Shell, find


class DropPath(nn.Module):
    """Leaves out a residual branch for whole examples, with probability `rate`, in training (stochastic depth)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x_BLD: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x_BLD
        keep_B11 = torch.rand(len(x_BLD), 1, 1, device=x_BLD.device) >= self.rate
        return x_BLD * keep_B11 / (1 - self.rate)


class BlockLinear(nn.Module):
    """A linear map whose matrix is block-diagonal, with I / G inputs and O / G outputs a block."""

    def __init__(self, inputs: int, outputs: int, blocks: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, outputs // blocks, inputs // blocks))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLGI = x_BLD.unflatten(-1, (len(self.weight), -1))
        y_BLD = torch.einsum("blgi,goi->blgo", x_BLGI, self.weight.to(x_BLD.dtype)).flatten(-2)
        return y_BLD if self.bias is None else y_BLD + self.bias.to(y_BLD.dtype)


class GatedMLP(nn.Module):
    """down(gelu(a) * b), with a and b the two halves of up(x); `up` has no bias. As in M2-BERT."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x_BLD: Tensor) -> Tensor:
        a_BLD, b_BLD = self.up(x_BLD).chunk(2, dim=-1)
        return self.down(F.gelu(a_BLD) * b_BLD)


def channel_mlp(settings: Settings) -> nn.Module:
    """Two linear maps with a GELU between them, in the form that the protocol asks for."""

    def linear(inputs: int, outputs: int, bias: bool) -> nn.Module:
        if settings.mlp_blocks > 1:
            return BlockLinear(inputs, outputs, settings.mlp_blocks, bias)
        return nn.Linear(inputs, outputs, bias=bias)

    width, hidden = settings.width, settings.channel_mlp
    if settings.mlp_gated:
        return GatedMLP(linear(width, 2 * hidden, False), linear(hidden, width, True))
    return nn.Sequential(linear(width, hidden, True), nn.GELU(), linear(hidden, width, True))


class Layer(nn.Module):
    """The shell with its residual, if it has one, and a channel MLP with its own if the protocol has one."""

    def __init__(
        self,
        settings: Settings,
        shell: ShellSettings,
        drop_path: float,
        make_mixer: Callable[[], Mixer],
        order: int | None,
    ):
        super().__init__()
        self.pre, cls = settings.norm == "pre", find(shell)
        self.norm = nn.LayerNorm(settings.width, eps=settings.norm_eps) if cls.residual else None
        self.shell = directed(cls, settings.width, shell, make_mixer, order)
        self.hidden_dropout = settings.hidden_dropout
        self.drop_path = DropPath(drop_path)
        self.mlp = None
        if settings.channel_mlp:
            self.mlp_norm = nn.LayerNorm(settings.width, eps=settings.norm_eps)
            self.mlp = channel_mlp(settings)

    def hands_on(self, device: str) -> bool:
        """Whether it reads and gives autocast's copy of the stream too, so that no pass over memory is for it alone:
        with a fused shell, and one only (directions 'one' and 'concat'), and the norm after the residual."""
        fused = isinstance(self.shell, Shell) and self.shell.backend == "triton" and self.norm is not None
        return fused and not self.pre and torch.is_autocast_enabled(device)

    def forward(
        self, x_BLD: Tensor, segments_BL: Tensor, narrow_BLD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream, and autocast's copy of it if it came with one, as it may where the layer `hands_on`."""

        def shell(x_BLD: Tensor, narrow_BLD: Tensor | None) -> Tensor:
            return self.shell(x_BLD, segments_BL, *([] if narrow_BLD is None else [narrow_BLD]))

        def mlp(x_BLD: Tensor, narrow_BLD: Tensor | None) -> Tensor:
            return self.mlp(x_BLD if narrow_BLD is None else narrow_BLD)

        if self.norm is None:
            x_BLD = self.shell(x_BLD, segments_BL)
        else:
            x_BLD, narrow_BLD = self.residual(x_BLD, narrow_BLD, self.norm, shell)
        return (x_BLD, narrow_BLD) if self.mlp is None else self.residual(x_BLD, narrow_BLD, self.mlp_norm, mlp)

    def residual(
        self,
        x_BLD: Tensor,
        narrow_BLD: Tensor | None,
        norm: nn.LayerNorm,
        branch: Callable[[Tensor, Tensor | None], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """With a copy, sum and norm are one operator, which makes the next."""
        if narrow_BLD is not None:
            y_BLD = self.dropped(branch(x_BLD, narrow_BLD))
            return torch.ops.mixerbench.add_norm(x_BLD, y_BLD, norm.weight, norm.bias, norm.eps)
        x_BLD = x_BLD + self.dropped(branch(norm(x_BLD) if self.pre else x_BLD, None))
        return (x_BLD if self.pre else norm(x_BLD)), None

    def dropped(self, y_BLD: Tensor) -> Tensor:
        if self.hidden_dropout:
            y_BLD = F.dropout(y_BLD, self.hidden_dropout, self.training)
        return self.drop_path(y_BLD)
