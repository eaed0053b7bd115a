// A request as a line for a shell and as a program, to be run as they stand. The key is named in them, never told.

import { key } from "../api.js";

const DEFAULTS = { n: 1, format: "webp", quality: 85, priority: "normal", strength: 1, control_scale: 0, cfg_normalization: 0, cfg_truncation: 1 };
const NOT_ASKED = ["preview", "deadline_s", "webhook", "template"]; // of the one task alone, or what it has become part of

const root = () => new URL(".", document.baseURI).href.replace(/\/$/, "");

/** Return what to submit for a task like this one, from a status' `request`: every value that is not what it would be anyhow. */
export function requestOf(resolved) {
  const empty = (value) => value === null || value === undefined || (typeof value === "object" && Object.keys(value).length === 0);
  const kept = Object.entries(resolved).filter(([name, value]) => !empty(value) && !NOT_ASKED.includes(name) && DEFAULTS[name] !== value);
  return Object.fromEntries(kept);
}

/** Return a bash command that submits the request. */
export function asCurl(request) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = [
    `curl -sS ${quoted(`${root()}/api/submit`)}`,
    ...(key.get() ? ['-H "Authorization: Bearer $ZFLEET_API_KEY"'] : []),
    "-H 'Content-Type: application/json'",
    `-d ${quoted(JSON.stringify(request))}`,
  ];
  return parts.join(" \\\n  ");
}

/** Return a Python program that submits the request, waits, and saves the pictures here. */
export function asPython(request) {
  const given = Object.entries(request).map(([name, value]) => `        ${name}=${literal(value)},\n`);
  const auth = key.get() ? ', api_key=os.environ["ZFLEET_API_KEY"]' : "";
  return `${key.get() ? "import os\n" : ""}from pathlib import Path

from zfleet.client import Client

with Client(${literal(root())}${auth}) as fleet:
    done = fleet.generate(
${given.join("")}    )
    for index, (image, data) in enumerate(zip(done.view.images, done.images)):
        path = Path(f"{done.view.task_id}-{index}.{image.format}")
        path.write_bytes(data)
        print(path)
`;
}

/** Return a value of JSON as Python writes it; its strings are Python's as they are. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, one]) => `${literal(name)}: ${literal(one)}`).join(", ")}}`;
  return JSON.stringify(value);
}
