"""The block of CRATE: one step of MSSA, then a few of ISTA (chapter 5).

It turns tokens Z into Z^{½} = Z + MSSA(LN(Z)), codes A = ISTA(LN(Z^{½})) and new tokens D A. There is no residual
around ISTA: the next layer sees nothing but atoms that fired. The codes pass through `block.neurons`.
"""

from torch import Tensor, nn

from cratelab.ista import Ista
from cratelab.mssa import Mssa


class CrateBlock(nn.Module):
    """One layer (eq-05-1): (b, n, d) to (b, n, d).

    Args:
        config: a `cratelab.CrateConfig`, or what has its fields.
    """

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Mssa(config.width, config.n_heads, span=config.span)
        self.ista_norm = nn.LayerNorm(config.width)
        self.ista = Ista(config.width, config.expansion, config.step_size, config.lam, config.n_steps)
        self.neurons = nn.Identity()
        self.ista_residual = config.ista_residual

    def forward(self, x: Tensor, cache: Tensor | None = None, position: int = 0) -> Tensor:
        return self.sparsify(x + self.attention(self.attention_norm(x), cache, position))

    def sparsify(self, x: Tensor) -> Tensor:
        """The second half of the layer: compressed tokens (b, n, d) to atoms (b, n, d)."""
        atoms = self.ista.decode(self.neurons(self.ista.encode(self.ista_norm(x))))
        return x + atoms if self.ista_residual else atoms
