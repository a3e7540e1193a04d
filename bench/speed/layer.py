"""What a cell times: one layer of the protocol's backbone around one mixer, at one length, forward and backward.

Built from the classes of training with the same initial values (those of layer 0 at seed 0); the input and the gradient
that comes in are random; parameters' gradients are made anew in each step, as training makes them.
Axes: B batch, L length, D width.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import backbone, capacity, registry
from bench.config import Run
from bench.layers import BlockLinear
from bench.mixers.base import Grant, Mixer
from bench.seeds import Streams
from bench.shells.base import Shell, owned_by_mixer
from bench.speed.naive import materialise
from bench.tasks.base import Places, Spec

DOCUMENTS = 4  # in a packed row, and in the cycle of lengths of padded rows


def grant_of(run: Run, length: int, segments: str) -> Grant:
    """What the mixer gets at this length; the protocol's own length and packing do not matter here."""
    task = registry.make_task(run, Places(data=None, cache=None))
    granted = registry.grant(run, task, registry.mixer_args(run))
    return dataclasses.replace(granted, length=length, packed=segments == "packed")


def unfit(run: Run, length: int, segments: str) -> str:
    return registry.mixer_class(run.mixer.name).unfit(grant_of(run, length, segments), registry.mixer_args(run))


def model_of(run: Run, length: int, segments: str, backend: str) -> backbone.Backbone:
    """A backbone of one layer with next to nothing around it, without values."""
    granted = grant_of(run, length, segments)
    spec = Spec("patches", 1, 0, length, 1, pooled=True, tied=False, packed=granted.packed, group=1)
    alone = dataclasses.replace(run.protocol.backbone, layers=1, positions=False)
    protocol = dataclasses.replace(run.protocol, backbone=alone)
    return capacity.granted_model(run, protocol, spec, granted, backend)


def rows_of(segments: str, batch: int, length: int) -> Tensor:
    """Segments BL: all real; or a half to all of each row; or four documents of equal length."""
    place_L = torch.arange(length)
    if segments == "packed":
        return (1 + place_L * DOCUMENTS // length).expand(batch, -1).contiguous()
    if segments == "padded":
        real_B1 = (length - torch.arange(batch) % DOCUMENTS * length // (2 * DOCUMENTS - 2))[:, None]
        return (place_L < real_B1).long()
    return torch.ones(batch, length, dtype=torch.long)


@dataclass
class Subject:
    """A layer with its input. `step` is what is timed. Where layers hand on autocast's copy of the stream, the input
    and the gradient that comes in are two each, as they are for all layers of a model but the last."""

    layer: nn.Module
    x_BLD: Tensor
    narrow_BLD: Tensor | None
    segments_BL: Tensor
    gradients: list[Tensor]
    bf16: bool

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(self.x_BLD.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.layer(self.x_BLD, self.segments_BL, self.narrow_BLD)

    def step(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        self.x_BLD.grad = None
        if self.narrow_BLD is not None:
            self.narrow_BLD.grad = None
        torch.autograd.backward(self.outputs()[: len(self.gradients)], self.gradients)


def subject_of(run: Run, length: int, batch: int, segments: str, backend: str, device: str) -> Subject:
    model = model_of(run, length, segments, backend)
    backbone.initialise(model, Streams(0, 0), registry.salt(run))
    generator = torch.Generator(device).manual_seed(Streams(0, 0).torch_seed("speed"))
    shape = (batch, length, run.protocol.backbone.width)
    x_BLD, gradient_BLD = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    layer, bf16 = model.layers[0].to(device).train(), run.protocol.precision == "bf16"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        hands_on = layer.hands_on(device)
    narrow_BLD = x_BLD.to(torch.bfloat16).requires_grad_() if hands_on else None
    gradients = [gradient_BLD, gradient_BLD.to(torch.bfloat16)] if hands_on else [gradient_BLD]
    segments_BL = rows_of(segments, batch, length).to(device)
    return Subject(layer, x_BLD.requires_grad_(), narrow_BLD, segments_BL, gradients, bf16)


def prepare(subject: Subject, way: str, compiled: bool) -> None:
    """Make the layer compute in one of the ways; a graph is captured later, when it is warm."""
    if way == "naive":
        materialise(subject.layer)
    elif way != "eager" and compiled:
        subject.layer.compile(dynamic=False)  # as training does


def captured(subject: Subject):
    """The step as a CUDA graph; call what is returned. The layer must be warm."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        subject.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject.step()
    return graph.replay


# Counted on the meta device -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What a step of a layer amounts to, by rules that are equal for all mixers."""

    parameters: int
    mixer_parameters: int
    state: int | None
    flops: int
    traffic: int


def counts_of(run: Run, length: int, batch: int, segments: str) -> Counts:
    with torch.device("meta"):
        layer = model_of(run, length, segments, registry.mixer_class(run.mixer.name).backends[0]).layers[0]
    sizes = {name: p.numel() for name, p in layer.named_parameters()}
    return Counts(
        parameters=sum(sizes.values()),
        mixer_parameters=sum(n for name, n in sizes.items() if owned_by_mixer(name)),
        state=layer.shell.parts()[0][0].state_size,
        flops=flops_of(layer, length, batch),
        traffic=traffic_of(layer, length * batch, 2 if run.protocol.precision == "bf16" else 4),
    )


def flops_of(layer: nn.Module, length: int, batch: int) -> int:
    """Of one step: the linear maps and the mixers' own `flops`, times three, since backward is twice forward."""
    maps = (module for module in layer.modules() if isinstance(module, nn.Linear | BlockLinear))
    linear = sum(2 * module.weight.numel() for module in maps)
    mixers = sum(module.flops(length) for module in layer.modules() if isinstance(module, Mixer))
    return 3 * batch * (linear * length + mixers)


def traffic_of(layer: nn.Module, tokens: int, item: int) -> int:
    """Bytes that one step moves if each stage of the layer reads what it needs once and writes what it gives once.

    Stages: those of the shell (`moved`), residual with norm (in fp32), and the two maps and the GELU of a channel MLP.
    Backward moves twice as much; parameters are read twice and their gradients written once, in fp32.
    """
    numbers, wide = 0, 0
    for shell in (module for module in layer.modules() if isinstance(module, Shell)):
        numbers += shell.moved()
        wide = 3 * shell.width
    if layer.mlp is not None:
        first = next(m for m in layer.mlp.modules() if isinstance(m, nn.Linear | BlockLinear))
        hidden = first.weight.shape[:-1].numel()
        numbers += 2 * shell.width + 4 * hidden
        wide *= 2
    return 3 * tokens * (item * numbers + 4 * wide) + 12 * sum(p.numel() for p in layer.parameters())
