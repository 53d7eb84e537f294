"""The batch norms of three networks, in the order in which they occur: whole networks are what people run.

Nothing but shapes. ResNet-50: He et al., arXiv:1512.03385. MobileNet-v2: Sandler et al., arXiv:1801.04381. U-Net:
Ronneberger et al., arXiv:1505.04597, with one axis and padded convolutions, on windows of 4096 values.
"""


def resnet50():
    """(C, H, W) of 53 batch norms, for images of 224x224."""
    shapes, size = [(64, 112, 112)], 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            before, size = size, size // 2 if stage and block == 0 else size  # the second convolution strides
            shapes += [(width, before, before), (width, size, size), (4 * width, size, size)]
            shapes += [(4 * width, size, size)] if block == 0 else []  # of the projection beside the first block
    return shapes


def mobilenet_v2():
    """(C, H, W) of 52 batch norms, for images of 224x224."""
    shapes, channels, size = [(32, 112, 112)], 32, 112
    for factor, width, blocks, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            hidden = factor * channels
            shapes += [(hidden, size, size)] if factor > 1 else []
            size //= stride if block == 0 else 1
            shapes += [(hidden, size, size), (width, size, size)]
            channels = width
    return [*shapes, (1280, size, size)]


def unet_1d():
    """(C, L) of 18 batch norms: two a level on the way down, two on the way up."""
    down = [(64 << level, 4096 >> level) for level in range(5)]
    return [shape for shape in (*down, *down[-2::-1]) for _ in range(2)]


NETWORKS = {"ResNet-50": resnet50, "MobileNet-v2": mobilenet_v2, "U-Net-1d": unet_1d}


def batch_norms(network, n):
    """The shapes of a network's batch norms for batches of n."""
    return [(n, *shape) for shape in NETWORKS[network]()]
