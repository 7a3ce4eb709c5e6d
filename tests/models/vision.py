"""A tiny MobileNetV2 of transformers' own, and images that it can tell apart."""

import torch
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification


def mobilenet(labels=4, size=32, channels=3):
    """Random weights: 16 inverted residuals of 8 to 32 channels."""
    config = MobileNetV2Config(
        depth_multiplier=0.1,
        image_size=size,
        num_channels=channels,
        num_labels=labels,
        classifier_dropout_prob=0.0,
        initializer_range=0.25,
    )
    return MobileNetV2ForImageClassification(config).eval()


def squares(count, seed, size=32):
    """Noise with a bright quarter: which one is the label. uint8 [count, 3, size, size], int64 [count]"""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 4, (count,), generator=draw)
    for image, label in zip(images, labels.tolist()):
        half = size // 2
        image[:, half * (label // 2) :, half * (label % 2) :][:, :half, :half] += 100
    return images, labels
