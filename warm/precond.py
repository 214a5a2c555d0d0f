"""Warm's preconditioned network: D denoises, R deblurs, x̂₀ = D + R (Sec. 2.2, 3.1)."""

import torch

from dnnlib import chosen
from training.layers import Init, Linear, PositionalEmbedding
from training.precond import SIGMA_DATA, Precond, edm_scalings, per_image
from warm.blur import BLUR_RATES, check_alpha
from warm.choices import BLUR_EMBEDDINGS, DEFAULTS, REST, checked_choices, log_blur
from warm.path import parse_family
from warm.targets import PAPER_TARGETS, TARGETS, Hot, Point


class WarmPrecond(Precond):
    """EDM's U-Net with a second conditioning input (blur) and one output per branch.

    D = c_skip·x + c_out·F_D with EDM's coefficients at σ = β; R = s_R(α)·F_R (warm.targets). The noise level
    is embedded through ln(β)/4 as in EDM, the blur through ln(α)/4: a positional embedding and a linear map
    without bias, added to the noise embedding; exactly zero for images with α = 0. A network whose only BNR
    is 0 is EDM's, tensor for tensor. Some of these choices, such as R's scale, have alternatives (warm.choices).

    Args:
        sigma_min, sigma_max: Supported noise levels β.
        sigma_data: Standard deviation of the data.
        bnr: What to train on: a number, a list '0,0.1,0.5' or a range '0.1-2' (None: the paper's 0.5).
        bnr_schedule: 'constant', or 'blurring[:SIGMA_B_MAX]', which replaces `bnr`.
        targets: What the branches estimate, a name in warm.targets.TARGETS (Table 5).
        blur: What kind of blur, a name in warm.blur.BLUR_RATES.
        rest_weight: Weight of R's term in the loss, > 0; recorded here, applied by warm.loss.
        rest_scale: Scale of R, a name in warm.choices.REST_SCALES.
        rest_loss: Weight of R's term at each noise level, a name in warm.choices.REST_LOSSES; like rest_weight.
        blur_embedding: How the blur is embedded, a name in warm.choices.BLUR_EMBEDDINGS; 'none' only for a single
            path, on which α follows from β.

    Attributes:
        family: The paths that the network is trained on (warm.path).
        parametrisation: The one of warm.targets in use.
        rates: The blur's (warm.blur).
        choices: Those of the last five arguments that are not the defaults; only these are in `init_kwargs`.

    Raises:
        UserError: an argument that is unknown, or that has no effect together with the others.
    """

    def __init__(self, *args, sigma_min=0, sigma_max=float('inf'), sigma_data=SIGMA_DATA, bnr=None, bnr_schedule=None,
                 targets=PAPER_TARGETS, blur=DEFAULTS['blur'], rest_weight=DEFAULTS['rest_weight'],
                 rest_scale=DEFAULTS['rest_scale'], rest_loss=DEFAULTS['rest_loss'],
                 blur_embedding=DEFAULTS['blur_embedding'], **network):
        family = parse_family(bnr, bnr_schedule)
        parametrisation = parametrisation_of(family, targets)
        choices = checked_choices(dict(blur=blur, rest_weight=rest_weight, rest_scale=rest_scale, rest_loss=rest_loss,
                                       blur_embedding=blur_embedding), family, targets, parametrisation.names)
        super().__init__(dict(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, **family.flags,
                              targets=targets, **choices),
                         sigma_min, sigma_max, len(parametrisation.names), *args, **network)
        self.family, self.parametrisation, self.choices = family, parametrisation, choices
        self.rest_weight, self.rest_scale, self.rest_loss = rest_weight, rest_scale, rest_loss
        self.rates = BLUR_RATES[blur]
        feature = BLUR_EMBEDDINGS[blur_embedding]
        self.map_blur = None if family.is_hot or feature is None else BlurEmbedding(self.model.noise_channels, feature)

    @classmethod
    def meaning(cls, kwargs):
        return {**kwargs, **parse_family(kwargs.get('bnr'), kwargs.get('bnr_schedule')).flags}

    def scalings(self, sigma):
        """EDM's coefficients at σ = β."""
        return edm_scalings(sigma, self.sigma_data)

    def point(self, x, sigma, alpha=None):
        """The warm.targets.Point given by the arguments of `forward`, checked as described there."""
        x, sigma = self.check_images(x), self.as_sigma(sigma, x)
        if alpha is None:
            alpha = self.family.default.alpha(sigma)
        check_alpha(alpha)
        alpha = per_image(torch.as_tensor(alpha, device=x.device), x, 'blur levels')
        return Point(x, sigma, alpha, *self.scalings(sigma), self.sigma_data, self.rest_scale, self.rates)

    def estimates(self, point, class_labels=None, force_fp32=False, **model_kwargs):
        """What the branches estimate at a Point: float32 tensors like x, one per branch."""
        if self.map_blur is not None:
            with self.products():
                model_kwargs['extra_embedding'] = self.map_blur(point.alpha.flatten().to(torch.float32))
        F = self.run_model(point.c_in * point.x, point.c_noise, class_labels, force_fp32, **model_kwargs)
        return self.parametrisation.estimates(F.split(self.img_channels, dim=1), point)

    def denoise_deblur(self, x, sigma, class_labels=None, alpha=None, force_fp32=False, **model_kwargs):
        """(D, R): the blurred image without noise (Eq. 5) and what the blur removed (Eq. 6); arguments as `forward`."""
        point = self.point(x, sigma, alpha)
        return self.parametrisation.parts(self.estimates(point, class_labels, force_fp32, **model_kwargs), point)

    def forward(self, x, sigma, class_labels=None, alpha=None, force_fp32=False, return_estimates=False,
                **model_kwargs):
        """The clean image x̂₀ = D + R.

        Args:
            x: Blurred and noisy images [B, C, N, N], x = V M_α Vᵀ x₀ + β ε.
            sigma: Noise level β > 0: a number, or one per image.
            class_labels: [B, label_dim], or None.
            alpha: Blur in pixels ≥ 0: a number, or one per image; None: that of the network's default path.
            force_fp32, model_kwargs: As in training.precond.Precond.
            return_estimates: Return instead a tuple of what the branches estimate, which a loss compares with
                `parametrisation.targets`. This is an option of `forward` since DDP wraps only that.

        Returns:
            float32, like x.

        Raises:
            UserError: images, noise levels or blur of the wrong number or shape; blur that is negative or not finite
                (the values of a tensor are not checked).
        """
        if return_estimates:
            return self.estimates(self.point(x, sigma, alpha), class_labels, force_fp32, **model_kwargs)
        D, R = self.denoise_deblur(x, sigma, class_labels, alpha, force_fp32, **model_kwargs)
        return D + R

    def transfer(self, source, source_kwargs=None):
        """As training.precond.Precond.transfer, from a Warm network or EDM's; the latter has no blur embedding.

        This network's then starts at zero, as does R (`taken_branches`). So it equals EDM's at BNR 0.
        """
        copied = super().transfer(source, source_kwargs)
        if self.map_blur is not None and 'map_blur.linear.weight' not in source:
            with torch.no_grad():
                self.map_blur.linear.weight.zero_()
        return copied

    def taken_branches(self, branches, source_kwargs):
        """The rest's from the rest's, or zeros; an image's from the branch of the same name, or else from the first."""
        theirs = {}  # EDM's only branch has no name here
        if 'targets' in source_kwargs:
            family = parse_family(source_kwargs.get('bnr'), source_kwargs.get('bnr_schedule'))
            theirs = dict(zip(parametrisation_of(family, source_kwargs['targets']).names, branches))
        zeros = torch.zeros_like(branches[0])
        return torch.cat([theirs.get(name, zeros if name == REST else branches[0])
                          for name in self.parametrisation.names])


def parametrisation_of(family, targets):
    """The warm.targets.Parametrisation of a network that is trained on these paths, with these --targets."""
    parametrisation = chosen('targets', targets, TARGETS)
    return Hot() if family.is_hot else parametrisation


class BlurEmbedding(torch.nn.Module):
    """Embedding [B, channels] of blur levels α [B] in pixels, through feature(α); zero at α = 0 (ours)."""

    def __init__(self, channels, feature=log_blur):
        super().__init__()
        self.feature = feature
        self.features = PositionalEmbedding(channels, endpoint=True, sin_first=True)
        self.linear = Linear(channels, channels, Init('xavier_uniform'), bias=False)

    def forward(self, alpha):
        return torch.where(alpha[:, None] > 0, self.linear(self.features(self.feature(alpha))), 0)
