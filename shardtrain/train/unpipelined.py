"""A model without a pipeline: every device applies all layers to its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from shardtrain.collectives.fsdp import Gather
from shardtrain.errors import UserError
from shardtrain.nn.model import Batch, Model, embedded, head_sums
from shardtrain.nn.returned import Sums, checked_loss, joined, refuse_sown
from shardtrain.pipeline.microbatches import microbatch, microbatches
from shardtrain.pipeline.slots import zeros_like
from shardtrain.sharding import Partitioner
from shardtrain.train.loss_sums import LossFunction, aux_scales, nonzero, weight_ratios, widened
from shardtrain.train.split_module import SplitModule, Tree
from shardtrain.weights.trained import merged, trained

if TYPE_CHECKING:
    from shardtrain.train.gradients import Gradients
    from shardtrain.train.state import TrainState


class UnpipelinedModel:
    """A model whose weights live as checkpoints store them. It has the methods of `PipelinedModel`.

    Args:
      module: the model.

    Attributes:
      manual_axes: mesh axes over which gradients are always computed manually.
      weights: a `Weight` per parameter, as they live on the devices.
    """

    manual_axes: tuple[str, ...] = ()
    #: The logical axes of the dims before the batch in what layers keep of a text.
    kept_axes: tuple[str | None, ...] = ("layers",)

    def __init__(self, module: SplitModule):
        self.module, self.weights = module, module.canonical_weights

    def check_mesh(self, mesh: Mesh) -> None:
        """Accept every mesh."""

    def check_step(
        self, partitioner: Partitioner, loss: LossFunction | None = None, accumulate: int = 1, gather: Gather = "tick"
    ) -> None:
        """Refuse options of a step that this model cannot have.

        Raises:
          UserError: microbatches for a module whose forward pass changes state; or options of a pipeline.
        """
        if accumulate > 1 and (mutable := self.module.mutable):
            raise UserError(
                f"optimizer.accumulate is {accumulate}, but the model changes {', '.join(mutable[:3])} in its forward "
                "pass, which would then depend on the microbatch; use accumulate 1"
            )
        if gather == "step":
            raise UserError("gather step is for a pipeline, and the model has no schedule; drop it, or give a schedule")

    def canonical(self, tree: Any) -> Any:
        """A state tree as checkpoints store it: the same tree."""
        return tree

    def live(self, tree: Any) -> Any:
        """The inverse of `canonical`."""
        return tree

    def stored_on(self, partitioner: Partitioner) -> Partitioner:
        """The partitioner of checkpoints: the same."""
        return partitioner

    def checked(self, jitted: Any, mesh: Mesh) -> Any:
        """A jitted step, which needs no check before it runs."""
        return jitted

    def warning(self) -> str | None:
        """Nothing to warn of."""
        return None

    def summary(self) -> str | None:
        """Nothing to report at the start of a run."""
        return None

    def gradients(
        self, options: Gradients, params: Tree, model_state: Tree, batch: Batch, key: jax.Array
    ) -> tuple[Tree, Sums, Tree]:
        """Gradients of the summed loss over this region's rows, microbatch by microbatch; of the mean if there is one.

        Returns:
          Gradients of the weights that train, the sums behind the loss, and the module's new state.
        """
        loss, accumulate = options.loss, options.accumulate
        weights_trained = trained(self.weights, self.weights)

        def weights() -> tuple[jax.Array, dict[str, jax.Array]]:
            if loss is not None:
                return jnp.ones(()), {}
            sums, aux, _ = self._sums(None, params, {}, batch, None, train=False)
            return sums["loss"][1], {name: w for name, (_, w) in aux.items()}

        # A single batch needs no pass for the scales: its own forward pass computes them.
        scales = aux_scales(weights, options.total) if accumulate > 1 else None

        def gradient(batch: Batch, key: jax.Array) -> tuple[Tree, tuple[Sums, Tree]]:
            def objective(part: Tree) -> tuple[jax.Array, tuple[Sums, Tree]]:
                sums, aux, new_state = self._sums(loss, merged(part, params), model_state, batch, key, train=True)
                value, weight = sums["loss"]
                ratios = scales
                if ratios is None:
                    ratios = weight_ratios(weight, {name: w for name, (_, w) in aux.items()}, options.total)
                value = value + sum(s * ratios[name] for name, (s, _) in aux.items())
                if accumulate == 1:
                    value = value / nonzero(jax.lax.stop_gradient(weight))
                return value, (joined(sums, aux), new_state)

            grads, rest = jax.grad(objective, has_aux=True)(trained(params, self.weights))
            return widened(grads, weights_trained, options.partitioner), rest

        if accumulate == 1:
            grads, (sums, new_state) = gradient(batch, key)
            return grads, sums, new_state
        batch_M = microbatches(batch, accumulate, "optimizer.accumulate")

        def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
            # Contract models draw their bits from row numbers; only a module's own streams need another key.
            own = key if loss is None else jax.random.fold_in(key, index)
            grads, (sums, _) = gradient(microbatch(batch_M, index), own)
            return jax.tree.map(jnp.add, carry, (grads, sums)), None

        grads, (sums, _) = zeros_like(jax.eval_shape(lambda: gradient(microbatch(batch_M, 0), key)))
        zeros = (widened(grads, weights_trained, options.partitioner), sums)
        (grads, sums), _ = jax.lax.scan(body, zeros, jnp.arange(accumulate))
        return grads, sums, model_state

    def sums(self, state: TrainState, batch: Batch, partitioner: Partitioner, loss: LossFunction | None = None) -> Sums:
        """The evaluation sums of one batch: loss, metrics and auxiliary terms.

        Raises:
          UserError: a part of the model, or the loss function, returned something else than it should.
        """
        sums, aux, _ = self._sums(loss, state.params, state.model_state, batch, None, train=False)
        return joined(sums, aux)

    def outputs(
        self,
        params: Tree,
        model_state: Tree,
        batch: Batch,
        partitioner: Partitioner,
        result: Callable[[Any, Any], jax.Array],
    ) -> jax.Array:
        """`result(module, x)`, `[B, ...]`, for the output `x` of the last block."""
        module: Any = self.module.merge(params, model_state)
        ctx = self.module.context(batch)
        return result(module, module.blocks(embedded(module, batch, ctx), ctx)[0])

    def extend(
        self,
        params: Tree,
        model_state: Tree,
        batch: Batch,
        past: Tree | None,
        partitioner: Partitioner,
        result: Callable[[Any, Any, Batch], jax.Array],
    ) -> tuple[jax.Array, Tree]:
        """Pass new tokens of a text through the model.

        Args:
          params: live parameters.
          model_state: the module's other variables.
          batch: the new tokens.
          past: what the layers kept of the tokens before, `[*kept_axes, B, slots, ...]`; `None` at the start of a text.
          partitioner: the mesh and its rules.
          result: `(module, x, batch) -> [B, ...]`, for the output `x` of the last block.

        Returns:
          The result, and what the layers keep of the new tokens.
        """
        module: Any = self.module.merge(params, model_state)
        ctx = self.module.context(batch)
        x, kept = module.blocks.extend(embedded(module, batch, ctx), ctx, past)
        return result(module, x, batch), kept

    def _sums(
        self,
        loss: LossFunction | None,
        params: Tree,
        model_state: Tree,
        batch: Batch,
        key: jax.Array | None,
        *,
        train: bool,
    ) -> tuple[Sums, Sums, Tree]:
        """One forward pass: the sums of loss and metrics, those of the auxiliary terms, and the module's new state."""
        module = self.module.merge(params, model_state, key)
        ctx = self.module.context(batch, key, train=train)
        if loss is None:
            model = cast(Model, module)
            x, aux = model.blocks(embedded(model, batch, ctx), ctx)
            sums = head_sums(model, x, batch, ctx)
        else:
            module.train() if train else module.eval()
            name = getattr(loss, "__name__", type(loss).__name__)
            returned, aux = loss(module, batch, ctx), {}
            refuse_sown(module)
            sums = checked_loss(f"the loss function {name}", returned)
        return sums, aux, self.module.model_state(module)
