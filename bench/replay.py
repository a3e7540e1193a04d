"""A training step as one CUDA graph: the host issues a copy of its inputs and one launch instead of some thousand.

At small widths the host needs longer to launch a step's kernels than the GPU to run them. The arithmetic is that of the
step itself, bit for bit: the same kernels with the same arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

WARM = 3  # calls of each shape that run as they are: they compile, and libraries allocate what they keep


@dataclass
class Recording:
    """A step with inputs of certain shapes."""

    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)


class Replay:
    """`step(inputs)` on a stream of its own; from call WARM of a shape on its recording, of which each has its memory.

    `step` must read the device through `inputs` and what lives as long as this, never wait for it, and leave no
    gradient behind. Shapes are to be few: batches cut to declared lengths. Random numbers may be drawn: a replay takes
    them where the generator stands.
    """

    def __init__(self, step: Callable[[dict[str, Tensor]], None]):
        self.step = step
        self.stream = torch.cuda.Stream()
        self.recordings: dict[tuple, Recording] = {}

    def __call__(self, inputs: dict[str, Tensor]) -> None:
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        recording = self.recordings.setdefault(shapes, Recording())
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if recording.calls < WARM:
                self.step(inputs)
            else:
                if recording.graph is None:
                    self.record(recording, inputs)
                for name, value in inputs.items():
                    recording.inputs[name].copy_(value, non_blocking=True)
                recording.graph.replay()
        torch.cuda.current_stream().wait_stream(self.stream)
        recording.calls += 1

    def record(self, recording: Recording, inputs: dict[str, Tensor]) -> None:
        recording.inputs = {name: value.clone() for name, value in inputs.items()}
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's thread pins memory meanwhile, which would end a capture of all threads.
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step(recording.inputs)
        except RuntimeError as error:
            raise RuntimeError(f"the step is no CUDA graph; set where.graph=off ({error})") from error
        recording.graph = graph
