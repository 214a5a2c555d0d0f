"""Training states in 10 bytes per parameter instead of 16: a run resumes closely, not bit for bit."""

import torch

MOMENTS = ('exp_avg', 'exp_avg_sq')  # Adam's m and v
PACKED = torch.bfloat16  # float32's range, an 8-bit significand: the relative rounding error is at most 2⁻⁸


def compact(state):
    """Convert a training state: Adam's moments and the difference of EMA and weights become bfloat16.

    Everything else stays as it is: weights w, step counts, what other optimisers keep, random states, and buffers that
    are the same in both networks. After `expand`, for magnitudes that are 0 or at least 2⁻¹²⁶ (and below 3.38e38),

        |m′ − m| ≤ 2⁻⁸ |m|,   |v′ − v| ≤ 2⁻⁸ v and v′ ≥ 0,   |ema′ − ema| ≤ 2⁻⁸ |ema − w| + float32's own rounding,

    so that Adam's next step, m/√v, differs by less than 0.6 % in each weight.

    Args:
        state: From `training.progress.run_state`; it is not changed.

    Returns:
        The same tree with `ema_difference` instead of `ema`, which marks it as compact.
    """
    weights = state['net']
    differences = {name: (average - weights[name]).to(PACKED) if average.is_floating_point() else average
                   for name, average in state['ema'].items()}
    others = {key: value for key, value in state.items() if key != 'ema'}
    return {**others, 'ema_difference': differences, 'optimizer': _with_moments(state['optimizer'], PACKED)}


def is_compact(state):
    """Whether this state was made by `compact`."""
    return 'ema_difference' in state


def expand(state):
    """Convert a compact state back to that of `training.progress.run_state`, within the bounds given in `compact`."""
    weights = state['net']
    averages = {name: weights[name] + value.to(weights[name].dtype) if value.is_floating_point() else value
                for name, value in state['ema_difference'].items()}
    others = {key: value for key, value in state.items() if key != 'ema_difference'}
    return {**others, 'ema': averages, 'optimizer': _with_moments(state['optimizer'], torch.float32)}


def _with_moments(optimizer, dtype):
    """The optimiser's state with its moments as `dtype`; the step count, also float32, is not a moment and stays."""
    moments = {index: {name: value.to(dtype) if name in MOMENTS else value for name, value in entry.items()}
               for index, entry in optimizer['state'].items()}
    return {**optimizer, 'state': moments}
