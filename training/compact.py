"""Training states in 10 bytes per parameter in place of 16: a run goes on close to what it was, not bit for bit."""

import torch

MOMENTS = ('exp_avg', 'exp_avg_sq')  # m and v of Adam
PACKED = torch.bfloat16  # float32's range, a significand of 8 bits: rounding changes a number by at most 2⁻⁸ of it


def compact(state):
    """A training state with Adam's moments and the moving average's difference from the weights as bfloat16.

    Everything else stays as it is: weights w, step counts, what other optimisers keep, random states, and buffers that
    are the same in both networks. After `expand`, of numbers that are 0 or at least 2⁻¹²⁶ (and below 3.38e38),

        |m′ − m| ≤ 2⁻⁸ |m|,   |v′ − v| ≤ 2⁻⁸ v and v′ ≥ 0,   |ema′ − ema| ≤ 2⁻⁸ |ema − w| + float32's own rounding,

    so that Adam's next step, m/√v, differs by less than 0.6 % in each weight.

    Args:
        state: From `training.progress.run_state`; it is not changed.

    Returns:
        The same tree with `ema_difference` in place of `ema`, which marks it as compact.
    """
    weights = state['net']
    differences = {name: (average - weights[name]).to(PACKED) if average.is_floating_point() else average
                   for name, average in state['ema'].items()}
    others = {key: value for key, value in state.items() if key != 'ema'}
    return {**others, 'ema_difference': differences, 'optimizer': _with_moments(state['optimizer'], PACKED)}


def is_compact(state):
    """Whether `compact` has made this state."""
    return 'ema_difference' in state


def expand(state):
    """From what `compact` gave, a state as `training.progress.run_state` makes it, within the bounds said there."""
    weights = state['net']
    averages = {name: weights[name] + value.to(weights[name].dtype) if value.is_floating_point() else value
                for name, value in state['ema_difference'].items()}
    others = {key: value for key, value in state.items() if key != 'ema_difference'}
    return {**others, 'ema': averages, 'optimizer': _with_moments(state['optimizer'], torch.float32)}


def _with_moments(optimizer, dtype):
    """The optimiser's state with its moments as `dtype`; the count of steps is float32 too, but no moment."""
    moments = {index: {name: value.to(dtype) if name in MOMENTS else value for name, value in entry.items()}
               for index, entry in optimizer['state'].items()}
    return {**optimizer, 'state': moments}
