"""Scores during training: every few ticks, from a few images, written to stats.jsonl and metrics.jsonl.

The images are drawn from the EMA network with seeds 0, 1, 2, …, each with its own generator. Training's random state
is not touched, so a run's weights do not depend on whether it is scored.
"""

import dataclasses
import os

from torch_utils import distributed as dist
from training.generation import BATCH, default_batch
from training.metrics import check_images, label, parse_metrics
from training.provenance import log_scores, sampling_facts, training_facts
from training.run_files import REF_NAME, SCORES_NAME
from training.scoring import ImageFiles, NetworkImages, load_scorer, open_detector, write_reference


@dataclasses.dataclass
class Evaluator:
    """Scores the EMA network every few ticks.

    Attributes:
        run_dir: Folder of metrics.jsonl.
        system: The System being trained.
        dataset_name: Name of the training data, for metrics.jsonl.
        ticks: Interval in ticks; the last tick is always scored.
        num: Number of images: far fewer than a published score's 50,000, so the scores' names in stats.jsonl state it.
        scorer: `training.scoring.Scorer`.
        sample_options: Options of the sampler.
        loss: Options of the loss (System.changed_loss), for metrics.jsonl.
    """

    run_dir: str
    system: object
    dataset_name: str
    ticks: int
    num: int
    scorer: object
    sample_options: dict
    loss: dict

    def __call__(self, net, tick, nimg, done):
        """Scores of `net` at the end of a tick, {'Metrics/FID-1000': value}, on rank 0; {} elsewhere or if not due."""
        if not (done or (tick > 0 and tick % self.ticks == 0)):
            return {}
        sampler = self.system.make_sampler(net, self.sample_options)
        source = NetworkImages(net, sampler, range(self.num), must_be_finite=False)
        values, facts = self.scorer(source, default_batch(net), progress=False)
        named = {label(name, self.scorer.detector): value for name, value in values.items()}
        if dist.get_rank() == 0:
            facts.update(training_facts(net, self.system, self.dataset_name, self.loss), kimg=nimg / 1000, network=None,
                         **sampling_facts(net, self.system, self.sample_options, sampler), **source.record)
            log_scores(os.path.join(self.run_dir, SCORES_NAME), values, self.scorer.detector, facts)
            shown = (f'{name} {value:.5g}' for name, value in named.items())
            print('  '.join([f'scores of {self.num} images:', *shown]))
        dist.barrier()  # the others wait for rank 0 here, where the watchdog does not count it as a hang
        return {f'Metrics/{name}-{self.num}': value for name, value in named.items()}


def no_evaluation(net, tick, nimg, done):
    """Takes the place of an `Evaluator` in a run without scores."""
    return {}


def make_evaluator(run_dir, system, dataset, sample_options=None, loss=None, ticks=0, num=1000, ref=None,
                   detector='inception', metrics='fid'):
    """An `Evaluator`, or `no_evaluation` for ticks 0. Call on all ranks.

    Args:
        dataset: The training data; without `ref`, its statistics (of unmirrored images) are the reference,
            and are kept as RUN_DIR/eval-ref.npz.
        sample_options: Options of the system's sampler.
        loss: Options of the loss (System.changed_loss), for the record.
        ticks, num, ref, detector, metrics: As train.py's --eval flags.

    Raises:
        UserError: what `fid.py calc` would refuse, before the training starts.
    """
    if not ticks:
        return no_evaluation
    names = parse_metrics(metrics)
    detector = open_detector(detector)
    images = ImageFiles(dataset.unmirrored(), dataset.path)
    check_images(names, num, detector, '--eval-')
    if ref is None:
        ref = os.path.join(run_dir, REF_NAME)
        dist.print0(f'Reference statistics of {dataset.path} for --eval...')
        write_reference(ref, images, detector, names, BATCH, progress=False)
    scorer = load_scorer(names, detector, ref)
    scorer.warn_of_size(images)
    return Evaluator(run_dir, system, dataset.name, ticks, num, scorer, sample_options or {}, loss or {})
