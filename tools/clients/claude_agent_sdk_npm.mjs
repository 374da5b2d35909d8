// The Claude Agent SDK for Node, with the Claude Code it brings: a turn with its shell. Run by tools/clients_check.py.
import assert from "node:assert/strict";
import { query } from "@anthropic-ai/claude-agent-sdk";

const names = ["ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL"];
const env = {
  PATH: process.env.PATH, HOME: process.env.HOME, ANTHROPIC_BASE_URL: process.env.BASE_URL,
  ANTHROPIC_AUTH_TOKEN: "none", CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
  ...Object.fromEntries(names.map((name) => [name, "scripted"])),
};
let session;
for (const prompt of ["Say medha.", "Once more."]) {
  let last;
  const options = { env, model: "scripted", allowedTools: ["Bash"], settingSources: [], resume: session };
  for await (const message of query({ prompt, options })) last = message;
  assert.deepEqual([last.type, last.is_error, last.result, last.num_turns], ["result", false, "Done.", 2]);
  session = last.session_id;
}
console.log("two turns with its shell");
