"""Purification: networks that put an image back among the clean ones before it is classified."""

from saddlepoint.defenses.purification.autoencoder import CIFAR, MNIST, MNIST_DETECTOR, Autoencoder, train_autoencoder
from saddlepoint.defenses.purification.denoiser import Denoiser, Guide, adversarial_pairs, guided_loss, train_denoiser
from saddlepoint.defenses.purification.pixelcnn import PixelCNN, PixelDefend, p_values, train_pixelcnn
from saddlepoint.defenses.purification.purifier import Purifier
from saddlepoint.defenses.purification.unet import UNet

__all__ = [
    "CIFAR", "MNIST", "MNIST_DETECTOR", "Autoencoder", "Denoiser", "Guide", "PixelCNN", "PixelDefend", "Purifier", "UNet",
    "adversarial_pairs", "guided_loss", "p_values", "train_autoencoder", "train_denoiser", "train_pixelcnn",
]  # fmt: skip
