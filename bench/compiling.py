"""What torch.compile makes of a model: each layer and what follows the embedding's look-up. Head and loss are the
training's own.

Compiled code takes parameters as inputs, so what a process has compiled for one model serves all later ones of like
arms and shapes.
"""

import torch

from bench.backbone import Backbone

MANY = 4096
"""Arms, lengths and modes each compile the forward of `Layer`: past its usual limit, meant for one model, dynamo would
leave it uncompiled."""


def allow_many() -> None:
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MANY


def compile_parts(model: Backbone) -> None:
    allow_many()
    for layer in model.layers:
        layer.compile(dynamic=False)
    # Not the look-up itself: its gradient, compiled, would add in whatever order threads come.
    model.embedding.placed = torch.compile(model.embedding.placed, dynamic=False)
