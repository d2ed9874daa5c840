// Drives a running daemon with the real npm SDK of Pieces and prints what it saw as JSON.
//
//     node drive.mjs BASE_URL
//
// The daemon must know the sample model, not downloaded yet, and a hub that serves SOURCE and
// OTHER_SOURCE at some MiB/s, so that there is progress to see.

import pieces from "@pieces.app/pieces-os-client";
import WebSocket from "ws";

const SAMPLE = "smollm2:135m-instruct-q4_1";
const SOURCE = "hf:owner/repo/Tiny.Q4_K_M.gguf";
const OTHER_SOURCE = "hf:other/repo/Other.Q4_K_M.gguf";
const UNKNOWN_ID = "00000000-0000-4000-8000-000000000000";
const WAIT_MS = 60_000;

const baseUrl = process.argv[2];
const misread = []; // answers that the SDK reads as something else than was sent

const readers = [
  [/^\/models$/, pieces.ModelsFromJSON, pieces.ModelsToJSON],
  [/^\/models\/stream\/identifiers$/, pieces.StreamedIdentifiersFromJSON, pieces.StreamedIdentifiersToJSON],
  [/\/delete\/cache$/, pieces.ModelDeleteCacheOutputFromJSON, pieces.ModelDeleteCacheOutputToJSON],
  [/\/download\/progress$/, pieces.ModelDownloadProgressFromJSON, pieces.ModelDownloadProgressToJSON],
  [/^\/models?\//, pieces.ModelFromJSON, pieces.ModelToJSON],
];

/** JSON in one spelling: sorted keys, nothing undefined, and no `created`, whose form changes. */
function comparable(value) {
  if (Array.isArray(value)) return value.map(comparable);
  if (value === null || typeof value !== "object") return value;
  const kept = Object.keys(value).filter((key) => key !== "created" && value[key] != null);
  return Object.fromEntries(kept.sort().map((key) => [key, comparable(value[key])]));
}

function checkRead(path, text) {
  const [, fromJson, toJson] = readers.find(([pattern]) => pattern.test(path));
  const sent = JSON.parse(text);
  const read = fromJson(sent);
  const models = path === "/models" ? read.iterable : fromJson === pieces.ModelFromJSON ? [read] : [];
  for (const model of models) {
    if (!pieces.instanceOfModel(model)) misread.push({ path, why: "no Model", model });
    if (Number.isNaN(model.created.value.getTime())) misread.push({ path, why: "created", model });
    for (const [field, allowed] of [
      ["type", pieces.ModelTypeEnum],
      ["usage", pieces.ModelUsageEnum],
      ["provider", pieces.ExternalMLProviderEnum],
      ["foundation", pieces.ModelFoundationEnum],
    ]) {
      const value = model[field];
      if (value !== undefined && !Object.values(allowed).includes(value)) {
        misread.push({ path, why: field, value });
      }
    }
  }
  const [before, after] = [sent, toJson(read)].map((one) => JSON.stringify(comparable(one)));
  if (before !== after) misread.push({ path, why: "lost", sent: before, read: after });
}

const configuration = new pieces.Configuration({
  basePath: baseUrl,
  middleware: [
    {
      async post({ url, response }) {
        const type = response.headers.get("content-type") ?? "";
        if (response.ok && type.startsWith("application/json")) {
          checkRead(decodeURIComponent(new URL(url).pathname), await response.text());
        }
      },
    },
  ],
});
const modelApi = new pieces.ModelApi(configuration);
const modelsApi = new pieces.ModelsApi(configuration);
const wellKnownApi = new pieces.WellKnownApi(configuration);

/** What a call that must fail is answered with. */
async function refusal(promise) {
  try {
    return { succeeded: await promise };
  } catch (error) {
    if (!(error instanceof pieces.ResponseError)) throw error;
    const { response } = error;
    return {
      status: response.status,
      type: response.headers.get("content-type"),
      text: await response.text(),
    };
  }
}

function within(promise, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited too long for ${what}`)), WAIT_MS);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** A WebSocket whose frames can be waited for. */
class Socket {
  constructor(path) {
    this.frames = [];
    this.path = path;
    this.ws = new WebSocket(baseUrl.replace("http", "ws") + path, { origin: baseUrl });
    this.ws.on("message", (data) => {
      this.frames.push(String(data));
      this.wake?.();
    });
  }

  open() {
    const opened = new Promise((resolve, reject) => {
      this.ws.once("open", resolve);
      this.ws.once("error", reject);
      this.ws.once("unexpected-response", (_, response) =>
        reject(new Error(`the handshake was answered with ${response.statusCode}`)),
      );
    });
    return within(opened, `${this.path} to open`).then(() => this);
  }

  /** Wait until one of the frames fulfils the condition; return them all, parsed. */
  async until(condition) {
    for (;;) {
      const frames = this.frames.map((frame) => JSON.parse(frame));
      if (frames.some(condition)) return frames;
      await within(new Promise((resolve) => (this.wake = resolve)), this.path);
    }
  }

  close() {
    const closed = new Promise((resolve) => this.ws.once("close", resolve));
    this.ws.close();
    return within(closed, `${this.path} to close`);
  }
}

function watch(model) {
  return new Socket(`/model/${model}/download/progress`).open();
}

function seeded(fields) {
  return {
    version: "1",
    created: { value: new Date() },
    name: "A model from Node",
    cloud: false,
    type: pieces.ModelTypeEnum.Speed,
    usage: pieces.ModelUsageEnum.CodeConversation,
    ...fields,
  };
}

const isEnd = ({ status }) => !["INITIALIZED", "IN-PROGRESS"].includes(status);
const create = (fields) => modelsApi.modelsCreateNewModel({ seededModel: seeded(fields) });
const snapshot = (model) => modelApi.modelsSpecificModelSnapshot({ model });
const seen = {};

async function findTheDaemon() {
  seen.health = await wellKnownApi.getWellKnownHealth();
  seen.version = await wellKnownApi.getWellKnownVersion();
  seen.installationPath = await wellKnownApi.getInstallationPath();
  seen.streamHealth = await wellKnownApi.getWellKnownStreamHealth();
}

async function meetErrors() {
  const model = UNKNOWN_ID;
  seen.unknown = {
    snapshot: await refusal(snapshot(model)),
    download: await refusal(modelApi.modelSpecificModelDownload({ model })),
    cancel: await refusal(modelApi.modelSpecificModelDownloadCancel({ model })),
    progress: await refusal(modelApi.modelSpecificModelDownloadProgress({ model })),
    load: await refusal(modelApi.modelSpecificModelLoad({ model })),
    unload: await refusal(modelApi.modelSpecificModelUnload({ model })),
    scores: await refusal(modelApi.modelScoresIncrement({ model })),
    delete: await refusal(modelsApi.modelsDeleteSpecificModel({ model })),
    deleteCache: await refusal(modelsApi.modelsDeleteSpecificModelCache({ model })),
  };
  const sample = await snapshot(SAMPLE);
  seen.refused = {
    updateBuiltin: await refusal(modelApi.modelUpdate({ model: { ...sample, name: "Mine" } })),
    deleteBuiltin: await refusal(modelsApi.modelsDeleteSpecificModel({ model: sample.id })),
    loadBeforeDownload: await refusal(modelApi.modelSpecificModelLoad({ model: sample.id })),
  };
  const bare = await create({ unique: "from-nowhere" });
  seen.refused.downloadWithoutSource = await refusal(
    modelApi.modelSpecificModelDownload({ model: bare.id }),
  );
  await modelsApi.modelsDeleteSpecificModel({ model: bare.id });
}

async function createAndUpdate() {
  const model = await create({ unique: SOURCE, custom: false });
  const again = await create({ unique: SOURCE });
  seen.created = model;
  seen.createdAgain = again.id;
  seen.updated = await modelApi.modelUpdate({ model: { ...model, description: "Changed." } });
  seen.listed = (await modelsApi.modelsSnapshot()).iterable.map(({ unique }) => unique);
  return model.id;
}

async function download(model) {
  const socket = await watch(model);
  seen.started = await modelApi.modelSpecificModelDownload({ model });
  await socket.until(({ percentage }) => percentage > 0);
  seen.plainProgress = await modelApi.modelSpecificModelDownloadProgress({ model });
  seen.frames = await socket.until(isEnd);
  seen.downloaded = await snapshot(model);
  await socket.close();
}

async function cancel() {
  const { id: model } = await create({ unique: OTHER_SOURCE });
  const socket = await watch(model);
  await modelApi.modelSpecificModelDownload({ model });
  await socket.until(({ percentage }) => percentage > 0);
  seen.canceled = await modelApi.modelSpecificModelDownloadCancel({ model });
  seen.canceledFrames = await socket.until(isEnd);
  await socket.close();
}

async function loadAndUnload() {
  const socket = await watch(SAMPLE);
  await modelApi.modelSpecificModelDownload({ model: SAMPLE });
  await socket.until(isEnd);
  await socket.close();
  const { id: model } = await snapshot(SAMPLE);
  seen.loaded = await modelApi.modelSpecificModelLoad({ model });
  seen.unloaded = await modelApi.modelSpecificModelUnload({ model });
  await modelApi.modelSpecificModelLoad({ model });
  await modelsApi.unloadModels();
  seen.unloadedWithAll = await snapshot(model);
  await modelApi.modelScoresIncrement({ model, seededScoreIncrement: {} });
  seen.deletedCache = await modelsApi.modelsDeleteSpecificModelCache({
    model,
    modelDeleteCacheInput: {},
  });
  seen.afterDeletedCache = await snapshot(model);
}

async function deleteCustom(model) {
  const socket = await new Socket("/models/stream/identifiers").open();
  await socket.until(({ iterable }) => iterable.some((one) => one.model.id === model));
  await modelsApi.modelsDeleteSpecificModel({ model });
  await socket.until(({ iterable }) =>
    iterable.some((one) => one.model.id === model && one.deleted),
  );
  await socket.close();
  seen.afterDelete = await refusal(snapshot(model));
  seen.identifiers = (await modelsApi.modelsStreamIdentifiers()).iterable.length;
}

await findTheDaemon();
await meetErrors();
const custom = await createAndUpdate();
await download(custom);
await cancel();
await loadAndUnload();
await deleteCustom(custom);
console.log(JSON.stringify({ ...seen, misread }, null, 1));
