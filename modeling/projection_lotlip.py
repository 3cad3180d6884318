"""Text projection of LLM2CLIP (https://arxiv.org/abs/2411.04997): a residual MLP on the features of a frozen tower."""

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + W2 gelu(W1 LayerNorm(x))"""

    def __init__(self, size: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, expansion * size)
        self.down = nn.Linear(expansion * size, size)

    def forward(self, features: Tensor) -> Tensor:
        """[..., size] -> [..., size]"""
        return features + self.down(nn.functional.gelu(self.up(self.norm(features))))


class ResidualMLP(nn.Module):
    """Normalises features, and applies residual blocks, a LayerNorm and a linear layer."""

    def __init__(self, size: int, output_size: int, num_layers: int, expansion: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(size, expansion) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, output_size)

    def forward(self, features: Tensor) -> Tensor:
        """[..., size] -> [..., output_size]"""
        return self.linear(self.norm(self.blocks(nn.functional.normalize(features, dim=-1))))
