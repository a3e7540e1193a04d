"""`mixerbench show`: the matrices that a run's mixers apply to one input, to a file and a figure (report/matrices.py).

They are taken where the shell hands v and features to the mixer, in fp64 on the CPU with the plain backend, and each is
held against the mixer's own output for that very input. It knows no mixer's and no task's name.
Axes: N layers, B = 1 example, L length, H heads, P head width, F values of a patch.
"""

import dataclasses
import platform
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import Refusal, registry
from bench.backbone import Backbone
from bench.compose import make_where, parse_overrides, parse_run
from bench.config import Run, Where, listed, resolved
from bench.directions import mirror
from bench.mixers.base import Mixer
from bench.provenance import code_digests
from bench.recorded import anew, id_of, require_weights, run_of, training
from bench.report.matrices import Matrices, arrays_of, draw, places, save
from bench.run import build as build_run
from bench.run import calibrated, load_parent
from bench.store import Store
from bench.tasks.base import Batch, Spec, Task
from bench.weights import read_weights
from bench.where import results

AGREE = 1e-6  # of the largest output: forward and matrix @ v are the same map in fp64
READ_AT_ONCE = 64  # held-out examples of a batch while looking for one


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to show of a run."""

    part: str  # of the task's held-out sets, '' for the first
    example: int  # its number there, from 0, in the order of evaluation
    source: Path | None  # an .npz with the arrays of a batch of one, instead of an example
    layers: list[int] | None  # None: all
    heads: list[int] | None
    fresh: bool  # as training starts, not as it ended
    with_skip: bool


def show(words: list[str], wanted: Wanted, out: Path | None) -> list[Path]:
    """Write the .npz, .png and .pdf of a run given by its words or its id; their paths. Refuses before it writes."""
    run, where = asked(words, wanted.fresh)
    if unfit := registry.check(run):
        raise Refusal(f"there is no matrix to show: {unfit}")
    store = Store(results(where))
    if not wanted.fresh:
        require_weights(run, store, words)
    torch.set_num_threads(where.threads)
    model, task = model_of(run, where, store, wanted.fresh, words)
    batch, text, name = given(task, wanted)
    matrices = materialise(model, batch, wanted.layers, wanted.heads)
    about = {"trained": not wanted.fresh, "input": text, **about_run(run)}
    matrices = dataclasses.replace(matrices, names_L=names(task, batch), about=about | matrices.about)
    name += ("-fresh" if wanted.fresh else "") + ("-skip" if wanted.with_skip else "")
    stem = (out or store.root / "show" / run.id) / name
    figures = draw(matrices, stem, wanted.with_skip)
    save(matrices, stem.with_name(stem.name + ".npz"))
    return [stem.with_name(stem.name + ".npz"), *figures]


# Which run ----------------------------------------------------------------------------------------------------------


def asked(words: list[str], fresh: bool) -> tuple[Run, Where]:
    """The run that words of the verb `run` mean, or the start of a record's id (with where.… words)."""
    ids = [word for word in words if "=" not in word]
    if not ids:
        run, where = parse_run(words)
        return run, dataclasses.replace(where, backend="auto", device="cpu")
    for word in words:
        if word != ids[0] and not word.startswith("where."):
            raise Refusal(f"'{word}' beside the id {ids[0]}; allowed beside an id: where.…")
    where = make_where(parse_overrides([word for word in words if word != ids[0]]))
    store = Store(results(where))
    run = run_of(store.record(id_of(store, ids[0])), store, fresh)
    return run, dataclasses.replace(where, backend="auto", device="cpu")


# The model and its input --------------------------------------------------------------------------------------------


def model_of(run: Run, where: Where, store: Store, fresh: bool, words: list[str]) -> tuple[Backbone, Task]:
    """The model as training starts (the parent's weights, or initial values with calibrated gains) or ended; fp64."""
    built = build_run(run, where, "cpu")
    if not fresh:
        path, remedy = store.weights(run.id), f"restore it, or {training(run, store, words)}"
        weights = read_weights(path, remedy)
        try:
            built.model.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise Refusal(f"{path} does not hold the weights of this run ({first}); {remedy}") from None
    elif run.parent is not None:
        load_parent(built.model, weights_above(run, store, words), run)
    else:
        calibrated(built, run)
    return built.model.double().eval(), built.task


