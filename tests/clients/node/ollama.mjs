// Drives a running daemon with the real npm library of Ollama and prints what it saw as JSON.
//
//     node ollama.mjs BASE_URL
//
// The daemon must have the sample model and the embedder `minilm`.

import { Ollama } from "ollama";

const SAMPLE = "smollm2:135m-instruct-q4_1";
const PROMPT = "Where is the Eiffel Tower?";
const options = { temperature: 0, num_predict: 24 };
const asked = { model: SAMPLE, messages: [{ role: "user", content: PROMPT }], options };

const client = new Ollama({ host: process.argv[2] });

/** What a call that must fail is answered with. */
async function refusal(promise) {
  try {
    return { succeeded: await promise };
  } catch (error) {
    return { status: error.status_code, message: error.message };
  }
}

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

/** A stream of a long answer that is left after three parts, or some that had come with them. */
async function aborted() {
  const format = { type: "array", items: { type: "integer" }, minItems: 500 };
  const stream = await client.chat({ ...asked, format, options: {}, stream: true });
  let parts = 0;
  try {
    for await (const _ of stream) if (++parts === 3) stream.abort();
  } catch (error) {
    return { parts, name: error.name };
  }
  return { parts };
}

const place = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
};

console.log(
  JSON.stringify({
    list: await client.list(),
    whole: await client.chat(asked),
    pieces: await all(await client.chat({ ...asked, stream: true })),
    generated: await client.generate({ model: SAMPLE, prompt: PROMPT, options }),
    schema: await client.chat({ ...asked, format: place }),
    running: await client.ps(),
    shown: await client.show({ model: SAMPLE }),
    embed: await client.embed({ model: "minilm", input: ["a cat", "a report"] }),
    embeddings: await client.embeddings({ model: "minilm", prompt: "a cat" }),
    pull: await all(await client.pull({ model: SAMPLE, stream: true })),
    copied: await client.copy({ source: SAMPLE, destination: "node-twin" }),
    removed: await client.delete({ model: "node-twin" }),
    version: await client.version(),
    missing: await refusal(client.chat({ ...asked, model: "nobody" })),
    wrong: await refusal(client.chat({ ...asked, options: { temperature: 9 } })),
    create: await refusal(client.create({ model: "mine", from: SAMPLE })),
    aborted: await aborted(),
  }),
);
