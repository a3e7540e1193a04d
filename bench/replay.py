"""A training step as one CUDA graph: the host issues a copy of its inputs and one launch instead of some thousand.

At small widths the host needs longer to launch a step's kernels than the GPU to run them. The arithmetic is that of the
step itself, bit for bit: the same kernels with the same arguments.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM = 3  # calls that run as they are: they compile, and libraries allocate what they keep


class Replay:
    """`step(inputs)` on a stream of its own; from call WARM on its recording, as long as the shapes stay the same.

    `step` must read the device through `inputs` and what lives as long as this, never wait for it, and leave no
    gradient behind. A change of shapes is an error. Random numbers may be drawn: a replay takes them where the
    generator stands.
    """

    def __init__(self, step: Callable[[dict[str, Tensor]], None]):
        self.step, self.calls = step, 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, Tensor] = {}

    def __call__(self, inputs: dict[str, Tensor]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.calls < WARM:
                self.step(inputs)
            else:
                if self.graph is None:
                    self.record(inputs)
                self.refill(inputs)
                self.graph.replay()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.calls += 1

    def record(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's thread pins memory meanwhile, which would end a capture of all threads.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step(self.inputs)
        self.graph = graph

    def refill(self, inputs: dict[str, Tensor]) -> None:
        for name, value in inputs.items():
            if value.shape != self.inputs[name].shape:
                raise ValueError(
                    f"a step was recorded with {name} of {tuple(self.inputs[name].shape)}, got {tuple(value.shape)}"
                )
            self.inputs[name].copy_(value, non_blocking=True)
