"""The whole study in one process: experiments share models, calibrations and compiled programs.

python -m experiments.study --quick
python -m experiments.study --full --output_dir=experiments/results/study_cpu
python -m experiments.study --quick --only=sparsity,retention
"""

from experiments.study import batch_size, context_length, model_size, request_mix, request_rate, retention, sparsity
from experiments.study.frame import main

EXPERIMENTS = tuple(
    module.EXPERIMENT for module in (request_rate, sparsity, context_length, batch_size, retention, request_mix, model_size)
)

if __name__ == "__main__":
    main(*EXPERIMENTS)
