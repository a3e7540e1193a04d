"""The row about sequence alignment, in both published definitions.

Axes: B batch, L length, H heads; batch row k has the features of token k changed.
"""

import torch
from torch import Tensor

from bench.check.subject import Row, Subject, factors
from bench.mixers.base import Features

LENGTH = 9
SAME = 1e-9
BROKEN = 1e-2


def aligned(subject: Subject) -> Row:
    """Which entries of M move with the features of one token k.

    strict (Def. 2.2): a contiguous diagonal block is built from its own tokens, so M_ij moves only for k from i to j.
    leading: an upper left block is built from its own tokens, so M_ij moves only for k up to the larger of i and j.
    A normaliser sees the whole row. So a definition also counts as held up to one factor a row: for each k and row i,
    the entries that must not move may all change by one common factor. The row fails only if a SAM mixer holds neither
    definition even so; a control that is declared not aligned fails if it holds one. The figure is the largest
    forbidden move, relative to M's largest entry, in the best reading.
    """
    if not subject.declared.sam:
        return Row("sequence alignment", None, "skip", "not SAM")
    mixer = subject.mixer(LENGTH, False)
    segments_BL = subject.documents([[LENGTH]] * LENGTH, LENGTH)
    v_BLHP, features = subject.inputs(mixer, segments_BL[:1])
    others = subject.inputs(mixer, segments_BL[:1], seed=3)[1]
    here_BL1 = torch.eye(LENGTH, dtype=torch.bool, device=subject.device)[:, :, None]
    changed = Features(*(torch.where(here_BL1, o, x) for x, o in zip(features, others, strict=True)))
    with torch.no_grad():
        m_1HLL = factors(mixer, v_BLHP, features, segments_BL[:1])
        n_BHLL = factors(mixer, v_BLHP.expand(LENGTH, -1, -1, -1), changed, segments_BL)
    k, i, j = torch.meshgrid(*[torch.arange(LENGTH, device=subject.device)] * 3, indexing="ij")
    outside = {
        "strict": (k < torch.minimum(i, j)) | (k > torch.maximum(i, j)),
        "leading": k > torch.maximum(i, j),
    }
    moves, said = [], []
    for name, fixed_BLL in outside.items():
        plain, scaled = (moved(m_1HLL, n_BHLL, fixed_BLL, free_factor) for free_factor in (False, True))
        if plain <= SAME:
            said.append(f"{name}: holds")
        elif scaled <= SAME:
            said.append(f"{name}: holds up to one factor a row, its normaliser (as it stands, moves {plain:.1e})")
        else:
            said.append(f"{name}: does not hold (moves {plain:.1e})")
        moves.append(min(plain, scaled))
    if not subject.declared.aligned:
        verdict = "pass" if min(moves) > BROKEN else "fail"
        return Row("sequence alignment", min(moves), verdict, f"a control, must not hold; {'; '.join(said)}")
    verdict = "pass" if min(moves) <= SAME else "fail"
    return Row("sequence alignment", min(moves), verdict, "; ".join(said))


def moved(m_1HLL: Tensor, n_BHLL: Tensor, fixed_BLL: Tensor, free_factor: bool) -> float:
    """The largest change of entries that must stay, after the best common factor of each row if one is free."""
    fixed_B1LL = fixed_BLL[:, None].to(m_1HLL)
    old, new = m_1HLL * fixed_B1LL, n_BHLL * fixed_B1LL
    if free_factor:
        size = (old * old).sum(-1, keepdim=True)
        old = old * ((old * new).sum(-1, keepdim=True) / torch.where(size > 0, size, 1.0))
    return float((new - old).abs().amax() / m_1HLL.abs().amax())
