"""The conformance suite: `check_mixer` holds any mixer to what every mixer promises, one row a property.

Call it from your own tests; `mixerbench check` prints its rows. A row that raises is a row that fails.
"""

from collections.abc import Callable

from bench.check import algebra, aligned, backends, cost, derivatives, grants, inputs, isolation, lengths, numbers
from bench.check.subject import Declared, Failed, Row, Subject
from bench.mixers.base import Grant, Mixer

__all__ = ["Declared", "Row", "check_mixer", "subject_of"]

ROWS = (
    ("forward = matrix v, fp64", algebra.forward_fp64),
    ("forward = matrix v, fp32", algebra.forward_fp32),
    ("gradcheck", derivatives.entries),
    ("gradients of whole rows", derivatives.directions),
    ("mixes tokens", algebra.mixes_tokens),
    ("gradients at initialisation", derivatives.alive),
    ("initial values", numbers.initial),
    ("padding invariance", isolation.padding),
    ("segment isolation", isolation.segments),
    ("document alone", isolation.alone),
    ("batch independence", isolation.batch),
    ("data independence", isolation.data_dependence),
    ("linear in v", algebra.linear),
    ("shorter lengths", lengths.shorter),
    ("longer lengths", lengths.longer),
    ("granted length", lengths.granted_length),
    ("sequence alignment", aligned.aligned),
    ("structure", numbers.structure),
    ("gain", algebra.gain),
    ("bf16 error", numbers.bf16),
    ("bf16 gradients", backends.half_gradients),
    ("compiled", backends.compiled),
    ("backends", backends.backends),
    ("rounded features", inputs.rounded),
    ("extreme features", inputs.extreme),
    ("inputs only read", inputs.only_read),
    ("determinism", numbers.deterministic),
    ("heads", numbers.heads),
    ("heads allowed", grants.heads_allowed),
    ("odd grants", grants.odd),
    ("state", cost.state),
    ("cost", cost.cost),
)


def subject_of(make: Callable[[Grant], Mixer], declared: Declared, full: bool, device: str = "cpu") -> Subject:
    """The sizes of the quick level (at most 10 s a mixer on two cores) and of the full one (60 s)."""
    length, long = (260, 1040) if full else (132, 300)
    return Subject(make, declared, length, long, slow_gradcheck=full, device=device)


def check_mixer(
    make: Callable[[Grant], Mixer], declared: Declared, full: bool = False, device: str = "cpu"
) -> list[Row]:
    """All rows for the mixer that `make(grant)` builds (parameters need no values: `initial` gives them), on a device.

    Nothing is raised for a wrong mixer; a row's verdict is 'fail'.
    """
    subject = subject_of(make, declared, full, device)
    rows = []
    for name, measure in ROWS:
        try:
            found = measure(subject)
        except Failed as failed:
            found = Row(name, None, "fail", str(failed))
        except Exception as error:  # whatever a mixer raises is a finding
            first = (str(error).splitlines() or [""])[0]
            found = Row(name, None, "fail", f"{type(error).__name__}: {first}")
        rows += [found] if isinstance(found, Row) else found
    return rows
