"""Running a workload: metrics of requests, and whole-batch (offline) measurement."""
