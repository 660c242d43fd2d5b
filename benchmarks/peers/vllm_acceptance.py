"""How many drafts of an EAGLE-3 head vLLM accepts, greedily, one request at a time.

Runs as a script in vLLM's own virtual environment, so it imports nothing of this project: `python
vllm_acceptance.py MODEL HEAD CHAIN TOKENS CONTEXT`, where MODEL and HEAD are folders in the
published layouts. Reads JSON from stdin, lists of token ids. Writes JSON to the file descriptor
that was stdout: the number of drafts, accepted tokens by position, and the answers' token ids.
"""

from __future__ import annotations

import json
import os
import sys

from vllm import LLM, SamplingParams

DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"


def main(model: str, head: str, chain: int, tokens: int, context: int) -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints goes to stderr
    prompts: list[list[int]] = json.load(sys.stdin)
    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=context,
        max_num_seqs=1,
        enforce_eager=True,  # compiling takes longer than the answers
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={"method": "eagle3", "model": head, "num_speculative_tokens": chain},
    )
    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
    counts = {metric.name: metric for metric in llm.get_metrics()}
    found = {
        "num_drafts": counts[DRAFTS].value,
        "accepted": counts[ACCEPTED].values,
        "answers": [list(one.outputs[0].token_ids) for one in done],
    }
    json.dump(found, out)
    out.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
