// The AI SDK: two turns with a tool, by its OpenAI provider (responses, chats) and the compatible one. Run by
// tools/clients_check.py.
import assert from "node:assert/strict";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";

const baseURL = `${process.env.BASE_URL}/v1`;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "medha", baseURL, apiKey: "none" });
const weather = tool({
  description: "Weather of a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `rain in ${city}`,
});

for (const model of [openai("scripted"), openai.chat("scripted"), compatible("scripted")]) {
  const common = { model, tools: { weather }, stopWhen: stepCountIs(4), maxRetries: 0 };
  const messages = [{ role: "user", content: "How is the weather?" }];
  const first = await generateText({ ...common, messages });
  assert.equal(first.text, "Done.");
  assert.equal(first.steps[0].toolResults[0].output, "rain in Oslo");
  const history = [...messages, ...first.response.messages, { role: "user", content: "And now?" }];
  const second = await generateText({ ...common, messages: history });
  assert.equal(second.text, "Done.");
  const streamed = streamText({ ...common, messages: history });
  assert.equal(await streamed.text, "Done.");
  assert.equal((await streamed.steps).length, 2);
}
console.log("two turns with a tool, whole and streamed, by three providers");
