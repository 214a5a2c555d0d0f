"""What the ranks must agree on after every step: whether to stop, and whether the numbers are still sound."""

import collections

import torch

from dnnlib import UserError
from torch_utils.distributed import Ballot


AGAIN = 'start again with a lower --lr, from the newest training state if there is one (the saved states are good)'


class Health:
    """Counts steps with a non-finite loss or gradients, and passes a stop request from any rank on to all.

    A step costs an all-reduce of two numbers. On a GPU they are read one step later, so that the host never
    waits for the step it has just launched.

    Args:
        max_nonfinite: Number of bad steps in a row that ends the run; 0 for no limit.
        count: Bad steps that the current tick has already had.

    Attributes:
        stopping: Whether any rank has asked to stop; becomes true at the same step on all ranks.
        streak: Bad steps in a row, up to the last one read.
        count: Bad steps of the current tick, up to the last one read.
    """

    def __init__(self, max_nonfinite=0, count=0):
        self.max_nonfinite, self.count = max_nonfinite, count
        self.stopping, self.streak = False, 0
        self._ballot, self._steps = Ballot(), collections.deque()

    def end_step(self, step, finite, stop):
        """Report this rank's part of a step. Call on all ranks.

        Args:
            step: Number of the step, for the message.
            finite: 0-d boolean tensors on the device; the step is sound if all are true.
            stop: Whether this rank asks to stop.

        Raises:
            UserError: `max_nonfinite` bad steps in a row.
        """
        sound = torch.stack(finite).all()
        self._ballot.cast(torch.stack([~sound, sound.new_full((), stop)]).to(torch.float32))
        self._steps.append(step)
        self._read(self._ballot.results())

    def settle(self):
        """Read what has not been read yet, so that the attributes include the last step."""
        self._read(self._ballot.results(wait=True))

    def _read(self, results):
        for bad, stop in results:
            step = self._steps.popleft()
            self.stopping |= stop > 0
            self.streak = self.streak + 1 if bad else 0
            self.count += bad > 0
            if self.streak == 1:
                self._first = step
            if self.max_nonfinite and self.streak >= self.max_nonfinite:
                raise UserError(f'the loss or its gradients were not finite in {self.streak} steps in a row, steps '
                                f'{self._first} to {step}; {AGAIN}, or allow more with --max-nonfinite')
