"""Small convolutional nets: a ResNet with BatchNorm or GroupNorm, and ConvNeXt's depthwise block.

A Conv2d's fan_in is its channels (of one group) times its kernel: with a constant number of groups it grows with
width, depthwise it doesn't, so depthwise filters are vectors. Width is the number of channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
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
    wrong_decay,
)


class BasicBlock(nn.Module):
    """ResNet's block; its second convolution has 4 groups."""

    def __init__(self, channels: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=4, bias=False)
        if norm is nn.BatchNorm2d:
            self.bn1, self.bn2 = norm(channels), norm(channels)
        else:
            self.bn1, self.bn2 = norm(4, channels), norm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ConvNeXtBlock(nn.Module):
    """Depthwise, norm, MLP by Linears with channels last, a layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        h = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(h)))).permute(0, 3, 1, 2)


class Net(nn.Module):
    """A stem, two blocks with a strided convolution between them, a mean and a classifier."""

    def __init__(self, channels: int, blocks: list[nn.Module], input_mult: float, output_mult: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.block1, self.block2 = blocks
        self.downsample = nn.Conv2d(channels, channels, 2, stride=2)
        self.fc = nn.Linear(channels, 10)
        self.input_mult, self.output_mult = input_mult, output_mult

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.block1(self.stem(x) * self.input_mult)
        x = self.block2(self.downsample(x))
        return self.fc(x.mean((2, 3)) * self.output_mult)


ROLES = {
    "stem.weight": Role("input", 0.2),
    "stem.bias": Role("input", start="zeros"),
    "fc.weight": Role("output"),
    "*.bn?.weight": gain(),
    "*.norm.weight": gain(),
    "*.dwconv.weight": Role("vector", 0.3),
    "*.gamma": Role("vector", start="keep"),
    "*.conv1.weight": Role("hidden", 0.06),
    "*.conv2.weight": Role("hidden", 0.12),
    "downsample.weight": Role("hidden", 0.08),
    "*.pwconv?.weight": Role("hidden"),
    "fc.bias": Role("fixed", start="zeros"),
    "*.bias": bias(),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a net whose blocks are the form's second word."""
    m, kind = width / 64, form.split()[1]
    if kind == "convnext":
        blocks = [ConvNeXtBlock(width) for _ in range(2)]
    else:
        blocks = [BasicBlock(width, nn.BatchNorm2d if kind == "batchnorm" else nn.GroupNorm) for _ in range(2)]
    grows = m**0.5 if code == "stem" else 1.0
    return Net(width, blocks, abc(form, "input", m)[0] * grows, output_mult(form, m, code))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Return images and classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return the classes' cross-entropy."""
    return F.cross_entropy(model(pair[0]), pair[1])


FAULTS = (
    vector_lr("stem.weight", "stem.weight", by=BOTH),
    hidden_lr("downsample.weight", tensor="downsample"),
    hidden_init("downsample.weight", "downsample"),
    wrong_decay("stem.weight", "stem"),
    coded("stem is multiplied by sqrt(m)", "stem", "stem", BOTH),
    *readout("fc", "fc.weight"),
)
RESNET = (
    *FAULTS,
    hidden_lr("*.conv?.weight", tensor="conv"),
    hidden_lr("block2.conv2.weight", tensor="block2.conv2", power=-1.0),
    vector_lr("block1.bn1.weight", "block1.bn1.weight"),
    forgotten("block2.bn2.bias", "block2.bn2.bias"),
)
CONVNEXT = (
    *FAULTS,
    vector_lr("*.dwconv.weight", "dwconv.weight"),
    Fault("depthwise filters' sigma is divided by sqrt(m)", "dwconv", AUDIT, init={"*.dwconv.weight": -0.5}),
    hidden_lr("*.pwconv?.weight", tensor="pwconv"),
    vector_lr("*.gamma", "gamma"),
    forgotten("block1.dwconv.bias", "block1.dwconv.bias"),
)
FAMILIES = [
    *families("resnet", build, ROLES, loss, batch, ("table3 batchnorm", "table8 groupnorm"), RESNET, lr=2.0**-8),
    *families("convnext", build, ROLES, loss, batch, ("table3 convnext", "table9 convnext"), CONVNEXT),
]
