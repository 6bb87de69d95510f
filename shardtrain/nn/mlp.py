"""Feed-forward layers."""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.host.typed import typed
from shardtrain.nn.context import Context
from shardtrain.nn.dropout import Dropout
from shardtrain.nn.linear import Linear, together
from shardtrain.sharding import constrain, gather_residual
from shardtrain.weights.precision import Precision


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, Shazeer 2020).

    Args:
      dim: width of the input and the output.
      hidden: width of `gate` and `up`.
      dropout: dropout rate of the output.
      precision: dtypes.
      rngs: seeds of the weights.

    Example:
      >>> layer = nn.GatedMLP(8, 16, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 5, 8)), nn.Context({})).shape
      (1, 5, 8)
    """

    @typed
    def __init__(
        self, dim: int, hidden: int, *, dropout: float = 0.0, precision: Precision = Precision(), rngs: nnx.Rngs
    ):
        up, down = ("BSD,DF->BSF", (dim, hidden), ("embed", "mlp")), ("BSF,FD->BSD", (hidden, dim), ("mlp", "embed"))
        self.gate = Linear(*up, precision=precision, rngs=rngs)
        self.up = Linear(*up, precision=precision, rngs=rngs)
        self.down = Linear(*down, precision=precision, rngs=rngs)
        self.dropout = Dropout(dropout, site="mlp")

    def __call__(self, x_BSD: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, S, dim]` to `[B, S, dim]` in the compute dtype."""
        x_BSD = gather_residual(x_BSD)
        gate_BSF, up_BSF = together(x_BSD, self.gate, self.up)
        gate_BSF, up_BSF = checkpoint_name(gate_BSF, "mlp_gate"), checkpoint_name(up_BSF, "mlp_up")
        hidden_BSF = constrain(jax.nn.silu(gate_BSF) * up_BSF, "batch", "seq", "mlp")
        return self.dropout(constrain(self.down(hidden_BSF), "batch", "seq_residual", None), ctx)
