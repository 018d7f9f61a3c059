"""vLLM for `scripts/bench serve`, in its own environment: a line of JSON asks for a batch, a line answers.

vllm_serve.py MODEL ADAPTER… [--quick]
"""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    model, *folders = sys.argv[1:]
    engine = LLM(
        model=model,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=16,
        max_loras=len(folders) + 1,  # vLLM 0.32 on a CPU gives the base's rows the last slot's adapter: leave it empty
        max_model_len=1024,
        max_num_seqs=128,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    adapters = [LoRARequest(Path(folder).name, index + 1, folder) for index, folder in enumerate(folders)]

    def run(prompts: list[list[int]], wanted: list[int | None], new: int) -> dict[str, float]:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=True)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        loras = [None if index is None else adapters[index] for index in wanted]
        began = time.process_time()
        outputs = engine.generate(given, params, lora_request=loras, use_tqdm=False)
        cpu_s = time.process_time() - began
        return {"cpu_s": cpu_s, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    for wanted in (None, 0):
        run([[1000 + index] * 64 for index in range(32)], [wanted] * 32, 16)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["prompts"], asked["adapters"], asked["new"])), flush=True)


if __name__ == "__main__":
    main()
