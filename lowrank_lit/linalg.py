"""Dense linear algebra that everything rests on: symmetric eigenvectors, damping, roots, balanced factors, the
numerical-rank rule.

All of it runs in float64 (float32 where a device has no float64), never in TF32, and never forms an inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_lit.errors import NonFiniteError

_NEAR = 0.1
"""Distance of a Gram matrix from I, in the Frobenius norm, up to which its columns count as orthogonal."""


def to_double(tensor: Tensor) -> Tensor:
    """The tensor in float64, in float32 on devices without float64 (Apple's)."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def require_finite(tensor: Tensor, what: str) -> None:
    """Check that every entry is finite.

    Raises:
        NonFiniteError: Naming ``what`` and how many entries are not.
    """
    # One pass, no copy: a sum is not finite where an entry is not. Where it only overflows the entries are looked at.
    if bool(torch.isfinite(tensor.sum(dtype=_wide(tensor)))):
        return
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{what}: {bad} of {tensor.numel()} values are NaN or infinite; check the checkpoint, or use a wider dtype "
            "(bfloat16, float32)"
        )


def _wide(tensor: Tensor) -> torch.dtype | None:
    """A type in which the sum of a tensor's entries does not overflow before its own largest number squared does."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None


def add_gram(total: Tensor, left: Tensor, right: Tensor | None = None) -> None:
    """Add ``left^T right``, known to be symmetric, to the lower triangle of ``total``: little more than half of the
    product's operations.

    The product is taken in panels of rows, each as far as the diagonal, in the precision of ``left``, and added in that
    of ``total``. What is above the diagonal afterwards is no part of the sum; :func:`mirrored` fills it.

    Args:
        total: ``(d, d)``, written to.
        left: ``(n, d)``.
        right: The same shape; ``None`` is ``left``, which makes a Gram matrix.
    """
    right = left if right is None else right
    size = len(total)
    # At most eight panels, 9/16 of the operations; a product with fewer than 128 rows runs below its best rate.
    panel = max(128, -(-size // 8))
    for begin in range(0, size, panel):
        end = min(size, begin + panel)
        total[begin:end, :end] += left[:, begin:end].mT @ right[:, :end]


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle, ``(d, d)``."""
    whole = lower.tril()
    whole += whole.tril(-1).mT
    return whole


def symmetric_product(left: Tensor, right: Tensor | None = None) -> Tensor:
    """``left^T right`` of two matrices ``(n, d)`` whose product is symmetric, exactly symmetric, ``(d, d)``; ``None``
    for ``right`` is ``left``."""
    return mirrored(_lower_gram(left, right))


def _lower_gram(left: Tensor, right: Tensor | None = None) -> Tensor:
    """The lower triangle of :func:`symmetric_product`; what is above it has no meaning."""
    total = left.new_zeros(left.shape[1], left.shape[1])
    add_gram(total, left, right)
    return total


