"""All networks under EDM's module name: training.networks.SongUNet, .EDMPrecond and so on."""

from training.architecture import Network
from training.layers import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock
from training.precond import EDMPrecond, Precond, VEPrecond, VPPrecond, iDDPMPrecond
from training.unet import MODELS, DhariwalUNet, SongUNet

__all__ = ['Conv2d', 'DhariwalUNet', 'EDMPrecond', 'FourierEmbedding', 'GroupNorm', 'Linear', 'MODELS', 'Network',
           'PositionalEmbedding', 'Precond', 'SongUNet', 'UNetBlock', 'VEPrecond', 'VPPrecond', 'iDDPMPrecond']
