"""What the paper's experiments cost at full size: FLOPs of a training step, and on a GPU images/s and hours.

    python tests/benchmarks/bench_presets.py --out=results/cost.json

Covers each preset and its EDM twin, with the options that `train.py --preset=NAME -n` prints. FLOPs are counted, not
measured, and need no GPU. Images/s are those of one GPU with an eighth of the batch, in bf16, compiled; hours are for
200 Mimg on eight such GPUs, without multi-GPU scaling losses. `python -m warm.study.page` shows the file. Rows in it of
presets that --only leaves out are kept, each with the commit that measured it. With --tiny, small networks are measured
instead, to try the script on a CPU.
"""

import contextlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import click
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.benchmarks.bench_train import Trainer, step_flops, write_zip  # noqa: E402
from tests.benchmarks.report import ROOT, Table, alternate_steps, compiled_whole, environment, select  # noqa: E402
from training.augment import AugmentPipe  # noqa: E402
from warm.presets import PRESETS  # noqa: E402
from warm.report.data import PAPER_GPUS, PAPER_KIMG  # noqa: E402
from warm.systems import SYSTEMS  # noqa: E402

FAST = dict(precision='bf16', compile=True, channels_last=True)


def options_of(preset, precond):
    """The training options that `train.py --preset=… --precond=… -n` prints, as a dict."""
    command = [sys.executable, str(ROOT / 'train.py'), f'--preset={preset}', f'--precond={precond}', '-n']
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return json.loads(out.split('Training options:\n', 1)[1].split('\n\n', 1)[0])


def network_of(config):
    """Arguments of the network for the training options `config`; the resolution is in the data set's name."""
    return dict(config['network_kwargs'], label_dim=10 if config['dataset_kwargs']['use_labels'] else 0,
                img_resolution=int(re.search(r'-(\d+)x\d+', config['dataset_kwargs']['path'])[1]),
                augment_dim=AugmentPipe(**config['augment_kwargs']).label_dim)


def speed(config, network_kwargs, batch, repeats, device, options):
    """Images/s of whole training steps on synthetic images, and whether all was compiled, as a dict."""
    with tempfile.TemporaryDirectory() as folder:
        data = f'{folder}/data.zip'
        write_zip(data, 4 * batch, network_kwargs['img_resolution'])
        trainer = Trainer(config['system'], options, network_kwargs, data, batch, device)
        with contextlib.closing(trainer.batches):
            seconds = alternate_steps({'step': trainer.step}, repeats, device)['step']
            return dict(images_per_second=batch / seconds, **compiled_whole(options))


def chosen_presets(only):
    """The paper's presets that --only selects: a preset's name selects that one, another word all that contain it."""
    names = [name for name in PRESETS if name != 'digits']
    select(names, only)  # refuses a word that no name contains
    words = [word.strip() for word in (only or '').split(',') if word.strip()]
    return [name for name in names
            if not words or any(word == name or word not in names and word in name for word in words)]


def former_rows(out, here, tiny):
    """The rows of an earlier report in `out`, or [].

    Args:
        out: Path of the report, or None.
        here: `environment` of this machine.
        tiny: Whether small networks are measured.

    Raises:
        click.ClickException: it was measured on a GPU, and this machine has no such GPU, or `tiny` is set.
    """
    if out is None or not pathlib.Path(out).is_file():
        return []
    content = json.loads(pathlib.Path(out).read_text())
    gpu = content['environment']['gpu']
    if any(row['hours'] is not None for row in content['rows']) and (tiny or here['gpu'] != gpu):
        raise click.ClickException(f'{out} has what was measured on {gpu}; choose another --out, or measure there')
    return [{'commit': content['environment']['commit'], **row} for row in content['rows']]


def merged(rows, former):
    """`rows` and those of `former` that none replaces, in the order of PRESETS, Warm before EDM.

    A row replaces that of the same preset and system, but one that failed replaces nothing.
    """
    def key(row):
        return row['preset'], row['system']
    old, new = ({key(row) for row in group} for group in (former, (row for row in rows if 'error' not in row)))
    together = [*(row for row in rows if key(row) in new or key(row) not in old),
                *(row for row in former if key(row) not in new)]
    return sorted(together, key=lambda row: (list(PRESETS).index(row['preset']), row['system'] != 'warm'))


@click.command(context_settings=dict(show_default=True, max_content_width=120))
@click.option('--only', metavar='LIST', default=None,
              help='Only these presets, or all whose name contains one of these words')
@click.option('--repeats', metavar='INT', type=int, default=5, help='Repeats per measurement (of 5 steps on CUDA)')
@click.option('--tiny', is_flag=True, help='Measure small networks, on the CPU too')
@click.option('--out', metavar='FILE.json', default=None, help='Also write the report here')
def main(only, repeats, tiny, out):
    """Count FLOPs and measure speed."""
    device, presets = 'cuda' if torch.cuda.is_available() else 'cpu', chosen_presets(only)
    here = environment(device)
    former = former_rows(out, here, tiny)
    torch.backends.cudnn.benchmark = True  # as train.py does
    table = Table('Cost of training at full size', dict(gpus=PAPER_GPUS, kimg=PAPER_KIMG, tiny=tiny), out, device,
                  arrange=lambda rows: merged(rows, former))
    for preset in presets:
        for precond in ('warm', 'edm'):
            config = options_of(preset, precond)
            network_kwargs = network_of(config)
            with torch.device('meta'):
                net = SYSTEMS[precond].network_class(img_channels=3, **network_kwargs)
            row = dict(preset=preset, system=precond, parameters=sum(p.numel() for p in net.parameters()),
                       gflop_an_image=step_flops(network_kwargs, precond) / 1e9, images_per_second=None, hours=None,
                       commit=here['commit'])

            def measure(_):
                if tiny:  # no hours: they would be those of another network
                    small = {**network_kwargs, 'model_channels': 8, 'num_blocks': 1}
                    return [speed(config, small, 2, 1, device, dict(precision='bf16'))]
                if device != 'cuda':
                    return [{}]
                found = speed(config, network_kwargs, config['batch_size'] // PAPER_GPUS, repeats, device, FAST)
                rate = found['images_per_second']
                return [dict(found, hours=1000 * PAPER_KIMG / (PAPER_GPUS * rate) / 3600)]
            table.attempt([row], measure)
    table.finish()


if __name__ == '__main__':
    main()
