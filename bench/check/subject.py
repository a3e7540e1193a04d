"""What a check is about: how to make a mixer, what it declares, and inputs for it, all from fixed seeds.

Axes: B batch, L length, H heads, P head width, K feature channels of one kind.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bench.mixers.base import Features, Grant, Mixer

WIDTH = 4  # P
FLOOR = 1e-4  # differences are relative to the largest entry, or to this share of all where it is smaller


class Row(NamedTuple):
    """One line of the table: a property, its measured figure, 'pass', 'fail' or 'skip', and the rule in words."""

    property: str
    figure: float | None
    verdict: str
    note: str


class Failed(Exception):
    """A property that does not hold although no number says so (a wrong shape, a missing refusal)."""


def always_fit(grant: Grant) -> str:
    return ""


@dataclass(frozen=True)
class Declared:
    """What a mixer says of itself.

    `sam`: built from the tokens; `unfit`: why it cannot run with a grant; `backends`: names of other ways to compute
    `forward` and what builds the mixer with each; `aligned`: if sam, built from the tokens at an entry's own places.
    """

    sam: bool
    heads: int
    unfit: Callable[[Grant], str] = always_fit
    backends: tuple[tuple[str, Callable[[Grant], Mixer]], ...] = ()
    aligned: bool = True


@dataclass(frozen=True)
class Subject:
    """A mixer under test and the sizes it is tested at."""

    make: Callable[[Grant], Mixer]
    declared: Declared
    length: int  # of the exact rows; longer than a chunk of a scan
    long: int  # of the rows that measure rounding
    slow_gradcheck: bool
    device: str  # cpu or cuda
    results: dict = field(default_factory=dict, compare=False)  # kept by rows that share them

    def grant(self, length: int, packed: bool, width: int = WIDTH) -> Grant:
        return Grant(heads=self.declared.heads, head_width=width, length=length, packed=packed)

    def mixer(self, length: int, packed: bool, dtype: torch.dtype = torch.float64) -> Mixer:
        """A fresh mixer with every parameter at its initial value; equal for equal arguments."""
        return self.initialised(self.make(self.grant(length, packed)), dtype)

    def initialised(self, mixer: Mixer, dtype: torch.dtype = torch.float64) -> Mixer:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                parameter.copy_(mixer.initial(name, generator))
        return mixer.to(self.device, dtype)

    def inputs(self, mixer: Mixer, segments_BL: Tensor, seed: int = 1) -> tuple[Tensor, Features]:
        """Standard normal v and features in fp64."""
        generator = torch.Generator().manual_seed(seed)
        widths = [getattr(mixer.wants, field.name) for field in dataclasses.fields(mixer.wants)]
        shapes = [(mixer.grant.heads, mixer.grant.head_width), *((width,) for width in widths)]
        v, *kinds = (
            torch.randn(*segments_BL.shape, *shape, generator=generator, dtype=torch.float64).to(self.device)
            for shape in shapes
        )
        return v, Features(*kinds)

    def documents(self, rows: list[list[int]], length: int) -> Tensor:
        return documents(rows, length).to(self.device)

    def layouts(self, packed: bool, length: int) -> Tensor:
        return layouts(packed, length).to(self.device)

    def structure(self) -> tuple[str, ...]:
        return self.make(self.grant(self.length, False)).structure()


def documents(rows: list[list[int]], length: int) -> Tensor:
    """segments_BL of rows given as lengths of documents; padding fills up."""
    out_BL = torch.zeros(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(rows):
        at = 0
        for number, n in enumerate(row, 1):
            out_BL[b, at : at + n] = number
            at += n
    return out_BL


def layouts(packed: bool, length: int) -> Tensor:
    """A full row, a padded one, an empty one; packed: many documents, borders on, beside and across multiples of 64."""
    if not packed:
        return documents([[length], [length // 2 + 3], [], [1]], length)
    half = length // 2
    many = [half - 11, 1, 2, length - half - 16, *[2] * 12]
    return documents([many, [64, 64], [], [1, length - 2, 1]], length)


def apply(m_BHLL: Tensor, v_BLHP: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhp->bihp", m_BHLL, v_BLHP)


def by_matrix(mixer: Mixer, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
    """What `forward` must be: M v, or the entrywise product of the M v of all factors if it is not linear in v."""
    batch, length, heads, _ = v_BLHP.shape
    y_BLHP = torch.ones_like(v_BLHP)
    for m_BHLL in mixer.matrices(v_BLHP, features, segments_BL):
        same_shape(m_BHLL, (batch, heads, length, length), "matrix")
        y_BLHP = y_BLHP * apply(m_BHLL, v_BLHP)
    return y_BLHP


def factors(mixer: Mixer, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
    """M_BHLL; the factors of a mixer that is not linear in v one after another, as if they were heads."""
    return torch.cat(mixer.matrices(v_BLHP, features, segments_BL), dim=1)


def not_linear(mixer: Mixer) -> bool:
    return "not linear" in mixer.structure()


def pushed(mixer: Mixer, v_1LHP: Tensor, features: Features, segments_1L: Tensor) -> Tensor:
    """M_HLL of one row as `forward` applies it: the unit vectors pushed through, so `matrix` has no say.

    Of a mixer that is not linear in v: the derivative of y_i by v_j at the given v, in the first channel of each head.
    """
    length, heads = v_1LHP.shape[1:3]
    if not_linear(mixer):
        # Row i of the batch is asked for y_i only, so that one gradient of the sum holds all rows of the derivative.
        v_BLHP = v_1LHP.expand(length, -1, -1, -1).detach().clone().requires_grad_()
        repeated = Features(*(x.expand(length, -1, -1) for x in features))
        y_BLHP = mixer(v_BLHP, repeated, segments_1L.expand(length, -1))
        (m_BLHP,) = torch.autograd.grad(y_BLHP[..., 0].diagonal(dim1=0, dim2=1).sum(), v_BLHP)
        return m_BLHP[..., 0].permute(2, 0, 1)
    units_BLHP = torch.eye(length).to(v_1LHP)[:, :, None, None].repeat(1, 1, heads, v_1LHP.shape[3])
    repeated = Features(*(x.expand(length, -1, -1) for x in features))
    with torch.no_grad():
        y_BLHP = mixer(units_BLHP, repeated, segments_1L.expand(length, -1))
    return y_BLHP[..., 0].permute(2, 1, 0)


def gradients(
    mixer: Mixer, way: Callable, v_BLHP: Tensor, features: Features, segments_BL: Tensor, seed: int = 2
) -> dict[str, Tensor]:
    """The value of `way` and all gradients of a fixed random projection of it, by name."""
    leaves = {"v": v_BLHP, **features._asdict()}
    leaves = {key: x.detach().clone().requires_grad_() for key, x in leaves.items()}
    y_BLHP = way(leaves["v"], Features(**{key: leaves[key] for key in features._fields}), segments_BL)
    same_shape(y_BLHP, v_BLHP.shape, "forward")
    leaves |= dict(mixer.named_parameters())
    if not y_BLHP.requires_grad:
        raise Failed("the output does not depend on anything that learns")
    found = torch.autograd.grad((y_BLHP * probe(y_BLHP, seed)).sum(), list(leaves.values()), allow_unused=True)
    grads = {key: torch.zeros_like(x) if g is None else g for (key, x), g in zip(leaves.items(), found, strict=True)}
    return {"value": y_BLHP.detach(), **grads}


def probe(y_BLHP: Tensor, seed: int = 2) -> Tensor:
    """Fixed random numbers that make one number of an output."""
    return torch.randn(y_BLHP.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y_BLHP)


def same_shape(x: Tensor, shape, what: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise Failed(f"{what} returns the shape {tuple(x.shape)}, expected {tuple(shape)}")


def differ(x: Tensor, y: Tensor, scale: float = 0.0) -> float:
    """Largest difference relative to the largest entry of y (to `scale` if that is larger); NaN if there is one."""
    same_shape(x, y.shape, "a result")
    if not y.numel():
        return 0.0
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).abs().amax()) / max(float(y.abs().amax()), scale, 1e-300)


def worst(figures: dict[str, float]) -> tuple[float, str]:
    """The largest figure, NaN above all, and its name."""
    name = max(figures, key=lambda key: float("inf") if figures[key] != figures[key] else figures[key])
    return figures[name], name


def at_most(property: str, figures: dict[str, float], bound: float, rule: str) -> Row:
    """A row that passes if every figure is at most `bound`; the note names the worst (NaN fails)."""
    figure, name = worst(figures)
    good = figure <= bound
    note = f"{rule}; at most {bound:g}" + ("" if good else f": {name}")
    return Row(property, figure, "pass" if good else "fail", note)


def at_least(property: str, figures: dict[str, float], bound: float, rule: str) -> Row:
    """A row that passes if every figure is above `bound`; the note names the smallest (NaN fails)."""
    name = min(figures, key=lambda key: float("-inf") if figures[key] != figures[key] else figures[key])
    good = figures[name] > bound
    note = f"{rule}; above {bound:g}" + ("" if good else f": {name}")
    return Row(property, figures[name], "pass" if good else "fail", note)
