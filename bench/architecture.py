"""What a protocol fixes of the model: backbone and shell. Imports neither torch nor a room."""

from dataclasses import dataclass

from bench import Refusal
from bench.strict import at_least, below_one, one_of


@dataclass(frozen=True)
class Backbone:
    layers: int
    width: int  # channels of the residual stream
    norm: str  # 'post': LN(x + f(x)), 'pre': x + f(LN(x))
    norm_eps: float
    channel_mlp: int  # hidden width of a channel MLP after each mixer, 0: none
    mlp_gated: bool  # GELU of one half of twice as many hidden channels gates the other
    mlp_blocks: int  # its maps are block-diagonal with so many blocks; 1: dense
    positions: bool  # learned absolute positions
    position_rows: int  # of their table, at least the task's length; 0: the task's length
    pooling: str  # 'mean' over real tokens or 'first' token with a tanh layer; for tasks with one output an example
    tied: bool  # head tied to the token embedding, where the task's outputs are its ids
    pad_symbols: int  # the embedding's rows are rounded up to a multiple of this
    dropout: float  # after the embedding and before a pooled head
    hidden_dropout: float  # of every residual branch, before it is added
    drop_path: float  # of the last layer, growing linearly from 0
    init_std: float  # of every linear map and embedding

    def __post_init__(self):
        at_least("protocol.backbone", self, {"layers": 1, "width": 1, "channel_mlp": 0, "pad_symbols": 1})
        at_least("protocol.backbone", self, {"mlp_blocks": 1, "position_rows": 0})
        one_of("protocol.backbone.norm", self.norm, ("post", "pre"))
        one_of("protocol.backbone.pooling", self.pooling, ("mean", "first"))
        at_least("protocol.backbone", self, {"norm_eps": 1e-12, "init_std": 0})
        below_one("protocol.backbone", self, "dropout", "hidden_dropout", "drop_path")
        if self.width % self.mlp_blocks or self.channel_mlp % self.mlp_blocks:
            raise Refusal(
                f"protocol.backbone.mlp_blocks must divide width {self.width} and channel_mlp {self.channel_mlp}, "
                f"got {self.mlp_blocks}"
            )


@dataclass(frozen=True)
class Shell:
    """Keys that the named shell does not have are at their off values (shells/base.py)."""

    name: str  # of its file in bench/shells
    directions: str  # 'one': as the mixer looks; 'concat', 'add', 'mult': also on reversed documents (directions.py)
    expand: float  # inner channels / width; their number must be whole
    conv_width: int  # taps of the depthwise convolution, 0: none
    conv_causal: bool  # else centred, and conv_width is odd
    skip: bool  # adds v to the mixer's output
    gain: float  # target |M v| / |v| at initialisation, reached by one fixed scalar a layer; 0: not calibrated
    norm_eps: float  # of a norm inside

    def __post_init__(self):
        at_least("protocol.shell", self, {"expand": 1, "conv_width": 0, "gain": 0, "norm_eps": 1e-12})
        if self.conv_width and not self.conv_causal and self.conv_width % 2 == 0:
            raise Refusal(f"protocol.shell.conv_width must be odd for a centred convolution, got {self.conv_width}")
        one_of("protocol.shell.directions", self.directions, ("one", "concat", "add", "mult"))


def inner_width(width: int, expand: float) -> int:
    """Channels inside the shell."""
    inner = round(width * expand)
    if abs(inner - width * expand) > 1e-6:
        text = f"{expand:g} x {width} = {width * expand:g}"
        raise Refusal(f"protocol.shell.expand x protocol.backbone.width must be a whole number, got {text}")
    return inner
