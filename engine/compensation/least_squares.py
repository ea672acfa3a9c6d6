"""Least squares from sums over tokens, so that parts of a text can be summed anywhere and added in a fixed order.

Z: inputs of one or several projections side by side [tokens, D]; R: what their output should change by [tokens, H];
w: a weight per token. The change of the weights is

    dW = argmin  sum_t w_t |R_t - dW Z_t|^2 + ridge m |dW|^2 = B^T (G + ridge m I)^-1,   G = Z^T w Z,  B = Z^T w R,

m the mean of the diagonal of G (compare OSSCAR's local_pruner.py, and ReplaceMe's lstsq.py, which has no ridge).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.engine.errors import SearchFailed


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of one part of the text, float64."""

    gram: Tensor
    """G [D, D]."""
    cross: Tensor
    """B [D, H]."""

    @classmethod
    def of(cls, inputs: Tensor, residual: Tensor, weights: Tensor) -> Sums:
        """inputs: [tokens, D]. residual: [tokens, H]. weights: [tokens].

        The products of at most a few thousand tokens are summed in the dtype of the inputs (at least float32), and
        those sums in float64.
        """
        wide = torch.promote_types(inputs.dtype, torch.float32)
        inputs, residual = inputs.to(wide), residual.to(wide)
        weighted = (inputs * weights.to(wide).unsqueeze(1)).T
        return cls((weighted @ inputs).double(), (weighted @ residual).double())

    def cpu(self) -> Sums:
        return Sums(self.gram.cpu(), self.cross.cpu())

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram + other.gram, self.cross + other.cross)

    def __mul__(self, factor: float) -> Sums:
        return Sums(self.gram * factor, self.cross * factor)


def solve(sums: Sums, ridge: float, num_free: int = 0) -> Tensor:
    """Return dW [H, D] in float64. num_free: number of last inputs (biases) that the ridge leaves alone.

    Raises SearchFailed if the sums are not finite.
    """
    gram, size = sums.gram, len(sums.gram)
    if not (torch.isfinite(gram).all() and torch.isfinite(sums.cross).all()):
        raise SearchFailed("the activations of the calibration text are not finite in this dtype; use float32.")
    mean = gram.diagonal()[: size - num_free].mean()
    penalty = torch.full((size,), float(ridge * mean), dtype=gram.dtype, device=gram.device)
    penalty[size - num_free :] = 0
    regular = gram + torch.diag(penalty)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if failed:  # singular: fewer tokens than inputs, and no ridge
        return torch.linalg.lstsq(regular, sums.cross, driver="gelsd").solution.T
    return torch.cholesky_solve(sums.cross, factor).T