def symmetric_eigen(matrix: Tensor, components: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric positive semi-definite matrix, largest first.

    Args:
        matrix: Symmetric up to rounding, shape ``(d, d)``; the symmetric part is used.
        components: Number of eigenvectors to give; ``None`` is all.

    Returns:
        Eigenvalues ``(d,)``, those below zero by rounding set to zero, and orthonormal eigenvectors as columns ``(d,
        components)``.
    """
    double = to_double(matrix)
    return lower_eigen((double + double.mT) / 2, components)


def lower_eigen(lower: Tensor, components: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`symmetric_eigen` of the matrix with this lower triangle, in its own dtype; the rest is not looked at."""
    values, vectors = torch.linalg.eigh(lower, UPLO="L")
    kept = len(values) if components is None else min(components, len(values))
    return values.flip(0).clamp_min(0), vectors[:, len(values) - kept :].flip(1)


def damp(moment: Tensor, damping: float) -> Tensor:
    """Shrink a second moment towards a multiple of the identity: ``(1 - a) R + a tr(R) / d I``.

    The damping is relative, so that scaling the activations changes nothing. It keeps directions that calibration never
    excited from being free to truncate.

    Args:
        moment: Second moment ``(d, d)``.
        damping: ``a`` in [0, 1].
    """
    damped = (1 - damping) * moment
    damped.diagonal().add_(damping * moment.diagonal().mean())
    return damped


def lower_root(moment: Tensor) -> Tensor:
    """A root ``S`` of a moment, ``S S^T = M``: Cholesky's, a tenth of an eigendecomposition, or where rounding has left
    the moment indefinite, which only an undamped one may be, that of the eigendecomposition.

    Args:
        moment: Symmetric positive semi-definite up to rounding ``(d, d)``.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(moment)
    if int(failed) == 0:
        return root
    values, vectors = symmetric_eigen(moment)
    return vectors * values.sqrt()


def orthonormalise(columns: Tensor) -> Tensor:
    """Orthonormal basis whose first ``k`` columns span the first ``k`` of ``columns``, for every ``k``; shape ``(d,
    r)``, ``r <= d``.

    Columns that are orthogonal but for rounding and their lengths, as those of a singular value decomposition are, take
    a Cholesky decomposition of their Gram matrix, several times faster than the Householder QR that all others take.
    """
    lengths = _lengths(columns)
    if bool((lengths > 0).all()):
        unit = columns / lengths
        gram = _lower_gram(unit)
        if float(2**0.5 * gram.tril(-1).norm()) < _NEAR:
            # The basis is orthonormal to the rounding of a matrix this close to I.
            solved: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), unit.mT, upper=False)
            return solved.mT
    basis, triangle = torch.linalg.qr(columns)
    # QR fixes each column up to a sign; taking the given column's makes the basis a continuous function of it.
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
    result: Tensor = basis * signs
    return result


def _lengths(columns: Tensor) -> Tensor:
    """Lengths of columns whose squares are in range; several times as fast as ``norm(dim=0)``."""
    return columns.square().sum(0).sqrt()


def floor_weights(weights: Tensor, share: float) -> Tensor:
    """Raise the smallest of some non-negative weights to ``share`` of their mean; the rest stay as they are.

    The damping of a diagonal metric: a channel that calibration never excited is cheap, but not free.

    Args:
        weights: ``(d,)``.
        share: In [0, 1].
    """
    return weights.clamp_min(share * float(weights.mean()))


def left_singular(matrix: Tensor, components: int | None = None) -> tuple[Tensor, Tensor]:
    """Singular values and left singular vectors by an eigendecomposition of the smaller Gram matrix.

    One and a half to four times faster than an SVD on a CPU. Squaring costs no accuracy where it counts: the vectors
    are orthonormal to rounding, and the values are taken as the lengths ``||u_i^T M||`` (wide) or ``||M v_i||`` (tall)
    rather than as roots of the Gram matrix's eigenvalues, so that zero comes out as rounding, ``eps s_1``, where those
    roots would give ``sqrt(eps) s_1``.

    Args:
        matrix: ``M`` ``(rows, columns)``.
        components: Number of vectors to give; ``None`` is all. The values are all given.

    Returns:
        Singular values ``(p,)``, largest first, and vectors ``(rows, components)``, ``p = min(rows, columns)``. Vectors
        of zero singular values complete an orthonormal set.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        _, left = lower_eigen(_lower_gram(matrix.mT))
        values, order = (left.mT @ matrix).norm(dim=1).sort(descending=True, stable=True)
        return values, left[:, order[:components]]
    _, right = lower_eigen(_lower_gram(matrix))
    images = matrix @ right
    values, order = _lengths(images).sort(descending=True, stable=True)
    return values, orthonormalise(images[:, order[:components]])


def dual_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """A root ``S`` of a moment, ``S S^T = M``, and its dual ``T = S^-T``, so that ``T^T S = I``.

    Both come from the eigendecomposition ``M = V L V^T``: ``S = V L^1/2``, ``T = V L^-1/2``. Nothing is inverted but
    positive numbers: eigenvalues below rounding (``d eps l_max``) are raised to it, which only an undamped moment
    needs.

    Args:
        moment: Symmetric positive semi-definite ``(d, d)`` and not zero; damp it first.
    """
    values, vectors = symmetric_eigen(moment)
    root = values.clamp_min(len(values) * torch.finfo(values.dtype).eps * float(values[0])).sqrt()
    return vectors * root, vectors / root


def equalise(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product in which column ``i`` of ``outer`` and row ``i`` of ``inner`` have equal norms.

    Components stay what and where they are: any prefix of them has the same product as before.

    Args:
        outer: ``(rows, rank)``.
        inner: ``(rank, columns)``.
    """
    heights, widths = outer.norm(dim=0), inner.norm(dim=1)
    # A component with a zero on either side becomes zero on both.
    lengths = heights.sqrt() * widths.sqrt()
    tiny = torch.finfo(outer.dtype).tiny
    return outer * (lengths / heights.clamp_min(tiny)), (lengths / widths.clamp_min(tiny))[:, None] * inner


def balance(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of the same product: ``outer = U S^1/2``, ``inner = S^1/2 V^T`` with ``outer inner = U S V^T``.

    Both factors then have the same singular values, which keeps half-precision storage in range, and adapters on the
    two factors equally conditioned. Gram matrices of the factors and one small eigendecomposition, or where these would
    lose digits a QR of each factor and one small SVD; the large product is never decomposed.
    Components of very different scales on the two sides lose nothing: their norms are made equal first.

    Args:
        outer: ``(rows, rank)``.
        inner: ``(rank, columns)``.
    """
    outer, inner = equalise(outer, inner)
    found = _balanced_by_gram(outer, inner)
    if found is not None:
        return found
    left, u, s, vh, right = _thin_parts(outer, inner)
    root = s.sqrt()
    return left @ (u * root), (root[:, None] * vh) @ right.mT


def balance_projection(basis: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`balance` where ``outer`` has orthonormal columns, as that of a projection ``U (U^T W)``, so that the
    singular values of the product are those of ``inner``: one small eigendecomposition, and no look at ``outer``.

    The product is kept whatever the columns are. As far as they are off orthonormality, the factors are off balance.

    Args:
        basis: ``(rows, rank)``.
        inner: ``(rank, columns)``.
    """
    energy, rotation = lower_eigen(_lower_gram(inner.mT))
    if not _spans_few_digits(energy):
        return balance(basis, inner)
    rows = rotation.mT @ inner
    root = rows.norm(dim=1).sqrt()
    return basis @ (rotation * root), rows / root[:, None]


def _spans_few_digits(energy: Tensor) -> bool:
    """Whether squared singular values ``(p,)``, largest first, are close enough for vectors from a Gram matrix."""
    least: float = 100 * torch.finfo(energy.dtype).eps ** 0.5
    return float(energy[-1]) > least * float(energy[0])


def factored_svd(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD ``outer inner = U diag(s) V^T`` of a product of thin factors, which is never formed: a QR of each factor and
    an SVD of ``(rank, rank)``.

    Args:
        outer: ``(rows, rank)``, ``rank <= min(rows, columns)``.
        inner: ``(rank, columns)``.

    Returns:
        ``U`` ``(rows, rank)``, ``s`` ``(rank,)``, largest first, and ``V`` ``(columns, rank)``. Where the product has a
        lower rank, the vectors of its zeros complete orthonormal sets.
    """
    left, u, s, vh, right = _thin_parts(*equalise(outer, inner))
    return left @ u, s, right @ vh.mT


def _thin_parts(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``outer inner = left (u diag(s) vh) right^T`` with orthonormal columns of ``left`` and ``right``."""
    left, left_triangle = torch.linalg.qr(outer)
    right, right_triangle = torch.linalg.qr(inner.mT)
    u, s, vh = torch.linalg.svd(left_triangle @ right_triangle.mT, full_matrices=False)
    return left, u, s, vh, right


def _balanced_by_gram(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor] | None:
    """Balanced factors from the Gram matrices of the two, without a QR or an SVD; ``None`` where squaring would cost
    more than half the digits: columns of ``outer`` that are nearly dependent, or singular values of the product that
    span more than a factor of some thousand (a hundred thousandth of the largest in float64)."""
    triangle, failed = torch.linalg.cholesky_ex(_lower_gram(outer))
    lengths = triangle.norm(dim=1)  # of the columns of outer
    if int(failed) or not bool((triangle.diagonal() > 1e-2 * lengths).all()):
        return None
    # With outer = Q L^T: (Q L^T) inner, and the left singular vectors of L^T inner.
    energy, rotation = lower_eigen(_lower_gram(triangle, symmetric_product(inner.mT) @ triangle))
    if not _spans_few_digits(energy):
        return None
    rows = (triangle @ rotation).mT @ inner
    root = rows.norm(dim=1).sqrt()
    basis = torch.linalg.solve_triangular(triangle.mT, rotation * root, upper=True)
    return outer @ basis, rows / root[:, None]


def numerical_rank(singular_values: Tensor, rows: int, columns: int) -> int:
    """Number of singular values above rounding: ``s > max(rows, columns) * eps * s_max``, the rule of LAPACK users.

    Strictly above, so that a matrix of zeros has rank 0.
    """
    if singular_values.numel() == 0:
        return 0
    tolerance = max(rows, columns) * torch.finfo(singular_values.dtype).eps * singular_values.max()
    return int((singular_values > tolerance).sum())
