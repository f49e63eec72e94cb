"""The parts of experiments.gpu_suite, which measures the kernels and whole decode steps on a real card."""
