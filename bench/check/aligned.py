"""The row about sequence alignment, in both published definitions.

Axes: B batch, one row a changed token, L length, H heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.check.subject import Row, Subject, factors
from bench.mixers.base import Features

SHORT = 9
SAME = 1e-9
BROKEN = 1e-2


def aligned(subject: Subject) -> Row:
    """Which entries of M move with the features of one token k: of every token of a short row, of some of a whole one.

    strict (Def. 2.2): a contiguous diagonal block is built from its own tokens, so M_ij moves only for k from i to j.
    leading: an upper left block is built from its own tokens, so M_ij moves only for k up to the larger of i and j.
    A normaliser sees the whole row. So a definition also counts as held up to one factor a row: for each k and row i,
    the entries that must not move may all change by one common factor. The row fails only if a SAM mixer holds neither
    definition even so; a control that is declared not aligned fails if it holds one. The figure is the largest
    forbidden move, relative to M's largest entry, in the best reading.
    """
    if not subject.declared.sam:
        return Row("sequence alignment", None, "skip", "not SAM")
    n = subject.length
    short, whole = moves(subject, SHORT, range(SHORT)), moves(subject, n, (0, 3, n // 3, 2 * n // 3 + 1, n - 1))
    best, said = [], []
    for name in short:
        plain, scaled = (max(x, y) for x, y in zip(short[name], whole[name], strict=True))
        if plain <= SAME:
            said.append(f"{name}: holds")
        elif scaled <= SAME:
            said.append(f"{name}: holds up to one factor a row, its normaliser (as it stands, moves {plain:.1e})")
        else:
            said.append(f"{name}: does not hold (moves {plain:.1e})")
        best.append(min(plain, scaled))
    if not subject.declared.aligned:
        verdict = "pass" if min(best) > BROKEN else "fail"
        return Row("sequence alignment", min(best), verdict, f"a control, must not hold; {'; '.join(said)}")
    verdict = "pass" if min(best) <= SAME else "fail"
    return Row("sequence alignment", min(best), verdict, "; ".join(said))


def moves(subject: Subject, length: int, tokens: Sequence[int]) -> dict[str, tuple[float, float]]:
    """By definition, the largest forbidden move, as it stands and up to one factor a row; batch row b changes token b's
    features."""
    mixer = subject.mixer(length, False)
    segments_BL = subject.documents([[length]] * len(tokens), length)
    v_BLHP, features = subject.inputs(mixer, segments_BL[:1])
    others = subject.inputs(mixer, segments_BL[:1], seed=3)[1]
    token_B11 = torch.tensor(tokens, device=subject.device)[:, None, None]
    here_BL1 = token_B11 == torch.arange(length, device=subject.device)[:, None]
    changed = Features(*(torch.where(here_BL1, o, x) for x, o in zip(features, others, strict=True)))
    with torch.no_grad():
        m_1HLL = factors(mixer, v_BLHP, features, segments_BL[:1])
        n_BHLL = factors(mixer, v_BLHP.expand(len(tokens), -1, -1, -1), changed, segments_BL)
    i_LL, j_LL = torch.meshgrid(*[torch.arange(length, device=subject.device)] * 2, indexing="ij")
    outside = {
        "strict": (token_B11 < torch.minimum(i_LL, j_LL)) | (token_B11 > torch.maximum(i_LL, j_LL)),
        "leading": token_B11 > torch.maximum(i_LL, j_LL),
    }
    return {
        name: tuple(moved(m_1HLL, n_BHLL, fixed_BLL, free_factor) for free_factor in (False, True))
        for name, fixed_BLL in outside.items()
    }


def moved(m_1HLL: Tensor, n_BHLL: Tensor, fixed_BLL: Tensor, free_factor: bool) -> float:
    """The largest change of entries that must stay, after the best common factor of each row if one is free."""
    fixed_B1LL = fixed_BLL[:, None].to(m_1HLL)
    old, new = m_1HLL * fixed_B1LL, n_BHLL * fixed_B1LL
    if free_factor:
        size = (old * old).sum(-1, keepdim=True)
        old = old * ((old * new).sum(-1, keepdim=True) / torch.where(size > 0, size, 1.0))
    return float((new - old).abs().amax() / m_1HLL.abs().amax())
