"""The other side of `make bench`: transformers and llama.cpp, each in a worker process of its own Python environment.

Only `client` and `prompts` are for the benchmark itself. The workers run under a Python 3.11 environment with torch, transformers,
gguf and llama-cpp-python (requirements.txt), named by the environment variable KVJAX_PEERS_PYTHON.
"""
