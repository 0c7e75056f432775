// Scores texts or token ids with ppod's reward service. Nothing of ppod but its .proto files is used.
//
//   node score.mjs --target 127.0.0.1:50051 "a text" "another text"
//   node score.mjs --target 127.0.0.1:50051 --tokens "[[1, 2, 3], [4]]"
//
// PPOD_TOKEN is the team's token, where the service asks for one; --ca FILE makes the connection TLS.
// Prints one JSON object. On an error: the typed error as JSON on stderr, and 1 as the exit code.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const HERE = dirname(fileURLToPath(import.meta.url));
const MAX_ATTEMPTS = 4;
const REPEATABLE = new Set(["UNAVAILABLE", "RESOURCE_EXHAUSTED"]);

const { values: options, positionals: texts } = parseArgs({
  allowPositionals: true,
  options: {
    target: { type: "string", default: "127.0.0.1:50051" },
    protos: { type: "string", default: join(HERE, "..", "..") },
    model: { type: "string", default: "" },
    tokens: { type: "string" },
    ca: { type: "string" },
    "timeout-s": { type: "string", default: "30" },
  },
});

const definition = protoLoader.loadSync(["ppod/v1/reward.proto", "error_details.proto"], {
  includeDirs: [options.protos, HERE],
  keepCase: true,
  // A 64-bit integer, such as a weight version, does not fit a JavaScript number.
  longs: String,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { ppod } = grpc.loadPackageDefinition(definition);

/** Packs arrays of token ids: int32, little-endian, one sequence after the other. */
function packSequences(sequences) {
  const bytes = Buffer.alloc(4 * sequences.reduce((total, ids) => total + ids.length, 0));
  let offset = 0;
  for (const ids of sequences) for (const id of ids) offset = bytes.writeInt32LE(id, offset);
  return { token_ids: bytes, lengths: sequences.map((ids) => ids.length) };
}

/** Reads float32 values, little-endian; refuses another number of them than expected, and any that is not finite. */
function unpackFloats(bytes, count, field) {
  if (bytes.length !== 4 * count) throw new Error(`${field}: found ${bytes.length} bytes, expected ${4 * count}`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const values = Array.from({ length: count }, (_, index) => view.getFloat32(4 * index, true));
  const bad = values.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) throw new Error(`${field}: value ${bad} is ${values[bad]}`);
  return values;
}

/** The typed error in the status details, as its fields; see "Errors" in protos/README.md. */
function typedError(error) {
  const typed = { code: grpc.status[error.code], message: error.details };
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!packed) return typed;
  const decode = (name, bytes) => definition[name].deserialize(bytes);
  for (const { type_url: type, value } of decode("google.rpc.Status", packed).details) {
    if (type.endsWith("/google.rpc.ErrorInfo")) {
      const { reason, metadata } = decode("google.rpc.ErrorInfo", value);
      Object.assign(typed, { reason, ...metadata });
    } else if (type.endsWith("/google.rpc.RetryInfo")) {
      const { seconds, nanos } = decode("google.rpc.RetryInfo", value).retry_delay;
      typed.retry_after_s = Number(seconds) + nanos / 1e9;
    }
  }
  return typed;
}

/** One RPC: the reply, or the error of grpc-js. */
function call(client, request, metadata, deadline) {
  return new Promise((resolve, reject) => {
    client.Score(request, metadata, { deadline }, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
}

/** Repeats with full jitter what the service allows to be repeated, never sooner than it says, within the deadline. */
async function score(client, request, metadata, deadline) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await call(client, request, metadata, deadline);
    } catch (error) {
      if (error.code === undefined) throw error;
      const typed = typedError(error);
      const endless = typed.code === "RESOURCE_EXHAUSTED" && !(typed.retry_after_s > 0);
      const waitMs = 1000 * (typed.retry_after_s ?? 0) + Math.random() * 100 * 2 ** (attempt - 1);
      const late = Date.now() + waitMs >= deadline.getTime();
      if (!REPEATABLE.has(typed.code) || endless || late || attempt === MAX_ATTEMPTS) {
        throw Object.assign(new Error(typed.message), { typed });
      }
      await sleep(waitMs);
    }
  }
}

async function main() {
  const sequences = options.tokens === undefined ? undefined : JSON.parse(options.tokens);
  const count = sequences?.length ?? texts.length;
  const credentials = options.ca ? grpc.credentials.createSsl(readFileSync(options.ca)) : grpc.credentials.createInsecure();
  const metadata = new grpc.Metadata();
  if (process.env.PPOD_TOKEN) metadata.set("authorization", `Bearer ${process.env.PPOD_TOKEN}`);
  const client = new ppod.v1.RewardService(options.target, credentials, {
    // Replicas behind one name share the calls.
    "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
  });
  try {
    const request = {
      request_id: randomUUID(),
      selector: { model: options.model },
      truncation: "TRUNCATION_SIDE_RIGHT",
      ...(sequences ? { tokens: packSequences(sequences) } : { texts: { texts } }),
    };
    const deadline = new Date(Date.now() + 1000 * Number(options["timeout-s"]));
    const reply = await score(client, request, metadata, deadline);
    const truncated = reply.truncated_tokens.length ? reply.truncated_tokens : Array(count).fill(0);
    console.log(
      JSON.stringify({
        model: reply.model.model,
        weight_version: reply.model.weight_version,
        scores: unpackFloats(reply.scores, count, "scores"),
        truncated_tokens: truncated,
      }),
    );
  } catch (error) {
    console.error(JSON.stringify(error.typed ?? { message: error.message }));
    process.exitCode = 1;
  } finally {
    client.close();
  }
}

await main();
