"""Many prompts at once: python examples/offline_batch.py CHECKPOINT"""

import sys

from megatron_medha import LLM, SamplingParams

prompts = ["def main():", "import os", "class Queue:", "for line in"]
params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, seed=1)

llm = LLM(sys.argv[1])
for output in llm.generate(prompts, params):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
