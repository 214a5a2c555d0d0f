"""The files of a run folder, by name.

    training_options.json              the run's options: the keywords of `training_loop`
    log.txt                            everything it printed
    stats.jsonl                        one line per tick: losses, timing, memory
    metrics.jsonl                      one line per score of its networks, from --eval or fid.py
    eval-ref.npz                       --eval's reference statistics, unless it is given some
    network-snapshot-KIMG.safetensors  the EMA network after KIMG thousand images; .pkl if EDM wrote it
    training-state-KIMG.pt             what --resume continues from

There are also pictures of training and generated images (`training_loop`), which no code reads.
"""

import os
import pathlib
import re

from dnnlib import UserError

OPTIONS_NAME = 'training_options.json'
LOG_NAME = 'log.txt'
STATS_NAME = 'stats.jsonl'
SCORES_NAME = 'metrics.jsonl'
REF_NAME = 'eval-ref.npz'
STATE, SNAPSHOT = 'training-state', 'network-snapshot'  # the kinds of files that are numbered by KIMG
ENDINGS = {STATE: 'pt', SNAPSHOT: 'safetensors'}
KIMG = r'\d{6,12}'


def saved_path(run_dir, kind, nimg):
    """RUN_DIR/KIND-KIMG.ENDING."""
    return os.path.join(run_dir, f'{kind}-{nimg // 1000:06d}.{ENDINGS[kind]}')


def saved_files(run_dir, kind):
    """The run folder's files of one kind, newest (highest KIMG) first."""
    pattern = rf'{kind}-{KIMG}\.{ENDINGS[kind]}'
    return sorted((path for path in pathlib.Path(run_dir).glob(f'{kind}-*') if re.fullmatch(pattern, path.name)),
                  key=parse_kimg, reverse=True)


def parse_kimg(path):
    """The KIMG in 'network-snapshot-KIMG.safetensors' (or '.pkl') or 'training-state-KIMG.pt', as an int.

    Raises:
        UserError: the name has neither form.
    """
    name = os.path.basename(os.fspath(path))
    match = re.search(rf'(?:{SNAPSHOT}-({KIMG})\.(?:safetensors|pkl)|{STATE}-({KIMG})\.pt)$', name)
    if not match:
        raise UserError(f"{path} is not named like training-state-000123.pt or network-snapshot-000123.safetensors; "
                        'restore the name under which training saved it')
    return int(match[1] or match[2])
