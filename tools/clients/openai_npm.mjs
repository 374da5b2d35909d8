// The openai package for Node: completions, chat, streams, errors. Run by tools/clients_check.py.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;

const whole = await client.completions.create({ model, prompt: "def main():", max_tokens: 8, temperature: 0 });
assert.equal(whole.usage.completion_tokens, 8);

let text = "";
let usage = null;
const stream = await client.completions.create({
  model, prompt: "def main():", max_tokens: 8, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const part of stream) {
  text += part.choices[0]?.text ?? "";
  usage = part.usage ?? usage;
}
assert.equal(text, whole.choices[0].text);
assert.equal(usage.completion_tokens, 8);

const messages = [{ role: "user", content: "hello" }];
const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 8, logprobs: true });
assert.equal(chat.choices[0].message.role, "assistant");
assert.equal(chat.choices[0].logprobs.content.length, chat.usage.completion_tokens);
const final = await client.chat.completions.stream({ model, messages, max_tokens: 8 }).finalChatCompletion();
assert.ok(["stop", "length"].includes(final.choices[0].finish_reason));

await assert.rejects(client.completions.create({ model: "no-such-model", prompt: "x" }), OpenAI.NotFoundError);
const controller = new AbortController();
const leaving = await client.completions.create(
  { model, prompt: "x", max_tokens: 2000, stream: true, ignore_eos: true }, { signal: controller.signal },
);
for await (const _ of leaving) {
  controller.abort();
  break;
}
console.log("completions, streams, chat, logprobs, usage, errors, a stream left early");
