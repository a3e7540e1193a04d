"""The backbone: embedding, layers around a mixer, head. It gets a factory of mixers and so cannot branch on one.

It reads the task's Spec and the protocol, nothing else. Every parameter is drawn from a stream keyed by its name.
Axes: B batch, L length, D width, T output positions, C outputs, F values of a patch.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import Refusal
from bench.config import Backbone as Settings
from bench.config import Protocol
from bench.config import Shell as ShellSettings
from bench.kernels import require_triton
from bench.layers import BlockLinear, Layer
from bench.mixers.base import Mixer
from bench.seeds import Streams
from bench.shells.base import Shell, owned_by_mixer
from bench.tasks.base import Batch, Spec


class Embedding(nn.Module):
    """Tokens or patches, plus learned positions and token types where asked for; LN and dropout."""

    def __init__(self, spec: Spec, settings: Settings):
        super().__init__()
        if spec.kind == "tokens":
            rows = math.ceil(spec.symbols / settings.pad_symbols) * settings.pad_symbols
            self.tokens = nn.Embedding(rows, settings.width)
        else:
            self.patches = nn.Linear(spec.symbols, settings.width)
        self.kind = spec.kind
        self.types = nn.Embedding(spec.types, settings.width) if spec.types else None
        self.positions = nn.Embedding(position_rows(spec, settings), settings.width) if settings.positions else None
        self.norm = nn.LayerNorm(settings.width, eps=settings.norm_eps)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, batch: Batch) -> Tensor:
        return self.both(batch, None)[0]

    def both(self, batch: Batch, narrow: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """What the layers get, and a copy of it in another dtype if one is given."""
        drops = self.training and self.dropout.p > 0
        x_BLD = self.tokens(batch["tokens"]) if self.kind == "tokens" else self.patches(batch["patches"])
        x_BLD, narrow_BLD = self.placed(x_BLD, batch.get("types"), None if drops else narrow)
        if drops:
            x_BLD = self.dropout(x_BLD)
            narrow_BLD = None if narrow is None else x_BLD.to(narrow)
        return x_BLD, narrow_BLD

    def placed(
        self, x_BLD: Tensor, types_BL: Tensor | None, narrow: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """With types and positions, normalised. All that torch.compile may have: no sum in it depends on an order."""
        if self.types is not None:
            x_BLD = x_BLD + of_few(self.types.weight, types_BL)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions.weight[: x_BLD.shape[1]]
        x_BLD = self.norm(x_BLD)
        return x_BLD, None if narrow is None else x_BLD.to(narrow)


def of_few(weight_ND: Tensor, index_BL: Tensor) -> Tensor:
    """Rows of a table of N. Where each is asked for by thousands of tokens, torch's lookup adds up their gradients on
    a GPU in an order that changes: nothing else differed in the first step of two runs. A masked sum repeats.
    """
    x_BLD = weight_ND[0].expand(*index_BL.shape, -1)
    for n in range(1, len(weight_ND)):
        x_BLD = torch.where(index_BL[..., None] == n, weight_ND[n], x_BLD)
    return x_BLD


def position_rows(spec: Spec, settings: Settings) -> int:
    """Rows of the table of learned positions, which a fine-tuning on longer rows shares with its parent."""
    if 0 < settings.position_rows < spec.length:
        raise Refusal(
            f"protocol.backbone.position_rows must be 0 or at least the task's length {spec.length}, "
            f"got {settings.position_rows}"
        )
    return settings.position_rows or spec.length


class TiedHead(nn.Module):
    """BERT's masked-LM head: linear map, GELU, LN, then the token embedding itself as decoder, with a bias."""

    def __init__(self, settings: Settings, rows: int):
        super().__init__()
        self.transform = nn.Linear(settings.width, settings.width)
        self.norm = nn.LayerNorm(settings.width, eps=settings.norm_eps)
        self.bias = nn.Parameter(torch.empty(rows))

    def initial(self, name: str, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.bias.shape)

    def forward(self, x: Tensor, decoder: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.transform(x))), decoder, self.bias)


