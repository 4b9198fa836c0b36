"""Hadamard rotations: orthonormal matrices of +-1 that spread an outlier over a whole block of features, and their signs.

A rotation R = diag(signs) blockdiag(H, ..., H) / sqrt(block) leaves x W^T = (x R)(W R)^T as it is, while both factors become
easier to quantize. H is a base of order b times a Sylvester matrix, H = kron(B_b, S_2, ..., S_2), with the smallest b that makes
the order. Sources:

    b = 1         J. J. Sylvester, 1867, Philosophical Magazine 34: kron(H, [[1, 1], [1, -1]])
    b = p + 1     R. Paley, 1933, Journal of Mathematics and Physics 12, first construction, p prime, p % 4 == 3
    b = 2(p + 1)  the second one, p % 4 == 1
    regular       Kronecker powers of J_4 - 2 I, every row and column of which sums to sqrt(order)

Paley's prime powers are left out: with odd factors below 61 they would only add the orders 52, 100 and 344 * 2^q.

A Sylvester matrix has a constant column, which collects the mean of the block into one feature; ConvRot (arXiv 2512.03673) sees
this make new outliers in diffusion transformers and uses regular matrices. The random signs of QuIP# (arXiv 2402.04396) are
the other remedy. Both are here, and can be combined.

Why two dense factors and no butterfly: H = kron(left, right) with both orders near sqrt(block) costs two small matrix products.
Float32 at [4096, 3072], one thread of a shared AMD EPYC, medians: this 0.14 s (mostly fresh memory), butterfly and dense base
0.7 s, the K x K product 0.95 s; at [1024, 4608] 0.023, 0.06 and 0.49 s.
"""

from functools import lru_cache
from math import isqrt
from operator import index

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

MAX_BASE = 1024  # a larger dense base is no fast transform: 11008 = 43 * 256 would need one of 5504


def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix: H H^T = order * I, entries +-1.

    Args:
        order: b * 2^q, with b = 1 or one of Paley's orders up to ``MAX_BASE``; the smallest b is taken.
    Returns:
        float64 [order, order] on the CPU.
    Raises:
        ValueError: for any other order.
    """
    base = _base_order(order)
    if base is None:
        raise ValueError(
            f"hadamard_matrix: order must be 1, 2 or a multiple of 4 with a Paley base (b * 2^q, b = p + 1 or 2 (p + 1) for a "
            f"prime p, b <= {MAX_BASE}), got {order}. Take the largest block that fits: block_size(width)."
        )
    return _kronecker_power(_base_matrix(base), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu"), order)


def regular_hadamard(order: int) -> Tensor:
    """A Hadamard matrix, symmetric, each row and column of which sums to +sqrt(order) (ConvRot, arXiv 2512.03673).

    Args:
        order: a power of 4.
    Returns:
        float64 [order, order] on the CPU.
    Raises:
        ValueError: for any other order.
    """
    if _base_order(order, regular=True) is None:
        raise ValueError(
            f"regular_hadamard: order must be a power of 4, got {order}. "
            "Take the largest block that fits: block_size(width, regular=True)."
        )
    return _kronecker_power(_base_matrix(1), 1 - 2 * torch.eye(4, dtype=torch.float64, device="cpu"), order)


def _kronecker_power(matrix: Tensor, factor: Tensor, order: int) -> Tensor:
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, factor)
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))


def _first_paley(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _second_paley(order: int) -> bool:
    return order % 8 == 4 and _is_prime(order // 2 - 1)


def _base_order(order: int, regular: bool = False) -> int | None:
    """The smallest b that has a construction and makes order / b a power of two (regular: of 4); ``None`` if there is none."""
    if order < 1:
        return None
    odd = order // (twos := order & -order)
    if regular:
        return 1 if odd == 1 and twos.bit_length() % 2 else None
    bases = [1] if odd == 1 else [odd << i for i in range(2, twos.bit_length()) if odd << i <= MAX_BASE]
    return next((b for b in bases if b == 1 or _first_paley(b) or _second_paley(b)), None)


def _base_matrix(order: int) -> Tensor:
    """Order 1, or Paley's constructions from the quadratic residues of a prime. float64 [order, order]."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    first = _first_paley(order)
    p = order - 1 if first else order // 2 - 1
    numbers = torch.arange(p, device="cpu")
    character = torch.full((p,), -1.0, dtype=torch.float64, device="cpu")
    character[numbers.square() % p] = 1.0
    character[0] = 0.0
    conference = pad(character[(numbers[:, None] - numbers) % p], (1, 0, 1, 0), value=1.0)
    conference[0, 0] = 0.0
    if first:
        conference[1:, 0] = -1.0  # skew, as the residues are for p % 4 == 3
        return conference + torch.eye(order, dtype=torch.float64, device="cpu")
    off, diagonal = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64, device="cpu")
    return torch.kron(conference, off) + torch.kron(torch.eye(p + 1, dtype=torch.float64, device="cpu"), diagonal)


def block_size(width: int, regular: bool = False, most: int | None = None) -> int:
    """The largest block that divides ``width`` and has a matrix; the whole width where possible. At least 4.

    Blocks of 1 and 2 are refused: they hardly spread anything, and the layer is better left as it is. A base may be large (700 * 8
    for 5600); ``most`` keeps the transform cheap and local.

    Args:
        width: features K, a multiple of 4.
        regular: only powers of 4, the orders of ``regular_hadamard``.
        most: no block is larger than this, which is at least 4.
    Raises:
        ValueError: for another width or ``most``.
    """
    if width < 4 or width % 4:
        raise ValueError(f"block_size: width must be a positive multiple of 4, got {width}. Leave this layer unrotated.")
    if most is not None and most < 4:
        raise ValueError(f"block_size: most must be at least 4, got {most}. Leave this layer unrotated.")
    limit = width if most is None else min(width, most)
    blocks = (block for block in range(limit - limit % 4, 0, -4) if width % block == 0)
    return next(block for block in blocks if _base_order(block, regular) is not None)


