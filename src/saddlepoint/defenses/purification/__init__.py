"""Purification: networks that put an image back among the clean ones before it is classified."""

from saddlepoint.defenses.purification.autoencoder import CIFAR, MNIST, MNIST_DETECTOR, Autoencoder, train_autoencoder
from saddlepoint.defenses.purification.purifier import Purifier

__all__ = ["CIFAR", "MNIST", "MNIST_DETECTOR", "Autoencoder", "Purifier", "train_autoencoder"]
