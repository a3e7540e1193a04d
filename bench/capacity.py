"""The model of a run as every run builds it, and what it costs. Whoever needs a run's model or its capacity asks here.

Under torch.device('meta') a model has its shapes only: enough to count, no values are drawn.
"""

from bench import backbone, registry
from bench.config import Protocol, Run
from bench.mixers.base import Grant
from bench.record import Capacity
from bench.shells.base import owned_by_mixer
from bench.tasks.base import Spec, Task


def model_of(run: Run, task: Task, backend: str) -> backbone.Backbone:
    """A run's model without values."""
    granted = registry.grant(run, task, registry.mixer_args(run))
    return granted_model(run, run.protocol, task.spec(), granted, backend)


def granted_model(run: Run, protocol: Protocol, spec: Spec, granted: Grant, backend: str) -> backbone.Backbone:
    """A model around the run's mixer, which computes with `backend` if it has it; with 'triton' the shells do too."""
    args, cls = registry.mixer_args(run), registry.mixer_class(run.mixer.name)
    own = backend if backend in cls.backends else cls.backends[0]
    model = backbone.make(spec, protocol, lambda: cls(granted, args, own), registry.order(run))
    if backend == "triton":
        backbone.fuse(model)
    return model


def capacity_of(model: backbone.Backbone) -> Capacity:
    """Parameters, FLOPs of all its mixers at the task's length, and numbers of state a head."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    mixers = [mixer for mixer, _ in model.parts()]
    return Capacity(
        parameters=sum(sizes.values()),
        mixer_parameters=sum(n for name, n in sizes.items() if owned_by_mixer(name)),
        flops=sum(one.flops(model.spec.length) for one in mixers),
        state_per_head=-1 if mixers[0].state_size is None else mixers[0].state_size,
    )
