"""Purification: networks that put an image back among the clean ones before it is classified."""

from saddlepoint.defenses.purification.autoencoder import CIFAR, MNIST, MNIST_DETECTOR, Autoencoder, train_autoencoder
from saddlepoint.defenses.purification.denoiser import Denoiser, Guide, adversarial_pairs, guided_loss, train_denoiser
from saddlepoint.defenses.purification.diffusion import Diffusion, DiffusionPurifier, train_diffusion
from saddlepoint.defenses.purification.gan import Critic, DefenseGAN, Generator, critic_loss, train_gan
from saddlepoint.defenses.purification.pixelcnn import PixelCNN, PixelDefend, p_values, train_pixelcnn
from saddlepoint.defenses.purification.purifier import Purifier
from saddlepoint.defenses.purification.quilting import Quilting
from saddlepoint.defenses.purification.unet import UNet

__all__ = [
    "CIFAR", "MNIST", "MNIST_DETECTOR", "Autoencoder", "Critic", "DefenseGAN", "Denoiser", "Diffusion", "DiffusionPurifier",
    "Generator", "Guide", "PixelCNN", "PixelDefend", "Purifier", "Quilting", "UNet", "adversarial_pairs", "critic_loss",
    "guided_loss", "p_values", "train_autoencoder", "train_denoiser", "train_diffusion", "train_gan", "train_pixelcnn",
]  # fmt: skip
