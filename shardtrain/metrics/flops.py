"""The speed of training as a share of the hardware's peak: model FLOP/s utilisation (MFU).

MFU counts the FLOPs that the maths of the model needs, without recomputation (PaLM, Chowdhery et al. 2022,
arXiv:2204.02311, section 4.1 and appendix B). Papers differ in two choices. Ours are: causal attention counts only the
pairs that are not masked (half of PaLM's count), and the peak is the dense one, not NVIDIA's "with sparsity".
"""

import re

import jax.numpy as jnp
from jax.typing import DTypeLike

PEAK: dict[str, dict[str, float]] = {
    # Dense FLOP/s of one GPU. float32 means TF32 tensor cores, which JAX's default matmul precision uses; the
    # others accumulate in float32. NVIDIA states most of them doubled, "with sparsity"; here they are halved.
    # "A100 Tensor Core GPU" datasheet, 2021 (SXM and PCIe agree). No float8.
    "A100": {"float32": 156e12, "bfloat16": 312e12},
    # "H100 Tensor Core GPU" datasheet, 2023, column SXM.
    "H100": {"float32": 494.7e12, "bfloat16": 989.4e12, "float8": 1978.9e12},
    # "H200 Tensor Core GPU" datasheet, 2024, column SXM: the H100's compute with more memory.
    "H200": {"float32": 494.7e12, "bfloat16": 989.4e12, "float8": 1978.9e12},
    # "HGX B200" specification, 2024, per GPU.
    "B200": {"float32": 1100e12, "bfloat16": 2250e12, "float8": 4500e12},
    # "L40S GPU" datasheet, 2023.
    "L40S": {"float32": 183e12, "bfloat16": 362e12, "float8": 733e12},
    # "Ada GPU Architecture" whitepaper, 2022, appendix A (float32 accumulation, half of the float16 rate).
    "RTX 4090": {"float32": 82.6e12, "bfloat16": 165.2e12, "float8": 330.3e12},
}
# The whole `device.device_kind`, so that a slower namesake (H100 PCIe, H200 NVL, 4090 Laptop, a MIG slice) is unknown.
_KINDS = {
    "A100": r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe",
    "H100": r"NVIDIA H100 80GB HBM3",
    "H200": r"NVIDIA H200",
    "B200": r"NVIDIA B200",
    "L40S": r"NVIDIA L40S",
    "RTX 4090": r"NVIDIA GeForce RTX 4090",
}


def peak_flops(device_kind: str, dtype: DTypeLike) -> float | None:
    """Return the dense FLOP/s of one device for matrix products; None if the table has no figure.

    None means that no MFU can be stated: on a CPU, on a GPU that is not in `PEAK`, or in float64.

    Args:
      device_kind: JAX's `device.device_kind`.
      dtype: of the operands. float16 is as fast as bfloat16, and all 8-bit floats are equally fast.
    """
    name = jnp.dtype(dtype).name
    column = "float8" if name.startswith("float8") else "bfloat16" if name == "float16" else name
    for gpu, pattern in _KINDS.items():
        if re.fullmatch(pattern, device_kind):
            return PEAK[gpu].get(column)
    return None


def transformer_flops_per_token(
    n_params_matmul: int, n_layers: int, n_heads: int, head_dim: int, seq_len: int, causal: bool = True
) -> float:
    """Return the FLOPs per token of a training step (forward and backward) of a decoder.

    There are 6 per parameter in a matrix product: 2 forward, and twice that backward. Attention adds, per layer, query
    and attended key, 4 H D forward (scores and weighted sum) and twice that backward.

    Args:
      n_params_matmul: parameters of the block matrices and of the output head (tied or not), without embedding
        lookups, norms and biases; of experts, only those that a token visits.
      n_layers: number of layers.
      n_heads: H, number of query heads.
      head_dim: D, size of a head.
      seq_len: length of a sequence.
      causal: whether a query attends (seq_len + 1) / 2 keys on average, instead of all.
    """
    keys = (seq_len + 1) / 2 if causal else seq_len
    return 6.0 * n_params_matmul + 12.0 * n_layers * n_heads * head_dim * keys


def mfu(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """Share (0 to 1) of the `peak` FLOP/s of all devices together that the model's own FLOPs take."""
    return tokens_per_s * flops_per_token / peak