def rotate(x: Tensor, signs: Tensor, block: int, regular: bool = False) -> Tensor:
    """x diag(signs) blockdiag(H) / sqrt(block), H the matrix of ``hadamard_matrix`` or ``regular_hadamard``. Orthonormal.

    Args:
        x: floating [..., K]. Arithmetic is float32 (float64 for float64), under autocast too.
        signs: +-1 of any dtype [K], on the device of ``x``.
        block: an order that divides K.
        regular: which matrix.
    Returns:
        [..., K] in the dtype of ``x``, differentiable in ``x``. Compiles without graph breaks.
    Raises:
        ValueError: for an ``x`` that is not floating, signs that do not fit, or a block that does not divide K or has no matrix.
    """
    block = _checked_block("rotate", x, signs, block)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    left, right = _factors(block, regular, dtype, x.device)
    # The scale goes with the signs, one vector, so that the matrices stay exact +-1.
    y = x.to(dtype) * (signs.to(dtype) * block**-0.5)
    return _blockwise(y, left, right).to(x.dtype)


def unrotate(x: Tensor, signs: Tensor, block: int, regular: bool = False) -> Tensor:
    """Inverse of ``rotate``: x blockdiag(H^T) diag(signs) / sqrt(block). Arguments, result and errors as there."""
    block = _checked_block("unrotate", x, signs, block)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    left, right = _factors(block, regular, dtype, x.device)
    y = _blockwise(x.to(dtype), left.mT, right.mT)
    return (y * (signs.to(dtype) * block**-0.5)).to(x.dtype)


def _checked_block(where: str, x: Tensor, signs: Tensor, block: int) -> int:
    block = index(block)  # a constant where the compiler made it a symbol
    if not x.is_floating_point():
        raise ValueError(f"{where}: x must be floating, got {x.dtype}. Decode it first.")
    if x.dim() == 0 or signs.shape != x.shape[-1:]:
        raise ValueError(
            f"{where}: signs must be one per feature of x {list(x.shape)}, got {list(signs.shape)}. Use random_signs(width, seed)."
        )
    if block < 1 or x.shape[-1] % block:
        raise ValueError(f"{where}: block must divide the {x.shape[-1]} features of x, got {block}. Use block_size(width).")
    return block


def _blockwise(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x blockdiag(kron(left, right)), as left^T X right on each block X."""
    rows, columns = left.shape[0], right.shape[0]
    blocks = x.unflatten(-1, (x.shape[-1] // (rows * columns), rows, columns))
    autocast_device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"  # the meta device has none
    with torch.autocast(autocast_device, enabled=False):
        return (left.mT @ (blocks @ right)).flatten(-3)


def _factors(order: int, regular: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # A compiled graph owns its copy on the device; parameters, because only their shapes stay fixed under dynamic=True. Eager mode
    # sends a copy each time (16 kB each at 4096). Cached inference tensors would break a later backward pass.
    with torch.inference_mode(False):
        left, right = (matrix.to(device, dtype, non_blocking=True) for matrix in _split(order, regular))
        return Parameter(left, requires_grad=False), Parameter(right, requires_grad=False)


# As torch.compiler.assume_constant_result does, which would import the whole compiler, and triton, with dqtk.
_factors._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _split(order: int, regular: bool) -> tuple[Tensor, Tensor]:
    """Matrices whose Kronecker product is the one of this order, their orders as equal as can be."""
    build, step = (regular_hadamard, 4) if regular else (hadamard_matrix, 2)
    core = _base_order(order, regular) or order  # without one, build() says what is wrong
    powers = [1]
    while order // core % (powers[-1] * step) == 0:
        powers.append(powers[-1] * step)
    right = min(powers, key=lambda power: power + order // power)
    return build(order // right), build(right)


def random_signs(width: int, seed: int) -> Tensor:
    """Random signs: int8 +-1 [width] on the CPU, the same for the same seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8, device="cpu") * 2 - 1


def pack_signs(signs: Tensor) -> Tensor:
    """Signs as bits, the checkpoint format: bit j of byte i is 1 where signs[8 i + j] is -1; the last byte is padded with 0.

    Args:
        signs: +-1 of any dtype [K].
    Returns:
        uint8 [ceil(K / 8)].
    Raises:
        ValueError: for another value or shape.
    """
    if signs.dim() != 1 or not (signs.abs() == 1).all():
        raise ValueError(
            f"pack_signs: signs must be a vector of +1 and -1, got {signs.dtype} {list(signs.shape)}. Use random_signs."
        )
    bits = pad((signs < 0).to(torch.uint8), (0, -len(signs) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=signs.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, width: int) -> Tensor:
    """Inverse of ``pack_signs``: int8 +-1 [width]. Raises ``ValueError`` if there are not ceil(width / 8) bytes."""
    if packed.dtype != torch.uint8 or list(packed.shape) != [-(-width // 8)]:
        raise ValueError(
            f"unpack_signs: packed must be uint8 [{-(-width // 8)}] for {width} signs, got {packed.dtype} {list(packed.shape)}. "
            "Use what pack_signs gave."
        )
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return 1 - 2 * bits.flatten()[:width].to(torch.int8)
