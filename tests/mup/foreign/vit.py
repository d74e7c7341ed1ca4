"""A vision transformer as timm writes it: patch convolution, raw cls_token and pos_embed, LayerScale, fused qkv.

In Table 9 tokens, positions and the class token are multiplied together, so all of them (and the patch convolution's
bias) are inputs. In Table 3 the head starts at zero. The form "upscaled" multiplies qkv and fc1 by sqrt(m).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    BOTH,
    Role,
    Scaled,
    abc,
    bias,
    coded,
    families,
    forgotten,
    gain,
    hidden_init,
    hidden_lr,
    output_mult,
    readout,
    vector_lr,
)


class PatchEmbed(nn.Module):
    """Image to patches."""

    def __init__(self, patch: int, chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(chans, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Return patches as a sequence."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """timm's attention."""

    def __init__(self, dim: int, num_heads: int, scale: float, mult: float) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.qkv = Scaled(dim, dim * 3, bias=False, mult=mult)
        self.proj = Scaled(dim, dim, mult=mult)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to all."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class LayerScale(nn.Module):
    """A gain on a branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.5 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return x * self.gamma


class Block(nn.Module):
    """timm's block."""

    def __init__(self, dim: int, num_heads: int, scale: float, mult: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, scale, mult)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.mlp = nn.Sequential(Scaled(dim, 2 * dim, mult=mult), nn.GELU(), Scaled(2 * dim, dim, mult=mult))

    def forward(self, x: Tensor) -> Tensor:
        """Add branches."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A ViT of 16 x 16 images in patches of 4."""

    def __init__(self, dim: int, scales: list[float], mult: float, input_mult: float, head_mult: float) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(4, 3, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, dim))
        self.blocks = nn.Sequential(*[Block(dim, 4, scale, mult) for scale in scales])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 10)
        self.input_mult, self.head_mult = input_mult, head_mult

    def forward(self, x: Tensor) -> Tensor:
        """Return classes' logits from the class token."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks((x + self.pos_embed) * self.input_mult))
        return self.head(x[:, 0] * self.head_mult)


ROLES = {
    "patch_embed.proj.bias": Role("input", start="zeros"),
    "patch_embed.proj.weight": Role("input", start="trunc"),
    "cls_token": Role("input", 0.05),
    "pos_embed": Role("input", 0.05, start="trunc"),
    "*norm*.weight": gain(),
    "*.gamma": Role("vector", start="keep"),
    "head.bias": Role("fixed", start="zeros"),
    "head.weight": Role("output"),
    "*.bias": bias(),
    "*.weight": Role("hidden", start="trunc"),
}
ZERO = ROLES | {"head.weight": Role("output", start="zeros")}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a ViT by the form."""
    m = width / 64
    right, wrong = 4 / (width // 4), (width // 4) ** -0.5
    scales = {"scores": [wrong, wrong], "scores 1": [right, wrong]}.get(code, [right, right])
    return VisionTransformer(
        width, scales, abc(form, "hidden", m)[0], abc(form, "input", m)[0], output_mult(form, m, code)
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Return images and classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.randint(0, 10, (4,), generator=generator)


def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return the classes' cross-entropy, smoothed."""
    return F.cross_entropy(model(pair[0]), pair[1], label_smoothing=0.1)


FAULTS = (
    coded("scores by 1/sqrt(d_head)", "attn", "scores"),
    coded("scores of the second block by 1/sqrt(d_head)", "blocks.1.attn", "scores 1"),
    hidden_lr("*.qkv.weight", "*.attn.proj.weight", "*.mlp.?.weight", tensor="blocks"),
    hidden_init("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv"),
    vector_lr("patch_embed.proj.weight", "patch_embed.proj.weight", by=BOTH),
    vector_lr("cls_token", "cls_token"),
    vector_lr("pos_embed", "pos_embed"),
    vector_lr("*.gamma", "gamma"),
    vector_lr("head.bias", "head.bias"),
    hidden_init("patch_embed.proj.weight", "patch_embed.proj", 0.5),
    forgotten("cls_token", "cls_token"),
)
DRAWN_HEAD = (*FAULTS, *readout("head", "head.weight"))
ZERO_HEAD = (*FAULTS, hidden_lr("head.weight", tensor="head.weight"))
FAMILIES = [
    *families("vit", build, ROLES, loss, batch, ("table9", "upscaled"), DRAWN_HEAD, decay="independent"),
    *families("vit", build, ZERO, loss, batch, ("table3 zero head",), ZERO_HEAD),
]