class Backbone(nn.Module):
    def __init__(
        self,
        spec: Spec,
        settings: Settings,
        shell: ShellSettings,
        make_mixer: Callable[[], Mixer],
        order: int | None,
    ):
        super().__init__()
        self.spec, self.settings, self.fused = spec, settings, False
        self.mirrored = shell.directions != "one"  # every second mixer gets documents reversed
        self.embedding = Embedding(spec, settings)
        rates = [settings.drop_path * i / max(1, settings.layers - 1) for i in range(settings.layers)]
        self.layers = nn.ModuleList(Layer(settings, shell, rate, make_mixer, order) for rate in rates)
        self.norm = nn.LayerNorm(settings.width, eps=settings.norm_eps) if settings.norm == "pre" else nn.Identity()
        self.tied = settings.tied and spec.tied
        if spec.pooled and settings.pooling == "first":
            self.pooler = nn.Linear(settings.width, settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = (
            TiedHead(settings, self.embedding.tokens.num_embeddings)
            if self.tied
            else nn.Linear(settings.width, spec.outputs)
        )

    def parts(self) -> list[tuple[Mixer, Tensor]]:
        """Each mixer and the fixed scale of its output, in the order of their calls: one a layer and direction."""
        return [part for layer in self.layers for part in layer.shell.parts()]

    def hidden(self, batch: Batch) -> Tensor:
        device = batch["segments"].device.type
        narrow = torch.get_autocast_dtype(device) if self.layers[0].hands_on(device) else None
        x_BLD, narrow_BLD = self.embedding.both(batch, narrow)
        for layer in self.layers:
            x_BLD, narrow_BLD = layer(x_BLD, batch["segments"], narrow_BLD)
        return self.norm(x_BLD)

    def forward(self, batch: Batch) -> Tensor:
        """Outputs: BC for a pooled task, else BTC at the batch's `positions`."""
        return self.outputs(self.read(batch))

    def read(self, batch: Batch) -> Tensor:
        """What the head gets: BD for a pooled task, else BTD at the batch's `positions`."""
        x_BLD = self.hidden(batch)
        if self.spec.pooled:
            return self.dropout(self.pool(x_BLD, batch["segments"]))
        return x_BLD.gather(1, batch["positions"][..., None].expand(-1, -1, x_BLD.shape[-1]))

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(x, self.embedding.tokens.weight) if self.tied else self.head(x)

    def pool(self, x_BLD: Tensor, segments_BL: Tensor) -> Tensor:
        if self.settings.pooling == "first":
            return torch.tanh(self.pooler(x_BLD[:, 0]))
        real_BL1 = (segments_BL > 0).to(x_BLD.dtype)[..., None]
        return (x_BLD * real_BL1).sum(1) / real_BL1.sum(1).clamp(min=1)


def make(spec: Spec, protocol: Protocol, make_mixer: Callable[[], Mixer], order: int | None) -> Backbone:
    """A backbone without values (build under torch.device('meta') to have its shapes only).

    `order`: None, or what fixes the other token of its document from which each token gets its features (`misalign`).
    """
    return Backbone(spec, protocol.backbone, protocol.shell, make_mixer, order)


def fuse(model: Backbone) -> None:
    """Let every shell, and in training the loss, use fused operators; the mixers' backends are their own matter."""
    require_triton()
    from bench.kernels import add_norm, cross_entropy  # noqa: F401 of the layers and the loss, as torch.ops.mixerbench

    model.fused = True
    for part in model.modules():
        if isinstance(part, Shell):
            part.fuse()


@contextmanager
def plain(model: Backbone) -> Iterator[None]:
    """Shells and mixers on their plain backends inside, as on any machine."""
    parts = [part for part in model.modules() if isinstance(part, Mixer | Shell)]
    backends = [part.backend for part in parts]
    for part in parts:
        part.backend = part.backends[0] if isinstance(part, Mixer) else "torch"
    try:
        yield
    finally:
        for part, backend in zip(parts, backends, strict=True):
            part.backend = backend


def shared(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are the same tensors whatever the mixer, in order of name."""
    return ((n, p) for n, p in sorted(model.named_parameters()) if not owned_by_mixer(n))


def initialise(model: Backbone, streams: Streams, salt: int) -> None:
    """Draw every parameter on the host from the stream of its own name, so that none depends on another's draw.

    A salt other than 0 changes the streams of what exists for the mixer only, and nothing else (an A/A arm).
    """
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{prefix}.{name}" if prefix else name
                purpose = f"parameter {full}" + (f" salt {salt}" if salt and owned_by_mixer(full) else "")
                generator = torch.Generator().manual_seed(streams.torch_seed(purpose))
                value = _initial(module, name, model.settings.init_std, generator)
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"initial value of {full} has shape {tuple(value.shape)}, wanted {tuple(parameter.shape)}"
                    )
                parameter.copy_(value)


def _initial(module: nn.Module, name: str, std: float, generator: torch.Generator) -> Tensor:
    shape = module.get_parameter(name).shape
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return torch.ones(shape) if name == "weight" else torch.zeros(shape)
    if isinstance(module, nn.Linear | nn.Embedding):
        return torch.empty(shape).normal_(std=std, generator=generator) if name == "weight" else torch.zeros(shape)
    if isinstance(module, BlockLinear):  # the variance of a sum over all inputs, as a dense map has it
        wide = std * len(module.weight) ** 0.5
        return torch.empty(shape).normal_(std=wide, generator=generator) if name == "weight" else torch.zeros(shape)
    if hasattr(module, "initial"):
        return module.initial(name, generator)
    raise TypeError(f"no rule for the initial values of {type(module).__name__}.{name}")


def shared_digest(model: nn.Module) -> str:
    """SHA-256 (16 hex digits) of names, shapes and values of all parameters outside the mixer."""
    total = hashlib.sha256()
    for name, parameter in shared(model):
        total.update(f"{name} {tuple(parameter.shape)}\n".encode())
        total.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def calibrate(model: Backbone, batch: Batch, target: float) -> list[tuple[float, float]]:
    """(|M v| / |v|, and its part that varies over tokens, |M v - mean over tokens| / |v|) of each mixer on `batch`.

    With a target above 0, each mixer's fixed scale is set so that the first figure reaches it, first layer first.
    """
    gains = []

    def measure(scale: Tensor, mixer: Mixer, inputs: tuple, output: Tensor) -> None:
        v_BLHP, _, segments_BL = inputs
        real_BL11 = (segments_BL > 0).double()[..., None, None]
        y_BLHP, v_norm = output.double() * real_BL11, (v_BLHP.double() * real_BL11).norm()
        mean_B1HP = y_BLHP.sum(1, keepdim=True) / real_BL11.sum(1, keepdim=True).clamp(min=1)
        varying = ((y_BLHP - mean_B1HP) * real_BL11).norm()
        gains.append((float(y_BLHP.norm() / v_norm), float(varying / v_norm)))
        if target:
            scale.fill_(target / max(gains[-1][0], 1e-12))

    handles = [mixer.register_forward_hook(partial(measure, scale)) for mixer, scale in model.parts()]
    was_training = model.training
    with torch.no_grad():
        model.eval()(batch)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return gains