def weights_above(run: Run, store: Store, words: list[str]) -> dict[str, Tensor]:
    """Those that a run starts from."""
    path, again = store.weights(run.parent.id), anew(run, words)
    if not path.exists():
        missing = f"run {run.id} starts from the weights of run {run.parent.id}, which are not here"
        raise Refusal(f"{missing}; {again}" if again else missing)
    return read_weights(path, f"restore it, or {again}" if again else "restore it")


def given(task: Task, wanted: Wanted) -> tuple[Batch, str, str]:
    """(a batch of one, what it is in words, a name for files)."""
    if wanted.source is not None:
        return from_file(wanted.source, task), f"input {wanted.source.name}", f"input_{wanted.source.stem}"
    parts = task.held_out()
    part = wanted.part or parts[0]
    if part not in parts:
        raise Refusal(f"no held-out set '{part}'; there are: {listed(parts)}")
    seen = 0
    for batch in task.held_out_batches(part, READ_AT_ONCE):
        here = wanted.example - seen
        if 0 <= here < len(batch["segments"]):
            one = {key: value[here : here + 1] for key, value in batch.items()}
            return one, f"example {wanted.example} of {part}", f"{part}_{wanted.example}"
        seen += len(batch["segments"])
    raise Refusal(f"no example {wanted.example} in {part}; there are: 0 to {seen - 1}")


def from_file(path: Path, task: Task) -> Batch:
    """The arrays of an .npz as a batch of one; a Refusal unless they are what the task's own batches hold."""
    spec, arrays = task.spec(), arrays_of(path)
    needed = [spec.kind, "segments", *(["types"] if spec.types else [])]
    known = listed(needed)
    for name in needed:
        if name not in arrays:
            raise Refusal(f"{path} lacks the array '{name}'; wanted: {known}")
    for name in arrays:
        if name not in needed and name not in task.example(spec.group):
            raise Refusal(f"{path} holds an unknown array '{name}'; wanted: {known}")
    kept = {name: arrays[name] for name in needed}
    axes = {name: 2 if name == "patches" else 1 for name in needed}
    kept = {name: a[0] if a.ndim == axes[name] + 1 and len(a) == 1 else a for name, a in kept.items()}
    length = len(kept["segments"]) if kept["segments"].ndim else 0
    if not 1 <= length <= spec.length:
        raise Refusal(f"{path}: segments has {length} tokens; allowed: 1 to {spec.length}")
    for name, array in kept.items():
        shape = (length, spec.symbols) if name == "patches" else (length,)
        if array.shape != shape:
            raise Refusal(f"{path}: {name} has shape {array.shape}; wanted: {shape}, a leading 1 allowed")
        require_values(path, name, array, spec)
    require_documents(path, kept["segments"], spec.packed)
    whole = {name: a.astype(np.float64 if name == "patches" else np.int64) for name, a in kept.items()}
    return {name: torch.from_numpy(array)[None] for name, array in whole.items()}


def require_values(path: Path, name: str, array: np.ndarray, spec: Spec) -> None:
    """Refuse numbers of another kind or outside of what the task's may be."""
    if name == "patches":
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise Refusal(f"{path}: patches must be finite numbers")
        return
    if array.dtype.kind not in "iu":
        raise Refusal(f"{path}: {name} is {array.dtype}; wanted: whole numbers")
    below = {"tokens": spec.symbols, "types": spec.types, "segments": spec.length + 1}[name]
    if array.min() < 0 or array.max() >= below:
        raise Refusal(f"{path}: {name} has values from {array.min()} to {array.max()}; allowed: 0 to {below - 1}")


