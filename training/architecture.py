"""The interface of the network F: the base class of all architectures."""

import torch
from torch.utils.checkpoint import checkpoint

from dnnlib import UserError
from training.layers import Conv2d


class Network(torch.nn.Module):
    """Base class of all architectures: F in training.precond.Precond.

    A new architecture is a subclass and two lines in training.unet: its class in MODELS, and what --arch stands for in
    ARCHITECTURES.

    A subclass takes, by keyword, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0 (widths of the
    labels, 0 for none), dropout (a probability, active in training only), and its own arguments, all of them plain
    JSON values with defaults. It must be constructible on the device 'meta', which has no memory. Its method

        forward(x, noise_labels, class_labels=None, augment_labels=None, extra_embedding=None)

    returns an image:

    - x: [B, in_channels, R, R], R = img_resolution; its dtype is the one to compute in, the weights are float32;
    - noise_labels: [B] or [1], the preconditioner's c_noise, float32 (as are the embeddings);
    - class_labels: [B or 1, label_dim], ignored if label_dim is 0; augment_labels: [B, augment_dim] or None;
    - extra_embedding: [B or 1, noise_channels] or None, added to the noise embedding: a hook for any further
      condition, such as Warm's blur;
    - result: [B, out_channels, R, R] in x's dtype. No image may depend on the others in its batch.

    Args:
        img_resolution, in_channels, out_channels: Size of the images, and channels in and out.
        noise_channels: Width of the noise embedding.

    Attributes: the arguments, and, with defaults that a subclass may keep:
        memory_format: Layout of the features, torch.channels_last or torch.contiguous_format (`set_memory_format`).
        recompute: Keep only the blocks' inputs and recompute the blocks in the backward pass, to save memory. A
            subclass that runs its blocks through `run_block` sets `can_recompute`.
        size_arguments: The arguments that train.py's --cbase and --cres set, {'cbase': argument, 'cres': argument},
            as far as the network has them.
        output_layers: Names of the submodules whose outputs make up the image: the first dimension of their parameters
            is out_channels. A network with more branches, or fewer, can start from its weights if they are named.
        small: Arguments for a network of at most a million parameters on 8×8 images, for the tests, which iterate
            over MODELS.
    """

    memory_format = torch.contiguous_format
    recompute = can_recompute = False
    size_arguments = {}
    output_layers = ()
    small = {}

    def __init__(self, img_resolution, in_channels, out_channels, noise_channels):
        super().__init__()
        self.img_resolution, self.in_channels, self.out_channels = img_resolution, in_channels, out_channels
        self.noise_channels = noise_channels

    def features_per_image(self):
        """How many numbers sampling keeps in memory per image; None if unknown, which keeps a GPU's batch small."""

    def set_memory_format(self, memory_format):
        """Use this layout for the features of all `Conv2d` from now on; parameters keep theirs."""
        self.memory_format = memory_format
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.memory_format = memory_format

    def check_recompute(self):
        """Raise UserError if `recompute` would have no effect."""
        if not self.can_recompute:
            raise UserError(f'{type(self).__name__} cannot recompute its features; '
                            'leave out --checkpoint-activations')

    def run_block(self, block, *inputs):
        """block(*inputs), checkpointed if `recompute` is set."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
