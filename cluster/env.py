"""Every environment variable that Luthier itself reads, named once.

The store's credentials and endpoint are the standard AWS variables, read by boto3; Ray's own
variables are read by Ray. What stands here is only what our code looks up by name.
"""

RAY_ADDRESS = "RAY_ADDRESS"
"""The Ray cluster to join. `ray job submit` sets it for the driver."""

RAY_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What a submitted job was submitted with, its metadata among it; Ray sets it for the driver."""

RAY_AUTH_MODE = "RAY_AUTH_MODE"
RAY_AUTH_TOKEN = "RAY_AUTH_TOKEN"
RAY_AUTH_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"

RAY_TRAIN_ENABLE_STATE_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"
"""Whether Ray's dashboard knows of training jobs; on in our drivers unless it is set."""

LUTHIER_CACHE = "LUTHIER_CACHE"
"""Folder on each node for downloaded models, data and adapters. Default: ~/.cache/luthier."""

LUTHIER_IMAGE = "LUTHIER_IMAGE"
"""The image, by digest, that a node was started from; a container cannot find out by itself."""

DS_ACCELERATOR = "DS_ACCELERATOR"
"""What DeepSpeed computes on; set for training workers."""

GLOO_SOCKET_IFNAME = "GLOO_SOCKET_IFNAME"
"""The interface that training workers on CPUs speak over. Default: the one of the address that Ray has of the node."""

TORCH_EXTENSIONS_DIR = "TORCH_EXTENSIONS_DIR"
"""Where torch keeps compiled operations; set for training workers that run in a virtual environment."""

LUTHIER_VLLM_PYTHON = "LUTHIER_VLLM_PYTHON"
"""The interpreter of vLLM's environment on each node. Default: .venv-vllm beside our packages."""