def require_documents(path: Path, segments_L: np.ndarray, packed: bool) -> None:
    """Refuse segments that are not 1, 2, ... (1 only, unless packed), each in one stretch, with 0 at the end only."""
    real = segments_L[: np.count_nonzero(segments_L)].astype(np.int64)
    steps = np.diff(real, prepend=0)
    if not len(real) or not real.all() or steps[0] != 1 or not np.isin(steps[1:], (0, 1) if packed else (0,)).all():
        rule = "1, 2, ... a document each" if packed else "1"
        raise Refusal(f"{path}: segments must be {rule}, then 0 for padding")


def names(task: Task, batch: Batch) -> np.ndarray:
    """Of the real tokens, '' each if the task has none."""
    real_L = batch["segments"][0].numpy() > 0
    found = task.words(batch["tokens"][0].numpy()[real_L]) if "tokens" in batch else []
    return np.array(found or [""] * int(real_L.sum()), dtype=np.str_)


# The matrices -------------------------------------------------------------------------------------------------------


def materialise(model: Backbone, batch: Batch, layers: list[int] | None, heads: list[int] | None) -> Matrices:
    """scale * M of the wanted layers and heads on the real tokens of a batch of one; names are left empty.

    Where the shell has two mixers, in two directions or not, the heads of the second follow those of the first.

    Raises Refusal for a mixer that is no linear map of v, and for one whose `forward` is not its `matrix`.
    """
    parts = model.parts()
    first, directions = parts[0][0], len(parts) // len(model.layers)
    if "not linear" in first.structure():
        raise Refusal("this mixer is not linear in v, so it has no matrix to show")
    layers = places("layer", layers, list(range(len(model.layers))))
    heads = places("head", heads, list(range(directions * first.grant.heads)))
    real_L = batch["segments"][0] > 0
    # A second direction's mixer gets every document reversed; what is drawn is in the order of the row again.
    back_L = mirror(batch["segments"])[0]
    found: list[Tensor] = []
    errors: list[float] = []

    def caught(mixer: Mixer, inputs: tuple, y_BLHP: Tensor) -> None:
        m_BHLL = mixer.matrix(*inputs)
        again_BLHP = torch.einsum("bhij,bjhp->bihp", m_BHLL, inputs[0])
        errors.append(float((again_BLHP - y_BLHP).abs().max() / y_BLHP.abs().max().clamp(min=1e-300)))
        m_HLL = m_BHLL[0][:, back_L][:, :, back_L] if model.mirrored and len(found) % directions else m_BHLL[0]
        found.append(m_HLL[:, real_L][:, :, real_L])

    handles = [mixer.register_forward_hook(caught) for mixer, _ in parts]
    with torch.no_grad():
        model.hidden({key: value.double() if key == "patches" else value for key, value in batch.items()})
    for handle in handles:
        handle.remove()
    largest = float(np.max(errors))  # NaN if one is
    if not largest < AGREE:
        raise Refusal(f"the mixer's forward is not its matrix (they differ by {largest:.1e}); see mixerbench check")
    scales_NH = torch.stack([scale.expand(first.grant.heads, 1)[:, 0] for _, scale in parts]).view(
        len(model.layers), -1
    )
    m_NHLL = torch.stack(found).view(len(model.layers), -1, *found[0].shape[1:]) * scales_NH[..., None, None]
    item = {"item": int(batch["items"][0])} if "items" in batch else {}
    return Matrices(
        m_NHLL=m_NHLL[layers][:, heads].numpy(),
        layers_N=np.array(layers, dtype=np.int64),
        heads_H=np.array(heads, dtype=np.int64),
        segments_L=batch["segments"][0][real_L].numpy(),
        names_L=np.array([], dtype=np.str_),
        about={"scales": scales_NH[layers][:, heads].tolist(), "agreement": largest, **item},
    )


def about_run(run: Run) -> dict:
    """What identifies the run and the code behind a file of matrices."""
    return {
        "id": run.id,
        "label": run.label,
        "mixer": run.mixer.name,
        "sam": run.mixer.args["sam"],
        "seed": run.seed,
        "skip": run.protocol.shell.skip,
        "run": resolved(run),
        "digests": code_digests(run),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
