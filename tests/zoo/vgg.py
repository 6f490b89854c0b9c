"""VGG-11 with BatchNorm: convolutions *with* bias before every BatchNorm.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks", arXiv 1409.1556, table 1,
column A; the layout is torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn

from tests.zoo.common import init_convs

# channels relative to the first stage; None is a max-pool
COLUMN_A = (1, None, 2, None, 4, 4, None, 8, 8, None, 8, 8, None)


class VGG(nn.Module):
    """torchvision's VGG.

    Args:
        num_classes: size of the output.
        width: channels of the first stage.
        hidden: features of the two hidden linear layers.
        pool: side of the map that the classifier sees.
    """

    def __init__(
        self, num_classes: int = 1000, width: int = 64, hidden: int = 4096, pool: int = 7
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for factor in COLUMN_A:
            if factor is None:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            conv = nn.Conv2d(channels, factor * width, kernel_size=3, padding=1)
            channels = factor * width
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((pool, pool))
        self.classifier = nn.Sequential(
            nn.Linear(channels * pool * pool, hidden),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = x.view(x.size(0), -1)
        x = self.classifier(x)
        return x


def vgg11_bn(num_classes: int = 1000, width: int = 64, hidden: int = 4096, pool: int = 7) -> VGG:
    """VGG-11 with BatchNorm: 132,868,840 parameters at the defaults."""
    return VGG(num_classes, width, hidden, pool)
