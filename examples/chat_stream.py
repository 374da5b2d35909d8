"""A chat of two turns, printed as it is written: python examples/chat_stream.py CHECKPOINT"""

import sys

from megatron_medha import LLM, SamplingParams

messages = [{"role": "system", "content": "You are brief."}]
params = SamplingParams(max_tokens=64, session_id="example")  # turns of one session reuse one another's KV

with LLM(sys.argv[1]) as llm:
    for question in ("What is a queue?", "And a stack?"):
        messages.append({"role": "user", "content": question})
        print(f"> {question}")
        answer = ""
        for new in llm.stream(messages, params):
            print(new.text, end="", flush=True)
            answer += new.text
        print()
        messages.append({"role": "assistant", "content": answer})
