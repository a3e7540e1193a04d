"""The row about sequence alignment, in both published definitions.

Axes: B batch, L length, H heads; batch row k has the features of token k changed.
"""

import torch
from torch import Tensor

from bench.check.subject import Row, Subject, documents
from bench.mixers.base import Features

LENGTH = 9
SAME = 1e-9


def aligned(subject: Subject) -> Row:
    """Which entries of M move with the features of one token k.

    strict (Def. 2.2): a contiguous diagonal block is built from its own tokens, so M_ij moves only for k from i to j.
    leading: an upper left block is built from its own tokens, so M_ij moves only for k up to the larger of i and j.
    A normaliser sees the whole row. So a definition also counts as held up to one factor a row: for each k and row i,
    the entries that must not move may all change by one common factor. The row fails only if a SAM mixer holds neither
    definition even so. The figure is the largest forbidden move, relative to the largest entry, under the best reading.
    """
    if not subject.declared.sam:
        return Row("sequence alignment", None, "skip", "not SAM")
    mixer = subject.mixer(LENGTH, False)
    segments_BL = documents([[LENGTH]] * LENGTH, LENGTH)
    v_BLHP, features = subject.inputs(mixer, segments_BL[:1])
    others = subject.inputs(mixer, segments_BL[:1], seed=3)[1]
    here_BL1 = torch.eye(LENGTH, dtype=torch.bool)[:, :, None]
    changed = Features(*(torch.where(here_BL1, o, x) for x, o in zip(features, others, strict=True)))
    with torch.no_grad():
        m_1HLL = mixer.matrix(v_BLHP, features, segments_BL[:1])
        n_BHLL = mixer.matrix(v_BLHP.expand(LENGTH, -1, -1, -1), changed, segments_BL)
    k, i, j = torch.meshgrid(*[torch.arange(LENGTH)] * 3, indexing="ij")
    outside = {
        "strict": (k < torch.minimum(i, j)) | (k > torch.maximum(i, j)),
        "leading": k > torch.maximum(i, j),
    }
    moves = {}
    for factor in ("", " up to one factor a row (its normaliser)"):
        for name, fixed_BLL in outside.items():
            moves[name + factor] = moved(m_1HLL, n_BHLL, fixed_BLL, bool(factor))
    holds = [name for name, move in moves.items() if move <= SAME]
    listed = ", ".join(f"{name} {move:.1e}" for name, move in moves.items() if len(name) < 8)
    if not holds:
        return Row("sequence alignment", min(moves.values()), "fail", f"neither definition holds ({listed})")
    both = "strict and leading definitions hold" if holds[0].startswith("strict") else f"{holds[0]} definition holds"
    if holds[0].startswith("leading") and any(name.startswith("strict") for name in holds):
        both = "leading definition holds, strict up to one factor a row"
    elif "factor" in holds[0] and holds[0].startswith("strict"):
        both = "strict and leading definitions hold up to one factor a row (its normaliser)"
    return Row("sequence alignment", moves[holds[0]], "pass", f"{both}; raw moves: {listed}")


def moved(m_1HLL: Tensor, n_BHLL: Tensor, fixed_BLL: Tensor, free_factor: bool) -> float:
    """The largest change of entries that must stay, after the best common factor of each row if one is free."""
    fixed_B1LL = fixed_BLL[:, None].to(m_1HLL)
    old, new = m_1HLL * fixed_B1LL, n_BHLL * fixed_B1LL
    if free_factor:
        size = (old * old).sum(-1, keepdim=True)
        old = old * ((old * new).sum(-1, keepdim=True) / torch.where(size > 0, size, 1.0))
    return float((new - old).abs().amax() / m_1HLL.abs().amax())
