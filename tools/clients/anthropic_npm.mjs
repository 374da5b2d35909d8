// The anthropic package for Node: messages, streams, tools, token counts, errors. Run by tools/clients_check.py.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "How is the weather?" }];
const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const common = { model: "scripted", max_tokens: 200, tools: [{ name: "weather", input_schema: schema }] };

const first = await client.messages.create({ ...common, messages });
assert.equal(first.stop_reason, "tool_use");
const call = first.content.at(-1);
assert.deepEqual(call.input, { city: "Oslo" });
const history = [
  ...messages, { role: "assistant", content: first.content },
  { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "rain" }] },
];
const final = await client.messages.stream({ ...common, messages: history }).finalMessage();
assert.equal(final.content[0].text, "Done.");
const streamed = await client.messages.stream({ ...common, messages }).finalMessage();
assert.deepEqual(streamed.content.at(-1).input, { city: "Oslo" });
const counted = await client.messages.countTokens({ model: "scripted", messages: history, tools: common.tools });
assert.equal(counted.input_tokens, final.usage.input_tokens);
await assert.rejects(client.messages.create({ ...common, model: "claude-unknown", messages }), Anthropic.NotFoundError);
console.log("messages and streams with a tool, token counts, errors");
