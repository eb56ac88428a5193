"""LeNet-5, AlexNet, ZFNet and GoogLeNet: importing this package registers them with timm."""

from tlscale.models.classic import networks as networks
