// Drives a running daemon with the real npm library of OpenAI and prints what it saw as JSON.
//
//     node openai.mjs BASE_URL
//
// The daemon must have the sample model and the embedder `minilm`.

import OpenAI from "openai";

const SAMPLE = "smollm2:135m-instruct-q4_1";
const EIFFEL = [{ role: "user", content: "Where is the Eiffel Tower?" }];
const GREEDY = { model: SAMPLE, messages: EIFFEL, temperature: 0, max_tokens: 32 };
const QUESTION = [{ role: "user", content: "What is the weather in Paris?" }];
const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
const WEATHER = { type: "function", function: { name: "weather", parameters: PARAMETERS } };

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });

/** What a call that must fail is answered with. */
async function refusal(promise) {
  try {
    return { succeeded: await promise };
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    const { status, code, param, message } = error;
    return { kind: error.constructor.name, status, code, param, message };
  }
}

async function streamed(body) {
  let text = "";
  let last;
  for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
    text += chunk.choices[0]?.delta.content ?? "";
    last = chunk;
  }
  return { text, last };
}

/** A conversation in which the library itself calls the tool and sends its result. */
async function toolRun() {
  const asked = [];
  const tool = {
    type: "function",
    function: {
      ...WEATHER.function,
      description: "Tells the weather of a city",
      parse: JSON.parse,
      function: (given) => {
        asked.push(given);
        return "17 degrees, sunny";
      },
    },
  };
  const runner = client.chat.completions.runTools({
    model: SAMPLE,
    messages: QUESTION,
    tools: [tool],
    tool_choice: { type: "function", function: { name: "weather" } },
    temperature: 0,
    max_tokens: 48,
  });
  await runner.done();
  return { asked, roles: runner.messages.map((message) => message.role) };
}

async function brokenOff() {
  const body = { ...GREEDY, max_tokens: 3000, ignore_eos: true, stream: true };
  const stream = await client.chat.completions.create(body);
  for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
  return stream.controller.signal.aborted;
}

/** What the Responses API says, whole and in pieces. */
async function responses() {
  const asked = { model: SAMPLE, input: EIFFEL, temperature: 0, max_output_tokens: 32 };
  const whole = await client.responses.create(asked);
  const kinds = [];
  let pieces = "";
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    kinds.push(event.type);
    if (event.type === "response.output_text.delta") pieces += event.delta;
  }
  return { text: whole.output_text, status: whole.status, pieces, kinds };
}

const vector = async (body) => (await client.embeddings.create({ model: "minilm", ...body })).data;

const seen = {
  models: (await client.models.list()).data.map((model) => model.id),
  model: await client.models.retrieve(SAMPLE),
  whole: await client.chat.completions.create(GREEDY),
  streamed: await streamed(GREEDY),
  counted: await streamed({ ...GREEDY, stream_options: { include_usage: true } }),
  helper: await client.chat.completions.stream(GREEDY).finalContent(),
  call: await client.chat.completions.create({
    model: SAMPLE,
    messages: QUESTION,
    tools: [WEATHER],
    tool_choice: "required",
    temperature: 0,
  }),
  toolRun: await toolRun(),
  parsed: (
    await client.chat.completions.parse({
      model: SAMPLE,
      messages: QUESTION,
      response_format: { type: "json_schema", json_schema: { name: "place", schema: PARAMETERS } },
      max_tokens: 64,
      seed: 1,
    })
  ).choices[0].message.content,
  completed: await client.completions.create({ model: SAMPLE, prompt: "One, two,", max_tokens: 4 }),
  responses: await responses(),
  packed: await vector({ input: ["A cat.", "A dog."] }), // asks for base64 by itself
  numbers: await vector({ input: ["A cat.", "A dog."], encoding_format: "float" }),
  brokenOff: await brokenOff(),
  unknown: await refusal(client.chat.completions.create({ ...GREEDY, model: "nothing" })),
  refused: await refusal(client.chat.completions.create({ ...GREEDY, audio: { voice: "alloy" } })),
};

console.log(JSON.stringify(seen));
