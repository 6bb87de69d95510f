"""Annotated layers on Flax NNX: the parts that models are written with."""

from shardtrain.nn.attention import Attention
from shardtrain.nn.attention_kernels import Implementation, attend
from shardtrain.nn.cache import Cache
from shardtrain.nn.context import Context
from shardtrain.nn.dropout import Dropout
from shardtrain.nn.embedding import Embedding, PositionEmbedding
from shardtrain.nn.head import linear_cross_entropy, logits
from shardtrain.nn.linear import Linear
from shardtrain.nn.losses import Loss, cross_entropy
from shardtrain.nn.mlp import GatedMLP
from shardtrain.nn.model import Batch, Model, forward
from shardtrain.nn.norm import LayerNorm, RMSNorm
from shardtrain.nn.param import param
from shardtrain.nn.sizes import matmul_flops
from shardtrain.nn.stack import Stack
from shardtrain.weights.precision import Precision
from shardtrain.weights.weight import Weight

__all__ = [
    "Attention",
    "Batch",
    "Cache",
    "Context",
    "Dropout",
    "Embedding",
    "GatedMLP",
    "Implementation",
    "LayerNorm",
    "Linear",
    "Loss",
    "Model",
    "PositionEmbedding",
    "Precision",
    "RMSNorm",
    "Stack",
    "Weight",
    "attend",
    "cross_entropy",
    "forward",
    "linear_cross_entropy",
    "logits",
    "matmul_flops",
    "param",
]
